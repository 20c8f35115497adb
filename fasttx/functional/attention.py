"""Attention: padded, and packed (variable length)."""

import math
from functools import partial

import torch
from torch import Tensor

from fasttx import autocast, checks, reference
from fasttx.dispatch import choose, runs_on_cpu
from fasttx.ops import attention as ops
from fasttx.rng import draw_seed


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    is_causal: bool = False,
    query_offset: int = 0,
    window: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * query key^T + bias) value, over the keys that each query may attend to.

    query (B, H, Tq, D), key (B, Hkv, Tk, D), value (B, Hkv, Tk, Dv) -> (B, H, Tq, Dv). Query i sits at position
    i + query_offset, key j at position j. All of these hold together:

    attn_mask     broadcastable to (B, H, Tq, Tk): bool (True = may attend), or floating, of query's dtype or float32
                  (added). Keys that a bool mask keeps from every query of a sequence are padding too
    key_lengths   (B,) integers in [0, Tk]: sequence b has that many keys; the rest is padding, never read into a result
    is_causal     keys at or before the query's position
    window        (left, right): keys at most that far before and after it; a negative side is unlimited
    alibi_slopes  (H,): adds -slope * |distance|

    A query with nothing to attend to gives zeros, lse = -inf, and zero gradients.

    dropout_p in [0, 1) drops normalised probabilities whenever it is positive, as in scaled_dot_product_attention.
    scale is 1 / sqrt(D) by default. enable_gqa: H is a multiple of Hkv, and query head h reads key head
    h // (H / Hkv). return_lse: the result is (output, lse), lse (B, H, Tq) in float32 (float64 for float64): the
    natural log of the sum of exponentials of the masked scores, before dropout.

    Vaswani et al. 2017; computed without a (Tq, Tk) matrix, after Milakov and Gimelshein 2018 and Dao et al. 2022.
    """
    if (
        attn_mask is key_lengths is alibi_slopes is window is None
        and dropout_p == 0.0
        and runs_on_cpu(backend, query, key, value)
        and _fit(query, key, value)
    ):
        output, lse = ops.attention(
            query, key, value, None, None, None, None, None, is_causal, query_offset, -1, -1, 0.0, None,
            _scale(scale, query), return_lse,
        )  # fmt: skip
        return (output, lse) if return_lse else output
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _require_dims(name, tensor, 4, "(batch, heads, length, width)")
    if autocast.acts_on(query):
        call = partial(
            attention, attn_mask=attn_mask, key_lengths=key_lengths, is_causal=is_causal, query_offset=query_offset,
            window=window, alibi_slopes=alibi_slopes, dropout_p=dropout_p, scale=scale, enable_gqa=enable_gqa,
            return_lse=return_lse, backend=backend,
        )  # fmt: skip
        return autocast.lowered(call, query, key, value)
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    if key.shape[0] != batch or value.shape[0] != batch:
        raise ValueError(f"query, key and value differ in batch: {_shapes(query, key, value)}")
    if value.shape[2] != keys:
        raise ValueError(f"key and value differ in length: {_shapes(query, key, value)}")
    _check_common(query, key, value, window, alibi_slopes, dropout_p, scale, enable_gqa)
    if attn_mask is not None:
        checks.require_mask("attn_mask", attn_mask, query, (batch, heads, queries, keys))
    if key_lengths is not None:
        key_lengths = _check_integers("key_lengths", key_lengths, batch)
        _check_range("key_lengths", key_lengths, keys)
    checks.require_same_device(
        "query", query, attn_mask=attn_mask, key_lengths=key_lengths, alibi_slopes=alibi_slopes
    )

    seed = draw_seed() if dropout_p > 0.0 else None
    chosen = choose(
        "attention", (query, key, value), backend, cpu_refusal=_refusal(attn_mask, alibi_slopes)
    )
    if chosen == "reference":
        return reference.attention(
            query, key, value, attn_mask=attn_mask, key_lengths=key_lengths, is_causal=is_causal,
            query_offset=query_offset, window=window, alibi_slopes=alibi_slopes,
            dropout_p=dropout_p, scale=scale, enable_gqa=enable_gqa, return_lse=return_lse,
            seed=seed,
        )  # fmt: skip
    if attn_mask is not None:
        attn_mask = attn_mask.expand(batch, heads, queries, keys)
    output, lse = ops.attention(
        query, key, value, attn_mask, key_lengths, None, None, alibi_slopes, is_causal,
        query_offset, *(window or (-1, -1)), dropout_p, seed, _scale(scale, query), return_lse,
    )  # fmt: skip
    return (output, lse) if return_lse else output


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    is_causal: bool = False,
    window: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """attention() over sequences of different lengths, packed one after another without padding.

    query (total_q, H, D), key (total_k, Hkv, D), value (total_k, Hkv, Dv) -> (total_q, H, Dv). cu_seqlens_q and
    cu_seqlens_k (N + 1,) are the integer offsets at which the N sequences begin, ending with the total: sequence n
    holds the rows from cu_seqlens[n] up to cu_seqlens[n + 1]. Each sequence gives what attention() gives for it alone;
    lse is (H, total_q).
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _require_dims(name, tensor, 3, "(total tokens, heads, width)")
    if autocast.acts_on(query):
        call = partial(
            attention_varlen, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, is_causal=is_causal, window=window,
            alibi_slopes=alibi_slopes, dropout_p=dropout_p, scale=scale, enable_gqa=enable_gqa, return_lse=return_lse,
            backend=backend,
        )  # fmt: skip
        return autocast.lowered(call, query, key, value)
    if value.shape[0] != key.shape[0]:
        raise ValueError(f"key and value differ in length: {_shapes(query, key, value)}")
    _check_common(query, key, value, window, alibi_slopes, dropout_p, scale, enable_gqa)
    cu_seqlens_q = _check_offsets("cu_seqlens_q", cu_seqlens_q, query.shape[0])
    cu_seqlens_k = _check_offsets("cu_seqlens_k", cu_seqlens_k, key.shape[0])
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must describe the same number of sequences, got "
            f"{len(cu_seqlens_q) - 1} and {len(cu_seqlens_k) - 1}"
        )
    checks.require_same_device(
        "query", query, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        alibi_slopes=alibi_slopes,
    )  # fmt: skip

    seed = draw_seed() if dropout_p > 0.0 else None
    refusal = _refusal(None, alibi_slopes)
    if choose("attention_varlen", (query, key, value), backend, cpu_refusal=refusal) == "reference":
        return reference.attention_varlen(
            query, key, value, cu_seqlens_q, cu_seqlens_k, is_causal=is_causal, window=window,
            alibi_slopes=alibi_slopes, dropout_p=dropout_p, scale=scale, enable_gqa=enable_gqa,
            return_lse=return_lse, seed=seed,
        )  # fmt: skip
    output, lse = ops.attention(
        query, key, value, None, None, cu_seqlens_q, cu_seqlens_k, alibi_slopes, is_causal, 0,
        *(window or (-1, -1)), dropout_p, seed, _scale(scale, query), return_lse,
    )  # fmt: skip
    return (output, lse) if return_lse else output


