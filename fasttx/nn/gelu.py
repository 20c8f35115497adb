"""GELU as a module."""

import torch
from torch import Tensor

from fasttx import checks, functional
from fasttx.functional._nested import is_dense_jagged

from ._plain import refuse_scripting, step_aside


class GELU(torch.nn.GELU):
    """torch.nn.GELU, exact or by its tanh approximation, by fasttx.functional.gelu. Any shape, or jagged."""

    __prepare_scriptable__ = refuse_scripting

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is not Tensor:  # by itself, a third of the time that it takes to ask
            checks.require_tensor("input", input)
        if input.is_nested and not is_dense_jagged(input):
            step_aside("gelu", "input is nested, and not jagged without holes")
            return super().forward(input)
        return functional.gelu(input, self.approximate)
