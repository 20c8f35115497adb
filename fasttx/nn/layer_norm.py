"""Layer norm as a module."""

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fasttx import checks, functional
from fasttx.functional._nested import is_dense_jagged
from fasttx.ops.layer_norm import plain_layer_norm

from ._plain import refuse_scripting, step_aside


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm by fasttx.functional.layer_norm.

    input (..., *normalized_shape), or jagged -> the same shape and dtype. Raises ValueError where the last
    dimensions are not normalized_shape, TypeError where the input is not floating.
    """

    __prepare_scriptable__ = refuse_scripting

    def forward(self, input: Tensor) -> Tensor:
        own = self._parameters  # as `parameter` has it, at half the price
        weight = own["weight"] if "weight" in own else self.weight
        bias = own["bias"] if "bias" in own else self.bias
        if not is_compiling():
            output = plain_layer_norm(input, self.normalized_shape, weight, bias, self.eps)
            if output is not None:
                return output
        checks.require_tensor("input", input)
        if input.is_nested and not is_dense_jagged(input):
            step_aside("layer_norm", "input is nested, and not jagged without holes")
            return super().forward(input)
        return functional.layer_norm(input, self.normalized_shape, weight, bias, self.eps)
