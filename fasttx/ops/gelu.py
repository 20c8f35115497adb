"""GELU and bias + GELU."""

import torch
from torch import Tensor

from ._library import (
    ACTIVATIONS,
    define,
    differentiate,
    forbid_double_backward,
    given,
    map_rows,
    plain_call,
    run,
    wants_grad,
)

CODES = {"none": ACTIVATIONS["gelu"], "tanh": ACTIVATIONS["gelu_tanh"]}


def _dense_like(input: Tensor) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def _gelu_fwd(input, bias, activation):
    return _dense_like(input)


def _gelu_bwd(grad, input, bias, activation, needs_bias):
    return _dense_like(input), input.new_empty((input.shape[-1] if needs_bias else 0,))


gelu_fwd = define("gelu_fwd(Tensor input, Tensor? bias, int activation) -> Tensor", _gelu_fwd, on_cuda=True)
gelu_bwd = define(
    "gelu_bwd(Tensor grad, Tensor input, Tensor? bias, int activation, bool needs_bias)"
    " -> (Tensor dinput, Tensor dbias)",
    _gelu_bwd,
    on_cuda=True,
)


def _save(ctx, inputs, output):
    input, bias, ctx.activation = inputs
    ctx.save_for_backward(input, bias)


def _backward(ctx, grad):
    input, bias = ctx.saved_tensors
    needs_input, needs_bias, _ = ctx.needs_input_grad
    dinput, dbias = gelu_bwd(grad, input, bias, ctx.activation, needs_bias)
    return given(dinput, needs_input), given(dbias, needs_bias), None


differentiate(gelu_fwd, _backward, _save)
forbid_double_backward(gelu_bwd)
plain_gelu = plain_call(gelu_fwd)
map_rows(gelu_fwd, "input")
map_rows(gelu_bwd, "grad", "input", alone=("needs_bias",))


def gelu(input: Tensor, approximate: str, backend: str = "") -> Tensor:
    """GELU, exact or by its tanh approximation."""
    return run(gelu_fwd.on(backend), wants_grad(input), input, None, CODES[approximate])


def bias_gelu(input: Tensor, bias: Tensor, approximate: str, backend: str = "") -> Tensor:
    """gelu(input + bias), the bias on the last dim."""
    return run(gelu_fwd.on(backend), wants_grad(input, bias), input, bias, CODES[approximate])
