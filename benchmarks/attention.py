"""Attention against scaled_dot_product_attention."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fasttx import functional, reference
from fasttx.cli import eager
from fasttx.rng import draw_seed

from .case import DTYPES, Case, Growth, Work, item_size, op_work, tensors
from .memory import extra_megabytes

_WIDTH = 64
_DROPOUT = 0.1
_SHORT, _MIDDLE, _LONG = (8, 12, 128), (2, 12, 512), (1, 12, 2048)

# (kind, (batch, heads, length), backward): the bars in float32 and in bfloat16.
_BARS = {
    ("full", _SHORT, False): (1.5, 2.0),
    ("full", _SHORT, True): (1.4, 2.2),
    ("full", _MIDDLE, False): (1.1, 1.6),
    ("full", _MIDDLE, True): (1.1, 1.4),
    ("full", _LONG, False): (1.1, 1.5),
    ("full", _LONG, True): (1.1, 1.2),
    ("causal", _MIDDLE, False): (2.0, 2.8),
    ("causal", _MIDDLE, True): (2.1, 2.6),
    ("causal", _LONG, False): (1.3, 1.8),
    ("causal", _LONG, True): (1.3, 1.5),
    ("half padded", _MIDDLE, False): (2.1, 3.0),
    ("half padded", _MIDDLE, True): (2.1, 2.6),
    ("dropout", _MIDDLE, True): (2.3, 3.2),
}
_DECODE_BARS = (1.8, 6.0)
_DECODE_ROOFLINE = 0.70
_ROOFLINE = {("full", _LONG, False): (0.70, 0.55)}
_MEGABYTES = 64.0


def cases() -> Iterator[Case | Growth]:
    """Full, causal, with half of the keys padded, with dropout; one new token against a cache; memory."""
    for index, dtype in enumerate(DTYPES):
        for (kind, shape, backward), bars in _BARS.items():
            batch, heads, length = shape
            useful = {"causal": (length + 1) / (2 * length), "half padded": 0.5}.get(kind, 1.0)
            # Scores and output; backward, scores again, and then dP, dV, dQ, dK.
            products = 7 if backward else 2
            yield Case(
                "attention",
                kind + (" fwd+bwd" if backward else " fwd"),
                f"({batch},{heads},{length},{_WIDTH})",
                dtype,
                partial(_work, kind, shape, dtype, backward),
                flops=useful * products * 2 * batch * heads * length * length * _WIDTH,
                bytes=(12 if backward else 4) * batch * heads * length * _WIDTH * item_size(dtype),
                bar=bars[index],
                roofline=_ROOFLINE.get((kind, shape, backward), (None, None))[index],
            )
        yield Case(
            "attention", "decode fwd", "(8,12,1x1024,64)", dtype, partial(_decode, dtype),
            flops=4 * 8 * 12 * 1024 * _WIDTH, bytes=2 * 8 * 12 * 1024 * _WIDTH * item_size(dtype),
            bar=_DECODE_BARS[index], roofline=_DECODE_ROOFLINE, limit="read",
        )  # fmt: skip
        for backward in (False, True):
            yield Growth(
                "attention", "memory" + (" fwd+bwd" if backward else " fwd"), "(1,12,16384,64)", dtype, "MiB",
                lambda seconds, dtype=dtype, backward=backward: extra_megabytes("attention", dtype, backward),
                bar=_MEGABYTES,
            )  # fmt: skip


def _rivals(**options: object) -> dict[str, Callable[..., Tensor]]:
    """What torch chooses, and its materialised attention, which it does not always choose where it is faster."""

    def materialised(query, key, value):
        return torch.ops.aten._scaled_dot_product_attention_math(query, key, value, **options)[0]

    return {"SDPA": partial(scaled_dot_product_attention, **options), "SDPA math": materialised}


def _decode(dtype: torch.dtype) -> Work:
    cache = (8, 12, 1024, _WIDTH)
    inputs = tensors(dtype, query=(8, 12, 1, _WIDTH), key=cache, value=cache)
    return op_work(inputs, _rivals(), functional.attention, reference.attention)


def _work(kind: str, shape: tuple[int, int, int], dtype: torch.dtype, backward: bool) -> Work:
    batch, _, length = shape
    inputs = tensors(dtype, query=(*shape, _WIDTH), key=(*shape, _WIDTH), value=(*shape, _WIDTH))
    if kind == "dropout":
        return _with_dropout(inputs, backward)
    rivals, options = _rivals(), {}
    if kind == "causal":
        options = {"is_causal": True}
        rivals = _rivals(**options)
    if kind == "half padded":
        rivals = _rivals(attn_mask=(torch.arange(length) < length // 2).view(1, 1, 1, length))
        options = {"key_lengths": torch.full((batch,), length // 2)}
    ours, truth = (partial(op, **options) for op in (functional.attention, reference.attention))
    return op_work(inputs, rivals, ours, truth, backward=backward)


def _with_dropout(inputs: dict[str, Tensor], backward: bool) -> Work:
    torch.manual_seed(0)
    known = {"dropout_p": _DROPOUT, "seed": draw_seed()}
    ours = partial(functional.attention, dropout_p=_DROPOUT)

    def judged(**inputs):
        torch.manual_seed(0)
        return ours(**inputs)

    return op_work(
        inputs, _rivals(dropout_p=_DROPOUT), ours, partial(reference.attention, **known), backward=backward,
        judged=judged, eager=partial(eager.attention, **known),
    )  # fmt: skip
