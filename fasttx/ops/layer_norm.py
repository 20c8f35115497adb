"""Layer norm, and layer norm of residual + dropout(input)."""

import torch
from torch import Tensor

from ._library import (
    accumulate_dtype,
    define,
    differentiate,
    forbid_double_backward,
    given,
    run,
    wants_grad,
)


def _statistics(input: Tensor, width: int) -> Tensor:
    return input.new_empty((input.numel() // width,), dtype=accumulate_dtype(input.dtype))


def _dense_like(input: Tensor) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def _layer_norm_fwd(input, width, weight, bias, eps):
    return _dense_like(input), _statistics(input, width), _statistics(input, width)


def _layer_norm_bwd(
    grad, input, mean, rstd, weight, width, needs_input, needs_weight, needs_bias
):
    none = input.new_empty((0,))
    return (
        _dense_like(input) if needs_input else none,
        input.new_empty((width,)) if needs_weight else torch.empty_like(none),
        input.new_empty((width,)) if needs_bias else torch.empty_like(none),
    )


layer_norm_fwd = define(
    "layer_norm_fwd(Tensor input, int width, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor output, Tensor mean, Tensor rstd)",
    _layer_norm_fwd,
)
layer_norm_bwd = define(
    "layer_norm_bwd(Tensor grad, Tensor input, Tensor mean, Tensor rstd, Tensor? weight, int width,"
    " bool needs_input, bool needs_weight, bool needs_bias)"
    " -> (Tensor dinput, Tensor dweight, Tensor dbias)",
    _layer_norm_bwd,
)


def _save_layer_norm(ctx, inputs, output):
    input, width, weight, bias, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(input, weight, mean, rstd)
    ctx.width = width
    ctx.parameter_shape = None if weight is None else weight.shape
    ctx.bias_shape = None if bias is None else bias.shape
    ctx.mark_non_differentiable(mean, rstd)


def _layer_norm_backward(ctx, grad, _grad_mean, _grad_rstd):
    input, weight, mean, rstd = ctx.saved_tensors
    needs_input, _, needs_weight, needs_bias, _ = ctx.needs_input_grad
    dinput, dweight, dbias = layer_norm_bwd(
        grad, input, mean, rstd, weight, ctx.width, needs_input, needs_weight, needs_bias
    )
    return (
        given(dinput, needs_input),
        None,
        dweight.view(ctx.parameter_shape) if needs_weight else None,
        dbias.view(ctx.bias_shape) if needs_bias else None,
        None,
    )


differentiate(layer_norm_fwd, _layer_norm_backward, _save_layer_norm)
forbid_double_backward(layer_norm_bwd)


def _add_layer_norm_fwd(
    input, residual, width, weight, bias, eps, dropout_p, seed, store_sum
):
    sum = _dense_like(input) if store_sum else input.new_empty((0,))
    return _dense_like(input), sum, _statistics(input, width), _statistics(input, width)


def _add_layer_norm_bwd(
    grad, grad_sum, sum, mean, rstd, weight, width, dropout_p, seed,
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
    " -> (Tensor output, Tensor sum, Tensor mean, Tensor rstd)",
    _add_layer_norm_fwd,
)
add_layer_norm_bwd = define(
    "add_layer_norm_bwd(Tensor grad, Tensor? grad_sum, Tensor sum, Tensor mean, Tensor rstd,"
    " Tensor? weight, int width, float dropout_p, Tensor? seed,"
    " bool needs_input, bool needs_residual, bool needs_weight, bool needs_bias)"
    " -> (Tensor dresidual, Tensor dinput, Tensor dweight, Tensor dbias)",
    _add_layer_norm_bwd,
)


def _save_add_layer_norm(ctx, inputs, output):
    _, _, width, weight, bias, _, dropout_p, seed, store_sum = inputs
    _, sum, mean, rstd = output
    if not store_sum:
        raise RuntimeError("add_layer_norm_fwd needs store_sum=True when gradients are wanted")
    ctx.save_for_backward(sum, weight, mean, rstd, seed)
    ctx.width, ctx.dropout_p = width, dropout_p
    ctx.parameter_shape = None if weight is None else weight.shape
    ctx.bias_shape = None if bias is None else bias.shape
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _add_layer_norm_backward(ctx, grad, grad_sum, _grad_mean, _grad_rstd):
    sum, weight, mean, rstd, seed = ctx.saved_tensors
    needs_input, needs_residual, _, needs_weight, needs_bias = ctx.needs_input_grad[:5]
    if grad is None:
        grad = torch.zeros_like(sum)
    # Without dropout both addends have the same gradient: one tensor serves them.
    dropped = ctx.dropout_p > 0.0
    dresidual, dinput, dweight, dbias = add_layer_norm_bwd(
        grad, grad_sum, sum, mean, rstd, weight, ctx.width, ctx.dropout_p, seed,
        needs_input and dropped, needs_residual or (needs_input and not dropped),
        needs_weight, needs_bias,
    )  # fmt: skip
    return (
        given(dinput if dropped else dresidual, needs_input),
        given(dresidual, needs_residual),
        None,
        dweight.view(ctx.parameter_shape) if needs_weight else None,
        dbias.view(ctx.bias_shape) if needs_bias else None,
        None, None, None, None,
    )  # fmt: skip


differentiate(add_layer_norm_fwd, _add_layer_norm_backward, _save_add_layer_norm)
forbid_double_backward(add_layer_norm_bwd)


def layer_norm(input: Tensor, width: int, weight: Tensor | None, bias: Tensor | None, eps: float):
    """Layer norm over trailing values that number `width`."""
    differentiable = wants_grad(input, weight, bias)
    return run(layer_norm_fwd, differentiable, input, width, weight, bias, eps)[0]


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
):
    """Layer norm of residual + dropout(input); with return_sum, that sum too."""
    differentiable = wants_grad(input, residual, weight, bias)
    output, sum, _, _ = run(
        add_layer_norm_fwd, differentiable,
        input, residual, width, weight, bias, eps, dropout_p, seed, return_sum or differentiable,
    )  # fmt: skip
    return (output, sum) if return_sum else output
