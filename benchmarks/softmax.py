"""Softmax of attention's scores."""

import math
from collections.abc import Iterator
from functools import partial

import torch

from fasttx import functional, reference

from .case import DTYPES, Case, Work, item_size, op_work, tensors


def cases() -> Iterator[Case]:
    """Rows of 128 and of 1024, forward and backward."""
    for dtype in DTYPES:
        for shape in ((8, 12, 128, 128), (1, 12, 1024, 1024)):
            for backward in (False, True):
                yield Case(
                    "softmax",
                    "fwd+bwd" if backward else "fwd",
                    str(shape).replace(" ", ""),
                    dtype,
                    partial(_work, shape, dtype, backward),
                    flops=10 * math.prod(shape),
                    bytes=(5 if backward else 2) * math.prod(shape) * item_size(dtype),
                )


def _work(shape: tuple[int, ...], dtype: torch.dtype, backward: bool) -> Work:
    return op_work(
        tensors(dtype, input=shape), {"softmax": lambda input: torch.softmax(input, -1)},
        functional.softmax, reference.softmax, backward=backward,
    )  # fmt: skip
