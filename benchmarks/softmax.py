"""Softmax of attention's scores."""

from collections.abc import Iterator

import torch

from fasttx import functional, reference

from .case import DTYPES, Case, tensors


def cases() -> Iterator[Case]:
    """Rows of 128 and of 1024, forward and backward."""
    for dtype in DTYPES:
        for shape in ((8, 12, 128, 128), (1, 12, 1024, 1024)):
            for backward in (False, True):
                inputs = tensors(dtype, input=shape)
                yield Case(
                    "softmax", str(shape).replace(" ", ""), dtype, inputs,
                    lambda input: torch.softmax(input, -1), functional.softmax, reference.softmax,
                    flops=10 * inputs["input"].numel(),
                    bytes=inputs["input"].nbytes * (5 if backward else 2), backward=backward,
                )  # fmt: skip
