"""Choosing tokens and searching with a beam, on models small enough to try every sequence."""

import math

import pytest
import torch

from fasttx.models import _decoding
from fasttx.models._decoding import beam_search, generate, generating, next_tokens

VOCABULARY, STOP, PAD = 4, 3, 0


class Toy:
    """Logits that depend on every token of a row's history, and on the row by its first token."""

    def __init__(self, scale=3.0, bias=0.0):
        self.scale, self.bias = scale, bias
        self.history, self.given = None, []

    def step(self, tokens):
        self.given.append(tuple(tokens.shape))
        self.history = tokens if self.history is None else torch.cat((self.history, tokens), 1)
        return self.logits(self.history)

    def reorder(self, index):
        self.history = self.history[index]

    def logits(self, history):
        weights = 0.7 + 0.37 * torch.arange(history.shape[1], dtype=torch.float64)
        state = ((1 + history) * weights).sum(1, keepdim=True)
        logits = self.scale * torch.sin(state * torch.arange(1, 1 + VOCABULARY, dtype=torch.float64))
        logits[:, STOP] += self.bias
        return logits


def starts(rows=5):
    return torch.arange(10, 10 + rows)[:, None].repeat(1, 2)


def sequences(toy, start, length, stop, tokens=(), total=0.0):
    """Every sequence that can follow start (T,), with the sum of its log-probabilities."""
    if len(tokens) == length or tokens[-1:] in [(token,) for token in stop]:
        yield list(tokens), total
        return
    logits = toy.logits(torch.tensor([start.tolist() + list(tokens)]))
    for token, value in enumerate(logits.log_softmax(-1)[0].tolist()):
        yield from sequences(toy, start, length, stop, (*tokens, token), total + value)


def search_plainly(toy, start, beams, penalty, length, stop):
    """The beam search of one row in lists."""
    live, ended = [([], 0.0)], []
    for size in range(1, length + 1):
        candidates = []
        for tokens, total in live:
            history = torch.tensor([start.tolist() + tokens])
            for token, value in enumerate(toy.logits(history).log_softmax(-1)[0].tolist()):
                candidates.append((tokens + [token], total + value))
        candidates.sort(key=lambda pair: -pair[1])
        ended += [(tokens, total / size**penalty) for tokens, total in candidates[:beams] if tokens[-1] in stop]
        live = [pair for pair in candidates if pair[0][-1] not in stop][:beams]
        bound = live[0][1] / (length if penalty > 0 else size + 1) ** penalty
        if len(ended) >= beams or (ended and max(score for _, score in ended) >= bound):
            return max(ended, key=lambda pair: pair[1])
    return max([*ended, (live[0][0], live[0][1] / length**penalty)], key=lambda pair: pair[1])


def padded(tokens, length):
    return tokens + [PAD] * (length - len(tokens))


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0, 2.0, -0.5])
@pytest.mark.parametrize("stop", [(STOP,), (1, STOP)])
def test_a_beam_that_holds_everything_finds_the_best_sequence(penalty, stop):
    toy, length = Toy(), 4
    tokens, scores = beam_search(
        toy.step, toy.reorder, starts(), beams=VOCABULARY**length, length_penalty=penalty, max_new_tokens=length,
        stop=stop, pad_id=PAD,
    )  # fmt: skip
    for row, start in enumerate(starts()):
        made = [(s, total / len(s) ** penalty) for s, total in sequences(toy, start, length, stop)]
        best, score = max(made, key=lambda pair: pair[1])
        assert tokens[row].tolist() == padded(best, tokens.shape[1])
        assert math.isclose(scores[row].item(), score, rel_tol=1e-12)


@pytest.mark.parametrize("beams", [1, 2, 3, 5])
@pytest.mark.parametrize("penalty", [0.0, 1.0, -0.5])
def test_a_beam_is_the_plain_search_of_each_row(beams, penalty):
    for scale, bias, length in ((3.0, 0.0, 6), (1.0, -2.0, 7), (2.0, 1.0, 3)):
        toy = Toy(scale, bias)
        tokens, scores = beam_search(
            toy.step, toy.reorder, starts(), beams=beams, length_penalty=penalty, max_new_tokens=length, stop={STOP}
        )
        longest = 0
        for row, start in enumerate(starts()):
            best, score = search_plainly(toy, start, beams, penalty, length, {STOP})
            assert tokens[row].tolist() == padded(best, tokens.shape[1])
            assert math.isclose(scores[row].item(), score, rel_tol=1e-12)
            longest = max(longest, len(best))
        assert tokens.shape[1] == longest
        assert toy.given[0] == (5, 2) and set(toy.given[1:]) <= {(5 * beams, 1)}


def test_a_row_that_never_ends_is_the_likeliest_of_full_length():
    toy, length = Toy(bias=-math.inf), 3
    tokens, scores = beam_search(
        toy.step, toy.reorder, starts(), beams=VOCABULARY**length, max_new_tokens=length, stop=(STOP,)
    )
    for row, start in enumerate(starts()):
        best, total = max(sequences(toy, start, length, (STOP,)), key=lambda made: made[1])
        assert tokens[row].tolist() == best and math.isclose(scores[row].item(), total / length, rel_tol=1e-12)


def test_a_beam_of_one_is_greedy():
    toys = Toy(), Toy()
    tokens, _ = beam_search(toys[0].step, toys[0].reorder, starts(9), beams=1, max_new_tokens=12, stop=(STOP,))
    assert torch.equal(tokens, generate(toys[1].step, starts(9), max_new_tokens=12, stop=(STOP,), pad_id=PAD))


