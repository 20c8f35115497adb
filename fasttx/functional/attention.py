"""Attention: padded, and packed (variable length)."""

import math
from functools import partial

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Parameter

from fasttx import autocast, checks, reference
from fasttx.dispatch import choose, runs_on_cpu
from fasttx.ops import attention as ops
from fasttx.ops._library import wants_grad
from fasttx.rng import draw_seed

from ._attention_checks import check_common, check_offsets, check_padded, require_dims
from ._nested import any_nested, attend_nested, refuse_options


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
    alibi_slopes  (H,): adds -slope * |distance|; they may be learned

    A query with nothing to attend to gives zeros, lse = -inf, and zero gradients.

    dropout_p in [0, 1) drops normalised probabilities whenever it is positive, as in scaled_dot_product_attention.
    scale is 1 / sqrt(D) by default. enable_gqa: H is a multiple of Hkv, and query head h reads key head
    h // (H / Hkv). return_lse: the result is (output, lse), lse (B, H, Tq) in float32 (float64 for float64): the
    natural log of the sum of exponentials of the masked scores, before dropout.

    query, key and value may be jagged nested tensors (B, H, ragged length, D): each sequence attends to its own keys,
    without attn_mask, key_lengths and query_offset, and the results are as ragged as query.

    Vaswani et al. 2017; computed without a (Tq, Tk) matrix, after Milakov and Gimelshein 2018 and Dao et al. 2022.
    """
    if attn_mask is key_lengths is window is alibi_slopes is backend is None and dropout_p == 0.0:
        # Without a mask a call costs as much as the kernel where inputs are small: it is looked at in C.
        given = (query, key, value, is_causal, query_offset, scale, return_lse)
        results = None if is_compiling() else ops.plain_attention(*given)
        if results is not None:
            return results[:2] if return_lse else results[0]
    if (
        alibi_slopes is window is None
        and runs_on_cpu(backend, query, key, value)
        and _fit(query, key, value)
        and (attn_mask is None or _mask_fits(attn_mask, query, key))
        and (key_lengths is None or _lengths_fit(key_lengths, key))
        and (dropout_p == 0.0 or (type(dropout_p) is float and 0.0 < dropout_p < 1.0))
        and type(is_causal) is bool
        and type(query_offset) is int
        and (scale is None or (type(scale) is float and math.isfinite(scale)))
    ):
        output, lse = ops.attention(
            query, key, value, _in_four_dims(attn_mask), key_lengths, None, None, None, is_causal, query_offset, -1, -1,
            dropout_p, draw_seed() if dropout_p else None, scale_of(scale, query), return_lse,
        )  # fmt: skip
        return (output, lse) if return_lse else output
    options = {
        "is_causal": is_causal, "window": window, "alibi_slopes": alibi_slopes, "dropout_p": dropout_p, "scale": scale
    }  # fmt: skip
    if any_nested(query, key, value):
        refuse_options(attn_mask=attn_mask, key_lengths=key_lengths, query_offset=query_offset or None)
        packed = partial(
            attention_varlen, **options, enable_gqa=enable_gqa, return_lse=return_lse, backend=backend
        )
        return attend_nested(packed, query, key, value)
    checks.require_floating("query", query)
    if autocast.acts_on(query):
        call = partial(
            attention, attn_mask=attn_mask, key_lengths=key_lengths, query_offset=query_offset, **options,
            enable_gqa=enable_gqa, return_lse=return_lse, backend=backend,
        )  # fmt: skip
        return autocast.lowered(call, query, key, value)
    checks.require_tensor("value", value)
    key_lengths = check_padded(
        query, key, value, attn_mask, key_lengths, query_offset, **options, enable_gqa=enable_gqa
    )
    seed = draw_seed() if dropout_p > 0.0 else None
    output, lse, _ = attend(
        query, key, value, attn_mask=attn_mask, key_lengths=key_lengths, query_offset=query_offset,
        **options, seed=seed, return_lse=return_lse, backend=backend,
    )  # fmt: skip
    return (output, lse) if return_lse else output


def attend(
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
    seed: Tensor | None = None,
    return_lse: bool = False,
    weights: int = ops.NONE,
    op: str = "attention",
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """attention() of arguments that were checked, under a seed that the caller knows.

    Output, lse where it is asked for, and the weights that were applied: those of ops.EACH head, or their ops.MEAN.
    Autocast acts on it as on attention(). `op`: what the call is known as.
    """
    options = {
        "attn_mask": attn_mask, "key_lengths": key_lengths, "is_causal": is_causal, "query_offset": query_offset,
        "window": window, "alibi_slopes": alibi_slopes, "dropout_p": dropout_p, "scale": scale, "seed": seed,
    }  # fmt: skip
    if autocast.acts_on(query):
        call = partial(attend, **options, return_lse=return_lse, weights=weights, op=op, backend=backend)
        return autocast.lowered(call, query, key, value)
    refusal = _refusal_on_gpu(query, alibi_slopes, weights)
    taken = choose(op, (query, key, value), backend, kernel_refusal=refusal)
    if taken == "reference":
        options["enable_gqa"] = True
        output, lse = reference.attention(query, key, value, **options, return_lse=True)
        applied = None if weights == ops.NONE else reference.attention_weights(query, key, **options)
        return output, lse if return_lse else None, applied.mean(1) if weights == ops.MEAN else applied
    output, lse, *applied = ops.attention(
        query, key, value, _in_four_dims(attn_mask), key_lengths, None, None, alibi_slopes, is_causal,
        query_offset, *(window or (-1, -1)), dropout_p, seed, scale_of(scale, query), return_lse, weights, taken,
    )  # fmt: skip
    return output, lse, *(applied or (None,))


def _refusal_on_gpu(query: Tensor, alibi_slopes: Tensor | None, weights: int) -> str | None:
    """What the GPU kernels do not do of what the CPU's do."""
    if query.is_cpu:
        return None
    if weights != ops.NONE:
        return "no GPU kernel gives the weights that attention applies"
    if alibi_slopes is not None and wants_grad(alibi_slopes):
        return "no GPU kernel has a gradient for alibi_slopes"
    return None


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
        require_dims(name, tensor, 3, "(total tokens, heads, width)")
    if autocast.acts_on(query):
        call = partial(
            attention_varlen, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, is_causal=is_causal, window=window,
            alibi_slopes=alibi_slopes, dropout_p=dropout_p, scale=scale, enable_gqa=enable_gqa, return_lse=return_lse,
            backend=backend,
        )  # fmt: skip
        return autocast.lowered(call, query, key, value)
    if value.shape[0] != key.shape[0]:
        raise checks.ArgumentError(f"key and value differ in length: {key.shape[0]} and {value.shape[0]} tokens")
    check_common(
        query, key, value, is_causal=is_causal, window=window, alibi_slopes=alibi_slopes,
        dropout_p=dropout_p, scale=scale, enable_gqa=enable_gqa,
    )  # fmt: skip
    cu_seqlens_q = check_offsets("cu_seqlens_q", cu_seqlens_q, query.shape[0])
    cu_seqlens_k = check_offsets("cu_seqlens_k", cu_seqlens_k, key.shape[0])
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        raise checks.ArgumentError(
            "cu_seqlens_q and cu_seqlens_k must describe the same number of sequences, got "
            f"{len(cu_seqlens_q) - 1} and {len(cu_seqlens_k) - 1}"
        )
    checks.require_same_device("query", query, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)

    seed = draw_seed() if dropout_p > 0.0 else None
    refusal = _refusal_on_gpu(query, alibi_slopes, ops.NONE)
    taken = choose("attention_varlen", (query, key, value), backend, kernel_refusal=refusal)
    if taken == "reference":
        return reference.attention_varlen(
            query, key, value, cu_seqlens_q, cu_seqlens_k, is_causal=is_causal, window=window,
            alibi_slopes=alibi_slopes, dropout_p=dropout_p, scale=scale, enable_gqa=enable_gqa,
            return_lse=return_lse, seed=seed,
        )  # fmt: skip
    output, lse = ops.attention(
        query, key, value, None, None, cu_seqlens_q, cu_seqlens_k, alibi_slopes, is_causal, 0,
        *(window or (-1, -1)), dropout_p, seed, scale_of(scale, query), return_lse, backend=taken,
    )  # fmt: skip
    return (output, lse) if return_lse else output


