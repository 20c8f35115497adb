"""Batches: each token once and where it belongs, nothing special masked, the same ones from the same generator."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttx import data


class Vocabulary(SimpleNamespace):
    """What mask_tokens asks a tokenizer for; special ids not all in front."""

    pad_id, cls_id, sep_id, mask_id, special_ids, size = 0, 1, 2, 49, [0, 1, 2, 30, 49], 50

    def __len__(self):
        return self.size


VOCABULARY = Vocabulary()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_pad():
    ids, padding = data.pad([[1, 2, 3], [], [4]], 9)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 9], [4, 9, 9]] and ids.dtype == torch.int64
    assert padding.tolist() == [[False] * 3, [True] * 3, [False, True, True]]
    ids, padding = data.pad([[1, 2, 3], [4]], 9, "left")
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert padding.tolist() == [[False] * 3, [True, True, False]]


def test_only_integers_are_padded():
    assert data.pad([torch.tensor([1, 2]), [3]], 0)[0].tolist() == [[1, 2], [3, 0]]
    with pytest.raises(TypeError, match="float"):
        data.pad([[1.5]], 0)


def test_shift():
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [0, 0, 7, 8]])
    inputs, targets = data.shift(ids)
    assert torch.equal(inputs, ids[:, :3]) and torch.equal(targets, ids[:, 1:])
    inputs, targets = data.shift(ids, ids == 0)
    assert torch.equal(inputs, ids[:, :3])
    assert targets.tolist() == [[2, 3, 4], [6, -100, -100], [-100, -100, 8]]


def test_mask_tokens():
    ids = torch.randint(50, (400, 100), generator=generator(1))
    before = ids.clone()
    inputs, targets = data.mask_tokens(ids, VOCABULARY, generator=generator())
    assert torch.equal(ids, before)
    special = torch.isin(ids, torch.tensor(VOCABULARY.special_ids))
    chosen = targets != -100
    assert not (chosen & special).any()
    assert torch.equal(targets[chosen], ids[chosen]) and torch.equal(inputs[~chosen], ids[~chosen])
    masked = chosen & (inputs == VOCABULARY.mask_id)
    assert not torch.isin(inputs[chosen & ~masked], torch.tensor(VOCABULARY.special_ids)).any()
    # Within four standard deviations of 15 %, and of 80 % and 10 % (one in 45 random tokens is the old one).
    ordinary = int((~special).sum())
    count = int(chosen.sum())
    changed = int((chosen & ~masked & (inputs != ids)).sum())
    parts = (count, ordinary, 0.15), (int(masked.sum()), count, 0.8), (changed, count, 0.1 * 44 / 45)
    for part, whole, share in parts:
        assert abs(part - share * whole) < 4 * (whole * share * (1 - share)) ** 0.5
    again = data.mask_tokens(ids, VOCABULARY, generator=generator())
    assert torch.equal(again[0], inputs) and torch.equal(again[1], targets)
    assert not torch.equal(data.mask_tokens(ids, VOCABULARY, generator=generator(1))[1], targets)
    of_int32 = data.mask_tokens(ids.int(), VOCABULARY, generator=generator())
    assert all(torch.equal(a, b) and a.dtype == torch.int64 for a, b in zip(of_int32, (inputs, targets), strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (torch.Tensor.float, TypeError, "token_ids must be int64 or int32, got torch.float32"),
        (torch.neg, ValueError, r"token_ids must lie in \[0, 49\], got -8"),
        (lambda ids: ids + 42, ValueError, r"token_ids must lie in \[0, 49\], got 50"),
    ],
)
def test_masks_tokens_alone(change, error, message):
    with pytest.raises(error, match=message):
        data.mask_tokens(change(torch.full((2, 3), 8)), VOCABULARY, generator=generator())


def test_shift_wants_padding_for_each_token():
    ids = torch.full((2, 3), 8)
    with pytest.raises(ValueError, match="padding must have the tokens' shape"):
        data.shift(ids, torch.zeros(1, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match="padding must be bool"):
        data.shift(ids, torch.zeros(2, 3))


def test_one_token_at_least_is_chosen():
    for seed in range(20):
        _, targets = data.mask_tokens(torch.tensor([[1, 5, 2, 0]]), VOCABULARY, generator=generator(seed))
        assert targets.tolist() == [[-100, 5, -100, -100]]


def documents(*lengths):
    """Sentences of ascending numbers, 100 apart from document to document."""
    made = []
    for number, sentences in enumerate(lengths):
        tokens = iter(range(100 * number, 100 * (number + 1)))
        made.append([[next(tokens) for _ in range(length)] for length in sentences])
    return made


def test_next_sentence_pairs():
    made = documents(*[[3, 4, 2, 5, 1, 3, 2]] * 60)
    pairs = data.next_sentence_pairs(made, max_length=14, generator=generator())
    for pair in pairs:
        assert pair.first and pair.second and len(pair.first) + len(pair.second) <= 11
        first, second = ({token // 100 for token in tokens} for tokens in (pair.first, pair.second))
        assert len(first) == len(second) == 1
        assert (first == second) == pair.is_next
        for tokens in (pair.first, pair.second):
            assert tokens == list(range(tokens[0], tokens[0] + len(tokens)))
        if pair.is_next:  # the first text may have lost its end
            assert pair.second[0] >= pair.first[-1] + 1
    true = sum(pair.is_next for pair in pairs)
    assert abs(true - len(pairs) / 2) < 4 * len(pairs) ** 0.5 / 2
    assert pairs == data.next_sentence_pairs(made, max_length=14, generator=generator())
    assert pairs != data.next_sentence_pairs(made, max_length=14, generator=generator(1))


def test_every_sentence_is_in_a_pair():
    """But for a last one that is left alone: with room for all, the rest of each document."""
    made = documents([2, 3, 2], [4, 4], [1, 1, 1, 1])
    for seed in range(10):
        pairs = data.next_sentence_pairs(made, max_length=100, generator=generator(seed))
        seen = {token for pair in pairs for token in (*pair.first, *pair.second)}
        assert seen >= {token for document in made for sentence in document[:-1] for token in sentence}


def test_pretraining_batch():
    pairs = [data.SentencePair([10, 11], [12], True), data.SentencePair([13], [14], False)]
    batch = data.pretraining_batch(pairs, VOCABULARY, generator=generator())
    clean = torch.tensor([[1, 10, 11, 2, 12, 2], [1, 13, 2, 14, 2, 0]])
    assert torch.equal(torch.where(batch.mlm_targets == -100, batch.token_ids, batch.mlm_targets), clean)
    assert batch.segment_ids.tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0]]
    assert torch.equal(batch.padding, clean == 0)
    assert batch.nsp_targets.tolist() == [0, 1]
    expected = data.mask_tokens(clean, VOCABULARY, generator=generator())
    assert torch.equal(batch.token_ids, expected[0]) and torch.equal(batch.mlm_targets, expected[1])


@settings(deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=60), st.integers(20, 80), st.integers(0, 5))
def test_length_buckets(lengths, tokens, seed):
    batches = data.length_buckets(lengths, tokens=tokens, generator=generator(seed))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert batch and len(batch) * max(lengths[index] for index in batch) <= tokens
    ranges = sorted((min(lengths[i] for i in batch), max(lengths[i] for i in batch)) for batch in batches)
    assert all(high <= low for (_, high), (low, _) in zip(ranges, ranges[1:], strict=False))  # like lengths together
    assert batches == data.length_buckets(torch.tensor(lengths), tokens=tokens, generator=generator(seed))


def test_buckets_come_in_another_order_each_time():
    rng, lengths = generator(), list(range(1, 50)) * 2
    assert data.length_buckets(lengths, tokens=100, generator=rng) != data.length_buckets(
        lengths, tokens=100, generator=rng
    )


def test_windows():
    stream = torch.arange(10)
    inputs, targets = data.windows(stream, 4, 200, generator())
    assert inputs.shape == targets.shape == (200, 4)
    assert torch.equal(targets, inputs + 1) and torch.equal(inputs, inputs[:, :1] + torch.arange(4))
    assert inputs[:, 0].unique().tolist() == list(range(6))  # from every place, the last one too
    assert torch.equal(data.windows(stream, 4, 200, generator())[0], inputs)


def mask(tokens, vocabulary=VOCABULARY, **options):
    return data.mask_tokens(torch.tensor([tokens]), vocabulary, generator=generator(), **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: data.pad([], 0), "nothing to pad"),
        (lambda: data.pad([[], []], 0), "nothing to pad"),
        (lambda: data.pad([[1]], 0, "middle"), "side must be"),
        (lambda: data.shift(torch.zeros(2, 1, dtype=torch.int64)), "two tokens or more"),
        (lambda: data.shift(torch.zeros(0, 4, dtype=torch.int64)), "two tokens or more"),
        (lambda: mask([0, 1, 2]), "no ordinary token"),
        (lambda: mask([5], probability=0), "probability"),
        (lambda: mask([5], Vocabulary(mask_id=None)), r"no \[MASK\]"),
        (lambda: data.next_sentence_pairs([], max_length=9, generator=generator()), "got 0 documents"),
        (lambda: data.next_sentence_pairs(documents([2, 2]), max_length=9, generator=generator()), "got 1 documents"),
        (lambda: data.next_sentence_pairs([[[1]], []], max_length=9, generator=generator()), "nor a sentence, empty"),
        (lambda: data.next_sentence_pairs([[[1]], [[2]]], max_length=9, generator=generator()), "two sentences"),
        (lambda: data.next_sentence_pairs(documents([2], [2]), max_length=4, generator=generator()), "at least 5"),
        (lambda: data.pretraining_batch([], VOCABULARY, generator=generator()), "nothing to pad"),
        (lambda: data.length_buckets([], tokens=4, generator=generator()), "no lengths"),
        (lambda: data.length_buckets([5], tokens=4, generator=generator()), "5 tokens, and a batch at most 4"),
        (lambda: data.windows(torch.arange(4), 4, 1, generator()), "the stream is"),
        (lambda: data.windows(torch.arange(4)[None], 2, 1, generator()), "the stream is"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
