"""What attention's functions ask of their arguments, each refusal with the argument's name."""

import math

import torch
from torch import Tensor

from fasttx import checks


def check_padded(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    attn_mask: Tensor | None,
    key_lengths: Tensor | None,
    query_offset: int,
    **options: object,
) -> Tensor | None:
    """Everything that holds for padded tensors, value left out where there is none; gives key_lengths as int64."""
    tensors = {"query": query, "key": key} | ({} if value is None else {"value": value})
    for name, tensor in tensors.items():
        require_dims(name, tensor, 4, "(batch, heads, length, width)")
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    if any(tensor.shape[0] != batch for tensor in tensors.values()):
        raise checks.ArgumentError(f"{' and '.join(tensors)} differ in batch: {_shapes(*tensors.values())}")
    if value is not None and value.shape[2] != keys:
        raise checks.ArgumentError(f"key and value differ in length: {_shapes(*tensors.values())}")
    check_common(query, key, value, **options)
    _require_integer("query_offset", query_offset)
    if attn_mask is not None:
        checks.require_mask("attn_mask", attn_mask, query, (batch, heads, queries, keys))
    if key_lengths is not None:
        key_lengths = _check_integers("key_lengths", key_lengths, batch)
        _check_range("key_lengths", key_lengths, keys)
    checks.require_same_device("query", query, attn_mask=attn_mask, key_lengths=key_lengths)
    return key_lengths


def check_common(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    *,
    is_causal: bool,
    window: tuple[int, int] | None,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    scale: float | None,
    enable_gqa: bool,
) -> None:
    """What holds for padded tensors and for packed ones."""
    checks.require_same_device("query", query, key=key, value=value)
    for name, tensor in (("key", key), ("value", value)):
        if tensor is not None and tensor.dtype != query.dtype:
            raise checks.KindError(f"{name} is {tensor.dtype} but query is {query.dtype}: use one dtype")
    if query.shape[-1] != key.shape[-1]:
        raise checks.ArgumentError(f"query and key differ in width: {query.shape[-1]} and {key.shape[-1]}")
    if query.shape[-1] == 0 and scale is None:
        raise checks.ArgumentError("query has width 0: the default scale 1 / sqrt(width) is undefined")
    heads, kv_heads = query.shape[1], key.shape[1]
    if value is not None and value.shape[1] != kv_heads:
        raise checks.ArgumentError(f"key has {kv_heads} heads but value has {value.shape[1]}")
    if heads != kv_heads and not enable_gqa:
        raise checks.ArgumentError(
            f"query has {heads} heads but key has {kv_heads}: they must agree unless enable_gqa=True"
        )
    if enable_gqa and (kv_heads == 0 or heads % kv_heads != 0):
        raise checks.ArgumentError(f"query's {heads} heads are not a multiple of key's {kv_heads}")
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal must be a bool, got {type(is_causal).__name__}")
    _check_window(window)
    if alibi_slopes is not None:
        checks.require_shape("alibi_slopes", alibi_slopes, (heads,), "one for each query head")
        checks.require_same_device("query", query, alibi_slopes=alibi_slopes)
    checks.require_probability("dropout_p", dropout_p)
    if scale is not None:
        if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat)):
            raise TypeError(f"scale must be a number, got {type(scale).__name__}")
        if not math.isfinite(scale):
            raise checks.ArgumentError(f"scale must be finite, got {scale}")


def require_dims(name: str, tensor: Tensor, dims: int, meaning: str) -> None:
    """A dense floating-point tensor of that many dimensions."""
    checks.require_floating(name, tensor)
    if tensor.layout is not torch.strided:
        raise checks.KindError(f"{name} must be a dense tensor, got the layout {tensor.layout}")
    if tensor.dim() != dims:
        raise checks.ArgumentError(f"{name} must be {meaning}, got the shape {checks.shape(tensor)}")


def check_offsets(name: str, offsets: Tensor, total: int) -> Tensor:
    """Offsets of packed sequences, as int64: they rise from 0 to the number of tokens."""
    checks.require_tensor(name, offsets)
    offsets = _check_integers(name, offsets, max(offsets.numel(), 1))
    if _checkable(offsets):
        sorted_up = bool((offsets[1:] >= offsets[:-1]).all())
        if offsets[0] != 0 or offsets[-1] != total or not sorted_up:
            raise checks.ArgumentError(f"{name} must rise from 0 to {total}, got {offsets.tolist()}")
    return offsets


def check_lse(name: str, lse: Tensor, rows: tuple[int, ...], like: Tensor) -> None:
    """The log of sums of exponentials of these rows, in float32, like's dtype or, for float64, in that."""
    checks.require_tensor(name, lse)
    wide = torch.promote_types(like.dtype, torch.float32)
    if lse.dtype not in (wide, like.dtype):
        kinds = " or ".join(sorted({str(wide), str(like.dtype)}))
        raise checks.KindError(f"{name} must be {kinds}, got {lse.dtype}")
    if tuple(lse.shape) != rows:
        raise checks.ArgumentError(
            f"{name} must have the shape {rows}, one value for each row, got {checks.shape(lse)}"
        )


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(checks.shape(tensor) for tensor in tensors)


def _require_integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")


def _check_window(window: tuple[int, int] | None) -> None:
    if window is None:
        return
    if not isinstance(window, (tuple, list)):
        raise TypeError(f"window must be (left, right), got {type(window).__name__}")
    if len(window) != 2:
        raise checks.ArgumentError(f"window must be (left, right), got {window}")
    for side in window:
        _require_integer("each side of window", side)


def _check_integers(name: str, tensor: Tensor, length: int) -> Tensor:
    checks.require_tensor(name, tensor)
    if tensor.dtype not in (torch.int64, torch.int32):
        raise checks.KindError(f"{name} must be int64 or int32, got {tensor.dtype}")
    if tuple(tensor.shape) != (length,):
        raise checks.ArgumentError(f"{name} must have the shape ({length},), got {checks.shape(tensor)}")
    return tensor.to(torch.int64)


def _checkable(tensor: Tensor) -> bool:
    """Whether values can be looked at: not while tracing, and not where that would wait for a GPU."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_range(name: str, lengths: Tensor, most: int) -> None:
    if _checkable(lengths) and bool(((lengths < 0) | (lengths > most)).any()):
        raise checks.ArgumentError(f"{name} must lie in [0, {most}], got {lengths.tolist()}")
