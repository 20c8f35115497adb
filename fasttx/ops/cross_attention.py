"""Attention to a memory with its projections, in training: out(attention(q, k, v)), q of x, and k and v of the memory.

One node of autograd, and no operator of the library: forward and backward call those of linear layers and of attention.
By themselves they are four nodes, and as many again for the views between them: longer than small layers' kernels take.
"""

import torch
from torch import Tensor

from .attention import attention_bwd, attention_fwd
from .linear import linear_bwd, linear_fwd

_NO_LENGTHS_NOR_SLOPES = (None, None, None, None)
_NO_OFFSET_NOR_WINDOW = (0, -1, -1)


class _CrossAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, memory, weight_in, bias_in, weight_out, bias_out, heads, batch_first, mask, is_causal, dropout_p, seed
    ):  # fmt: skip
        width = weight_out.shape[1]
        (weight_q, weight_kv), (bias_q, bias_kv) = _split(weight_in, width), _split(bias_in, width)
        q = linear_fwd.raw(x, weight_q, bias_q, None)
        kv = linear_fwd.raw(memory, weight_kv, bias_kv, None)
        ctx.options = heads, batch_first, is_causal, dropout_p, (width // heads) ** -0.5
        attended, _, stats, _ = attention_fwd.raw(
            *_heads_of(q, kv, heads, batch_first), mask, *_NO_LENGTHS_NOR_SLOPES, is_causal, *_NO_OFFSET_NOR_WINDOW,
            dropout_p, seed, ctx.options[-1], True,
        )  # fmt: skip
        ctx.save_for_backward(x, memory, weight_in, weight_out, q, kv, attended, stats, mask, seed)
        return linear_fwd.raw(_joined(attended, batch_first), weight_out, bias_out, None)

    @staticmethod
    def backward(ctx, grad):
        x, memory, weight_in, weight_out, q, kv, attended, stats, mask, seed = ctx.saved_tensors
        heads, batch_first, is_causal, dropout_p, scale = ctx.options
        needs_x, needs_memory, *of_in, needs_weight_out, needs_bias_out = ctx.needs_input_grad[:6]
        width = weight_out.shape[1]
        dattended, dweight_out, dbias_out = linear_bwd(
            grad, _joined(attended, batch_first), weight_out, True, needs_weight_out, needs_bias_out
        )
        dq, dk, dv = attention_bwd(
            _split_heads(dattended, heads, batch_first), None, *_heads_of(q, kv, heads, batch_first), attended, stats,
            mask, *_NO_LENGTHS_NOR_SLOPES, is_causal, *_NO_OFFSET_NOR_WINDOW, dropout_p, seed, scale,
        )  # fmt: skip
        weight_q, weight_kv = _split(weight_in, width)
        dx, dweight_q, dbias_q = linear_bwd(_joined(dq, batch_first), x, weight_q, needs_x, *of_in)
        dkv = torch.cat((_joined(dk, batch_first), _joined(dv, batch_first)), -1)
        dmemory, dweight_kv, dbias_kv = linear_bwd(dkv, memory, weight_kv, needs_memory, *of_in)
        return (
            dx if needs_x else None,
            dmemory if needs_memory else None,
            torch.cat((dweight_q, dweight_kv)) if of_in[0] else None,
            torch.cat((dbias_q, dbias_kv)) if of_in[1] else None,
            dweight_out if needs_weight_out else None,
            dbias_out if needs_bias_out else None,
            *[None] * 6,
        )


# Function.apply is this, after checks for functorch, which are made before.
cross_attention = super(torch.autograd.Function, _CrossAttention).apply


def _split(rows: Tensor | None, width: int) -> tuple[Tensor | None, Tensor | None]:
    """The rows for queries, and those for keys and values."""
    return (None, None) if rows is None else rows.split((width, rows.shape[0] - width))


def _split_heads(x: Tensor, heads: int, batch_first: bool) -> Tensor:
    """(B, T, E) or (T, B, E) -> (B, H, T, D), a view."""
    x = x.unflatten(-1, (heads, -1))
    return x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3)


def _heads_of(q: Tensor, kv: Tensor, heads: int, batch_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(_split_heads(t, heads, batch_first) for t in (q, *kv.chunk(2, -1)))


def _joined(x: Tensor, batch_first: bool) -> Tensor:
    """(B, H, T, D) -> (B, T, E) or (T, B, E)."""
    return (x.transpose(1, 2) if batch_first else x.permute(2, 0, 1, 3)).flatten(-2)