def _fit(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether padded tensors of as many heads have the shapes that they should; where not, the checks say why."""
    if key is None or value is None or not query.dim() == key.dim() == value.dim() == 4:
        return False
    batch, heads, _, width = query.shape
    of_key, of_value = key.shape, value.shape
    return of_key == (batch, heads, of_value[2], width) and of_value[:2] == of_key[:2] and width > 0


def _mask_fits(mask: Tensor, query: Tensor, key: Tensor) -> bool:
    """The same of a mask: a plain tensor of a dtype that masks have, which broadcasts to every score."""
    if type(mask) not in (Tensor, Parameter) or not mask.is_cpu or mask.layout is not torch.strided or mask.is_nested:
        return False
    if mask.dtype not in (torch.bool, torch.float32, query.dtype) or mask.dim() > 4:
        return False
    scores = (*query.shape[:3], key.shape[2])
    return all(size in (1, most) for size, most in zip(reversed(mask.shape), reversed(scores), strict=False))


def _lengths_fit(lengths: Tensor, key: Tensor) -> bool:
    """The same of the sequences' lengths."""
    if type(lengths) is not Tensor or lengths.dtype != torch.int64 or not lengths.is_cpu:
        return False
    if lengths.layout is not torch.strided or lengths.shape != key.shape[:1]:
        return False
    keys, values = key.shape[2], lengths.tolist()
    return not values or (min(values) >= 0 and max(values) <= keys)


def _in_four_dims(mask: Tensor | None) -> Tensor | None:
    """Not expanded: its gradient is summed over what it broadcasts over, and has its own shape."""
    return mask if mask is None or mask.dim() == 4 else mask[(None,) * (4 - mask.dim())]


def scale_of(scale: float | None, query: Tensor) -> float:
    """The scale, or what it is by default."""
    return 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