def _fit(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether padded tensors of as many heads have the shapes that they should; where not, the checks say why."""
    if key is None or value is None or not query.dim() == key.dim() == value.dim() == 4:
        return False
    batch, heads, _, width = query.shape
    of_key, of_value = key.shape, value.shape
    return of_key == (batch, heads, of_value[2], width) and of_value[:2] == of_key[:2] and width > 0


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(checks.shape(tensor) for tensor in tensors)


def _scale(scale: float | None, query: Tensor) -> float:
    return 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)


def _require_dims(name: str, tensor: Tensor, dims: int, meaning: str) -> None:
    checks.require_floating(name, tensor)
    if tensor.dim() != dims:
        raise ValueError(f"{name} must be {meaning}, got the shape {checks.shape(tensor)}")


def _check_common(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: tuple[int, int] | None,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    scale: float | None,
    enable_gqa: bool,
) -> None:
    checks.require_same_device("query", query, key=key, value=value)
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} is {tensor.dtype} but query is {query.dtype}: use one dtype")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query and key differ in width: {query.shape[-1]} and {key.shape[-1]}")
    if query.shape[-1] == 0 and scale is None:
        raise ValueError("query has width 0: the default scale 1 / sqrt(width) is undefined")
    heads, kv_heads = query.shape[1], key.shape[1]
    if value.shape[1] != kv_heads:
        raise ValueError(f"key has {kv_heads} heads but value has {value.shape[1]}")
    if heads != kv_heads and not enable_gqa:
        raise ValueError(
            f"query has {heads} heads but key has {kv_heads}: they must agree unless enable_gqa=True"
        )
    if enable_gqa and (kv_heads == 0 or heads % kv_heads != 0):
        raise ValueError(f"query's {heads} heads are not a multiple of key's {kv_heads}")
    if window is not None and len(window) != 2:
        raise ValueError(f"window must be (left, right), got {window}")
    if alibi_slopes is not None:
        checks.require_shape("alibi_slopes", alibi_slopes, (heads,), "one for each query head")
    checks.require_probability("dropout_p", dropout_p)


def _check_integers(name: str, tensor: Tensor, length: int) -> Tensor:
    checks.require_tensor(name, tensor)
    if tensor.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, got {tensor.dtype}")
    if tuple(tensor.shape) != (length,):
        raise ValueError(f"{name} must have the shape ({length},), got {checks.shape(tensor)}")
    return tensor.to(torch.int64)


def _checkable(tensor: Tensor) -> bool:
    """Whether values can be looked at: not while tracing, and not where that would wait for a GPU."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_range(name: str, lengths: Tensor, most: int) -> None:
    if _checkable(lengths) and bool(((lengths < 0) | (lengths > most)).any()):
        raise ValueError(f"{name} must lie in [0, {most}], got {lengths.tolist()}")


def _check_offsets(name: str, offsets: Tensor, total: int) -> Tensor:
    checks.require_tensor(name, offsets)
    offsets = _check_integers(name, offsets, max(offsets.numel(), 1))
    if _checkable(offsets):
        sorted_up = bool((offsets[1:] >= offsets[:-1]).all())
        if offsets[0] != 0 or offsets[-1] != total or not sorted_up:
            raise ValueError(f"{name} must rise from 0 to {total}, got {offsets.tolist()}")
    return offsets


def _refusal(attn_mask: Tensor | None, alibi_slopes: Tensor | None) -> str | None:
    """What the CPU kernels leave to the reference."""
    if torch.is_grad_enabled():
        if attn_mask is not None and attn_mask.requires_grad:
            return "attn_mask wants a gradient"
        if alibi_slopes is not None and alibi_slopes.requires_grad:
            return "alibi_slopes wants a gradient"
    return None
