"""Jagged nested tensors (batch, heads, ragged length, width) as packed sequences."""

from collections.abc import Callable

import torch
from torch import Tensor


def any_nested(*tensors: object) -> bool:
    """Whether one of them is a nested tensor."""
    return any(isinstance(tensor, Tensor) and tensor.is_nested for tensor in tensors)


def attend_nested(
    attention_varlen: Callable[..., Tensor | tuple[Tensor, Tensor]], query: Tensor, key: Tensor, value: Tensor
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each sequence to its own keys; results are as ragged as query, by the same nested int."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check(name, tensor)
    offsets = query.offsets()
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        raise ValueError(f"query, key and value differ in batch: {query.shape[0]}, {key.shape[0]}, {value.shape[0]}")
    if value.offsets() is not key.offsets() and not torch.equal(value.offsets(), key.offsets()):
        raise ValueError("key and value differ in their sequences' lengths")
    q, k, v = (tensor.transpose(1, 2).values() for tensor in (query, key, value))
    result = attention_varlen(q, k, v, offsets, key.offsets())
    if isinstance(result, Tensor):
        return _ragged(result, offsets)
    output, lse = result
    return _ragged(output, offsets), _ragged(lse.transpose(0, 1), offsets)


def refuse_options(**options: object) -> None:
    """What attention() takes for padded tensors, and nested ones have no use for."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name} must not be given with nested tensors: their sequences have no padding")


def _ragged(tokens: Tensor, offsets: Tensor) -> Tensor:
    """(total tokens, heads, ...) -> (batch, heads, ragged length, ...)."""
    return torch.nested.nested_tensor_from_jagged(tokens, offsets=offsets).transpose(1, 2)


def _check(name: str, tensor: object) -> None:
    if not any_nested(tensor):
        raise ValueError(f"{name} must be nested, as the others are")
    if tensor.layout is not torch.jagged:
        raise ValueError(f"{name} must be nested with the layout torch.jagged, got {tensor.layout}")
    if tensor.dim() != 4 or tensor._ragged_idx != 2:
        raise ValueError(
            f"{name} must be (batch, heads, ragged length, width), as .transpose(1, 2) gives it of "
            f"(batch, ragged length, heads, width), got {tuple(tensor.shape)}"
        )
    if tensor._lengths is not None:
        raise ValueError(f"{name} must not have holes between its sequences (lengths): make it contiguous")
