"""The feed-forward half of a transformer layer: linear, activation, dropout, linear."""

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


def _feed_forward_fwd(
    input, weight1, bias1, weight2, bias2, activation, dropout_p, seed, store_preact, packed1, packed2
):  # fmt: skip
    outer = input.shape[:-1]
    preact = (*outer, weight1.shape[0]) if store_preact else (0,)
    return input.new_empty((*outer, weight2.shape[0])), input.new_empty(preact)


def _feed_forward_bwd(
    grad, input, preact, weight1, weight2, activation, dropout_p, seed,
    needs_input, needs_weight1, needs_bias1, needs_weight2, needs_bias2,
):  # fmt: skip
    def wanted(shape, needs):
        return input.new_empty(shape if needs else (0,))

    return (
        wanted(input.shape, needs_input),
        wanted(weight1.shape, needs_weight1),
        wanted(weight1.shape[:1], needs_bias1),
        wanted(weight2.shape, needs_weight2),
        wanted(weight2.shape[:1], needs_bias2),
    )


feed_forward_fwd = define(
    "feed_forward_fwd(Tensor input, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2,"
    " int activation, float dropout_p, Tensor? seed, bool store_preact,"
    " Tensor? packed1, Tensor? packed2) -> (Tensor output, Tensor preact)",
    _feed_forward_fwd,
)
feed_forward_bwd = define(
    "feed_forward_bwd(Tensor grad, Tensor input, Tensor preact, Tensor weight1, Tensor weight2,"
    " int activation, float dropout_p, Tensor? seed, bool needs_input,"
    " bool needs_weight1, bool needs_bias1, bool needs_weight2, bool needs_bias2)"
    " -> (Tensor dinput, Tensor dweight1, Tensor dbias1, Tensor dweight2, Tensor dbias2)",
    _feed_forward_bwd,
)


def _save_feed_forward(ctx, inputs, output):
    input, weight1, _, weight2, _, activation, dropout_p, seed, *_ = inputs
    _, preact = output
    ctx.save_for_backward(input, weight1, weight2, preact, seed)
    ctx.activation, ctx.dropout_p = activation, dropout_p
    ctx.mark_non_differentiable(preact)


def _feed_forward_backward(ctx, grad, _grad_preact):
    input, weight1, weight2, preact, seed = ctx.saved_tensors
    needs = ctx.needs_input_grad[:5]
    gradients = feed_forward_bwd(
        grad, input, preact, weight1, weight2, ctx.activation, ctx.dropout_p, seed, *needs
    )
    return (*map(given, gradients, needs), None, None, None, None, None, None)


differentiate(feed_forward_fwd, _feed_forward_backward, _save_feed_forward, lambda inputs: inputs[8])
forbid_double_backward(feed_forward_bwd)
map_rows(feed_forward_fwd, "input", alone=("dropout_p",))
map_rows(
    feed_forward_bwd, "grad", "input", "preact",
    alone=("dropout_p", "needs_weight1", "needs_bias1", "needs_weight2", "needs_bias2"),
)  # fmt: skip


def feed_forward(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """linear2(dropout(activation(linear1(input))))."""
    tensors = (input, weight1, bias1, weight2, bias2)
    differentiable = wants_grad(*tensors)
    output, _ = run(
        feed_forward_fwd, differentiable,
        *tensors, ACTIVATIONS[activation], dropout_p, seed, differentiable,
        packed(weight1), packed(weight2),
    )  # fmt: skip
    return output
