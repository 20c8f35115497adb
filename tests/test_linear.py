"""Linear layers on the CPU kernels."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from budget import DTYPES
from properties import (
    LAYOUTS,
    assert_compiles,
    assert_exact_on_every_isa,
    assert_gradients_of_any_layout,
    assert_gradients_only_where_asked,
    assert_layouts_do_not_matter,
    assert_refuses_second_derivatives,
    assert_same_bits,
    assert_threads_do_not_matter,
    assert_within_budget_on_every_isa,
    draw,
    integers,
    results,
    same_bits,
)

from fasttx import functional, reference

pytestmark = pytest.mark.usefixtures("needs_extension")

# About the edges of register tiles: 6 rows, and 2 to 64 columns.
SIZES = (1, 5, 6, 7, 63, 64, 65)
# About the edges of the blocks that k is summed in: 96, 192 and 768, and of the 32 that a matrix unit takes at once.
DEPTHS = (0, 1, 2, 3, 33, 95, 96, 193, 769, 1030)

CPU_LINEAR = partial(functional.linear, backend="cpu")


def linear_inputs(*outer, depth, out, bias=True):
    """input (*outer, depth), weight (out, depth), and the bias (out,)."""
    inputs = {"input": draw(*outer, depth), "weight": draw(out, depth) / math.sqrt(max(depth, 1))}
    return inputs | ({"bias": draw(out)} if bias else {})


def check(inputs, dtype):
    """linear within the budget on every instruction set."""
    assert_within_budget_on_every_isa(
        CPU_LINEAR, eager=F.linear, reference=reference.linear, inputs=inputs, dtype=dtype
    )


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_edges_of_tiles(dtype, depth, bias):
    """Exact products, rounded once: every depth with every number of rows and of columns."""
    turn = DEPTHS.index(depth) + 3 * bias
    for i, rows in enumerate(SIZES):
        out = SIZES[(i + turn) % len(SIZES)]
        inputs = {"input": integers(rows, depth), "weight": integers(out, depth)}
        if bias:
            inputs["bias"] = integers(out)
        slope = integers(rows, out)
        assert_exact_on_every_isa(CPU_LINEAR, reference.linear, inputs, slope, dtype)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(dtype, depth):
    check(linear_inputs(65, depth=depth, out=64), dtype)
    if depth > 3:  # one row: PyTorch multiplies a vector, with short chains of additions
        check(linear_inputs(1, depth=depth, out=1000, bias=False), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outer", [(), (2, 3), (2, 1, 2, 3)], ids=str)
def test_dimensions(dtype, outer):
    """A vector, and more dims than two."""
    check(linear_inputs(*outer, depth=19, out=11), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_blocks_of_rows(dtype):
    """More rows than share a block of the weight."""
    check(linear_inputs(400, depth=40, out=70), dtype)


def test_long_sums():
    """A depth of 4096, and gradients that add 4096 rows."""
    check(linear_inputs(3, depth=4096, out=20), torch.float32)
    check(linear_inputs(4096, depth=20, out=3), torch.float32)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_weights_give_the_same_bits(isa, dtype, depth):
    """A call without gradients keeps its packed weight; the one with gradients packs anew."""
    inputs = {n: x.to(dtype) for n, x in linear_inputs(7, depth=depth, out=65).items()}
    fresh = results(CPU_LINEAR, inputs)["output 0"]
    for _ in range(2):
        assert same_bits(CPU_LINEAR(**inputs), fresh)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(isa, layout):
    make = LAYOUTS[layout]
    dense = {"input": draw(3, 9, 70), "weight": draw(67, 70), "bias": draw(67)}
    dense = {name: x.float() for name, x in dense.items()}
    laid_out = {"input": make(3, 9, 70), "weight": make(67, 70), "bias": draw(134).float()[::2]}
    for names in (["input"], ["weight"], ["bias"], list(dense)):
        inputs = dense | {name: laid_out[name] for name in names}
        assert_layouts_do_not_matter(CPU_LINEAR, inputs)
        with torch.no_grad():
            contiguous = {n: x.contiguous() for n, x in inputs.items()}
            assert same_bits(CPU_LINEAR(**inputs), CPU_LINEAR(**contiguous))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transposed_weights(isa, dtype):
    """The weight of a Conv1D, (in, out), seen as (out, in), in every dtype."""
    inputs = {n: x.to(dtype) for n, x in linear_inputs(9, depth=71, out=67).items()}
    inputs["weight"] = inputs["weight"].t().contiguous().t()
    assert_layouts_do_not_matter(CPU_LINEAR, inputs)


def test_layouts_of_incoming_gradients(isa):
    assert_gradients_of_any_layout(CPU_LINEAR, linear_inputs(4, 6, depth=19, out=7))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_are_not_finite_stay_in_their_row(isa, dtype, value):
    """An odd depth: the padding of packed pairs must not meet them."""
    inputs = {n: x.to(dtype) for n, x in linear_inputs(9, depth=71, out=67).items()}
    clean = CPU_LINEAR(**inputs)
    inputs["input"][4, 70] = value
    spoiled = CPU_LINEAR(**inputs)
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert same_bits(spoiled[others], clean[others])
    assert not spoiled[4].isfinite().any()
    # In the weight they stay in their column.
    inputs = {n: x.to(dtype) for n, x in linear_inputs(9, depth=71, out=67).items()}
    clean = CPU_LINEAR(**inputs)
    inputs["weight"][66, 70] = value
    spoiled = CPU_LINEAR(**inputs)
    assert same_bits(spoiled[:, :66], clean[:, :66])
    assert not spoiled[:, 66].isfinite().any()


def test_infinity_is_no_nan(isa):
    """What is infinite in PyTorch is so here, of either sign, and what is NaN is NaN."""
    inputs = {n: x.float() for n, x in linear_inputs(40, depth=100, out=50).items()}
    inputs["input"][3, 5], inputs["input"][33, 99] = math.inf, -math.inf
    inputs["weight"][4, 9], inputs["weight"][48, 5] = -math.inf, 0.0
    ours, theirs = CPU_LINEAR(**inputs), F.linear(**inputs)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours == math.inf, theirs == math.inf)
    assert torch.equal(ours == -math.inf, theirs == -math.inf)


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FFFFFFF, -1], ids=hex)
def test_any_nan_is_nan(isa, bits):
    """Whatever its payload: rounding it as a number would make another of it."""
    inputs = {n: x.float() for n, x in linear_inputs(9, depth=71, out=67).items()}
    inputs["input"].view(torch.int32)[4, 7] = bits
    assert CPU_LINEAR(**inputs)[4].isnan().all()


@pytest.mark.parametrize("exponent", [-98, -90, -40, 60, 120])
def test_scales(exponent):
    """Rows far from 1, beside one that is not, within the budget as by themselves."""
    inputs = linear_inputs(40, depth=100, out=50, bias=False)
    inputs["input"][1:] *= 2.0**exponent
    rows = {"input": inputs["input"][1:], "weight": inputs["weight"]}
    assert_within_budget_on_every_isa(
        CPU_LINEAR, eager=F.linear, reference=reference.linear, inputs=rows, dtype=torch.float32
    )
    both = {n: x.float() for n, x in inputs.items()}
    assert same_bits(CPU_LINEAR(**both)[1:], CPU_LINEAR(**{n: x.float() for n, x in rows.items()}))


OPS = {
    "bias": partial(linear_inputs, depth=33, out=70),
    "no bias": partial(linear_inputs, depth=33, out=70, bias=False),
}
every_case = pytest.mark.parametrize("make", OPS.values(), ids=OPS.keys())


@every_case
def test_gradcheck(make):
    given = [x.requires_grad_() for x in linear_inputs(3, depth=5, out=4).values()]
    given = given if "bias" in make(1) else given[:2]
    assert torch.autograd.gradcheck(CPU_LINEAR, tuple(given))


@every_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_matter(isa, threads, dtype, make):
    inputs = {n: x.to(dtype) for n, x in make(700).items()}
    assert_threads_do_not_matter(CPU_LINEAR, inputs, threads)


@every_case
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles(make):
    assert_compiles(CPU_LINEAR, make(2, 5))


@every_case
def test_second_derivatives_are_refused(make):
    assert_refuses_second_derivatives(CPU_LINEAR, make(5))


@every_case
def test_gradients_only_where_asked(make):
    assert_gradients_only_where_asked(CPU_LINEAR, make(5), "linear_bwd")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("depth", [3, 300])
def test_a_row_does_not_depend_on_the_batch(isa, dtype, depth):
    inputs = {n: x.to(dtype) for n, x in linear_inputs(700, depth=depth, out=65).items()}
    whole = results(CPU_LINEAR, inputs, ["input"])
    for rows in (1, 6, 200):
        part = inputs | {"input": inputs["input"][:rows]}
        assert_same_bits(
            results(CPU_LINEAR, part, ["input"]), {n: x[:rows] for n, x in whole.items()}
        )
    for row in (5, 191, 192, 699):
        alone = inputs | {"input": inputs["input"][row]}
        assert same_bits(CPU_LINEAR(**alone), whole["output 0"][row])


@pytest.mark.parametrize("depth, out", [(3, 65), (300, 330), (4500, 200)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_or_two_rows_of_a_packed_weight_are_those_of_a_batch(isa, dtype, depth, out):
    """Their panels are read side by side: four and fewer, from one stretch of the depth to more than are kept."""
    inputs = {n: x.to(dtype) for n, x in linear_inputs(40, depth=depth, out=out).items()}
    whole = CPU_LINEAR(**inputs)
    spread = torch.empty(80, depth + 1, dtype=dtype)[::2, 1:]
    spread.copy_(inputs["input"])
    for rows in (slice(7, 8), slice(0, 40, 39), slice(3, 6)):
        for x in (inputs["input"][rows], spread[rows]):
            assert same_bits(CPU_LINEAR(**inputs | {"input": x}), whole[rows])


@pytest.mark.parametrize("outer, depth, out", [((0,), 5, 7), ((2, 0), 5, 7), ((3,), 0, 7),
                                               ((3,), 5, 0), ((0,), 0, 0)], ids=str)  # fmt: skip
def test_empty(isa, outer, depth, out):
    """Without rows the weight's gradient is zero; without depth the output is the bias."""
    inputs = linear_inputs(*outer, depth=depth, out=out)
    found = results(CPU_LINEAR, inputs)
    torch.testing.assert_close(found, results(reference.linear, inputs))


def raw_samples():
    """Arguments of every raw op, with and without options."""
    ops = torch.ops.fasttx
    input, weight, bias, grad = draw(2, 3, 5), draw(4, 5), draw(4), draw(2, 3, 4)
    yield ops.linear_fwd.default, (input, weight, None, None)
    yield ops.linear_fwd.default, (input[0, 0], weight.t().contiguous().t(), bias, None)
    yield ops.linear_fwd.default, (input, weight, bias, ops.pack_weight(weight))
    leaves = [t.clone().requires_grad_() for t in (input, weight, bias)]
    yield ops.linear_fwd.default, (*leaves, None)
    yield ops.linear_fwd.default, (*leaves[:2], None, None)
    for needs in ((True, True, True), (True, False, False), (False, False, True), (False,) * 3):
        yield ops.linear_bwd.default, (grad, input, weight, *needs)
    yield ops.pack_weight.default, (weight,)


@pytest.mark.parametrize("index", range(10))
def test_opcheck(index):
    op, args = list(raw_samples())[index]
    torch.library.opcheck(op, args)
