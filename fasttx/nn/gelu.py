"""GELU as a module."""

import torch
from torch import Tensor

from fasttx import functional


class GELU(torch.nn.GELU):
    """torch.nn.GELU, exact or by its tanh approximation, by fasttx.functional.gelu. Any shape."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.gelu(input, self.approximate)
