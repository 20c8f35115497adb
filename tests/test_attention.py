"""Attention, padded and packed: the CPU kernels against float64, and bit for bit against themselves."""

import math
from collections.abc import Callable

import pytest
import torch
from budget import DTYPES, poisoned
from properties import (
    LAYOUTS,
    assert_compiles,
    assert_gradients_of_any_layout,
    assert_layouts_do_not_matter,
    assert_refuses_second_derivatives,
    assert_same_bits,
    assert_threads_do_not_matter,
    assert_within_budget_on_every_isa,
    draw,
    results,
    same_bits,
)
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn.functional import scaled_dot_product_attention

import fasttx.functional as F
from fasttx import philox, reference
from fasttx.ops import attention as ops
from fasttx.rng import draw_seed

pytestmark = pytest.mark.usefixtures("needs_extension")

SEED = torch.tensor(0x1234_5678_9ABC)


def _run(query: Tensor, key: Tensor, value: Tensor, **options) -> tuple[Tensor, Tensor]:
    """The op itself, with a dropout seed, by the reference's arguments."""
    mask = options.get("attn_mask")
    if mask is not None:
        mask = mask.expand(*query.shape[:3], key.shape[2])
    return ops.attention(
        query, key, value, mask, options.get("key_lengths"), None, None, options.get("alibi_slopes"),
        options.get("is_causal", False), options.get("query_offset", 0),
        *options.get("window", (-1, -1)), options.get("dropout_p", 0.0), options.get("seed"),
        options.get("scale", query.shape[-1] ** -0.5),
    )  # fmt: skip


def _truth(query: Tensor, key: Tensor, value: Tensor, **options) -> tuple[Tensor, Tensor]:
    return reference.attention(query, key, value, **options, enable_gqa=True, return_lse=True)


def _bias(queries: int, keys: int, dtype: torch.dtype, **options) -> Tensor:
    """Everything that is added to the scores, -inf where a key is not attended to."""
    distance = torch.arange(keys) - torch.arange(queries)[:, None] - options.get("query_offset", 0)
    keep = torch.ones(1, 1, queries, keys, dtype=torch.bool)
    if options.get("is_causal"):
        keep = keep & (distance <= 0)
    left, right = options.get("window", (-1, -1))
    if left >= 0:
        keep = keep & (distance >= -left)
    if right >= 0:
        keep = keep & (distance <= right)
    if "key_lengths" in options:
        keep = keep & (torch.arange(keys) < options["key_lengths"][:, None, None, None])
    bias = torch.zeros(())
    if "alibi_slopes" in options:
        bias = bias - options["alibi_slopes"][:, None, None] * distance.abs()
    mask = options.get("attn_mask")
    if mask is not None and mask.dtype == torch.bool:
        keep = keep & mask
    elif mask is not None:
        bias = bias + mask
    return bias.to(dtype).masked_fill(~keep, -math.inf)


def _eager(query: Tensor, key: Tensor, value: Tensor, **options) -> tuple[Tensor, Tensor]:
    """PyTorch's attention where every row sees a key, and lse in float32."""
    bias = _bias(query.shape[2], key.shape[2], query.dtype, **options)
    scale = options.get("scale", query.shape[-1] ** -0.5)
    groups = query.shape[1] // key.shape[1]
    wide_key = key.repeat_interleave(groups, 1).float()
    scores = query.float() @ wide_key.mT * scale + bias.float()
    lse = scores.logsumexp(-1)
    if not options.get("dropout_p"):
        bias = bias.expand(query.shape[0], query.shape[1], *bias.shape[2:])
        output = scaled_dot_product_attention(
            query, key, value, attn_mask=bias, scale=options.get("scale"), enable_gqa=True
        )
        return output, lse
    p = options["dropout_p"]
    batch, heads = torch.arange(query.shape[0]), torch.arange(query.shape[1])
    keep = philox.keep_mask(options["seed"], batch, heads, *scores.shape[2:], p)
    scores = query @ key.repeat_interleave(groups, 1).mT * scale + bias
    probabilities = scores.softmax(-1) * keep / (1 - p)
    return probabilities.to(query.dtype) @ value.repeat_interleave(groups, 1), lse


