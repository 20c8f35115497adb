"""Linear layers, alone and as the feed-forward half of a transformer layer."""

from functools import partial

from torch import Tensor

from fasttx import autocast, checks, reference
from fasttx.dispatch import choose, layers_run_on_cpu
from fasttx.ops import feed_forward as ops
from fasttx.ops import linear as linear_ops
from fasttx.rng import draw_seed

_ACTIVATIONS = ("relu", "gelu", "gelu_tanh")


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """input @ weight.T + bias: input (..., in), weight (out, in), bias (out,) or None -> (..., out)."""
    if layers_run_on_cpu(backend, input, weight, bias):
        return linear_ops.linear(input, weight, bias)
    checks.require_floating("input", input)
    _check_layer("weight", weight, "bias", bias, "input", _width(input))
    checks.require_same_device("input", input, weight=weight, bias=bias)
    if autocast.acts_on(input):
        return autocast.lowered(partial(linear, backend=backend), input, weight, bias)
    if choose("linear", (input, weight, bias), backend) == "reference":
        return reference.linear(input, weight, bias)
    return linear_ops.linear(input, weight, bias)


def feed_forward(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    activation: str = "gelu",
    dropout_p: float = 0.0,
    training: bool = False,
    backend: str | None = None,
) -> Tensor:
    """linear2(dropout(activation(linear1(input)))).

    input (..., in), weight1 (hidden, in), weight2 (out, hidden), as nn.Linear keeps them; either bias may be None.
    activation: "gelu" | "gelu_tanh" | "relu". Dropout acts when `training`, with probability dropout_p in [0, 1).
    """
    tensors = (input, weight1, bias1, weight2, bias2)
    p = dropout_p if training else 0.0
    if (
        layers_run_on_cpu(backend, *tensors)
        and type(dropout_p) is float
        and 0.0 <= dropout_p < 1.0
        and activation in _ACTIVATIONS
    ):
        return ops.feed_forward(*tensors, activation, p, draw_seed() if p > 0.0 else None)
    checks.require_floating("input", input)
    _check_layer("weight1", weight1, "bias1", bias1, "input", _width(input))
    _check_layer("weight2", weight2, "bias2", bias2, "weight1's output", weight1.shape[0])
    checks.require_same_device(
        "input", input, weight1=weight1, bias1=bias1, weight2=weight2, bias2=bias2
    )
    checks.require_probability("dropout_p", dropout_p)
    if activation not in _ACTIVATIONS:
        raise checks.ArgumentError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
    if autocast.acts_on(input):
        call = partial(feed_forward, activation=activation, dropout_p=dropout_p, training=training, backend=backend)
        return autocast.lowered(call, *tensors)
    seed = draw_seed() if p > 0.0 else None
    if choose("feed_forward", tensors, backend) == "reference":
        return reference.feed_forward(
            *tensors, activation=activation, dropout_p=p, training=training, seed=seed
        )
    return ops.feed_forward(*tensors, activation, p, seed)


def _width(input: Tensor) -> int:
    if input.dim() == 0:
        raise checks.ArgumentError("input must have at least one dimension")
    return input.shape[-1]


def _check_layer(
    weight_name: str, weight: Tensor, bias_name: str, bias: Tensor | None, source: str, width: int
) -> None:
    checks.require_floating(weight_name, weight)
    if weight.dim() != 2 or weight.shape[1] != width:
        raise checks.ArgumentError(
            f"{weight_name} must have the shape (out, {width}), as {source} is {width} wide; "
            f"got {checks.shape(weight)}"
        )
    checks.require_shape(bias_name, bias, (weight.shape[0],), f"{weight_name}'s output")
