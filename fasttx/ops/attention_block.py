"""The attention half of a transformer layer: norm(x + dropout(f(x))), or in inference x + f(norm(x)).

f(x) = out(attention(q, k, v)) with q, k and v the thirds of in(x): self-attention over (batch, length,
width), (length, batch, width), or sequences packed by cu_seqlens, (tokens, width).
"""

from torch import Tensor

from fasttx.packing import packed

from ._library import (
    define,
    differentiate,
    forbid_double_backward,
    given,
    run,
    wants_grad,
)
from .self_attention import new_intermediates


def _attention_block_fwd(
    input, weight_in, bias_in, weight_out, bias_out, norm_weight, norm_bias, eps, norm_first, heads,
    batch_first, attn_mask, cu_seqlens, is_causal, scale, attention_p, attention_seed, dropout_p,
    seed, store, packed_in, packed_out,
):  # fmt: skip
    if norm_first:
        return input.new_empty(input.shape), *(input.new_empty((0,)) for _ in range(4))
    *kept, _ = new_intermediates(input, weight_in, heads, batch_first, store)
    return input.new_empty(input.shape), *kept, input.new_empty(input.shape if store else (0,))


def _attention_block_bwd(grad, input, weight_in, weight_out, *rest):
    width = input.shape[-1:]
    shapes = (
        input.shape, weight_in.shape, weight_in.shape[:1], weight_out.shape, weight_out.shape[:1],
        width, width,
    )  # fmt: skip
    return tuple(
        input.new_empty(shape if needed else (0,))
        for shape, needed in zip(shapes, rest[-7:], strict=True)
    )


_OPTIONS = (
    "int heads, bool batch_first, Tensor? attn_mask, Tensor? cu_seqlens, bool is_causal, float scale,"
    " float attention_p, Tensor? attention_seed, float dropout_p, Tensor? seed"
)
attention_block_fwd = define(
    "attention_block_fwd(Tensor input, Tensor weight_in, Tensor? bias_in, Tensor weight_out,"
    " Tensor? bias_out, Tensor? norm_weight, Tensor? norm_bias, float eps, bool norm_first,"
    f" {_OPTIONS}, bool store, Tensor? packed_in, Tensor? packed_out)"
    " -> (Tensor output, Tensor qkv, Tensor attended, Tensor stats, Tensor sum)",
    _attention_block_fwd,
)
attention_block_bwd = define(
    "attention_block_bwd(Tensor grad, Tensor input, Tensor weight_in, Tensor weight_out, Tensor? norm_weight,"
    " Tensor qkv, Tensor attended, Tensor stats, Tensor sum, float eps,"
    f" {_OPTIONS}, bool needs_input, bool needs_weight_in, bool needs_bias_in, bool needs_weight_out,"
    " bool needs_bias_out, bool needs_norm_weight, bool needs_norm_bias)"
    " -> (Tensor dinput, Tensor dweight_in, Tensor dbias_in, Tensor dweight_out, Tensor dbias_out,"
    " Tensor dnorm_weight, Tensor dnorm_bias)",
    _attention_block_bwd,
)


def _save(ctx, inputs, output):
    input, weight_in, _, weight_out, _, norm_weight, _, ctx.eps, _, *options, _, _, _ = inputs
    ctx.heads, ctx.batch_first, mask, cu_seqlens, ctx.is_causal, ctx.scale, *dropouts = options
    ctx.attention_p, attention_seed, ctx.dropout_p, seed = dropouts
    ctx.save_for_backward(
        input, weight_in, weight_out, norm_weight, *output[1:], mask, cu_seqlens, attention_seed, seed
    )
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    *tensors, mask, cu_seqlens, attention_seed, seed = ctx.saved_tensors
    needs = ctx.needs_input_grad[:7]
    gradients = attention_block_bwd(
        grad, *tensors, ctx.eps, ctx.heads, ctx.batch_first, mask, cu_seqlens, ctx.is_causal, ctx.scale,
        ctx.attention_p, attention_seed, ctx.dropout_p, seed, *needs,
    )  # fmt: skip
    return (*map(given, gradients, needs), *[None] * 15)


# In training the norm comes last.
differentiate(attention_block_fwd, _backward, _save, lambda inputs: inputs[-3] and not inputs[8])
forbid_double_backward(attention_block_bwd)


def attention_block(
    input: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    norm_first: bool,
    heads: int,
    batch_first: bool,
    attn_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    is_causal: bool,
    scale: float,
    attention_p: float,
    attention_seed: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """The half's output; norm_first has no gradient, nor has attn_mask, which has 4 dims that broadcast."""
    tensors = (input, weight_in, bias_in, weight_out, bias_out, norm_weight, norm_bias)
    differentiable = wants_grad(*tensors)
    return run(
        attention_block_fwd, differentiable,
        *tensors, eps, norm_first, heads, batch_first, attn_mask, cu_seqlens, is_causal, scale,
        attention_p, attention_seed, dropout_p, seed, differentiable, packed(weight_in),
        packed(weight_out),
    )[0]  # fmt: skip
