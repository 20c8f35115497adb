"""Layer norm as a module."""

import torch
from torch import Tensor

from fasttx import functional

from ._plain import step_aside


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm by fasttx.functional.layer_norm.

    input (..., *normalized_shape) -> the same shape and dtype. Raises ValueError where the last
    dimensions are not normalized_shape, TypeError where the input is not floating.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.is_nested:
            step_aside("layer_norm", "input is nested")
            return super().forward(input)
        # Attributes of a module take a Python call each to find; one that is parametrized or pruned is not a parameter.
        parameters = self._parameters
        weight = parameters["weight"] if "weight" in parameters else self.weight
        bias = parameters["bias"] if "bias" in parameters else self.bias
        return functional.layer_norm(input, self.normalized_shape, weight, bias, self.eps)