def test_greedy_rows_end_by_themselves():
    toy, rows, length = Toy(), 9, 12
    tokens = generate(toy.step, starts(rows), max_new_tokens=length, stop={STOP}, pad_id=PAD)
    ends = []
    for row, start in enumerate(starts(rows)):
        expected = []
        while len(expected) < length and expected[-1:] != [STOP]:
            expected.append(toy.logits(torch.tensor([start.tolist() + expected])).argmax().item())
        assert tokens[row].tolist() == padded(expected, tokens.shape[1])
        ends.append(len(expected))
    assert tokens.shape[1] == max(ends) and min(ends) < max(ends)
    assert toy.given == [(rows, 2)] + [(rows, 1)] * (max(ends) - 1)


def test_generation_ends_as_soon_as_every_row_has():
    toy = Toy(bias=100.0)
    assert generate(toy.step, starts(), max_new_tokens=50, stop={STOP}).tolist() == [[STOP]] * 5
    assert len(toy.given) == 1
    assert generate(Toy(bias=100.0).step, starts(), max_new_tokens=3).tolist() == [[STOP] * 3] * 5


LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.9, -3.0, 0.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options, kept",
    [
        ({"temperature": 1.0}, [0, 1, 2, 3, 4, 5]),
        ({"temperature": 0.5}, [0, 1, 2, 3, 4, 5]),
        ({"temperature": 2.0, "top_k": 3}, [0, 3, 2]),
        ({"temperature": 1.0, "top_k": 99}, [0, 1, 2, 3, 4, 5]),
        # Their probabilities are about 0.44, 0.40, 0.10, 0.06, 0.02 and 0.003.
        ({"temperature": 1.0, "top_p": 0.6}, [0, 3]),
        ({"temperature": 1.0, "top_p": 0.9}, [0, 3, 2]),
        ({"temperature": 1.0, "top_p": 1.0}, [0, 1, 2, 3, 4, 5]),
        # Of the two that top_k leaves, the first has more than half.
        ({"temperature": 1.0, "top_k": 2, "top_p": 0.5}, [0]),
    ],
    ids=str,
)  # fmt: skip
def test_samples_follow_their_distribution(options, kept, dtype):
    draws = 20_000
    logits = LOGITS.to(dtype)
    tokens = next_tokens(logits.expand(draws, -1), **options, generator=torch.Generator().manual_seed(1))
    expected = torch.zeros(len(LOGITS), dtype=torch.float64)
    expected[kept] = (logits.double()[kept] / options["temperature"]).softmax(0)
    found = torch.bincount(tokens, minlength=len(LOGITS)) / draws
    assert not found[expected == 0].any()
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt()).all()


def test_what_leaves_one_token_is_greedy():
    logits = 40 * torch.randn(50, 30)
    greedy = next_tokens(logits)
    assert torch.equal(greedy, logits.argmax(-1))
    for options in ({"temperature": 1e-38}, {"temperature": 1, "top_k": 1}, {"temperature": 3.0, "top_p": 1e-9}):
        assert torch.equal(next_tokens(logits, **options), greedy)


@pytest.mark.parametrize("temperature", [1e-300, 1e-46, 1e-38])
def test_the_coldest_temperatures_are_greedy(temperature):
    logits = torch.randn(7, 40)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        likeliest = logits.to(dtype).argmax(-1)
        assert torch.equal(next_tokens(logits.to(dtype), temperature=temperature), likeliest)
        assert torch.equal(next_tokens(logits.to(dtype), temperature=1.0, top_p=temperature), likeliest)


def test_a_generator_decides_and_the_default_one_is_left_alone():
    logits, state = torch.randn(40, 30), torch.get_rng_state()
    first, again, other = (
        next_tokens(logits, temperature=1.0, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"temperature": -0.1}, ValueError, "temperature must be 0 or more, got -0.1"),
        ({"temperature": math.nan}, ValueError, "temperature must be 0 or more, got nan"),
        ({"temperature": "1"}, TypeError, "temperature must be a number, got str"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"top_k": 2.0}, TypeError, "top_k must be an integer, got float"),
        ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, ValueError, r"top_p must be in \(0, 1\], got 1.1"),
        ({"top_p": True}, TypeError, "top_p must be a number, got bool"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
    ],
    ids=str,
)  # fmt: skip
def test_options_that_are_none_are_refused_before_the_first_step(options, error, message):
    toy = Toy()
    with pytest.raises(error, match=message):
        generate(toy.step, starts(), **{"max_new_tokens": 2, "temperature": 1.0, **options})
    assert toy.given == []


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"beams": 0}, ValueError, "beams must be at least 1, got 0"),
        ({"beams": 1.5}, TypeError, "beams must be an integer, got float"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
        ({"length_penalty": 121.0}, ValueError, "length_penalty 121.0 is too much for 2 tokens"),
        ({"length_penalty": -121.0}, ValueError, "length_penalty -121.0 is too much for 2 tokens"),
        ({"length_penalty": None}, TypeError, "length_penalty must be a number, got NoneType"),
    ],
    ids=str,
)  # fmt: skip
def test_searches_that_are_none_are_refused_before_the_first_step(options, error, message):
    toy = Toy()
    with pytest.raises(error, match=message):
        beam_search(toy.step, toy.reorder, starts(), **{"beams": 2, "max_new_tokens": 2, "stop": {STOP}, **options})
    assert toy.given == []


def test_a_model_is_put_back_in_the_modes_that_it_was_in():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout()))
    model[1][0].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(KeyError), generating(model):
        assert torch.is_inference_mode_enabled() and not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == before and not torch.is_inference_mode_enabled()


def test_samples_of_a_generation_are_its_generators():
    options = {"max_new_tokens": 20, "temperature": 1.5, "top_k": 3, "top_p": 0.9}
    first, again, other = (
        _decoding.generate(Toy().step, starts(), **options, generator=torch.Generator().manual_seed(seed))
        for seed in (5, 5, 6)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
