"""GELU, exact and by tanh."""

from collections.abc import Iterator
from functools import partial

from torch.nn.functional import gelu

from fasttx import functional, reference

from .case import DTYPES, Case, tensors


def cases() -> Iterator[Case]:
    """A small and a large activation, forward and backward."""
    for dtype in DTYPES:
        for rows, approximate in ((128, "none"), (128, "tanh"), (4096, "none")):
            for backward in (False, True):
                inputs = tensors(dtype, input=(rows, 3072))
                yield Case(
                    f"gelu {approximate}", f"({rows},3072)", dtype, inputs,
                    *(
                        partial(op, approximate=approximate)
                        for op in (gelu, functional.gelu, reference.gelu)
                    ),
                    flops=20 * rows * 3072, bytes=inputs["input"].nbytes * (5 if backward else 2),
                    backward=backward,
                )  # fmt: skip
