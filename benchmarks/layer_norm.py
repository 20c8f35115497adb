"""Layer norm, and dropout + add + layer norm."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import dropout
from torch.nn.functional import layer_norm as torch_layer_norm

from fasttx import functional, reference
from fasttx.cli import eager
from fasttx.rng import draw_seed

from .case import DTYPES, Case, tensors

_WIDTH = 768


def cases() -> Iterator[Case]:
    """Forward for few and for many rows; forward and backward, alone and after a residual sum."""
    for dtype in DTYPES:
        for rows, backward in ((64, False), (4096, False), (16384, False), (4096, True)):
            inputs = tensors(dtype, input=(rows, _WIDTH), weight=(_WIDTH,), bias=(_WIDTH,))
            yield Case(
                "layer norm", f"({rows},{_WIDTH})", dtype, inputs,
                _torch, _fasttx, _reference,
                flops=8 * rows * _WIDTH, bytes=inputs["input"].nbytes * (5 if backward else 2),
                backward=backward,
            )  # fmt: skip
        for p in (0.0, 0.1):
            yield _added(dtype, p)


def _torch(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch_layer_norm(input, (_WIDTH,), weight, bias)


def _fasttx(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.layer_norm(input, _WIDTH, weight, bias)


def _reference(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return reference.layer_norm(input, _WIDTH, weight, bias)


def _added(dtype: torch.dtype, p: float) -> Case:
    rows = 4096
    inputs = tensors(
        dtype, input=(rows, _WIDTH), residual=(rows, _WIDTH), weight=(_WIDTH,), bias=(_WIDTH,)
    )

    def torch_op(input, residual, weight, bias):
        return torch_layer_norm(residual + dropout(input, p), (_WIDTH,), weight, bias)

    def fasttx_op(input, residual, weight, bias):
        torch.manual_seed(0)
        return functional.add_layer_norm(
            input, residual, _WIDTH, weight, bias, dropout_p=p, training=True
        )

    torch.manual_seed(0)
    options = {"dropout_p": p, "training": True, "seed": draw_seed()}

    def with_mask(op):
        return lambda input, residual, weight, bias: op(
            input, residual, (_WIDTH,), weight, bias, **options
        )

    return Case(
        f"dropout {p} + add + layer norm", f"({rows},{_WIDTH})", dtype, inputs,
        torch_op, fasttx_op, with_mask(reference.add_layer_norm),
        flops=10 * rows * _WIDTH, bytes=inputs["input"].nbytes * 8, backward=True,
        eager=with_mask(eager.add_layer_norm),
    )  # fmt: skip