def _qkv(
    batch: int, heads: int, kv_heads: int, queries: int, keys: int, width: int, value_width: int
) -> dict[str, Tensor]:
    return {
        "query": draw(batch, heads, queries, width),
        "key": draw(batch, kv_heads, keys, width),
        "value": draw(batch, kv_heads, keys, value_width),
    }


# By name: batch, heads, kv heads, queries, keys, width, value width; and options.
CASES = {
    "one tile": ((2, 3, 3, 37, 53, 16, 16), {}),
    "one query": ((2, 4, 2, 1, 190, 64, 64), {}),
    "one key": ((1, 2, 2, 50, 1, 8, 8), {}),
    "several tiles": ((1, 2, 2, 101, 300, 64, 64), {}),
    "odd widths": ((1, 2, 1, 50, 131, 33, 7), {}),
    "width 1": ((1, 1, 1, 7, 9, 1, 1), {}),
    "wide": ((1, 1, 1, 9, 17, 130, 200), {}),
    "a scale": ((1, 2, 2, 20, 30, 16, 16), {"scale": -0.7}),
    "causal": ((1, 2, 2, 150, 150, 32, 32), {"is_causal": True}),
    "causal, few queries": ((1, 2, 1, 5, 205, 24, 24), {"is_causal": True, "query_offset": 200}),
    "window": ((1, 2, 2, 140, 160, 8, 8), {"window": (20, 3), "query_offset": 10}),
    "window to the left": ((1, 1, 1, 200, 200, 8, 8), {"window": (70, -1), "is_causal": True}),
    "lengths": ((3, 2, 2, 20, 290, 16, 16), {"key_lengths": torch.tensor([290, 1, 145])}),
    "alibi": ((1, 2, 2, 60, 140, 8, 8), {"alibi_slopes": torch.tensor([0.5, 0.0625])}),
    "dropout": ((2, 4, 2, 60, 140, 16, 16), {"dropout_p": 0.3, "seed": SEED}),
}


