"""What eager PyTorch makes of each of fasttx's ops, from its own ops: the yardstick of `compare`.

Each takes its namesake's arguments in fasttx.reference, in any dtype. Dropout alone is written out,
with the mask that the kernels draw, as PyTorch's own cannot be told which values to drop.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttx import philox


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
    seed: int | Tensor | None = None,
    batch: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """scaled_dot_product_attention, with every other option turned into its mask."""
    others = (attn_mask, key_lengths, window, alibi_slopes)
    if query_offset or any(option is not None for option in others):
        attn_mask = _mask(query, key, attn_mask, key_lengths, is_causal, query_offset, window, alibi_slopes)
        is_causal = False
    if dropout_p == 0.0 and not return_lse:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.mT * (scale or 1 / math.sqrt(query.shape[-1]))
    if is_causal:
        attn_mask = torch.ones_like(scores, dtype=torch.bool).tril()
    if attn_mask is not None:
        scores = scores + _additive(attn_mask, scores.dtype)
    probabilities = scores.softmax(-1)
    if dropout_p > 0.0:
        batch = torch.arange(len(query)) if batch is None else batch
        heads = torch.arange(query.shape[1])
        keep = philox.keep_mask(seed, batch, heads, *scores.shape[2:], dropout_p)
        probabilities = probabilities * keep / (1 - dropout_p)
    output = probabilities @ value
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return (output, wide.logsumexp(-1)) if return_lse else output


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    **options,
) -> Tensor:
    """One call of attention for each sequence."""
    bounds = zip(
        cu_seqlens_q[:-1].tolist(),
        cu_seqlens_q[1:].tolist(),
        cu_seqlens_k[:-1].tolist(),
        cu_seqlens_k[1:].tolist(),
        strict=True,
    )
    outputs = [
        attention(
            query[q0:q1].transpose(0, 1)[None],
            key[k0:k1].transpose(0, 1)[None],
            value[k0:k1].transpose(0, 1)[None],
            batch=torch.tensor([index]),
            **options,
        )[0].transpose(0, 1)
        for index, (q0, q1, k0, k1) in enumerate(bounds)
    ]
    return torch.cat(outputs)


def softmax(input: Tensor, *, mask: Tensor | None = None, is_causal: bool = False, dim: int = -1) -> Tensor:
    """torch.softmax of the masked input."""
    if is_causal:
        rows = torch.ones(input.shape[-2:], dtype=torch.bool).tril()
        input = input.masked_fill(~rows, -math.inf)
    if mask is not None:
        input = input + _additive(mask, input.dtype)
    return input.softmax(dim)


def layer_norm(
    input: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """torch.nn.functional.layer_norm."""
    return F.layer_norm(input, normalized_shape, weight, bias, eps)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    return_sum: bool = False,
    seed: int | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Dropout, sum, layer norm: three ops."""
    if training:
        input = _dropout(input, dropout_p, seed, math.prod(normalized_shape))
    total = residual + input
    normed = F.layer_norm(total, normalized_shape, weight, bias, eps)
    return (normed, total) if return_sum else normed


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """torch.nn.functional.gelu."""
    return F.gelu(input, approximate=approximate)


def bias_gelu(input: Tensor, bias: Tensor, approximate: str = "none") -> Tensor:
    """Sum, GELU: two ops."""
    return F.gelu(input + bias, approximate=approximate)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear."""
    return F.linear(input, weight, bias)


def feed_forward(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    activation: str = "gelu",
    dropout_p: float = 0.0,
    training: bool = False,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Linear, activation, dropout, linear: four ops."""
    hidden = _ACTIVATIONS[activation](F.linear(input, weight1, bias1))
    if training:
        hidden = _dropout(hidden, dropout_p, seed, hidden.shape[-1])
    return F.linear(hidden, weight2, bias2)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def _dropout(x: Tensor, p: float, seed: int | Tensor | None, columns: int) -> Tensor:
    keep = philox.matrix_keep_mask(seed, x.numel() // columns, columns, p, x.device)
    return x * keep.view(x.shape) / (1 - p)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add: bool becomes 0 and -inf."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -math.inf)


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The linear layer, and cross_entropy of its output."""
    logits = F.linear(input, weight, bias).flatten(0, -2)
    loss = F.cross_entropy(
        logits, target.flatten(), ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction
    )
    return loss.view(target.shape) if reduction == "none" else loss


def embedding(
    token_ids: Tensor,
    token_weight: Tensor,
    position_weight: Tensor | None = None,
    segment_ids: Tensor | None = None,
    segment_weight: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    position_ids: Tensor | None = None,
    offset: int = 0,
    token_scale: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    padding_idx: int | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Sums of F.embedding, and F.layer_norm."""
    total = F.embedding(token_ids, token_weight, padding_idx)
    if token_scale != 1.0:
        total = total * token_scale
    if position_weight is not None:
        positions = position_ids
        if positions is None:
            positions = torch.arange(token_ids.shape[-1], device=token_ids.device) + offset
        total = total + F.embedding(positions, position_weight)
    if segment_weight is not None:
        segments = torch.zeros_like(token_ids) if segment_ids is None else segment_ids
        total = total + F.embedding(segments, segment_weight)
    if norm_weight is not None:
        total = F.layer_norm(total, (total.shape[-1],), norm_weight, norm_bias, eps)
    if not training or dropout_p == 0.0:
        return total
    keep = philox.matrix_keep_mask(seed, token_ids.numel(), total.shape[-1], dropout_p, total.device)
    return total * keep.view(total.shape).to(total.dtype).div(1 - dropout_p)


def _mask(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    key_lengths: Tensor | None,
    is_causal: bool,
    query_offset: int,
    window: tuple[int, int] | None,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """All that restricts or biases attention as one mask (B, H, Tq, Tk), in query's dtype."""
    queries, keys = query.shape[2], key.shape[2]
    distance = torch.arange(keys) - (torch.arange(queries) + query_offset)[:, None]
    allowed = torch.ones(len(query), query.shape[1], queries, keys, dtype=torch.bool)
    if is_causal:
        allowed &= distance <= 0
    if window is not None:
        left, right = window
        allowed &= (left < 0) | (distance >= -left)
        allowed &= (right < 0) | (distance <= right)
    if key_lengths is not None:
        allowed &= torch.arange(keys) < key_lengths[:, None, None, None]
    mask = _additive(allowed, query.dtype)
    if alibi_slopes is not None:
        mask = mask - alibi_slopes[:, None, None] * distance.abs()
    return mask if attn_mask is None else mask + _additive(attn_mask, query.dtype)
