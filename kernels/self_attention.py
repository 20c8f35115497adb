"""Self-attention with its projections, alone and as the half of a transformer layer: products and attention in turn.

q, k and v are read where the joined projection left them, and attention leaves its output as the next product reads it.
"""

import torch
from torch import Tensor

from ._attention_checks import refuse_weights
from .attention import attention_fwd
from .attention_bwd import attention_bwd
from .checks import require_input, require_like, require_values, require_weight
from .dropout import Dropout
from .launch import dense
from .layer_norm import add_layer_norm_bwd, layer_norm_fwd
from .linear import as_rows, linear_bwd, linear_fwd
from .matmul import NO_DROPOUT, multiply


def _check(input: Tensor, weight_in: Tensor, weight_out: Tensor, heads: int, cu_seqlens: Tensor | None) -> None:
    dims = 3 if cu_seqlens is None else 2
    require_input("input", input)
    if input.dim() != dims:
        raise ValueError(f"input must have {dims} dimensions, got {input.dim()}")
    require_weight("weight_in", weight_in, input, input.shape[-1])
    if heads <= 0 or weight_in.shape[0] % (3 * heads):
        raise ValueError(f"weight_in of shape {tuple(weight_in.shape)} does not consist of 3 x {heads} heads")
    require_weight("weight_out", weight_out, input, weight_in.shape[0] // 3)


def _split(qkv: Tensor, heads: int, batch_first: bool) -> list[Tensor]:
    """q, k and v as attention takes them: (batch, heads, length, width); of packed sequences (tokens, heads, width)."""
    parts = qkv.view(*qkv.shape[:-1], 3, heads, qkv.shape[-1] // (3 * heads)).unbind(-3)
    return [_heads_second(part, batch_first) for part in parts]


def _heads_second(part: Tensor, batch_first: bool) -> Tensor:
    if part.dim() == 3:
        return part
    return part.transpose(1, 2) if batch_first else part.permute(1, 2, 0, 3)


def _joined(part: Tensor, batch_first: bool) -> Tensor:
    """The way back: heads side by side in the last dim."""
    if part.dim() == 4:
        part = part.transpose(1, 2) if batch_first else part.permute(2, 0, 1, 3)
    return part.reshape(*part.shape[:-2], part.shape[-2] * part.shape[-1])


def _options(mask, cu_seqlens, is_causal, p, seed, scale) -> tuple:
    """attention's arguments after query, key and value."""
    return mask, None, cu_seqlens, cu_seqlens, None, is_causal, 0, -1, -1, p, seed, scale


def _forward(
    input: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_out: Tensor, bias_out: Tensor | None, heads: int,
    batch_first: bool, options: tuple, store: bool, *, residual: Tensor | None = None, dropout: Dropout = NO_DROPOUT,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """residual + dropout(out(attention(in(input)))), qkv, what attention gave, and its statistics."""
    _check(input, weight_in, weight_out, heads, options[2])
    require_like("bias_out", bias_out, input, weight_out.shape[:1])
    qkv = linear_fwd(input, weight_in, bias_in, None)
    attended, _, stats, _ = attention_fwd(*_split(qkv, heads, batch_first), *options, store)
    attended = _joined(attended, batch_first)
    y = input.new_empty((*input.shape[:-1], weight_out.shape[0]))
    require_like("residual", residual, y)
    multiply(
        as_rows(attended), weight_out.t(), y, bias=dense(bias_out), residual=dense(residual), dropout=dropout
    )  # fmt: skip
    return y, qkv, attended, stats


def _backward(
    grad: Tensor, input: Tensor, weight_in: Tensor, weight_out: Tensor, qkv: Tensor, attended: Tensor, stats: Tensor,
    heads: int, batch_first: bool, options: tuple, residual: Tensor | None, needs_input: bool, needs_weight_in: bool,
    needs_bias_in: bool, needs_weight_out: bool, needs_bias_out: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of out(attention(in(input))); residual is added to the input's."""
    none = input.new_empty((0,))
    dx, dweight_in, dbias_in = none, torch.empty_like(none), torch.empty_like(none)
    needs_projection = needs_input or needs_weight_in or needs_bias_in
    dattended, dweight_out, dbias_out = linear_bwd(
        grad, attended, weight_out, needs_projection, needs_weight_out, needs_bias_out
    )
    if needs_projection:
        query, key, value = _split(qkv, heads, batch_first)
        width = value.shape[-1]
        slope, output = (
            _heads_second(x.view(*x.shape[:-1], heads, width), batch_first) for x in (dattended, dense(attended))
        )
        gradients = attention_bwd(slope, None, query, key, value, output, stats, *options)
        dqkv = torch.cat([_joined(gradient, batch_first) for gradient in gradients], dim=-1)
        _, dweight_in, dbias_in = linear_bwd(dqkv, input, weight_in, False, needs_weight_in, needs_bias_in)
        if needs_input:
            dx = input.new_empty(input.shape)
            multiply(as_rows(dqkv), weight_in, dx, residual=residual)
    return dx, dweight_in, dbias_in, dweight_out, dbias_out


def _check_stored(input: Tensor, weight_in: Tensor, qkv: Tensor, attended: Tensor, stats: Tensor, heads: int) -> None:
    outer = input.shape[:-1]
    require_like("qkv", qkv, input, (*outer, weight_in.shape[0]))
    require_like("attended", attended, input, (*outer, weight_in.shape[0] // 3))
    if stats.dtype is not torch.float32 or stats.numel() != 2 * heads * outer.numel() or stats.shape[-1] != 2:
        raise ValueError(
            f"stats must be float32 with two values a row and head, got {tuple(stats.shape)} {stats.dtype}"
        )


def _refuse_packed(*packed: Tensor | None) -> None:
    if any(weight is not None for weight in packed):
        raise ValueError("packed_in and packed_out must be None: weights are packed for the CPU's kernels only")


def self_attention_fwd(
    input: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_out: Tensor, bias_out: Tensor | None, heads: int,
    batch_first: bool, attn_mask: Tensor | None, cu_seqlens: Tensor | None, is_causal: bool, scale: float,
    attention_p: float, attention_seed: Tensor | None, store: bool, packed_in: Tensor | None,
    packed_out: Tensor | None, weights: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """fasttx::self_attention_fwd; weights are not packed here."""
    _refuse_packed(packed_in, packed_out)
    refuse_weights(weights, None)
    Dropout.of(attention_p, attention_seed)
    options = _options(attn_mask, cu_seqlens, is_causal, attention_p, attention_seed, scale)
    y, *stored = _forward(input, weight_in, bias_in, weight_out, bias_out, heads, batch_first, options, store)
    kept = stored if store else [x.new_empty((0,)) for x in stored]
    return y, *kept, input.new_empty((0,))


def self_attention_bwd(
    grad: Tensor, input: Tensor, weight_in: Tensor, weight_out: Tensor, qkv: Tensor, attended: Tensor, stats: Tensor,
    heads: int, batch_first: bool, attn_mask: Tensor | None, cu_seqlens: Tensor | None, is_causal: bool, scale: float,
    attention_p: float, attention_seed: Tensor | None, needs_input: bool, needs_weight_in: bool, needs_bias_in: bool,
    needs_weight_out: bool, needs_bias_out: bool, grad_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """fasttx::self_attention_bwd."""
    refuse_weights(0, grad_weights)
    _check(input, weight_in, weight_out, heads, cu_seqlens)
    _check_stored(input, weight_in, qkv, attended, stats, heads)
    Dropout.of(attention_p, attention_seed)
    options = _options(attn_mask, cu_seqlens, is_causal, attention_p, attention_seed, scale)
    return _backward(
        grad, input, weight_in, weight_out, qkv, attended, stats, heads, batch_first, options, None,
        needs_input, needs_weight_in, needs_bias_in, needs_weight_out, needs_bias_out,
    )  # fmt: skip


def attention_block_fwd(
    input: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_out: Tensor, bias_out: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, norm_first: bool, heads: int, batch_first: bool,
    attn_mask: Tensor | None, cu_seqlens: Tensor | None, is_causal: bool, scale: float, attention_p: float,
    attention_seed: Tensor | None, dropout_p: float, seed: Tensor | None, store: bool, packed_in: Tensor | None,
    packed_out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """fasttx::attention_block_fwd; weights are not packed here."""
    _refuse_packed(packed_in, packed_out)
    _check(input, weight_in, weight_out, heads, cu_seqlens)
    width = input.shape[-1]
    require_values("norm_weight", norm_weight, input, width)
    require_values("norm_bias", norm_bias, input, width)
    Dropout.of(attention_p, attention_seed)
    dropout = Dropout.of(dropout_p, seed)
    options = _options(attn_mask, cu_seqlens, is_causal, attention_p, attention_seed, scale)
    x = layer_norm_fwd(input, width, norm_weight, norm_bias, eps) if norm_first else input
    total, *stored = _forward(
        x, weight_in, bias_in, weight_out, bias_out, heads, batch_first, options, store and not norm_first,
        residual=input, dropout=dropout,
    )  # fmt: skip
    nothing = [input.new_empty((0,)) for _ in range(4)]
    if norm_first:
        return (total, *nothing)
    y = layer_norm_fwd(total, width, norm_weight, norm_bias, eps)
    return (y, *stored, total) if store else (y, *nothing)


def attention_block_bwd(
    grad: Tensor, input: Tensor, weight_in: Tensor, weight_out: Tensor, norm_weight: Tensor | None, qkv: Tensor,
    attended: Tensor, stats: Tensor, sum: Tensor, eps: float, heads: int, batch_first: bool, attn_mask: Tensor | None,
    cu_seqlens: Tensor | None, is_causal: bool, scale: float, attention_p: float, attention_seed: Tensor | None,
    dropout_p: float, seed: Tensor | None, needs_input: bool, needs_weight_in: bool, needs_bias_in: bool,
    needs_weight_out: bool, needs_bias_out: bool, needs_norm_weight: bool, needs_norm_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """fasttx::attention_block_bwd."""
    _check(input, weight_in, weight_out, heads, cu_seqlens)
    _check_stored(input, weight_in, qkv, attended, stats, heads)
    require_like("sum", sum, input)
    Dropout.of(attention_p, attention_seed)
    options = _options(attn_mask, cu_seqlens, is_causal, attention_p, attention_seed, scale)
    drops = dropout_p > 0.0
    dsum, dropped, dnorm_weight, dnorm_bias = add_layer_norm_bwd(
        grad, None, sum, norm_weight, input.shape[-1], eps, dropout_p, seed,
        drops, True, needs_norm_weight, needs_norm_bias,
    )  # fmt: skip
    gradients = _backward(
        dropped if drops else dsum, input, weight_in, weight_out, qkv, attended, stats, heads, batch_first, options,
        dsum, needs_input, needs_weight_in, needs_bias_in, needs_weight_out, needs_bias_out,
    )  # fmt: skip
    return (*gradients, dnorm_weight, dnorm_bias)
