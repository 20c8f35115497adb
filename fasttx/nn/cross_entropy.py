"""The last linear layer of a language model and its loss as a module."""

import math

import torch
from torch import Tensor

from fasttx import checks, functional
from fasttx.functional.cross_entropy import check_options

from ._plain import parameter


class LinearCrossEntropy(torch.nn.Module):
    """cross_entropy(linear(input), target) without the logits in memory.

    input (..., in_features), target (...): class indices -> the loss, as functional.linear_cross_entropy. The weight
    (classes, in_features) and the bias are named, kept and drawn as torch.nn.Linear's, so that a state_dict fits both;
    `weight` may be an embedding's: `head.weight = embedding.weight`. `logits(input)` are those that the loss is of.

    Raises TypeError for sizes that are no integers, ValueError for sizes below 1 and options that are none.
    """

    def __init__(
        self,
        in_features: int,
        classes: int,
        bias: bool = True,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.require_size("in_features", in_features)
        checks.require_size("classes", classes)
        check_options(ignore_index, label_smoothing, reduction, None)
        self.in_features, self.classes = in_features, classes
        self.ignore_index, self.label_smoothing, self.reduction = ignore_index, label_smoothing, reduction
        self.weight = torch.nn.Parameter(torch.empty(classes, in_features, device=device, dtype=dtype))
        self.register_parameter(
            "bias", torch.nn.Parameter(torch.empty(classes, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weight and the bias from U(-1 / sqrt(in_features), 1 / sqrt(in_features)), as torch.nn.Linear."""
        bound = 1 / math.sqrt(self.in_features)
        for values in (self.weight, self.bias):
            if values is not None:
                torch.nn.init.uniform_(values, -bound, bound)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.linear_cross_entropy(
            input, parameter(self, "weight"), target, parameter(self, "bias"), ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing, reduction=self.reduction,
        )  # fmt: skip

    def logits(self, input: Tensor) -> Tensor:
        """linear(input): (..., classes)."""
        return functional.linear(input, parameter(self, "weight"), parameter(self, "bias"))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, classes={self.classes}, bias={self.bias is not None}, "
            f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}, reduction={self.reduction!r}"
        )
