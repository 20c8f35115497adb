"""The feed-forward half of a transformer layer: norm(x + dropout2(f(x))), or in inference x + f(norm(x)).

f(x) = linear2(dropout1(activation(linear1(x)))), as in feed_forward.
"""

from torch import Tensor

from fasttx.packing import packed

from ._library import (
    ACTIVATIONS,
    define,
    differentiate,
    forbid_double_backward,
    given,
    map_rows,
    run,
    wants_grad,
)


def _feed_forward_block_fwd(
    input, weight1, bias1, weight2, bias2, norm_weight, norm_bias, eps, norm_first, activation,
    dropout1_p, seed1, dropout2_p, seed2, store, packed1, packed2, decodes,
):  # fmt: skip
    outer = input.shape[:-1]
    if norm_first:
        return input.new_empty(input.shape), *(input.new_empty((0,)) for _ in range(2))
    return (
        input.new_empty(input.shape),
        input.new_empty((*outer, weight1.shape[0]) if store else (0,)),
        input.new_empty(input.shape if store else (0,)),
    )


def _feed_forward_block_bwd(
    grad, input, weight1, weight2, norm_weight, preact, sum, eps, activation,
    dropout1_p, seed1, dropout2_p, seed2, *needs,
):  # fmt: skip
    width = input.shape[-1:]
    shapes = (
        input.shape, weight1.shape, weight1.shape[:1], weight2.shape, weight2.shape[:1], width, width,
    )  # fmt: skip
    return tuple(
        input.new_empty(shape if needed else (0,)) for shape, needed in zip(shapes, needs, strict=True)
    )


feed_forward_block_fwd = define(
    "feed_forward_block_fwd(Tensor input, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2,"
    " Tensor? norm_weight, Tensor? norm_bias, float eps, bool norm_first, int activation,"
    " float dropout1_p, Tensor? seed1, float dropout2_p, Tensor? seed2, bool store,"
    " Tensor? packed1, Tensor? packed2, bool decodes)"
    " -> (Tensor output, Tensor preact, Tensor sum)",
    _feed_forward_block_fwd,
)
feed_forward_block_bwd = define(
    "feed_forward_block_bwd(Tensor grad, Tensor input, Tensor weight1, Tensor weight2, Tensor? norm_weight,"
    " Tensor preact, Tensor sum, float eps, int activation,"
    " float dropout1_p, Tensor? seed1, float dropout2_p, Tensor? seed2, bool needs_input,"
    " bool needs_weight1, bool needs_bias1, bool needs_weight2, bool needs_bias2,"
    " bool needs_norm_weight, bool needs_norm_bias)"
    " -> (Tensor dinput, Tensor dweight1, Tensor dbias1, Tensor dweight2, Tensor dbias2,"
    " Tensor dnorm_weight, Tensor dnorm_bias)",
    _feed_forward_block_bwd,
)


def _save(ctx, inputs, output):
    input, weight1, _, weight2, _, norm_weight, _, ctx.eps, _, *options, _, _, _, _ = inputs
    ctx.activation, ctx.dropout1_p, seed1, ctx.dropout2_p, seed2 = options
    ctx.save_for_backward(input, weight1, weight2, norm_weight, *output[1:], seed1, seed2)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    *tensors, seed1, seed2 = ctx.saved_tensors
    needs = ctx.needs_input_grad[:7]
    gradients = feed_forward_block_bwd(
        grad, *tensors, ctx.eps, ctx.activation, ctx.dropout1_p, seed1, ctx.dropout2_p, seed2, *needs
    )
    return (*map(given, gradients, needs), *[None] * 11)


# In training the norm comes last.
differentiate(feed_forward_block_fwd, _backward, _save, lambda inputs: inputs[-4] and not inputs[8])
forbid_double_backward(feed_forward_block_bwd)
map_rows(feed_forward_block_fwd, "input", alone=("dropout1_p", "dropout2_p"))
map_rows(
    feed_forward_block_bwd, "grad", "input", "preact", "sum",
    alone=(
        "dropout1_p", "dropout2_p", "needs_weight1", "needs_bias1", "needs_weight2", "needs_bias2",
        "needs_norm_weight", "needs_norm_bias",
    ),
)  # fmt: skip


def feed_forward_block(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    norm_first: bool,
    activation: str,
    dropout1_p: float,
    seed1: Tensor | None,
    dropout2_p: float,
    seed2: Tensor | None,
    decodes: bool = False,
) -> Tensor:
    """The half's output; norm_first has no gradient. decodes: tokens come one at a time, as few rows."""
    tensors = (input, weight1, bias1, weight2, bias2, norm_weight, norm_bias)
    differentiable = wants_grad(*tensors)
    return run(
        feed_forward_block_fwd, differentiable,
        *tensors, eps, norm_first, ACTIVATIONS[activation], dropout1_p, seed1, dropout2_p, seed2,
        differentiable, packed(weight1, decodes), packed(weight2, decodes), decodes,
    )[0]  # fmt: skip
