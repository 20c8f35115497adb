"""GELU, and GELU of input + bias."""

from functools import partial

from torch import Tensor
from torch.compiler import is_compiling

from fasttx import autocast, checks, reference
from fasttx.dispatch import choose, runs_on_cpu
from fasttx.ops import gelu as ops

from ._nested import any_nested, on_values


def gelu(input: Tensor, approximate: str = "none", *, backend: str | None = None) -> Tensor:
    """x * Phi(x), with Phi the normal distribution function; or its tanh approximation.

    Any shape, or a jagged nested tensor; the result has input's shape and dtype. As torch.nn.functional.gelu; Hendrycks
    and Gimpel 2016.
    """
    if backend is None and approximate in checks.APPROXIMATIONS and not is_compiling():
        output = ops.plain_gelu(input, None, ops.CODES[approximate])
        if output is not None:
            return output
    checks.require_floating("input", input)
    checks.require_approximation(approximate)
    if any_nested(input):
        return on_values(partial(gelu, approximate=approximate, backend=backend), input)
    if autocast.acts_on(input):
        call = partial(gelu, approximate=approximate, backend=backend)
        return autocast.following(call, (input,), wide_on_gpu=False)
    taken = choose("gelu", (input,), backend)
    if taken == "reference":
        return reference.gelu(input, approximate)
    return ops.gelu(input, approximate, taken)


def bias_gelu(
    input: Tensor, bias: Tensor, approximate: str = "none", *, backend: str | None = None
) -> Tensor:
    """gelu(input + bias): input (..., width), bias (width,)."""
    if (
        bias is not None
        and runs_on_cpu(backend, input, bias)
        and bias.shape == input.shape[-1:]
        and bias.dim() == 1
        and approximate in checks.APPROXIMATIONS
    ):
        return ops.bias_gelu(input, bias, approximate)
    checks.require_floating("input", input)
    checks.require_approximation(approximate)
    if input.dim() == 0:
        raise checks.ArgumentError("input must have at least one dimension")
    checks.require_tensor("bias", bias)
    checks.require_shape("bias", bias, (input.shape[-1],), "input's width")
    checks.require_same_device("input", input, bias=bias)
    if autocast.acts_on(input):
        call = partial(bias_gelu, approximate=approximate, backend=backend)
        return autocast.following(call, (input, bias), wide_on_gpu=False)
    taken = choose("bias_gelu", (input, bias), backend)
    if taken == "reference":
        return reference.bias_gelu(input, bias, approximate)
    return ops.bias_gelu(input, bias, approximate, taken)
