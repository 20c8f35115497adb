"""What a row of attention may depend on, bit for bit: not on threads, the batch, padding, or what it does not see."""

import math

import pytest
import torch
from attention_calls import SEED, draw_inputs, run_eager, run_op, run_reference
from budget import DTYPES, assert_op_within_budget, poisoned
from properties import assert_same_bits, assert_threads_do_not_matter, draw, results, same_bits
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fasttx import functional, philox
from fasttx.ops import attention as ops

pytestmark = pytest.mark.usefixtures("needs_extension")

# What a row may not depend on is tried with all of these.
INVARIANT = (
    {},
    {"is_causal": True},
    {"window": (40, 9)},
    {"alibi_slopes": torch.tensor([0.3, 0.1, 0.0, 0.02])},
)

EMPTY = (
    ("no batch", (0, 2, 2, 5, 7, 8, 8)),
    ("no queries", (2, 2, 2, 0, 7, 8, 8)),
    ("no keys", (2, 2, 1, 5, 0, 8, 6)),
    ("no keys, several tiles of queries", (2, 2, 1, 70, 0, 8, 6)),
    ("no keys, more than one thread's queries", (1, 2, 2, 300, 0, 64, 64)),
    ("no heads", (2, 0, 0, 5, 7, 8, 8)),
    ("no value width", (2, 2, 2, 5, 7, 8, 0)),
    ("nothing", (0, 0, 0, 0, 0, 4, 0)),
)


