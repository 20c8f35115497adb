"""GELU, exact and by tanh."""

from collections.abc import Iterator
from functools import partial

import torch
from torch.nn.functional import gelu

from fasttx import functional, reference

from .case import DTYPES, Case, Work, item_size, op_work, tensors

# (rows, approximate, backward): the bars in float32 and in bfloat16.
_BARS = {
    (128, "none", True): (1.6, 1.8),
    (128, "none", False): (None, None),
    (128, "tanh", False): (None, None),
    (128, "tanh", True): (None, None),
    (4096, "none", False): (None, None),
}


def cases() -> Iterator[Case]:
    """A small and a large activation."""
    for index, dtype in enumerate(DTYPES):
        for (rows, approximate, backward), bars in _BARS.items():
            yield Case(
                "gelu",
                ("exact" if approximate == "none" else approximate) + (" fwd+bwd" if backward else " fwd"),
                f"({rows},3072)",
                dtype,
                partial(_work, rows, approximate, dtype, backward),
                flops=20 * rows * 3072,
                bytes=(5 if backward else 2) * rows * 3072 * item_size(dtype),
                bar=bars[index],
            )


def _work(rows: int, approximate: str, dtype: torch.dtype, backward: bool) -> Work:
    theirs, ours, truth = (
        partial(op, approximate=approximate) for op in (gelu, functional.gelu, reference.gelu)
    )
    return op_work(tensors(dtype, input=(rows, 3072)), {"gelu": theirs}, ours, truth, backward=backward)
