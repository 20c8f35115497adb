"""The weights that attention applies."""

import math
from functools import partial, reduce

import torch
from torch import Tensor

from fasttx import autocast, checks, philox, reference
from fasttx.dispatch import choose
from fasttx.ops.attention import EACH

from ._attention_checks import check_lse, check_padded
from .attention import attend, scale_of

# Dropout's random words are made for so many weights at a time: they stay in cache.
_WEIGHTS_AT_A_TIME = 1 << 18


def attention_weights(
    query: Tensor,
    key: Tensor,
    lse: Tensor | None = None,
    *,
    attn_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    is_causal: bool = False,
    query_offset: int = 0,
    window: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    backend: str | None = None,
) -> Tensor:
    """exp(scale * query key^T + bias - lse): the weights that attention() gives the keys, (B, H, Tq, Tk).

    query (B, H, Tq, D), key (B, Hkv, Tk, D); the options are attention()'s. lse (B, H, Tq) is that of these keys, or
    of more: with the merged lse of all parts the weights are this part's share. None: that of these keys, and the
    weights are their softmax, which is exact where lse has been rounded. Keys that a query may not attend to get 0, and
    so does every key of a query with nothing to attend to. Computed in float32 (float64 for float64) and rounded once,
    to query's dtype. Differentiable by query, key, lse and a floating attn_mask.

    dropout_p and seed (an int, or an int64 tensor of no dimensions): the weights applied under them, that is dropped,
    or scaled by 1 / (1 - dropout_p).
    """
    checks.require_floating("query", query)
    options = {
        "is_causal": is_causal, "query_offset": query_offset, "window": window, "alibi_slopes": alibi_slopes,
        "dropout_p": dropout_p, "scale": scale,
    }  # fmt: skip
    if autocast.acts_on(query):
        call = partial(
            attention_weights, attn_mask=attn_mask, key_lengths=key_lengths, **options, seed=seed,
            enable_gqa=enable_gqa, backend=backend,
        )  # fmt: skip
        return autocast.lowered(lambda query, key: call(query, key, lse), query, key)
    key_lengths = check_padded(query, key, None, attn_mask, key_lengths, **options, enable_gqa=enable_gqa)
    if lse is not None:
        check_lse("lse", lse, tuple(query.shape[:-1]), query)
        checks.require_same_device("query", query, lse=lse)
    if dropout_p > 0.0 and seed is None:
        raise checks.ArgumentError(f"seed must be given where dropout_p is {dropout_p}")
    if lse is not None and choose("attention_weights", (query, key), backend) == "reference":
        return reference.attention_weights(
            query, key, lse, attn_mask=attn_mask, key_lengths=key_lengths, **options, seed=seed, enable_gqa=True
        )
    if lse is None or _is_worth_two_passes(query, attn_mask, key_lengths, is_causal, window, alibi_slopes):
        seed = torch.tensor(seed) if isinstance(seed, int) else seed
        nothing = key.new_empty((*key.shape[:-1], 0))  # what the weights are applied to
        _, own, weights = attend(
            query, key, nothing, attn_mask=attn_mask, key_lengths=key_lengths, **options, seed=seed,
            return_lse=lse is not None, weights=EACH, op="attention_weights", backend=backend,
        )  # fmt: skip
        if lse is None:
            return weights
        # Finite, so that keys which are masked get 0 whatever lse is.
        most = math.log(torch.finfo(own.dtype).max) - 1
        return weights * (own - _without_keys(lse)).clamp(max=most).exp()[..., None]
    scores = _scores(query, key, scale_of(scale, query))
    mask = _mask(scores, attn_mask, key_lengths, is_causal, query_offset, window, alibi_slopes)
    weights = scores.sub_(_without_keys(lse)[..., None])
    if mask is not None:
        weights = weights.masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else weights.add_(mask)
    weights = weights.exp_()
    if dropout_p > 0.0:
        weights = (weights * _kept(weights, seed, dropout_p)).mul_(1.0 / (1.0 - dropout_p))
    return weights.to(query.dtype)


def _is_worth_two_passes(query: Tensor, *masks: object) -> bool:
    """Whether to take the softmax's weights from the kernel, and scale them: it has masks in the same pass.

    Not where that would round twice, to a half.
    """
    wide = query.dtype in (torch.float32, torch.float64)
    return wide and query.is_cpu and any(mask is not None and mask is not False for mask in masks)


def _without_keys(lse: Tensor) -> Tensor:
    """lse, and inf in place of the -inf of a query without keys, whose weights are to be zero."""
    return lse.masked_fill(lse == -math.inf, math.inf)


def _scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """scale * query key^T (B, H, Tq, Tk), one product for all query heads that share a key head."""
    batch, heads, queries, width = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    query, keys = query.to(wide) * scale, key.to(wide).mT
    if heads == key.shape[1]:
        return query @ keys
    of_each = heads // key.shape[1]
    grouped = query.reshape(batch, key.shape[1], of_each * queries, width) @ keys
    return grouped.view(batch, heads, queries, key.shape[2])


def _mask(
    scores: Tensor,
    attn_mask: Tensor | None,
    key_lengths: Tensor | None,
    is_causal: bool,
    query_offset: int,
    window: tuple[int, int] | None,
    alibi_slopes: Tensor | None,
) -> Tensor | None:
    """All of it as one mask that broadcasts to scores: bool, True = may attend, or what is to be added."""
    queries, keys = scores.shape[-2:]
    left, right = window or (-1, -1)
    right = 0 if is_causal else right
    kept, added = [], []
    if left >= 0 or right >= 0 or alibi_slopes is not None:
        positions = torch.arange(query_offset, query_offset + queries, device=scores.device)
        distance = torch.arange(keys, device=scores.device) - positions[:, None]
        if left >= 0:
            kept.append(distance >= -left)
        if right >= 0:
            kept.append(distance <= right)
        if alibi_slopes is not None:
            added.append(-alibi_slopes.to(scores.dtype)[:, None, None] * distance.abs())
    if key_lengths is not None:
        kept.append(torch.arange(keys, device=scores.device) < key_lengths[:, None, None, None])
    if attn_mask is not None:
        (kept if attn_mask.dtype == torch.bool else added).append(attn_mask)
    keep = reduce(torch.logical_and, kept) if kept else None
    if not added:
        return keep
    bias = reduce(torch.add, added).to(scores.dtype)
    return bias if keep is None else bias.masked_fill(~keep, -math.inf)


def _kept(weights: Tensor, seed: int | Tensor, p: float) -> Tensor:
    """Which weights dropout keeps."""
    batch, heads, queries, keys = weights.shape
    of_batch, of_head = (torch.arange(count, device=weights.device) for count in (batch, heads))
    parts = (of_head,)
    if not torch.compiler.is_compiling():
        parts = of_head.split(max(1, _WEIGHTS_AT_A_TIME // max(1, batch * queries * keys)))
    return torch.cat([philox.keep_mask(seed, of_batch, part, queries, keys, p) for part in parts], dim=1)