def _differentiate(inputs: dict[str, Tensor], slope: Tensor, **options) -> list[Tensor]:
    """Output, lse, and the gradients of query, key and value."""
    leaves = [x.detach().requires_grad_() for x in inputs.values()]
    output, lse = run_op(*leaves, **options)
    return [output, lse, *torch.autograd.grad(output, leaves, slope)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", INVARIANT, ids=lambda options: "".join(options) or "plain")
def test_padding_and_the_batch_do_not_change_a_bit(isa, dtype, options):
    if dtype == torch.float64 and "alibi_slopes" in options:
        options = {"alibi_slopes": options["alibi_slopes"].double()}
    lengths = [530, 7, 264, 1]  # several tiles, and chunks of the backward; less than one; between
    full = {name: x.to(dtype) for name, x in draw_inputs(4, 4, 2, 530, 530, 32, 40).items()}
    for b, length in enumerate(lengths):  # what is in the padding must not matter
        full["key"][b, :, length:] = full["value"][b, :, length:] = math.nan
    slope = draw(4, 4, 530, 40).to(dtype)
    for b, length in enumerate(lengths):
        slope[b, :, length:] = 0

    padded = _differentiate(full, slope, key_lengths=torch.tensor(lengths), **options)
    assert all(not x[b, :, n:].any() for x in padded[3:] for b, n in enumerate(lengths))
    for b, length in enumerate(lengths):
        alone = {name: x[b : b + 1, :, :length] for name, x in full.items()}
        found = _differentiate(alone, slope[b : b + 1, :, :length], **options)
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
@pytest.mark.parametrize("place", ("left", "holes"))
@pytest.mark.parametrize("options", INVARIANT, ids=lambda options: "".join(options) or "plain")
def test_masked_padding_anywhere_does_not_change_a_bit(isa, dtype, place, options):
    # By a mask that all queries share, and by one for each query; in holes, distances are those of other positions.
    if place == "holes" and ("window" in options or "alibi_slopes" in options):
        options = {"is_causal": True, "scale": -0.2}
    if dtype == torch.float64 and "alibi_slopes" in options:
        options = {"alibi_slopes": options["alibi_slopes"].double()}
    size, lengths = 330, [330, 7, 264, 1]
    inputs = {name: x.to(dtype) for name, x in draw_inputs(4, 4, 2, size, size, 16, 24).items()}
    slope = draw(4, 4, size, 24).to(dtype)
    keep = torch.zeros(4, 1, 1, size, dtype=torch.bool)
    places = [
        torch.arange(size - n, size) if place == "left" else torch.randperm(size)[:n].sort().values for n in lengths
    ]
    for b, at in enumerate(places):
        keep[b, :, :, at] = True
    inputs["key"].masked_fill_(~keep.mT, math.nan)
    inputs["value"].masked_fill_(~keep.mT, math.nan)
    slope.masked_fill_(~keep.mT, 0)  # nothing reaches a query that is padding

    shared = _differentiate(inputs, slope, attn_mask=keep, **options)
    each = keep & torch.ones(size, size, dtype=torch.bool).tril() if options.get("is_causal") else keep
    dense = each.expand(4, 1, size, size).contiguous()
    by_query = _differentiate(inputs, slope, attn_mask=dense, **options)
    for b, at in enumerate(places):
        alone = {name: x[b : b + 1, :, at] for name, x in inputs.items()}
        expected = _differentiate(alone, slope[b : b + 1, :, at], **options)
        for found in (shared, by_query):
            for whole, part in zip(found, expected, strict=True):
                assert same_bits(whole[b : b + 1, :, at], part)
        padding = ~keep[b].flatten()
        assert all(not x[b, :, padding].any() for x in shared[2:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ((4, 1), (2, 4), (1, 5)))
def test_masked_padding_of_a_cache(isa, dtype, rows):
    # A few queries, one or four of them for each kv head, read the keys where they lie.
    kv_heads, queries = rows
    inputs = {name: x.to(dtype) for name, x in draw_inputs(3, 4, kv_heads, queries, 400, 24, 40).items()}
    for place in ("left", "holes"):
        keep = torch.zeros(3, 1, 1, 400, dtype=torch.bool)
        places = [torch.arange(400 - n, 400) if place == "left" else torch.randperm(400)[:n].sort().values
                  for n in (400, 150, 290)]  # fmt: skip
        for b, at in enumerate(places):
            keep[b, :, :, at] = True
        dirty = inputs | {name: inputs[name].masked_fill(~keep.mT, math.nan) for name in ("key", "value")}
        slope = draw(3, 4, queries, 40).to(dtype)
        output, lse, *gradients = _differentiate(dirty, slope, attn_mask=keep)
        for b, at in enumerate(places):
            alone = {name: x[b : b + 1] if name == "query" else x[b : b + 1, :, at] for name, x in inputs.items()}
            of_queries = [x[b : b + 1] for x in (output, lse, gradients[0])]
            of_keys = [x[b : b + 1, :, at] for x in gradients[1:]]
            for found, part in zip(of_queries + of_keys, _differentiate(alone, slope[b : b + 1]), strict=True):
                assert same_bits(found, part)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_shorter_sequence_of_more_chunks(isa, dtype, threads):
    # 1024 keys are four chunks of the backward, 1100 are three.
    inputs = {name: x.to(dtype) for name, x in draw_inputs(2, 1, 1, 20, 1100, 8, 8).items()}
    lengths = torch.tensor([1100, 1024])
    slope = draw(2, 1, 20, 8).to(dtype)
    with threads(2), poisoned():
        found = _differentiate(inputs, slope, key_lengths=lengths)
    alone = {name: x[1:] if name == "query" else x[1:, :, :1024] for name, x in inputs.items()}
    for whole, part in zip(found, _differentiate(alone, slope[1:]), strict=True):
        assert same_bits(whole[1:, :, : part.shape[2]], part)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_place(isa, dtype):
    # Up to four queries over more keys than a tile holds are summed another way.
    inputs = {name: x.to(dtype) for name, x in draw_inputs(1, 2, 2, 120, 200, 16, 16).items()}
    for options in ({}, {"is_causal": True, "query_offset": 80}, {"window": (50, 2)}):
        whole = run_op(**inputs, **options)
        for first, last in ((0, 5), (1, 60), (47, 97), (112, 120)):
            shifted = options | {"query_offset": options.get("query_offset", 0) + first}
            part = inputs | {"query": inputs["query"][:, :, first:last]}
            for x, y in zip(whole, run_op(**part, **shifted), strict=True):
                assert same_bits(x[:, :, first:last], y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_on_any_number_of_threads(isa, dtype, threads):
    options = {"is_causal": True, "dropout_p": 0.1, "seed": SEED}
    # With 5 pairs of sequence and head, more threads share what one takes pair by pair.
    shapes = ((1, 2, 1, 150, 150, 16, 16), (3, 5, 5, 40, 130, 8, 8), (2, 8, 2, 2, 60, 16, 16), (5, 2, 1, 70, 600, 8, 8))
    for shape in shapes:
        inputs = {name: x.to(dtype) for name, x in draw_inputs(*shape).items()}
        assert_threads_do_not_matter(lambda query, key, value: run_op(query, key, value, **options), inputs, threads)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize(("what", "shape"), EMPTY)
def test_empty_sizes(isa, dtype, what, shape):
    inputs = {name: x.to(dtype) for name, x in draw_inputs(*shape).items()}
    assert_op_within_budget(run_op, eager=run_eager, reference=run_reference, inputs=inputs, dtype=dtype)
    with poisoned():
        found = results(run_op, inputs)
    if shape[3] and shape[4] == 0:
        assert not found["output 0"].any() and (found["output 1"] == -math.inf).all()


def test_packed_sequences_without_any_keys():
    query, none = torch.randn(300, 2, 64), torch.randn(0, 2, 64)
    ends = torch.tensor([0, 120, 300]), torch.tensor([0, 0, 0])
    with poisoned():
        output, lse = functional.attention_varlen(query, none, none, *ends, return_lse=True)
    assert not output.any() and (lse == -math.inf).all()


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
        inputs = {name: x.to(dtype) for name, x in draw_inputs(*shape).items()}
        with poisoned():
            found = results(lambda o=options, **x: run_op(**x, **o), inputs)
        rows = expected[:, None].expand(2, 2, 60)
        assert torch.equal(found["output 1"] == -math.inf, rows)
        for name in ("output 0", "d query"):
            assert not found[name][rows].any() and found[name][~rows].any(-1).all()
        assert all(found[f"d {name}"].isfinite().all() for name in inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_the_lowest_finite_mask(isa, dtype):
    # Added to a score it leaves nothing of it: such a row is the mean of the values, as in PyTorch.
    inputs = {name: x.to(dtype) for name, x in draw_inputs(1, 2, 2, 8, 40, 16, 16).items()}
    lowest = torch.full((8, 40), torch.finfo(dtype).min, dtype=dtype)
    lowest[:4, :20] = 0

    def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = lowest.clamp(min=torch.finfo(query.dtype).min).to(query.dtype)
        return scaled_dot_product_attention(query, key, value, mask)

    assert_op_within_budget(
        lambda **x: run_op(**x, attn_mask=lowest)[0],
        eager=eager,
        reference=lambda **x: run_reference(**x, attn_mask=lowest.double())[0],
        inputs=inputs,
        dtype=dtype,
    )


@pytest.mark.parametrize("growth", [2, 8, 200, -200], ids=lambda growth: f"2^{growth} in 64 keys")
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_that_grow_along_the_keys(isa, dtype, growth):
    # The largest score so far is kept while later ones are little larger, and what is summed up rescaled where not.
    inputs = draw_inputs(2, 4, 4, 60, 300, 32, 32)
    inputs["query"][..., 0] = 1 + torch.rand(60) / 4
    inputs["key"][..., 0] = torch.arange(300) * (growth / 64 * math.log(2) * 32**0.5)
    assert_op_within_budget(
        run_op,
        eager=run_eager,
        reference=run_reference,
        inputs={name: x.to(dtype) for name, x in inputs.items()},
        dtype=dtype,
        gradients=False,  # of keys so large, luck decides how good PyTorch's own are
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("slope", [math.inf, -math.inf, math.nan])
def test_whatever_slope_lse_has_nothing_reaches_a_row_without_keys(backend, slope):
    """As the logarithm of an empty sum has: its derivative is 1 / 0."""
    inputs = draw_inputs(2, 2, 2, 5, 9, 8, 8)
    lengths, slopes = torch.tensor([0, 9]), draw(2, 2, 5)
    results = []
    for of_empty in (0.0, slope):
        leaves = [x.detach().requires_grad_() for x in inputs.values()]
        bias = torch.zeros(5, 9).double().requires_grad_()
        _, lse = functional.attention(
            *leaves, key_lengths=lengths, attn_mask=bias, return_lse=True, backend=backend
        )
        assert (lse[0] == -math.inf).all()
        slopes[0] = of_empty
        results.append(torch.autograd.grad(lse, (*leaves, bias), slopes, materialize_grads=True))
    assert all(map(torch.equal, results[0], results[1]))


def _nan_rows(visible: Tensor, query: Tensor, key: Tensor, value: Tensor) -> dict[str, Tensor]:
    """Which rows of each result are NaN, by the formulas, over visible (B, H, Tq, Tk) pairs alone."""
    of_query, of_key, of_value = (x.isnan().any(-1) for x in (query, key, value))
    weights = (visible & (of_query[..., None] | of_key[:, :, None])).any(-1)
    outputs = weights | (visible & of_value[:, :, None]).any(-1)
    return {
        "output 0": outputs, "output 1": weights, "d query": outputs,
        "d key": (visible & outputs[..., None]).any(2), "d value": (visible & weights[..., None]).any(2),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_nan_reaches_every_row_that_sees_it_and_never_from_padding(isa, dtype, name):
    """On every backend. Where a mask hides it from some queries, their rows may be NaN too, as in PyTorch."""
    size = 150
    distance = torch.arange(size) - torch.arange(size)[:, None]
    some = torch.rand(2, 1, size, size) > 0.5
    some[..., 3] = True
    some[:, :, 2] = False
    lengths = torch.tensor([size - 2, 3])
    within = torch.arange(size) < lengths[:, None, None, None]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    hidden = torch.zeros(size, size).masked_fill_(torch.arange(size) > 75, -math.inf)
    # By options: what each query sees, and whether all of a sequence see the same.
    cases = [
        ({}, torch.ones(1, dtype=torch.bool), True),
        ({"alibi_slopes": torch.tensor([0.1, 0.2], dtype=wide)}, torch.ones(1, dtype=torch.bool), True),
        ({"key_lengths": lengths}, within, True),
        ({"attn_mask": within}, within, True),
        ({"is_causal": True}, distance <= 0, False),
        ({"window": (2, 1)}, (distance >= -2) & (distance <= 1), False),
        ({"attn_mask": some}, some, False),
        ({"attn_mask": hidden.to(dtype)}, hidden == 0, False),
    ]
    for options, visible, exact in cases:
        for place in (1, size - 1):
            inputs = {n: x.to(dtype) for n, x in draw_inputs(2, 2, 2, size, size, 16, 16).items()}
            inputs[name][0, 0, place, 5] = math.nan
            expected = _nan_rows(visible.expand(2, 2, size, size), **inputs)
            for op in (run_op, run_reference):
                found = results(lambda op=op, options=options, **x: op(**x, **options), inputs)
                for result, rows in expected.items():
                    nan = found[result].isnan().reshape(*rows.shape, -1).any(-1)
                    assert torch.equal(nan, rows) if exact else nan[rows].all(), (result, options, place)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_in_the_rows_that_see_them(isa, dtype):
    inputs = {name: x.to(dtype) for name, x in draw_inputs(1, 2, 2, 300, 300, 16, 16).items()}
    clean, _ = run_op(**inputs, is_causal=True)
    for name in ("query", "key", "value"):
        for garbage in (math.nan, math.inf):
            dirty = {n: x.clone() for n, x in inputs.items()}
            dirty[name][0, 0, 250] = garbage
            output, _ = run_op(**dirty, is_causal=True)
            seen = slice(250, 251) if name == "query" else slice(250, None)
            if garbage is math.nan:
                assert output[0, 0, seen].isnan().all()
            # Rows of the same tile of queries as one that sees the value may be NaN, as in PyTorch.
            assert same_bits(output[:, :, :192], clean[:, :, :192])
            assert same_bits(output[0, 1], clean[0, 1])


def test_what_no_row_may_see_can_be_anything(isa):
    inputs = {name: x.float() for name, x in draw_inputs(2, 2, 2, 60, 300, 16, 16).items()}
    lengths = torch.tensor([130, 3])
    for options in ({"key_lengths": lengths}, {"attn_mask": (torch.arange(300) < 130)[None, None, None]}):
        expected = results(lambda options=options, **x: run_op(**x, **options), inputs)
        for garbage in (math.nan, math.inf, -math.inf, 3e38):
            dirty = {n: x.clone() for n, x in inputs.items()}
            for name in ("key", "value"):
                if "key_lengths" in options:
                    dirty[name][0, :, 130:], dirty[name][1, :, 3:] = garbage, garbage
                else:
                    dirty[name][:, :, 130:] = garbage
            found = results(lambda options=options, **x: run_op(**x, **options), dirty)
            assert_same_bits(found, expected)


def test_large_scores_do_not_overflow(isa):
    query = torch.tensor([1e19, -1e19, 1e4]).reshape(1, 1, 3, 1)
    key = torch.tensor([1.0, -1.0, 0.5]).reshape(1, 1, 3, 1) * 1e18
    value = torch.eye(3)[None, None]
    output, _ = run_op(query, key, value, scale=1.0)
    torch.testing.assert_close(output[0, 0], torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 0]]))


def test_dropout_regenerates_its_mask():
    # With ones for values, a row's output is the share that was kept, and dV the kept probabilities.
    query, key = torch.zeros(1, 1, 70, 4), torch.zeros(1, 1, 200, 4)
    value = torch.eye(200)[None, None].requires_grad_()
    output, _ = run_op(query, key, value, dropout_p=0.25, seed=SEED)
    keep = philox.keep_mask(SEED, torch.zeros(1).long(), torch.zeros(1).long(), 70, 200, 0.25)
    torch.testing.assert_close(output.detach(), keep / (200 * 0.75))
    (slope,) = torch.autograd.grad(output, value, torch.eye(200)[:70].expand_as(output))
    torch.testing.assert_close(slope[0, 0, :, :70], keep[0, 0].mT / (200 * 0.75))