def _assert_within_budget(inputs: dict[str, Tensor], dtype: torch.dtype, **options) -> None:
    assert_within_budget_on_every_isa(
        lambda query, key, value: _run(query, key, value, **_in_dtype(options, query.dtype)),
        reference=lambda query, key, value: _truth(query, key, value, **options),
        eager=lambda query, key, value: _eager(query, key, value, **options),
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
    _assert_within_budget(_qkv(*shape), dtype, **options)


MASK_SHAPES = ((2, 1, 1, 140), (2, 4, 50, 140), (1, 4, 1, 140), (50, 140), (4, 50, 1), (140,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MASK_SHAPES)
def test_masks_within_budget(dtype, shape):
    inputs = _qkv(2, 4, 2, 50, 140, 8, 8)
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
        _qkv(2, 6, 2, 90, 170, 20, 12),
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
    inputs = {name: x.float() for name, x in _qkv(2, 3, 3, 50, 37, 8, 8).items()}
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
            results(lambda query, key, value, m=m: _run(query, key, value, attn_mask=m), inputs)
            for m in (mask, dense)
        ]
        assert_same_bits(*found)


def _drop_padding(options: dict) -> dict:
    return {name: x for name, x in options.items() if name != "key_lengths"}


# What a row may not depend on is tried with all of these.
INVARIANT = (
    {},
    {"is_causal": True},
    {"window": (40, 9)},
    {"alibi_slopes": torch.tensor([0.3, 0.1, 0.0, 0.02])},
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", INVARIANT, ids=lambda options: "".join(options) or "plain")
def test_padding_and_the_batch_do_not_change_a_bit(isa, dtype, options):
    if dtype == torch.float64 and "alibi_slopes" in options:
        options = {"alibi_slopes": options["alibi_slopes"].double()}
    lengths = [150, 7, 64, 1]
    full = {name: x.to(dtype) for name, x in _qkv(4, 4, 2, 150, 150, 32, 40).items()}
    for b, length in enumerate(lengths):  # what is in the padding must not matter
        full["key"][b, :, length:] = full["value"][b, :, length:] = math.nan
    slope = draw(4, 4, 150, 40).to(dtype)
    for b, length in enumerate(lengths):
        slope[b, :, length:] = 0

    def differentiate(inputs, slope, **options):
        leaves = [x.detach().requires_grad_() for x in inputs.values()]
        output, lse = _run(*leaves, **options)
        return [output, lse, *torch.autograd.grad(output, leaves, slope)]

    padded = differentiate(full, slope, key_lengths=torch.tensor(lengths), **options)
    assert all(not x[b, :, n:].any() for x in padded[3:] for b, n in enumerate(lengths))
    for b, length in enumerate(lengths):
        alone = {name: x[b : b + 1, :, :length] for name, x in full.items()}
        found = differentiate(alone, slope[b : b + 1, :, :length], **options)
        for whole, part in zip(padded, found, strict=True):
            assert same_bits(whole[b : b + 1, :, :length], part)

    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])

    def pack(x):  # (batch, heads, tokens, ...) -> (total tokens, heads, ...)
        rows = [x[b, :, :length].transpose(0, 1) for b, length in enumerate(lengths)]
        return torch.cat(rows).detach()

    leaves = [pack(x).requires_grad_() for x in full.values()]
    output, lse = ops.attention(
        *leaves, None, None, offsets, offsets, options.get("alibi_slopes"),
        options.get("is_causal", False), 0, *options.get("window", (-1, -1)), 0.0, None, 32**-0.5,
    )  # fmt: skip
    gradients = torch.autograd.grad(output, leaves, pack(slope))
    for packed, whole in zip((output, lse.t(), *gradients), padded, strict=True):
        assert same_bits(packed, pack(whole))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_place(isa, dtype):
    inputs = {name: x.to(dtype) for name, x in _qkv(1, 2, 2, 120, 200, 16, 16).items()}
    for options in ({}, {"is_causal": True, "query_offset": 80}, {"window": (50, 2)}):
        whole = _run(**inputs, **options)
        for first, last in ((0, 1), (1, 60), (47, 97), (119, 120)):
            shifted = options | {"query_offset": options.get("query_offset", 0) + first}
            part = inputs | {"query": inputs["query"][:, :, first:last]}
            for x, y in zip(whole, _run(**part, **shifted), strict=True):
                assert same_bits(x[:, :, first:last], y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_on_any_number_of_threads(isa, dtype, threads):
    options = {"is_causal": True, "dropout_p": 0.1, "seed": SEED}
    for shape in ((1, 2, 1, 150, 150, 16, 16), (3, 5, 5, 40, 130, 8, 8), (2, 8, 2, 2, 60, 16, 16)):
        inputs = {name: x.to(dtype) for name, x in _qkv(*shape).items()}
        assert_threads_do_not_matter(
            lambda query, key, value: _run(query, key, value, **options), inputs, threads
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    make = LAYOUTS[layout]
    for shape in ((2, 3, 20, 16), (2, 3, 9, 17), (2, 1, 20, 2)):
        inputs = {name: make(*shape) for name in ("query", "key", "value")}
        assert_layouts_do_not_matter(
            lambda query, key, value: _run(query, key, value, is_causal=True), inputs
        )


def test_tokens_before_heads_give_gradients_in_the_same_order():
    projected = torch.randn(2, 30, 3, 4, 8)  # as one projection gives them: query, key, value
    inputs = [x.transpose(1, 2).requires_grad_() for x in projected.unbind(2)]
    output, _ = _run(*inputs)
    assert output.transpose(1, 2).is_contiguous()
    for x in torch.autograd.grad(output.sum(), inputs):
        assert x.transpose(1, 2).is_contiguous()


def test_gradients_of_any_layout():
    inputs = {name: x.float() for name, x in _qkv(2, 2, 2, 20, 30, 8, 6).items()}
    assert_gradients_of_any_layout(_run, inputs)


EMPTY = (
    ("no batch", (0, 2, 2, 5, 7, 8, 8)),
    ("no queries", (2, 2, 2, 0, 7, 8, 8)),
    ("no keys", (2, 2, 1, 5, 0, 8, 6)),
    ("no heads", (2, 0, 0, 5, 7, 8, 8)),
    ("no value width", (2, 2, 2, 5, 7, 8, 0)),
    ("nothing", (0, 0, 0, 0, 0, 4, 0)),
)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize(("what", "shape"), EMPTY)
def test_empty_sizes(isa, dtype, what, shape):
    inputs = {name: x.to(dtype) for name, x in _qkv(*shape).items()}
    truth = results(lambda **x: reference.attention(**x, enable_gqa=True, return_lse=True), inputs)
    with poisoned():
        found = results(_run, inputs)
    for name, x in found.items():
        torch.testing.assert_close(x, truth[name], rtol=0.02, atol=0.02)
    if shape[3] and shape[4] == 0:
        assert not found["output 0"].any() and (found["output 1"] == -math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_see_nothing_give_zeros(isa, dtype):
    shape = (2, 2, 2, 60, 150, 16, 16)
    keep = torch.rand(2, 1, 60, 150) > 0.5
    keep[:, :, 5], keep[:, :, 50] = False, False
    minus = torch.zeros(keep.shape).masked_fill(~keep, -math.inf)
    wide = minus.double() if dtype == torch.float64 else minus
    dead = torch.zeros(2, 60, dtype=torch.bool)
    dead[:, [5, 50]] = True
    none = torch.zeros(2, 60, dtype=torch.bool)
    cases = [({"attn_mask": m}, dead) for m in (keep, minus.to(dtype), wide)]
    early = none.clone()
    early[:, :30] = True
    cases.append(({"is_causal": True, "query_offset": -30}, early))
    cases.append(({"key_lengths": torch.tensor([0, 9])}, torch.tensor([[True], [False]]) | none))
    cases.append(({"attn_mask": torch.zeros(1, 1, 1, 150, dtype=torch.bool)}, ~none))
    for options, expected in cases:
        inputs = {name: x.to(dtype) for name, x in _qkv(*shape).items()}
        with poisoned():
            found = results(lambda o=options, **x: _run(**x, **o), inputs)
        rows = expected[:, None].expand(2, 2, 60)
        assert torch.equal(found["output 1"] == -math.inf, rows)
        for name in ("output 0", "d query"):
            assert not found[name][rows].any() and found[name][~rows].any(-1).all()
        assert all(found[f"d {name}"].isfinite().all() for name in inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_the_lowest_finite_mask(isa, dtype):
    # Added to a score it leaves nothing of it: such a row is the mean of the values, as in PyTorch.
    inputs = {name: x.to(dtype) for name, x in _qkv(1, 2, 2, 8, 40, 16, 16).items()}
    lowest = torch.full((8, 40), torch.finfo(dtype).min, dtype=dtype)
    lowest[:4, :20] = 0
    found = results(lambda **x: _run(**x, attn_mask=lowest)[0], inputs)
    wide = {name: x.double() for name, x in inputs.items()}
    truth = results(lambda **x: _truth(**x, attn_mask=lowest.double())[0], wide)
    for name, x in found.items():
        torch.testing.assert_close(x.double(), truth[name], rtol=0.02, atol=0.03)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_in_the_rows_that_see_them(isa, dtype):
    inputs = {name: x.to(dtype) for name, x in _qkv(1, 2, 2, 300, 300, 16, 16).items()}
    clean, _ = _run(**inputs, is_causal=True)
    for name in ("query", "key", "value"):
        for garbage in (math.nan, math.inf):
            dirty = {n: x.clone() for n, x in inputs.items()}
            dirty[name][0, 0, 250] = garbage
            output, _ = _run(**dirty, is_causal=True)
            seen = slice(250, 251) if name == "query" else slice(250, None)
            if garbage is math.nan:
                assert output[0, 0, seen].isnan().all()
            # Rows of the same tile of queries as one that sees the value may be NaN, as in PyTorch.
            assert same_bits(output[:, :, :192], clean[:, :, :192])
            assert same_bits(output[0, 1], clean[0, 1])


def test_what_no_row_may_see_can_be_anything(isa):
    inputs = {name: x.float() for name, x in _qkv(2, 2, 2, 60, 300, 16, 16).items()}
    lengths = torch.tensor([130, 3])
    for options in ({"key_lengths": lengths}, {"attn_mask": (torch.arange(300) < 130)[None, None, None]}):
        expected = results(lambda options=options, **x: _run(**x, **options), inputs)
        for garbage in (math.nan, math.inf, -math.inf, 3e38):
            dirty = {n: x.clone() for n, x in inputs.items()}
            for name in ("key", "value"):
                if "key_lengths" in options:
                    dirty[name][0, :, 130:], dirty[name][1, :, 3:] = garbage, garbage
                else:
                    dirty[name][:, :, 130:] = garbage
            found = results(lambda options=options, **x: _run(**x, **options), dirty)
            assert_same_bits(found, expected)


def test_large_scores_do_not_overflow(isa):
    query = torch.tensor([1e19, -1e19, 1e4]).reshape(1, 1, 3, 1)
    key = torch.tensor([1.0, -1.0, 0.5]).reshape(1, 1, 3, 1) * 1e18
    value = torch.eye(3)[None, None]
    output, _ = _run(query, key, value, scale=1.0)
    torch.testing.assert_close(output[0, 0], torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 0]]))


def _packed(lengths_q: list[int], lengths_k: list[int]) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    inputs = {
        "query": draw(sum(lengths_q), 4, 16),
        "key": draw(sum(lengths_k), 2, 16),
        "value": draw(sum(lengths_k), 2, 9),
    }
    return inputs, tuple(torch.tensor([0, *torch.tensor(n).cumsum(0)]) for n in (lengths_q, lengths_k))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", ({}, {"is_causal": True}, {"window": (9, 2)}))
def test_packed_sequences_within_budget(dtype, options):
    inputs, offsets = _packed([50, 1, 131], [60, 1, 140])

    def eager(query, key, value):
        outputs, lses = [], []
        for q0, q1, k0, k1 in zip(*(x for o in offsets for x in (o[:-1], o[1:])), strict=True):
            padded = (query[q0:q1], key[k0:k1], value[k0:k1])
            output, lse = _eager(*(x.transpose(0, 1)[None] for x in padded), **options)
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
        found = results(
            lambda **x: F.attention_varlen(**x, **_offsets(offsets), **options, backend="cpu"), inputs
        )
    for name, x in found.items():
        torch.testing.assert_close(x, truth[name], rtol=1e-12, atol=1e-12)


def _offsets(offsets: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return dict(zip(("cu_seqlens_q", "cu_seqlens_k"), offsets, strict=True))


def test_packed_dropout_is_that_of_the_padded_batch():
    inputs, offsets = _packed([70, 3], [90, 5])
    torch.manual_seed(5)
    output = F.attention_varlen(**inputs, **_offsets(offsets), dropout_p=0.4, enable_gqa=True)
    torch.manual_seed(5)
    truth = reference.attention_varlen(
        **inputs, **_offsets(offsets), dropout_p=0.4, enable_gqa=True, seed=draw_seed()
    )
    torch.testing.assert_close(output, truth, rtol=1e-12, atol=1e-12)


def test_the_public_op_equals_the_reference():
    inputs = _qkv(2, 4, 2, 30, 40, 16, 12)
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
        truth = _truth(**inputs, **options, seed=seed)
        for pair in zip(found, truth, strict=True):
            torch.testing.assert_close(*pair, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    inputs = [x.requires_grad_() for x in _qkv(2, 4, 2, 5, 6, 3, 2).values()]
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
        assert gradcheck(lambda *x, o=options: _run(*x, **o)[0], inputs)
    assert gradcheck(_run, inputs)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_opcheck(dtype):
    inputs = [x.to(dtype) for x in _qkv(2, 2, 1, 6, 9, 8, 5).values()]
    inputs[0] = inputs[0].transpose(1, 2).contiguous().transpose(1, 2)
    inputs[1] = inputs[1].mT.contiguous().mT  # no unit stride along a row
    options = (torch.rand(2, 2, 6, 9) > 0.2, None, None, None, torch.rand(2), True, 1, 5, -1, 0.1, SEED, 0.3)
    leaves = [x.detach().requires_grad_() for x in inputs]
    torch.library.opcheck(ops.attention_fwd, (*leaves, *options))
    output, lse, stats = ops.attention_fwd(*inputs, *options)
    slopes = (torch.randn_like(output), torch.randn_like(lse))
    torch.library.opcheck(ops.attention_bwd, (*slopes, *inputs, output, stats, *options))
    packed = [torch.randn(7, 2, 4).to(dtype).requires_grad_() for _ in range(3)]
    offsets = torch.tensor([0, 3, 7])
    options = (None, None, offsets, offsets, None, False, 0, -1, -1, 0.0, None, 0.5)
    torch.library.opcheck(ops.attention_fwd, (*packed, *options))


def test_compiled_equals_eager():
    inputs = {name: x.float() for name, x in _qkv(2, 4, 2, 30, 40, 16, 12).items()}
    keep = torch.rand(30, 40) > 0.2

    def op(query, key, value):
        first, lse = F.attention(
            query, key, value, attn_mask=keep, enable_gqa=True, return_lse=True, backend="cpu"
        )
        return first, lse, F.attention(query, key, value, is_causal=True, enable_gqa=True, backend="cpu")

    assert_compiles(op, inputs)


def test_second_derivative_is_refused():
    inputs = {name: x.float() for name, x in _qkv(1, 1, 1, 3, 4, 8, 8).items()}
    assert_refuses_second_derivatives(_run, inputs)


def test_dropout_regenerates_its_mask():
    # With ones for values, a row's output is the share that was kept, and dV the kept probabilities.
    query, key = torch.zeros(1, 1, 70, 4), torch.zeros(1, 1, 200, 4)
    value = torch.eye(200)[None, None].requires_grad_()
    output, _ = _run(query, key, value, dropout_p=0.25, seed=SEED)
    keep = philox.keep_mask(SEED, torch.zeros(1).long(), torch.zeros(1).long(), 70, 200, 0.25)
    torch.testing.assert_close(output.detach(), keep / (200 * 0.75))
    (slope,) = torch.autograd.grad(output, value, torch.eye(200)[:70].expand_as(output))
    torch.testing.assert_close(slope[0, 0, :, :70], keep[0, 0].mT / (200 * 0.75))


def _refusals() -> dict[str, tuple[str, Callable[[list], None]]]:
    """What is wrong with the call, by name: the message, and the change to good arguments."""

    def put(index: int, value: object) -> Callable[[list], None]:
        return lambda arguments: arguments.__setitem__(index, value)

    x, mask = torch.randn(2, 4, 6, 8), torch.ones(2, 4, 6, 6, dtype=torch.bool)
    numbers = torch.tensor
    return {
        "dtype": ("query must be float32", put(0, x.int())),
        "key's dtype": ("key differs in dtype", put(1, x.double())),
        "dimensions": ("4 dimensions", put(2, x[0])),
        "width": ("differ in width", put(1, x[..., :7])),
        "length": ("heads or length", put(2, x[:, :, :5])),
        "kv heads": ("heads or length", put(2, x[:, :2])),
        "heads": ("multiple", lambda a: a.__setitem__(slice(1, 3), [x[:, :3], x[:, :3]])),
        "batch": ("differ in batch", lambda a: a.__setitem__(slice(1, 3), [x[:1], x[:1]])),
        "mask's shape": ("does not broadcast", put(3, mask[..., :5])),
        "mask's dims": ("4 dimensions", put(3, mask[0])),
        "mask's dtype": ("attn_mask must be bool", put(3, mask.int())),
        "mask too wide": ("attn_mask must be bool", put(3, mask.double())),
        "lengths too long": ("must lie in", put(4, numbers([3, 7]))),
        "negative lengths": ("must lie in", put(4, numbers([3, -1]))),
        "lengths' dtype": ("int64", put(4, numbers([3, 3], dtype=torch.int32))),
        "lengths' number": ("must hold 2", put(4, numbers([3]))),
        "half of the offsets": ("come together", put(5, numbers([0, 6]))),
        "slopes": ("alibi_slopes", put(7, torch.rand(3))),
        "slopes' dtype": ("alibi_slopes", put(7, torch.rand(4).double())),
        "dropout": ("dropout_p", put(12, 1.0)),
        "no seed": ("seed", put(12, 0.5)),
    }


REFUSALS = _refusals()


@pytest.mark.parametrize("what", REFUSALS)
def test_the_op_itself_refuses_what_would_read_astray(what):
    message, change = REFUSALS[what]
    good = [torch.randn(2, 4, 6, 8) for _ in range(3)]
    good += [None, None, None, None, None, False, 0, -1, -1, 0.0, None, 0.5]
    ops.attention_fwd(*good)
    change(good)
    with pytest.raises(RuntimeError, match=message):
        ops.attention_fwd(*good)


@pytest.mark.parametrize(
    "offsets", ([0, 4], [1, 3, 6], [0, 5, 3, 6], [0, 7, 6], [0, -1, 6], []), ids=str
)
def test_the_op_itself_refuses_offsets_out_of_bounds(offsets):
    x = torch.randn(6, 2, 8)
    bad = torch.tensor(offsets, dtype=torch.int64)
    good = torch.tensor([0] * max(len(offsets) - 1, 0) + [6])
    for q, k in ((bad, good), (good, bad)):
        with pytest.raises(RuntimeError, match="cu_seqlens"):
            ops.attention_fwd(x, x, x, None, None, q, k, None, False, 0, -1, -1, 0.0, None, 1.0)


def test_the_gradient_must_fit_the_forward():
    inputs = [torch.randn(2, 2, 5, 8) for _ in range(3)]
    options = (None, None, None, None, None, False, 0, -1, -1, 0.0, None, 1.0)
    output, lse, stats = ops.attention_fwd(*inputs, *options)
    for slope, slope_lse, out, at, message in (
        (output[..., :4], None, output, stats, "grad has the wrong shape"),
        (output, None, output[:1], stats, "output has the wrong shape"),
        (output, None, output, stats[:1], "stats does not fit"),
        (output, None, output, stats.double(), "stats does not fit"),
        (output, lse[..., :1], output, stats, "grad_lse does not fit"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.attention_bwd(slope, slope_lse, *inputs, out, at, *options)


def test_bad_arguments():
    x = torch.randn(2, 4, 6, 8)
    bad: list[tuple[type, str, tuple, dict]] = [
        (TypeError, "query", (x.int(), x, x), {}),
        (TypeError, "key", (x, x.double(), x), {}),
        (ValueError, "query", (x[0], x, x), {}),
        (ValueError, "width", (x, x[..., :7], x), {}),
        (ValueError, "heads", (x, x[:, :2], x[:, :2]), {}),
        (ValueError, "multiple", (x, x[:, :3], x[:, :3]), {"enable_gqa": True}),
        (ValueError, "batch", (x, x[:1], x[:1]), {}),
        (ValueError, "broadcast", (x, x, x), {"attn_mask": torch.ones(5, 6) > 0}),
        (TypeError, "attn_mask", (x, x, x), {"attn_mask": torch.ones(6, 6).int()}),
        (ValueError, "key_lengths", (x, x, x), {"key_lengths": torch.tensor([7, 1])}),
        (TypeError, "key_lengths", (x, x, x), {"key_lengths": torch.rand(2)}),
        (ValueError, "dropout_p", (x, x, x), {"dropout_p": 1.0}),
        (ValueError, "dropout_p", (x, x, x), {"dropout_p": -0.1}),
        (ValueError, "alibi_slopes", (x, x, x), {"alibi_slopes": torch.rand(3)}),
    ]
    for error, message, tensors, options in bad:
        with pytest.raises(error, match=message):
            F.attention(*tensors, **options)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_mask_that_wants_a_gradient_is_left_to_the_reference(dtype):
    inputs = {name: x.to(dtype) for name, x in _qkv(1, 2, 2, 5, 6, 8, 8).items()}
    mask = torch.zeros(5, 6, requires_grad=True)
    F.attention(**inputs, attn_mask=mask).sum().backward()
    assert mask.grad.abs().sum() > 0
    with pytest.raises(RuntimeError, match="gradient"):
        F.attention(**inputs, attn_mask=mask, backend="cpu")
