"""Attention, padded and packed: the CPU kernels against float64."""

import math

import pytest
import torch
from attention_calls import SEED, draw_inputs, run_eager, run_op, run_reference
from budget import DTYPES, poisoned
from properties import (
    LAYOUTS,
    assert_compiles,
    assert_gradients_of_any_layout,
    assert_layouts_do_not_matter,
    assert_refuses_second_derivatives,
    assert_same_bits,
    assert_within_budget_on_every_isa,
    draw,
    results,
)
from torch import Tensor
from torch.autograd import gradcheck

import fasttx.functional as F
from fasttx import reference
from fasttx.ops import attention as ops
from fasttx.rng import draw_seed

pytestmark = pytest.mark.usefixtures("needs_extension")

# By name: batch, heads, kv heads, queries, keys, width, value width; and options.
CASES = {
    "one tile": ((4, 3, 3, 37, 53, 16, 16), {}),
    "one query": ((16, 4, 2, 1, 190, 64, 64), {}),
    "decoding": ((8, 4, 2, 2, 430, 33, 70), {"is_causal": True, "query_offset": 401}),
    "decoding, some lengths": ((12, 2, 2, 1, 300, 64, 64), {"key_lengths": torch.tensor([300, 9, 129, 200] * 3)}),
    "one key": ((4, 2, 2, 50, 1, 8, 8), {}),
    "several tiles": ((2, 2, 2, 101, 300, 64, 64), {}),
    "odd widths": ((4, 2, 1, 50, 131, 33, 7), {}),
    "width 1": ((8, 8, 8, 17, 9, 1, 1), {}),
    "wide": ((4, 2, 2, 9, 17, 130, 200), {}),
    "a scale": ((4, 4, 4, 20, 30, 16, 16), {"scale": -0.4}),
    "causal": ((2, 2, 2, 150, 150, 32, 32), {"is_causal": True}),
    "causal, few queries": ((4, 4, 2, 5, 205, 24, 24), {"is_causal": True, "query_offset": 200}),
    "window": ((2, 2, 2, 140, 160, 8, 8), {"window": (20, 3), "query_offset": 10}),
    "window to the left": ((2, 2, 2, 200, 200, 8, 8), {"window": (70, -1), "is_causal": True}),
    "lengths": ((3, 2, 2, 20, 290, 16, 16), {"key_lengths": torch.tensor([290, 1, 145])}),
    "alibi": ((4, 2, 2, 60, 140, 8, 8), {"alibi_slopes": torch.tensor([0.5, 0.0625])}),
    "dropout": ((4, 4, 2, 60, 140, 16, 16), {"dropout_p": 0.3, "seed": SEED}),
}


def _assert_within_budget(inputs: dict[str, Tensor], dtype: torch.dtype, **options) -> None:
    assert_within_budget_on_every_isa(
        lambda query, key, value: run_op(query, key, value, **_in_dtype(options, query.dtype)),
        reference=lambda query, key, value: run_reference(query, key, value, **options),
        eager=lambda query, key, value: run_eager(query, key, value, **options),
        inputs=inputs,
        dtype=dtype,
    )


