"""Layer norm, alone and fused with the residual sum before it."""

import math
from collections.abc import Sequence
from functools import partial

from torch import Tensor
from torch.compiler import is_compiling

from fasttx import autocast, checks, reference
from fasttx.dispatch import choose, runs_on_cpu
from fasttx.ops import layer_norm as ops
from fasttx.rng import draw_seed

from ._nested import any_nested, on_values


def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias, over the last dimensions.

    input (..., *normalized_shape), or such a jagged nested tensor; weight and bias of normalized_shape, or None; the
    result has input's shape and dtype. As torch.nn.functional.layer_norm; Ba, Kiros and Hinton 2016.
    """
    if backend is None and not is_compiling():
        output = ops.plain_layer_norm(input, normalized_shape, weight, bias, eps)
        if output is not None:
            return output
    checks.require_floating("input", input)
    dims = _check_parameters(input, normalized_shape, weight, bias)
    if any_nested(input):
        call = partial(layer_norm, normalized_shape=dims, weight=weight, bias=bias, eps=eps, backend=backend)
        return on_values(call, input, trailing=len(dims))
    if autocast.acts_on(input):
        call = partial(layer_norm, normalized_shape=dims, eps=eps, backend=backend)
        return autocast.following(
            lambda input, weight, bias: call(input, weight=weight, bias=bias),
            (input,), (weight, bias), wide_on_gpu=True,
        )  # fmt: skip
    tensors = (input, weight, bias)
    taken = choose("layer_norm", tensors, backend, kernel_refusal=_refusal(dims))
    if taken == "reference":
        return reference.layer_norm(input, dims, weight, bias, eps)
    return ops.layer_norm(input, math.prod(dims), weight, bias, eps, taken)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    return_sum: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """layer_norm(residual + dropout(input)): what closes each half of a post-norm transformer layer.

    input and residual (..., *normalized_shape), of one shape and dtype. Dropout acts when `training`, with probability
    dropout_p in [0, 1). With return_sum, the result is (normed, residual + dropout(input)): what a pre-norm layer goes
    on from.
    """
    p = dropout_p if training else 0.0
    if (
        residual is not None
        and runs_on_cpu(backend, input, residual, weight, bias)
        and residual.shape == input.shape
        and type(dropout_p) is float
        and 0.0 <= dropout_p < 1.0
        and (width := _fitting_width(input, normalized_shape, weight, bias))
    ):
        seed = draw_seed() if p > 0.0 else None
        return ops.add_layer_norm(input, residual, width, weight, bias, eps, p, seed, return_sum)
    checks.require_floating("input", input)
    checks.require_tensor("residual", residual)
    checks.require_shape("residual", residual, tuple(input.shape), "input's")
    checks.require_probability("dropout_p", dropout_p)
    dims = _check_parameters(input, normalized_shape, weight, bias)
    checks.require_same_device("input", input, residual=residual)
    if autocast.acts_on(input):
        call = partial(
            add_layer_norm, normalized_shape=dims, eps=eps, dropout_p=dropout_p, training=training,
            return_sum=return_sum, backend=backend,
        )  # fmt: skip
        return autocast.following(
            lambda input, residual, weight, bias: call(input, residual, weight=weight, bias=bias),
            (input, residual), (weight, bias), wide_on_gpu=True,
        )  # fmt: skip
    seed = draw_seed() if p > 0.0 else None
    tensors = (input, residual, weight, bias)
    taken = choose("add_layer_norm", tensors, backend, kernel_refusal=_refusal(dims))
    if taken == "reference":
        return reference.add_layer_norm(
            input, residual, dims, weight, bias, eps,
            dropout_p=p, training=training, return_sum=return_sum, seed=seed,
        )  # fmt: skip
    return ops.add_layer_norm(
        input, residual, math.prod(dims), weight, bias, eps, p, seed, return_sum, taken
    )


def _fitting_width(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
) -> int:
    """How many values normalized_shape holds, where every shape is as it should be; else 0: the checks then say why."""
    dims = (normalized_shape,) if type(normalized_shape) is int else normalized_shape
    if (
        not (isinstance(dims, tuple) and dims)
        or (weight is not None and weight.shape != dims)
        or (bias is not None and bias.shape != dims)
    ):
        return 0
    sizes = input.shape
    if len(dims) == 1:  # a slice of a torch.Size takes as long as all the rest
        width = dims[0] if sizes and sizes[-1] == dims[0] else 0
    else:
        width = math.prod(dims) if sizes[-len(dims) :] == dims else 0
    return width if type(width) is int else 0


def _refusal(dims: tuple[int, ...]) -> str | None:
    """What the CPU kernels leave to the reference."""
    return None if math.prod(dims) > 0 else f"normalized_shape {dims} holds nothing"


def _check_parameters(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[int, ...]:
    if not isinstance(normalized_shape, (int, Sequence)):
        raise TypeError(
            f"normalized_shape must be an int or a sequence of them, got {normalized_shape!r}"
        )
    single = isinstance(normalized_shape, int)
    dims = (normalized_shape,) if single else tuple(normalized_shape)
    if not dims or tuple(input.shape[-len(dims) :]) != dims:
        raise checks.ArgumentError(
            f"input's last dimensions must be normalized_shape {dims}, got {checks.shape(input)}"
        )
    if weight is not None:
        checks.require_shape("weight", weight, dims, "normalized_shape")
    if bias is not None:
        checks.require_shape("bias", bias, dims, "normalized_shape")
    checks.require_same_device("input", input, weight=weight, bias=bias)
    return dims
