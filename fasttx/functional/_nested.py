"""Jagged nested tensors: as packed sequences, (batch, heads, ragged length, width), or by their values."""

from collections.abc import Callable

import torch
from torch import Tensor

from fasttx import checks


def any_nested(*tensors: object) -> bool:
    """Whether one of them is a nested tensor."""
    return any(isinstance(tensor, Tensor) and tensor.is_nested for tensor in tensors)


def is_dense_jagged(tensor: Tensor) -> bool:
    """Whether a nested tensor is jagged, without holes between its sequences."""
    return tensor.layout is torch.jagged and tensor._lengths is None


def on_values(function: Callable[[Tensor], Tensor], input: Tensor, trailing: int = 0) -> Tensor:
    """A function that keeps shapes, and sees each stretch of `trailing` last dimensions by itself, of jagged input."""
    if not is_dense_jagged(input):
        raise checks.ArgumentError(
            "input is nested, and must then have the layout torch.jagged without holes (lengths), got the layout "
            f"{input.layout}"
        )
    if input._ragged_idx >= input.dim() - trailing:
        raise checks.ArgumentError(
            f"input must not be ragged in its last dimensions, {trailing} of them, got {input.shape}"
        )
    values = function(input.values())
    return torch.nested.nested_tensor_from_jagged(values, offsets=input.offsets(), jagged_dim=input._ragged_idx)


def attend_nested(
    attention_varlen: Callable[..., Tensor | tuple[Tensor, Tensor]], query: Tensor, key: Tensor, value: Tensor
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each sequence to its own keys; results are as ragged as query, by the same nested int."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check(name, tensor)
    offsets = query.offsets()
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        raise checks.ArgumentError(
            f"query, key and value differ in batch: {query.shape[0]}, {key.shape[0]}, {value.shape[0]}"
        )
    if value.offsets() is not key.offsets() and not torch.equal(value.offsets(), key.offsets()):
        raise checks.ArgumentError("key and value differ in their sequences' lengths")
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
            raise checks.ArgumentError(f"{name} must not be given with nested tensors: their sequences have no padding")


def _ragged(tokens: Tensor, offsets: Tensor) -> Tensor:
    """(total tokens, heads, ...) -> (batch, heads, ragged length, ...)."""
    return torch.nested.nested_tensor_from_jagged(tokens, offsets=offsets).transpose(1, 2)


def _check(name: str, tensor: object) -> None:
    if not any_nested(tensor):
        raise checks.ArgumentError(f"{name} must be nested, as the others are")
    if tensor.layout is not torch.jagged:
        raise checks.ArgumentError(f"{name} must be nested with the layout torch.jagged, got {tensor.layout}")
    if tensor.dim() != 4 or tensor._ragged_idx != 2:
        raise checks.ArgumentError(
            f"{name} must be (batch, heads, ragged length, width), as .transpose(1, 2) gives it of "
            f"(batch, ragged length, heads, width), got {tuple(tensor.shape)}"
        )
    if tensor._lengths is not None:
        raise checks.ArgumentError(f"{name} must not have holes between its sequences (lengths): make it contiguous")