def _in_dtype(options: dict, dtype: torch.dtype) -> dict:
    """Masks in a dtype that the op takes beside `dtype`."""
    mask = options.get("attn_mask")
    if dtype == torch.float64 and mask is not None and mask.is_floating_point():
        options = options | {"attn_mask": mask.double()}
    return options


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_attention_within_budget(dtype, case):
    shape, options = CASES[case]
    _assert_within_budget(draw_inputs(*shape), dtype, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", (True, False), ids=("of a batch", "of each query"))
@pytest.mark.parametrize("place", ("left", "holes"))
def test_padding_by_a_mask_within_budget(dtype, place, shared):
    size = 170
    keep = torch.arange(size) >= torch.tensor([40, 0, 60])[:, None]  # which leaves the first query some keys
    if place == "holes":
        keep = torch.rand(3, size) > torch.tensor([0.4, 0.0, 0.8])[:, None]
    mask = keep[:, None, None]
    if not shared:
        mask = mask & (torch.rand(3, 1, 100, size) > 0.3)
    _assert_within_budget(
        draw_inputs(3, 4, 2, 100, size, 20, 12),
        dtype,
        attn_mask=mask,
        key_lengths=torch.tensor([size, size - 3, size]),
        is_causal=True,
        query_offset=size - 100,
        window=(150, -1),
        alibi_slopes=torch.linspace(0.01, 0.2, 4),
        dropout_p=0.2,
        seed=SEED,
    )


MASK_SHAPES = ((2, 1, 1, 140), (2, 4, 50, 140), (1, 4, 1, 140), (50, 140), (4, 50, 1), (140,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MASK_SHAPES)
def test_masks_within_budget(dtype, shape):
    inputs = draw_inputs(2, 4, 2, 50, 140, 8, 8)
    boolean = torch.rand(shape) > 0.4
    boolean[..., 0] = True
    _assert_within_budget(inputs, dtype, attn_mask=boolean)
    bias = torch.randn(shape).masked_fill(~boolean, -math.inf)
    _assert_within_budget(inputs, dtype, attn_mask=bias.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_everything_at_once(dtype):
    keep = torch.rand(2, 1, 90, 170) > 0.3
    keep[..., 0] = True
    _assert_within_budget(
        draw_inputs(2, 6, 2, 90, 170, 20, 12),
        dtype,
        attn_mask=keep,
        key_lengths=torch.tensor([170, 133]),
        is_causal=True,
        query_offset=60,
        window=(150, -1),
        alibi_slopes=torch.linspace(0.01, 0.2, 6),
        dropout_p=0.2,
        seed=SEED,
        scale=0.3,
    )


@pytest.mark.parametrize("kind", ("bool", "float"))
def test_masks_of_any_stride(isa, kind):
    inputs = {name: x.float() for name, x in draw_inputs(2, 3, 3, 50, 37, 8, 8).items()}
    values = torch.rand(37, 50, 3, 4) - 0.3
    values = values > 0 if kind == "bool" else values
    for mask in (
        values.permute(3, 2, 1, 0)[::2],  # the keys far apart
        values.permute(3, 2, 1, 0)[:2, :1],
        values[0, :, 0].repeat(2, 37)[:37, :100:2].t().expand(2, 3, 50, 37),
        values[0, :, :1, :1].expand(50, 1, 37)[:, 0],  # one value for a whole row
        values[:, 0, 0, 0],
    ):
        dense = mask.expand(2, 3, 50, 37).contiguous()
        found = [
            results(lambda query, key, value, m=m: run_op(query, key, value, attn_mask=m), inputs)
            for m in (mask, dense)
        ]
        assert_same_bits(*found)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    make = LAYOUTS[layout]
    for shape in ((2, 3, 20, 16), (2, 3, 9, 17), (2, 1, 20, 2)):
        inputs = {name: make(*shape) for name in ("query", "key", "value")}
        assert_layouts_do_not_matter(lambda query, key, value: run_op(query, key, value, is_causal=True), inputs)


def test_tokens_before_heads_give_gradients_in_the_same_order():
    projected = torch.randn(2, 30, 3, 4, 8)  # as one projection gives them: query, key, value
    inputs = [x.transpose(1, 2).requires_grad_() for x in projected.unbind(2)]
    output, _ = run_op(*inputs)
    assert output.transpose(1, 2).is_contiguous()
    for x in torch.autograd.grad(output.sum(), inputs):
        assert x.transpose(1, 2).is_contiguous()


def test_gradients_of_any_layout():
    inputs = {name: x.float() for name, x in draw_inputs(2, 2, 2, 20, 30, 8, 6).items()}
    assert_gradients_of_any_layout(run_op, inputs)


def _packed(lengths_q: list[int], lengths_k: list[int]) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    inputs = {
        "query": draw(sum(lengths_q), 4, 16) / 2,
        "key": draw(sum(lengths_k), 2, 16),
        "value": draw(sum(lengths_k), 2, 9),
    }
    return inputs, tuple(torch.tensor([0, *torch.tensor(n).cumsum(0)]) for n in (lengths_q, lengths_k))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", ({}, {"is_causal": True}, {"window": (9, 2)}))
def test_packed_sequences_within_budget(dtype, options):
    inputs, offsets = _packed([150, 1, 131], [160, 1, 140])

    def eager(query, key, value):
        outputs, lses = [], []
        for q0, q1, k0, k1 in zip(*(x for o in offsets for x in (o[:-1], o[1:])), strict=True):
            padded = (query[q0:q1], key[k0:k1], value[k0:k1])
            output, lse = run_eager(*(x.transpose(0, 1)[None] for x in padded), **options)
            outputs.append(output[0].transpose(0, 1))
            lses.append(lse[0])
        return torch.cat(outputs), torch.cat(lses, -1)

    assert_within_budget_on_every_isa(
        lambda query, key, value: F.attention_varlen(
            query, key, value, *offsets, **options, enable_gqa=True, return_lse=True, backend="cpu"
        ),
        reference=lambda query, key, value: reference.attention_varlen(
            query, key, value, *offsets, **options, enable_gqa=True, return_lse=True
        ),
        eager=eager,
        inputs=inputs,
        dtype=dtype,
    )


@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"),
    (([], []), ([0, 5, 0], [3, 0, 0]), ([0], [0]), ([4, 0, 70], [9, 8, 7])),
)
def test_packed_empty_sequences(isa, lengths_q, lengths_k):
    inputs, offsets = _packed(lengths_q, lengths_k)
    options = {"enable_gqa": True, "return_lse": True}
    truth = results(lambda **x: reference.attention_varlen(**x, **_offsets(offsets), **options), inputs)
    with poisoned():
        found = results(lambda **x: F.attention_varlen(**x, **_offsets(offsets), **options, backend="cpu"), inputs)
    for name, x in found.items():
        torch.testing.assert_close(x, truth[name], rtol=1e-12, atol=1e-12)


def _offsets(offsets: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return dict(zip(("cu_seqlens_q", "cu_seqlens_k"), offsets, strict=True))


def test_packed_dropout_is_that_of_the_padded_batch():
    inputs, offsets = _packed([70, 3], [90, 5])
    torch.manual_seed(5)
    output = F.attention_varlen(**inputs, **_offsets(offsets), dropout_p=0.4, enable_gqa=True)
    torch.manual_seed(5)
    truth = reference.attention_varlen(**inputs, **_offsets(offsets), dropout_p=0.4, enable_gqa=True, seed=draw_seed())
    torch.testing.assert_close(output, truth, rtol=1e-12, atol=1e-12)


def test_the_public_op_equals_the_reference():
    inputs = draw_inputs(2, 4, 2, 30, 40, 16, 12)
    keep = torch.rand(2, 1, 30, 40) > 0.2
    for options in (
        {"attn_mask": keep, "is_causal": True},
        {"key_lengths": torch.tensor([40, 7], dtype=torch.int32), "window": (5, 5)},
        {"alibi_slopes": torch.rand(4), "scale": 0.1, "query_offset": 3, "is_causal": True},
        {"dropout_p": 0.5},
    ):
        torch.manual_seed(9)
        found = F.attention(**inputs, **options, enable_gqa=True, return_lse=True, backend="cpu")
        torch.manual_seed(9)
        seed = draw_seed() if "dropout_p" in options else None
        truth = run_reference(**inputs, **options, seed=seed)
        for pair in zip(found, truth, strict=True):
            torch.testing.assert_close(*pair, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    inputs = [x.requires_grad_() for x in draw_inputs(2, 4, 2, 5, 6, 3, 2).values()]
    keep = torch.rand(5, 6) > 0.4
    keep[1] = False
    for options in (
        {},
        {"is_causal": True, "query_offset": -1},
        {"attn_mask": keep[None, None]},
        {"attn_mask": draw(2, 1, 1, 6), "key_lengths": torch.tensor([6, 3])},
        {"alibi_slopes": draw(4), "window": (2, 1)},
        {"dropout_p": 0.4, "seed": SEED},
    ):
        # A row that sees nothing has lse = -inf, whose differences are NaN.
        assert gradcheck(lambda *x, o=options: run_op(*x, **o)[0], inputs)
    assert gradcheck(run_op, inputs)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_opcheck(dtype):
    inputs = [x.to(dtype) for x in draw_inputs(2, 2, 1, 6, 9, 8, 5).values()]
    inputs[0] = inputs[0].transpose(1, 2).contiguous().transpose(1, 2)
    inputs[1] = inputs[1].mT.contiguous().mT  # no unit stride along a row
    options = (torch.rand(2, 2, 6, 9) > 0.2, None, None, None, torch.rand(2), True, 1, 5, -1, 0.1, SEED, 0.3)
    leaves = [x.detach().requires_grad_() for x in inputs]
    torch.library.opcheck(ops.attention_fwd.registered, (*leaves, *options))
    output, lse, stats, _ = ops.attention_fwd(*inputs, *options)
    slopes = (torch.randn_like(output), torch.randn_like(lse))
    torch.library.opcheck(ops.attention_bwd.registered, (*slopes, *inputs, output, stats, *options))
    packed = [torch.randn(7, 2, 4).to(dtype).requires_grad_() for _ in range(3)]
    offsets = torch.tensor([0, 3, 7])
    options = (None, None, offsets, offsets, None, False, 0, -1, -1, 0.0, None, 0.5)
    torch.library.opcheck(ops.attention_fwd.registered, (*packed, *options))


def test_compiled_equals_eager():
    inputs = {name: x.float() for name, x in draw_inputs(2, 4, 2, 30, 40, 16, 12).items()}
    keep = torch.rand(30, 40) > 0.2

    def op(query, key, value):
        first, lse = F.attention(query, key, value, attn_mask=keep, enable_gqa=True, return_lse=True, backend="cpu")
        return first, lse, F.attention(query, key, value, is_causal=True, enable_gqa=True, backend="cpu")

    assert_compiles(op, inputs)


def test_second_derivative_is_refused():
    inputs = {name: x.float() for name, x in draw_inputs(1, 1, 1, 3, 4, 8, 8).items()}
    assert_refuses_second_derivatives(run_op, inputs)
