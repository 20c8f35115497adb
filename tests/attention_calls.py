"""Attention as the tests call it: the op, the reference and PyTorch's own, by the reference's arguments."""

import math

import torch
from properties import draw
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fasttx import philox, reference
from fasttx.ops import attention as ops

SEED = torch.tensor(0x1234_5678_9ABC)


def run_op(query: Tensor, key: Tensor, value: Tensor, **options) -> tuple[Tensor, Tensor]:
    """The op itself, with a dropout seed, by the reference's arguments."""
    mask = options.get("attn_mask")
    if mask is not None:
        mask = mask.expand(*query.shape[:3], key.shape[2])
    return ops.attention(
        query, key, value, mask, options.get("key_lengths"), None, None, options.get("alibi_slopes"),
        options.get("is_causal", False), options.get("query_offset", 0),
        *options.get("window", (-1, -1)), options.get("dropout_p", 0.0), options.get("seed"),
        options.get("scale", query.shape[-1] ** -0.5), backend=options.get("backend", ""),
    )  # fmt: skip


def run_reference(query: Tensor, key: Tensor, value: Tensor, **options) -> tuple[Tensor, Tensor]:
    return reference.attention(query, key, value, **options, enable_gqa=True, return_lse=True)


def bias_of(queries: int, keys: int, dtype: torch.dtype, **options) -> Tensor:
    """Everything that is added to the scores, -inf where a key is not attended to."""
    distance = torch.arange(keys) - torch.arange(queries)[:, None] - options.get("query_offset", 0)
    keep = torch.ones(1, 1, queries, keys, dtype=torch.bool)
    if options.get("is_causal"):
        keep = keep & (distance <= 0)
    left, right = options.get("window", (-1, -1))
    if left >= 0:
        keep = keep & (distance >= -left)
    if right >= 0:
        keep = keep & (distance <= right)
    if "key_lengths" in options:
        keep = keep & (torch.arange(keys) < options["key_lengths"][:, None, None, None])
    bias = torch.zeros(())
    if "alibi_slopes" in options:
        bias = bias - options["alibi_slopes"][:, None, None] * distance.abs()
    mask = options.get("attn_mask")
    if mask is not None and mask.dtype == torch.bool:
        keep = keep & mask
    elif mask is not None:
        bias = bias + mask
    return bias.to(dtype).masked_fill(~keep, -math.inf)


def run_eager(query: Tensor, key: Tensor, value: Tensor, **options) -> tuple[Tensor, Tensor]:
    """PyTorch's attention where every row sees a key, and lse in float32."""
    bias = bias_of(query.shape[2], key.shape[2], query.dtype, **options)
    scale = options.get("scale", query.shape[-1] ** -0.5)
    groups = query.shape[1] // max(key.shape[1], 1)
    wide_key = key.repeat_interleave(groups, 1).float()
    scores = query.float() @ wide_key.mT * scale + bias.float()
    lse = scores.logsumexp(-1)
    if not options.get("dropout_p"):
        bias = bias.expand(query.shape[0], query.shape[1], *bias.shape[2:])
        output = scaled_dot_product_attention(
            query, key, value, attn_mask=bias, scale=options.get("scale"), enable_gqa=True
        )
        return output, lse
    p = options["dropout_p"]
    batch, heads = torch.arange(query.shape[0]), torch.arange(query.shape[1])
    keep = philox.keep_mask(options["seed"], batch, heads, *scores.shape[2:], p)
    scores = query @ key.repeat_interleave(groups, 1).mT * scale + bias
    probabilities = scores.softmax(-1) * keep / (1 - p)
    return probabilities.to(query.dtype) @ value.repeat_interleave(groups, 1), lse


def draw_inputs(
    batch: int, heads: int, kv_heads: int, queries: int, keys: int, width: int, value_width: int
) -> dict[str, Tensor]:
    return {
        # Scores well within their exponentials' range: else one row's luck decides the largest error.
        "query": draw(batch, heads, queries, width) / 2,
        "key": draw(batch, kv_heads, keys, width),
        "value": draw(batch, kv_heads, keys, value_width),
    }
