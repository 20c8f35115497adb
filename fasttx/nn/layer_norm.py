"""Layer norm as a module."""

import torch
from torch import Tensor

from fasttx import functional


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm by fasttx.functional.layer_norm.

    input (..., *normalized_shape) -> the same shape and dtype. Raises ValueError where the last dimensions are not
    normalized_shape, TypeError where the input is not floating.
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.layer_norm(
            input, self.normalized_shape, self.weight, self.bias, self.eps
        )
