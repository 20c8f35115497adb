"""What every generating model shares: the choice of the next token, and the loops that choose one after another."""

import contextlib
import math
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from fasttx import checks

# New tokens (B, new) -> logits (B, vocabulary) of what comes next. It keeps what it has seen, as by a KVCache.
Step = Callable[[Tensor], Tensor]


@contextlib.contextmanager
def generating(model: torch.nn.Module) -> Iterator[None]:
    """The model in inference: without dropout and gradients, and afterwards in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises TypeError or ValueError for options of `next_tokens` that are none."""
    _require_number("temperature", temperature)
    if not temperature >= 0.0:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    if top_k is not None:
        checks.require_size("top_k", top_k)
    if top_p is not None:
        _require_number("top_p", top_p)
        if not 0.0 < top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], got {top_p}")


def check_length_penalty(length_penalty: float, longest: int) -> None:
    """Raises TypeError or ValueError unless `longest` tokens to its power stay within float32."""
    _require_number("length_penalty", length_penalty)
    if not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty must be finite, got {length_penalty}")
    if abs(length_penalty) * math.log10(longest) > 36:  # a float32 has 38, and a score some of them
        raise ValueError(f"length_penalty {length_penalty} is too much for {longest} tokens: scores come to no number")


def next_tokens(
    logits: Tensor,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A token for each row: logits (B, vocabulary) -> (B,) int64.

    temperature 0: the most likely one. Otherwise drawn from softmax(logits / temperature), among the top_k most likely
    tokens, and of those among the fewest that together have the probability top_p (Holtzman et al. 2020).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature < torch.finfo(logits.dtype).tiny:  # rounded, it could be 0
        return logits.argmax(-1)
    # The largest becomes 0, so that no temperature makes it infinite.
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    logits, tokens = logits.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        logits[:, top_k:] = -torch.inf
    probabilities = logits.softmax(-1)
    if top_p is not None:
        left = probabilities.cumsum(-1) - probabilities >= top_p
        left[:, 0] = False  # where top_p, rounded, is 0
        probabilities = probabilities.masked_fill(left, 0.0)
    return tokens.gather(1, probabilities.multinomial(1, generator=generator)).squeeze(1)


def generate(
    step: Step,
    start: Tensor,
    *,
    max_new_tokens: int,
    stop: Collection[int] = (),
    pad_id: int = 0,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The tokens that follow start (B, T) int64, each chosen by `next_tokens`: (B, new), new <= max_new_tokens.

    A row ends with a token of `stop`, and is pad_id from there on; nothing more is made once all rows have ended.
    Raises TypeError or ValueError for options that are none, before the first step.
    """
    checks.require_size("max_new_tokens", max_new_tokens)
    check_sampling(temperature, top_k, top_p)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
    stops = torch.tensor(sorted(stop), dtype=torch.int64, device=start.device)
    ended = start.new_zeros(len(start), dtype=torch.bool)
    tokens, made = start, []
    while len(made) < max_new_tokens and not ended.all():
        chosen = next_tokens(step(tokens), **sampling).masked_fill(ended, pad_id)
        made.append(chosen)
        ended = ended | torch.isin(chosen, stops)
        tokens = chosen[:, None]
    return torch.stack(made, 1)


def beam_search(
    step: Step,
    reorder: Callable[[Tensor], None],
    start: Tensor,
    *,
    beams: int,
    max_new_tokens: int,
    stop: Collection[int],
    length_penalty: float = 1.0,
    pad_id: int = 0,
) -> tuple[Tensor, Tensor]:
    """The best tokens after start (B, T) int64 that a beam finds: (B, new), pad_id after a row's end, and scores (B,).

    The score of `length` tokens, that of `stop` which ends them included, is the sum of their log-probabilities over
    length ** length_penalty. At each step a row keeps the `beams` likeliest sequences that go on. It is done when
    `beams` have ended, or none that goes on can surpass the best that has; after max_new_tokens, the likeliest that
    would go on counts like one that has ended.

    reorder(index): what `step` keeps becomes that of the rows index, (B * beams,): first those of start repeated. After
    that step is given the last tokens (B * beams, 1). Raises as `generate`.
    """
    checks.require_size("beams", beams)
    checks.require_size("max_new_tokens", max_new_tokens)
    check_length_penalty(length_penalty, max_new_tokens)
    stops = torch.tensor(sorted(stop), dtype=torch.int64, device=start.device)
    first_beam = torch.arange(0, len(start) * beams, beams, device=start.device)[:, None]
    logits = step(start)
    reorder(first_beam[:, 0].repeat_interleave(beams) // beams)
    logits = logits.repeat_interleave(beams, 0)
    vocabulary = logits.shape[-1]
    # So many of the likeliest hold `beams` that go on, however many of them end.
    candidates = min(beams * (1 + len(stops)), beams * vocabulary)

    # At first there is one sequence for each row; copies of it are impossible.
    scores = logits.new_full((len(start), beams), -torch.inf, dtype=torch.promote_types(logits.dtype, torch.float32))
    scores[:, 0] = 0.0
    tokens = start.new_empty((len(start), beams, 0))
    best, best_score = start.new_full((len(start), max_new_tokens), pad_id), scores.new_full((len(start),), -torch.inf)
    best_length, ended = start.new_zeros(len(start)), start.new_zeros(len(start))
    done = start.new_zeros(len(start), dtype=torch.bool)
    for length in range(1, max_new_tokens + 1):
        log_probabilities = logits.log_softmax(-1, dtype=scores.dtype).view(len(start), beams, vocabulary)
        totals, place = (scores[..., None] + log_probabilities).flatten(1).topk(candidates)
        parents, chosen = place // vocabulary, place % vocabulary
        ends = torch.isin(chosen, stops)

        # Only those among the likeliest `beams` count as ended, and the first of them is the best of this length.
        ending = totals.masked_fill(~ends, -torch.inf)[:, :beams]
        score, which = (ending / length**length_penalty).max(1, keepdim=True)
        better = ~done & (score[:, 0] > best_score)
        best[better, :length] = _extended(tokens, parents, chosen, which)[better, 0]
        best_score, best_length[better] = torch.where(better, score[:, 0], best_score), length
        ended = ended + ending.isfinite().sum(1)

        scores, which = totals.masked_fill(ends, -torch.inf).topk(beams)
        tokens = _extended(tokens, parents, chosen, which)
        parents = parents.gather(1, which)
        # Log-probabilities only fall, so this is the most that a sequence which goes on can come to.
        longest = max_new_tokens if length_penalty > 0 else length + 1
        done = done | (ended >= beams) | (scores[:, 0] / longest**length_penalty <= best_score)
        if done.all() or length == max_new_tokens:
            break
        reorder((first_beam + parents).flatten())
        logits = step(tokens[..., -1].reshape(-1, 1))

    score = scores[:, 0] / length**length_penalty
    better = ~done & (score > best_score)
    best[better, :length], best_length[better] = tokens[better, 0], length
    best_score = torch.where(better, score, best_score)
    return best[:, : best_length.max()], best_score


def _extended(tokens: Tensor, parents: Tensor, chosen: Tensor, which: Tensor) -> Tensor:
    """The candidates `which` (B, n) as sequences: the parents' tokens (B, beams, length) and the chosen one."""
    parents = parents.gather(1, which)[..., None].expand(-1, -1, tokens.shape[-1])
    return torch.cat((tokens.gather(1, parents), chosen.gather(1, which)[..., None]), -1)


def _require_number(name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
