"""What attention's launchers ask of their arguments, whoever calls the raw operators.

Values of key_lengths and cu_seqlens are not looked at, as that would wait for the GPU: kernels keep them within bounds.
"""

import torch
from torch import Tensor

from . import availability
from .checks import require_input, require_like


def require_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    slopes: Tensor | None,
) -> None:
    """What the forward and the backward ask."""
    packed = cu_seqlens_q is not None
    if packed != (cu_seqlens_k is not None):
        raise ValueError("cu_seqlens_q and cu_seqlens_k come together")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        require_input(name, tensor)
        if tensor.dim() != (3 if packed else 4):
            raise ValueError(f"{name} must have {3 if packed else 4} dimensions, got {tensor.dim()}")
    reason = availability.OPS["attention"]((query, key, value))
    if reason is not None:
        raise ValueError(f"attention's Triton kernels cannot take this: {reason}")
    outer = 0 if packed else 1  # dims before the heads, or packed tokens
    require_like("key", key, query, (*query.shape[:outer], *key.shape[outer:-1], query.shape[-1]))
    require_like("value", value, query, (*key.shape[:-1], value.shape[-1]))
    heads, kv_heads = query.shape[1], key.shape[1]
    if heads % kv_heads if kv_heads else heads:
        raise ValueError(f"query's {heads} heads are not a multiple of key's {kv_heads}")
    if packed:
        if mask is not None or key_lengths is not None:
            raise ValueError("packed sequences take no attn_mask and no key_lengths")
        _require_indices("cu_seqlens_q", cu_seqlens_q, query, max(1, cu_seqlens_q.numel()))
        _require_indices("cu_seqlens_k", cu_seqlens_k, query, cu_seqlens_q.numel())
    else:
        _require_indices("key_lengths", key_lengths, query, query.shape[0])
    if slopes is not None and (slopes.dtype != torch.float32 or slopes.shape != (heads,)):
        raise ValueError(f"alibi_slopes must be float32 of shape ({heads},), got {slopes.dtype} {tuple(slopes.shape)}")
    if mask is not None:
        _require_mask(mask, query, (*query.shape[:3], key.shape[2]))


def require_results(
    query: Tensor, value: Tensor, grad: Tensor, grad_lse: Tensor | None, output: Tensor, stats: Tensor
) -> None:
    """What the backward asks besides: of the forward's results, and of their gradients."""
    require_like("output", output, query, (*query.shape[:-1], value.shape[-1]))
    require_like("grad", grad, output)
    rows = tuple(query.shape[:-1]) if query.dim() == 4 else (query.shape[1], query.shape[0])
    for name, tensor, shape in (("stats", stats, (*rows, 2)), ("grad_lse", grad_lse, rows)):
        if tensor is not None and (tensor.dtype != torch.float32 or tuple(tensor.shape) != shape):
            raise ValueError(f"{name} must be float32 of shape {shape}, got {tensor.dtype} {tuple(tensor.shape)}")


def refuse_weights(weights: int, grad_weights: Tensor | None) -> None:
    """There is no Triton kernel for the weights that attention applies, nor for what their gradient adds."""
    if weights or grad_weights is not None:
        raise ValueError("attention's Triton kernels do not give its weights: weights must be 0, grad_weights None")


def _require_indices(name: str, tensor: Tensor | None, query: Tensor, count: int) -> None:
    if tensor is not None and (
        tensor.dtype != torch.int64 or tensor.device != query.device or tuple(tensor.shape) != (count,)
    ):
        raise ValueError(f"{name} must be int64 of shape ({count},) on {query.device}, got {tensor}")


def _require_mask(mask: Tensor, query: Tensor, wanted: tuple[int, ...]) -> None:
    if mask.dtype not in (torch.bool, query.dtype, torch.float32) or mask.device != query.device:
        raise TypeError(f"attn_mask must be bool, {query.dtype} or float32 on {query.device}, got {mask.dtype}")
    if mask.dim() != 4 or any(size not in (1, full) for size, full in zip(mask.shape, wanted, strict=True)):
        raise ValueError(f"attn_mask must broadcast to {wanted}, got {tuple(mask.shape)}")
