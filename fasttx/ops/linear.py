"""Linear layers."""

import torch
from torch import Tensor

from fasttx.packing import packed

from ._library import define, differentiate, forbid_double_backward, given, map_rows, run, wants_grad


def _linear_fwd(input, weight, bias, packed):
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def _linear_bwd(grad, input, weight, needs_input, needs_weight, needs_bias):
    none = input.new_empty((0,))
    return (
        input.new_empty(input.shape) if needs_input else none,
        input.new_empty(weight.shape) if needs_weight else torch.empty_like(none),
        input.new_empty((weight.shape[0],)) if needs_bias else torch.empty_like(none),
    )


linear_fwd = define(
    "linear_fwd(Tensor input, Tensor weight, Tensor? bias, Tensor? packed) -> Tensor", _linear_fwd
)
linear_bwd = define(
    "linear_bwd(Tensor grad, Tensor input, Tensor weight,"
    " bool needs_input, bool needs_weight, bool needs_bias)"
    " -> (Tensor dinput, Tensor dweight, Tensor dbias)",
    _linear_bwd,
)


def _save_linear(ctx, inputs, output):
    input, weight, _, _ = inputs
    ctx.save_for_backward(input, weight)


def _linear_backward(ctx, grad):
    input, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    gradients = linear_bwd(grad, input, weight, *needs)
    return (*map(given, gradients, needs), None)


differentiate(linear_fwd, _linear_backward, _save_linear)
forbid_double_backward(linear_bwd)
map_rows(linear_fwd, "input")
map_rows(linear_bwd, "grad", "input", alone=("needs_weight", "needs_bias"))


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """input @ weight.T + bias."""
    differentiable = wants_grad(input, weight, bias)
    return run(linear_fwd, differentiable, input, weight, bias, packed(weight))
