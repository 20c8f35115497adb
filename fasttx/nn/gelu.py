"""GELU as a module."""

import torch
from torch import Tensor

from fasttx import functional

from ._plain import step_aside


class GELU(torch.nn.GELU):
    """torch.nn.GELU, exact or by its tanh approximation, by fasttx.functional.gelu. Any shape."""

    def forward(self, input: Tensor) -> Tensor:
        if input.is_nested:
            step_aside("gelu", "input is nested")
            return super().forward(input)
        return functional.gelu(input, self.approximate)
