"""Layer norm as a module."""

import torch
from torch import Tensor

from fasttx import checks, functional
from fasttx.functional._nested import is_dense_jagged

from ._plain import parameter, refuse_scripting, step_aside


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm by fasttx.functional.layer_norm.

    input (..., *normalized_shape), or jagged -> the same shape and dtype. Raises ValueError where the last
    dimensions are not normalized_shape, TypeError where the input is not floating.
    """

    __prepare_scriptable__ = refuse_scripting

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is not Tensor:  # by itself, a third of the time that it takes to ask
            checks.require_tensor("input", input)
        if input.is_nested and not is_dense_jagged(input):
            step_aside("layer_norm", "input is nested, and not jagged without holes")
            return super().forward(input)
        weight, bias = parameter(self, "weight"), parameter(self, "bias")
        return functional.layer_norm(input, self.normalized_shape, weight, bias, self.eps)
