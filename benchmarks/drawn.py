"""Shapes that nobody chose: attention under every kind of mask, and feed-forward, drawn at random.

FASTTX_DRAW, a number, 0 by default, draws others.
"""

import os
import random
from collections.abc import Iterator
from functools import partial

import torch
from torch.nn.functional import linear, relu, scaled_dot_product_attention

from fasttx import functional, reference

from .case import DTYPES, Case, Work, item_size, op_work, tensors

_ROWS = 10  # of each op and dtype
_MOST_SCORES, _MOST_PRODUCTS = 3e7, 1e9


def cases() -> Iterator[Case]:
    """Rows without bars: where fasttx is slow is what they are there to show."""
    draw = random.Random(int(os.environ.get("FASTTX_DRAW", "0")))
    for dtype in DTYPES:
        for one in (_attention, _feed_forward):
            for _ in range(_ROWS):
                yield one(draw, dtype)


def _attention(draw: random.Random, dtype: torch.dtype) -> Case:
    batch, heads, width = draw.choice((1, 2, 4, 8)), draw.choice((4, 8, 12, 16)), draw.choice((32, 40, 64, 80, 96, 128))
    queries = draw.choice((1, 7, 32, 50, 64, 100, 128, 197, 384, 577, 1024))
    keys = queries if draw.random() < 0.7 else draw.choice((20, 77, 128, 300, 1024))
    if batch * heads * queries * keys > _MOST_SCORES:
        batch = 1
    kind = draw.choice(("full", "padded", "bool", "float", *(("causal", "causal padded") if queries == keys else ())))
    backward = kind != "float" and draw.random() < 0.4
    shape = (batch, heads, queries, keys, width)
    tokens = batch * heads * width * item_size(dtype)
    return Case(
        "drawn", f"attention, {kind}" + (" fwd+bwd" if backward else " fwd"),
        f"({batch},{heads},{queries}x{keys},{width})", dtype, partial(_attend, shape, kind, dtype, backward),
        flops=(7 if backward else 2) * 2 * batch * heads * queries * keys * width,
        bytes=(3 if backward else 1) * 2 * (queries + keys) * tokens,
    )  # fmt: skip


def _attend(shape: tuple[int, ...], kind: str, dtype: torch.dtype, backward: bool) -> Work:
    batch, heads, queries, keys, width = shape
    drawn = torch.Generator().manual_seed(0)
    inputs = tensors(
        dtype, query=(batch, heads, queries, width), key=(batch, heads, keys, width), value=(batch, heads, keys, width)
    )
    ours, theirs = {}, {}
    if kind == "bool":
        ours["attn_mask"] = torch.rand(batch, 1, queries, keys, generator=drawn) > 0.3
        ours["attn_mask"][..., 0] = True
        theirs = ours
    elif kind == "float":
        ours["attn_mask"] = torch.randn(1, heads, queries, keys, generator=drawn).to(dtype)
        theirs = ours
    else:
        if "causal" in kind:
            ours["is_causal"] = theirs["is_causal"] = True
        if "padded" in kind:
            lengths = torch.randint(1, keys + 1, (batch,), generator=drawn)
            seen = (torch.arange(keys) < lengths[:, None])[:, None, None]
            if theirs.pop("is_causal", False):
                seen = seen & torch.ones(queries, keys, dtype=torch.bool).tril()
            ours["key_lengths"], theirs["attn_mask"] = lengths, seen
    return op_work(
        inputs, {"SDPA": partial(scaled_dot_product_attention, **theirs)}, partial(functional.attention, **ours),
        partial(reference.attention, **ours), backward=backward,
    )  # fmt: skip


def _feed_forward(draw: random.Random, dtype: torch.dtype) -> Case:
    width, factor = draw.choice((64, 128, 256, 384, 512, 768, 1024, 1280)), draw.choice((2, 4))
    tokens = draw.choice((1, 4, 16, 50, 128, 197, 512, 1024, 2048))
    if tokens * factor * width**2 > _MOST_PRODUCTS:
        tokens = 256
    backward, hidden = draw.random() < 0.4, factor * width
    times = 3 if backward else 1
    return Case(
        "drawn", "feed-forward" + (" fwd+bwd" if backward else " fwd"), f"({tokens},{width},{hidden})", dtype,
        partial(_forward, tokens, width, hidden, dtype, backward), flops=times * 4 * tokens * width * hidden,
        bytes=times * 2 * (tokens * width + width * hidden) * item_size(dtype),
    )  # fmt: skip


def _forward(tokens: int, width: int, hidden: int, dtype: torch.dtype, backward: bool) -> Work:
    inputs = tensors(
        dtype, input=(tokens, width), weight1=(hidden, width), bias1=(hidden,), weight2=(width, hidden), bias2=(width,)
    )
    inputs = {name: x / x.shape[1] ** 0.5 if name.startswith("weight") else x for name, x in inputs.items()}

    def torch_feed_forward(input, weight1, bias1, weight2, bias2):
        return linear(relu(linear(input, weight1, bias1)), weight2, bias2)

    return op_work(
        inputs, {"linear, relu": torch_feed_forward}, partial(functional.feed_forward, activation="relu"),
        partial(reference.feed_forward, activation="relu"), backward=backward, weights=("weight1", "weight2"),
    )  # fmt: skip
