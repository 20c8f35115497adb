"""Layer norm, and layer norm of residual + dropout(input)."""

import torch
from torch import Tensor

from ._library import (
    define,
    differentiate,
    forbid_double_backward,
    given,
    map_rows,
    plain_call,
    run,
    wants_grad,
)


def _dense_like(input: Tensor) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def _layer_norm_fwd(input, width, weight, bias, eps):
    return _dense_like(input)


def _layer_norm_bwd(grad, input, weight, width, eps, needs_input, needs_weight, needs_bias):
    none = input.new_empty((0,))
    return (
        _dense_like(input) if needs_input else none,
        input.new_empty((width,)) if needs_weight else torch.empty_like(none),
        input.new_empty((width,)) if needs_bias else torch.empty_like(none),
    )


layer_norm_fwd = define(
    "layer_norm_fwd(Tensor input, int width, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    _layer_norm_fwd,
    on_cuda=True,
)
layer_norm_bwd = define(
    "layer_norm_bwd(Tensor grad, Tensor input, Tensor? weight, int width, float eps,"
    " bool needs_input, bool needs_weight, bool needs_bias)"
    " -> (Tensor dinput, Tensor dweight, Tensor dbias)",
    _layer_norm_bwd,
    on_cuda=True,
)


def _parameter_shape(weight: Tensor | None, bias: Tensor | None) -> torch.Size | None:
    """The parameters' shape where it is not their gradients' own, (width,)."""
    parameter = bias if weight is None else weight
    return None if parameter is None or parameter.dim() == 1 else parameter.shape


def _parameter_gradient(gradient: Tensor, wanted: bool, shape: torch.Size | None) -> Tensor | None:
    """In the parameter's shape, which is given where it is not the gradient's own, (width,)."""
    if not wanted:
        return None
    return gradient if shape is None else gradient.view(shape)


def _save_layer_norm(ctx, inputs, output):
    input, width, weight, bias, eps = inputs
    ctx.save_for_backward(input, weight)
    ctx.rest = width, eps, _parameter_shape(weight, bias)


def _layer_norm_backward(ctx, grad):
    input, weight = ctx.saved_tensors
    width, eps, shape = ctx.rest
    needs_input, _, needs_weight, needs_bias, _ = ctx.needs_input_grad
    dinput, dweight, dbias = layer_norm_bwd(grad, input, weight, width, eps, needs_input, needs_weight, needs_bias)
    if shape is not None:
        dweight = _parameter_gradient(dweight, needs_weight, shape)
        dbias = _parameter_gradient(dbias, needs_bias, shape)
    return (
        dinput if needs_input else None,
        None,
        dweight if needs_weight else None,
        dbias if needs_bias else None,
        None,
    )


differentiate(layer_norm_fwd, _layer_norm_backward, _save_layer_norm)
forbid_double_backward(layer_norm_bwd)
# By (input, normalized_shape, weight, bias, eps).
plain_layer_norm = plain_call(layer_norm_fwd, "plain_layer_norm")
map_rows(layer_norm_fwd, "input")
map_rows(layer_norm_bwd, "grad", "input", alone=("needs_weight", "needs_bias"))


def _add_layer_norm_fwd(
    input, residual, width, weight, bias, eps, dropout_p, seed, store_sum
):
    sum = _dense_like(input) if store_sum else input.new_empty((0,))
    return _dense_like(input), sum


def _add_layer_norm_bwd(
    grad, grad_sum, sum, weight, width, eps, dropout_p, seed,
    needs_input, needs_residual, needs_weight, needs_bias,
):  # fmt: skip
    return (
        _dense_like(sum) if needs_residual else sum.new_empty((0,)),
        _dense_like(sum) if needs_input else sum.new_empty((0,)),
        sum.new_empty((width,)) if needs_weight else sum.new_empty((0,)),
        sum.new_empty((width,)) if needs_bias else sum.new_empty((0,)),
    )


add_layer_norm_fwd = define(
    "add_layer_norm_fwd(Tensor input, Tensor residual, int width, Tensor? weight, Tensor? bias,"
    " float eps, float dropout_p, Tensor? seed, bool store_sum)"
    " -> (Tensor output, Tensor sum)",
    _add_layer_norm_fwd,
    on_cuda=True,
)
add_layer_norm_bwd = define(
    "add_layer_norm_bwd(Tensor grad, Tensor? grad_sum, Tensor sum, Tensor? weight,"
    " int width, float eps, float dropout_p, Tensor? seed,"
    " bool needs_input, bool needs_residual, bool needs_weight, bool needs_bias)"
    " -> (Tensor dresidual, Tensor dinput, Tensor dweight, Tensor dbias)",
    _add_layer_norm_bwd,
    on_cuda=True,
)


def _save_add_layer_norm(ctx, inputs, output):
    _, _, ctx.width, weight, bias, ctx.eps, ctx.dropout_p, seed, _ = inputs
    ctx.save_for_backward(output[1], weight, seed)
    ctx.shape = _parameter_shape(weight, bias)
    ctx.set_materialize_grads(False)


def _add_layer_norm_backward(ctx, grad, grad_sum):
    sum, weight, seed = ctx.saved_tensors
    needs_input, needs_residual, _, needs_weight, needs_bias = ctx.needs_input_grad[:5]
    if grad is None:
        grad = torch.zeros_like(sum)
    # Without dropout both addends have the same gradient: one tensor serves them.
    dropped = ctx.dropout_p > 0.0
    dresidual, dinput, dweight, dbias = add_layer_norm_bwd(
        grad, grad_sum, sum, weight, ctx.width, ctx.eps, ctx.dropout_p, seed,
        needs_input and dropped, needs_residual or (needs_input and not dropped),
        needs_weight, needs_bias,
    )  # fmt: skip
    return (
        given(dinput if dropped else dresidual, needs_input),
        given(dresidual, needs_residual),
        None,
        _parameter_gradient(dweight, needs_weight, ctx.shape),
        _parameter_gradient(dbias, needs_bias, ctx.shape),
        None, None, None, None,
    )  # fmt: skip


differentiate(
    add_layer_norm_fwd, _add_layer_norm_backward, _save_add_layer_norm, lambda inputs: inputs[-1]
)
forbid_double_backward(add_layer_norm_bwd)
map_rows(add_layer_norm_fwd, "input", "residual", alone=("dropout_p",))
map_rows(
    add_layer_norm_bwd, "grad", "grad_sum", "sum", alone=("dropout_p", "needs_weight", "needs_bias")
)


def layer_norm(
    input: Tensor, width: int, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str = ""
):
    """Layer norm over trailing values that number `width`."""
    differentiable = wants_grad(input, weight, bias)
    return run(layer_norm_fwd.on(backend), differentiable, input, width, weight, bias, eps)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    width: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    return_sum: bool,
    backend: str = "",
):
    """Layer norm of residual + dropout(input); with return_sum, that sum too."""
    differentiable = wants_grad(input, residual, weight, bias)
    output, sum = run(
        add_layer_norm_fwd.on(backend), differentiable,
        input, residual, width, weight, bias, eps, dropout_p, seed, return_sum or differentiable,
    )  # fmt: skip
    return (output, sum) if return_sum else output
