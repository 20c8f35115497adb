"""Attention against scaled_dot_product_attention."""

from collections.abc import Iterator
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from fasttx import functional, reference

from .case import DTYPES, Case, size, tensors

_SHAPES = ((8, 12, 128), (2, 12, 512), (1, 12, 2048))
_WIDTH = 64


def cases() -> Iterator[Case]:
    """Full, causal, and with half of the keys padded; one new token against a cache."""
    for dtype in DTYPES:
        for batch, heads, length in _SHAPES:
            for backward in (False, True):
                for kind in ("full", "causal", "padded"):
                    yield _case(kind, (batch, heads, length), dtype, backward)
        inputs = tensors(
            dtype, query=(8, 12, 1, _WIDTH), key=(8, 12, 1024, _WIDTH), value=(8, 12, 1024, _WIDTH)
        )
        yield Case(
            "attention decode", "(8,12,1x1024,64)", dtype, inputs,
            scaled_dot_product_attention, functional.attention, reference.attention,
            flops=4 * 8 * 12 * 1024 * _WIDTH, bytes=size(inputs),
        )  # fmt: skip


def _case(kind: str, shape: tuple[int, int, int], dtype: torch.dtype, backward: bool) -> Case:
    batch, heads, length = shape
    full = (batch, heads, length, _WIDTH)
    inputs = tensors(dtype, query=full, key=full, value=full)
    torch_options, options, useful = {}, {}, 1.0
    if kind == "causal":
        torch_options = options = {"is_causal": True}
        useful = (length + 1) / (2 * length)
    if kind == "padded":
        keep = torch.arange(length) < length // 2
        torch_options = {"attn_mask": keep.view(1, 1, 1, length)}
        options = {"key_lengths": torch.full((batch,), length // 2)}
        useful = 0.5
    products = 7 if backward else 2  # scores and output; then scores again, dP, dV, dQ, dK
    return Case(
        f"attention {kind}", f"({batch},{heads},{length},{_WIDTH})", dtype, inputs,
        partial(scaled_dot_product_attention, **torch_options),
        partial(functional.attention, **options), partial(reference.attention, **options),
        flops=useful * products * 2 * batch * heads * length * length * _WIDTH,
        bytes=size(inputs) * (7 if backward else 4) / 3, backward=backward,
    )  # fmt: skip
