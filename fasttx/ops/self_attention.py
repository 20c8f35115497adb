"""Self-attention with its projections: out(attention(q, k, v)), with q, k and v the thirds of in(x).

Over (batch, length, width), (length, batch, width), or sequences packed by cu_seqlens, (tokens, width).
"""

from torch import Tensor

from fasttx.packing import packed

from ._library import (
    accumulate_dtype,
    define,
    differentiate,
    forbid_double_backward,
    given,
    run,
    wants_grad,
)
from .attention import NONE, new_weights


def new_intermediates(
    input: Tensor, weight_in: Tensor, heads: int, batch_first: bool, store: bool, weights: int = NONE
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The shape function of qkv, attended, stats and the weights that were applied, over tokens in any layout."""
    outer = input.shape[:-1]
    rows = (heads, *outer)
    if len(outer) == 2:
        rows = (outer[0], heads, outer[1]) if batch_first else (outer[1], heads, outer[0])
    return (
        input.new_empty((*outer, weight_in.shape[0]) if store else (0,)),
        input.new_empty((*outer, weight_in.shape[0] // 3) if store else (0,)),
        input.new_empty((*rows, 2) if store or weights != NONE else (0,), dtype=accumulate_dtype(input.dtype)),
        new_weights(input, rows, rows[-1], weights),
    )


def _self_attention_fwd(
    input, weight_in, bias_in, weight_out, bias_out, heads, batch_first, attn_mask, cu_seqlens, is_causal,
    scale, attention_p, attention_seed, store, packed_in, packed_out, weights=NONE,
):  # fmt: skip
    output = input.new_empty((*input.shape[:-1], weight_out.shape[0]))
    return output, *new_intermediates(input, weight_in, heads, batch_first, store, weights)


def _self_attention_bwd(
    grad, input, weight_in, weight_out, qkv, attended, stats, heads, batch_first, attn_mask, cu_seqlens, is_causal,
    scale, attention_p, attention_seed, *rest,
):  # fmt: skip
    shapes = (input.shape, weight_in.shape, weight_in.shape[:1], weight_out.shape, weight_out.shape[:1])
    return tuple(
        input.new_empty(shape if needed else (0,))
        for shape, needed in zip(shapes, rest[:5], strict=True)
    )


_OPTIONS = (
    "int heads, bool batch_first, Tensor? attn_mask, Tensor? cu_seqlens, bool is_causal, float scale,"
    " float attention_p, Tensor? attention_seed"
)
self_attention_fwd = define(
    "self_attention_fwd(Tensor input, Tensor weight_in, Tensor? bias_in, Tensor weight_out, Tensor? bias_out,"
    f" {_OPTIONS}, bool store, Tensor? packed_in, Tensor? packed_out, int weights=0)"
    " -> (Tensor output, Tensor qkv, Tensor attended, Tensor stats, Tensor applied)",
    _self_attention_fwd,
)
self_attention_bwd = define(
    "self_attention_bwd(Tensor grad, Tensor input, Tensor weight_in, Tensor weight_out, Tensor qkv,"
    f" Tensor attended, Tensor stats, {_OPTIONS}, bool needs_input, bool needs_weight_in, bool needs_bias_in,"
    " bool needs_weight_out, bool needs_bias_out, Tensor? grad_weights=None)"
    " -> (Tensor dinput, Tensor dweight_in, Tensor dbias_in, Tensor dweight_out, Tensor dbias_out)",
    _self_attention_bwd,
)


def _save(ctx, inputs, output):
    input, weight_in, _, weight_out, _, *options, _, _, _, weights = inputs
    ctx.heads, ctx.batch_first, mask, cu_seqlens, ctx.is_causal, ctx.scale, ctx.attention_p, seed = options
    _, *stored, applied = output
    ctx.save_for_backward(input, weight_in, weight_out, *stored, mask, cu_seqlens, seed)
    ctx.mark_non_differentiable(*stored, *([applied] if weights == NONE else []))
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _qkv, _attended, _stats, grad_weights):
    *tensors, mask, cu_seqlens, seed = ctx.saved_tensors
    needs = ctx.needs_input_grad[:5]
    if grad is None:  # the loss is of the weights alone, which those of the output have no part in
        input, _, weight_out = tensors[:3]
        grad = input.new_zeros((*input.shape[:-1], weight_out.shape[0]))
        needs = (*needs[:3], False, False)
    gradients = self_attention_bwd(
        grad, *tensors, ctx.heads, ctx.batch_first, mask, cu_seqlens, ctx.is_causal, ctx.scale,
        ctx.attention_p, seed, *needs, grad_weights,
    )  # fmt: skip
    return (*map(given, gradients, needs), *[None] * 12)


differentiate(self_attention_fwd, _backward, _save, lambda inputs: inputs[-4])
forbid_double_backward(self_attention_bwd)


def self_attention(
    input: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    heads: int,
    batch_first: bool,
    attn_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    is_causal: bool,
    scale: float,
    attention_p: float,
    attention_seed: Tensor | None,
    weights: int = NONE,
) -> Tensor | tuple[Tensor, Tensor]:
    """The output, and the weights that are asked for, as ops.attention gives them.

    attn_mask, which has 4 dims that broadcast, gets no gradient.
    """
    tensors = (input, weight_in, bias_in, weight_out, bias_out)
    differentiable = wants_grad(*tensors)
    output, _, _, _, applied = run(
        self_attention_fwd, differentiable,
        *tensors, heads, batch_first, attn_mask, cu_seqlens, is_causal, scale, attention_p, attention_seed,
        differentiable, packed(weight_in), packed(weight_out), weights,
    )  # fmt: skip
    return output if weights == NONE else (output, applied)
