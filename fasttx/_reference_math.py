"""The mathematics that the reference's functions share, on tensors that are wide already; private to them."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fasttx import philox

_SCORES = 2**22  # of one head, for sequences of the same lengths at once


def softmax(scores: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Softmax and its lse, dim kept; a row that is empty, or all -inf, gives 0 and -inf."""
    # amax refuses an empty dim; sum gives the right shape. The maximum cancels, so it needs no
    # gradient, and a finite one in place of -inf keeps -inf - -inf out of both passes.
    largest = (scores.amax if scores.numel() else scores.sum)(dim, keepdim=True).detach()
    largest = largest.masked_fill(largest == -math.inf, 0.0)
    exponentials = (scores - largest).exp()
    total = exponentials.sum(dim, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    return exponentials / total, (largest + total.log()).masked_fill(empty, -math.inf)


def layer_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    dims = tuple(range(-len(as_shape(normalized_shape)), 0))
    centred = x - x.mean(dims, keepdim=True)
    # Two passes: the mean of squares minus the squared mean would cancel.
    normed = centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    if weight is not None:
        normed = normed * weight.to(x.dtype)
    if bias is not None:
        normed = normed + bias.to(x.dtype)
    return normed


def gelu(x: Tensor) -> Tensor:
    # Phi(x) = (1 + erf(x / sqrt 2)) / 2 = erfc(-x / sqrt 2) / 2; erfc keeps the digits of the
    # negative tail.
    return 0.5 * x * torch.erfc(-x * math.sqrt(0.5))


def gelu_tanh(x: Tensor) -> Tensor:
    # (1 + tanh u) / 2 = sigmoid(2u), which keeps the digits of the negative tail; as the
    # exponential of its log, whose derivative does not cancel in the positive one.
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
    return x * torch.nn.functional.logsigmoid(2 * inner).exp()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = x @ weight.to(x.dtype).t()
    return product if bias is None else product + bias.to(x.dtype)


def dropout(x: Tensor, p: float, seed: int | Tensor | None, column_dims: int) -> Tensor:
    """Dropout of x seen as a matrix, whose columns are the last `column_dims` dims."""
    rows, columns = math.prod(x.shape[:-column_dims]), math.prod(x.shape[-column_dims:])
    keep = philox.matrix_keep_mask(need(seed), rows, columns, p, x.device)
    return drop(x, keep.reshape(x.shape), p)


def drop(x: Tensor, keep: Tensor, p: float) -> Tensor:
    return (x * (1 / (1 - p))).masked_fill(~keep, 0.0)


def need(seed: int | Tensor | None) -> int | Tensor:
    if seed is None:
        raise ValueError("dropout is active and needs a seed: an int or a 0-dim int64 tensor")
    return seed


def as_shape(normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    return (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)


def of_same_lengths(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Packed sequences as batches: their rows of queries (n, Tq) and keys (n, Tk), and their indices (n,).

    A batch has `_SCORES` or one sequence at most. The first batch is of no sequence, so that results of none have the
    right shape and a gradient.
    """
    indices: dict[tuple[int, int], list[int]] = {(0, 0): []}
    for index, lengths in enumerate(zip(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist(), strict=True)):
        indices.setdefault(lengths, []).append(index)
    for lengths, members in indices.items():
        every = torch.tensor(members, dtype=torch.int64, device=cu_seqlens_q.device)
        for batch in every.split(max(1, _SCORES // max(1, math.prod(lengths)))):
            rows_q, rows_k = (
                starts[batch, None] + torch.arange(length, device=batch.device)
                for starts, length in zip((cu_seqlens_q, cu_seqlens_k), lengths, strict=True)
            )
            yield rows_q, rows_k, batch


def unpack(packed: Tensor, rows: Sequence[Tensor]) -> list[Tensor]:
    """The rows (n, T) of each batch, of packed (total, H, D): (n, H, T, D)."""
    # index_select, and once: the gradient of indexing by a tensor sorts, and takes a whole tensor each time.
    taken = packed.index_select(0, torch.cat([batch.flatten() for batch in rows]))
    parts = taken.split([batch.numel() for batch in rows])
    return [part.unflatten(0, batch.shape).transpose(1, 2) for part, batch in zip(parts, rows, strict=True)]


def widen(x: Tensor) -> Tensor:
    """x in the dtype that it is computed in: float32, or float64 for float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


GELUS: dict[str, Callable[[Tensor], Tensor]] = {"none": gelu, "tanh": gelu_tanh}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": torch.relu,
}
