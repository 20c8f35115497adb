"""Layer norm, and dropout + add + layer norm."""

from collections.abc import Iterator
from functools import partial

import torch
from torch.nn.functional import dropout
from torch.nn.functional import layer_norm as torch_layer_norm

from fasttx import functional, reference
from fasttx.cli import eager
from fasttx.rng import draw_seed

from .case import DTYPES, Case, Growth, Work, item_size, op_work, tensors
from .growth import FLAT, GROWN, time_per_token

_WIDTH = 768
_DROPOUT = 0.1

# (rows, backward): the bars in float32 and in bfloat16.
_BARS = {
    (64, False): (1.2, 1.5),
    (4096, False): (None, None),
    (16384, False): (1.6, 2.0),
    (65536, False): (None, None),
    (4096, True): (1.7, 2.2),
}
_ADDED_BAR = 6.0
# Of copy bandwidth, over memory that no cache holds.
_ROOFLINE_ROWS, _ROOFLINE = 65536, 0.85


def cases() -> Iterator[Case | Growth]:
    """Forward for few and for many rows; forward and backward, alone and after a residual sum; time per token."""
    for index, dtype in enumerate(DTYPES):
        for (rows, backward), bars in _BARS.items():
            yield Case(
                "layer_norm",
                "fwd+bwd" if backward else "fwd",
                f"({rows},{_WIDTH})",
                dtype,
                partial(_work, rows, dtype, backward),
                flops=(20 if backward else 8) * rows * _WIDTH,
                bytes=(5 if backward else 2) * rows * _WIDTH * item_size(dtype),
                bar=bars[index],
                roofline=_ROOFLINE if rows == _ROOFLINE_ROWS else None,
                limit="copy",
            )
        rows = 4096
        yield Case(
            "layer_norm", "dropout + add fwd+bwd", f"({rows},{_WIDTH})", dtype, partial(_added, rows, dtype),
            flops=30 * rows * _WIDTH, bytes=8 * rows * _WIDTH * item_size(dtype), bar=_ADDED_BAR,
        )  # fmt: skip
        yield Growth(
            "layer_norm", "time per token", GROWN, dtype, "x",
            partial(time_per_token, partial(_call, dtype)), bar=FLAT,
        )  # fmt: skip


def _work(rows: int, dtype: torch.dtype, backward: bool) -> Work:
    inputs = tensors(dtype, input=(rows, _WIDTH), weight=(_WIDTH,), bias=(_WIDTH,))
    theirs, ours, truth = (
        partial(op, normalized_shape=(_WIDTH,))
        for op in (torch_layer_norm, functional.layer_norm, reference.layer_norm)
    )
    return op_work(inputs, {"layer_norm": theirs}, ours, truth, backward=backward)


def _added(rows: int, dtype: torch.dtype) -> Work:
    inputs = tensors(dtype, input=(rows, _WIDTH), residual=(rows, _WIDTH), weight=(_WIDTH,), bias=(_WIDTH,))
    options = {"normalized_shape": (_WIDTH,), "dropout_p": _DROPOUT, "training": True}
    torch.manual_seed(0)
    known = options | {"seed": draw_seed()}
    ours = partial(functional.add_layer_norm, **options)

    def theirs(input, residual, weight, bias):
        return torch_layer_norm(residual + dropout(input, _DROPOUT), (_WIDTH,), weight, bias)

    def judged(**inputs):
        torch.manual_seed(0)
        return ours(**inputs)

    return op_work(
        inputs, {"dropout, add, layer_norm": theirs}, ours, partial(reference.add_layer_norm, **known), backward=True,
        judged=judged, eager=partial(eager.add_layer_norm, **known),
    )  # fmt: skip


def _call(dtype: torch.dtype, tokens: int):
    inputs = tensors(dtype, input=(tokens, _WIDTH), weight=(_WIDTH,), bias=(_WIDTH,))
    return torch.no_grad()(lambda: functional.layer_norm(normalized_shape=(_WIDTH,), **inputs))
