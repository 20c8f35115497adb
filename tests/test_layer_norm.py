"""Layer norm, and layer norm of residual + dropout(input), on the CPU kernels."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from budget import DTYPES
from properties import (
    LAYOUTS,
    assert_compiles,
    assert_gradients_of_any_layout,
    assert_gradients_only_where_asked,
    assert_layouts_do_not_matter,
    assert_refuses_second_derivatives,
    assert_same_bits,
    assert_threads_do_not_matter,
    assert_within_budget_on_every_isa,
    draw,
    results,
    same_bits,
)

from fasttx import UnsupportedError, functional, philox, reference
from fasttx.rng import draw_seed

pytestmark = pytest.mark.usefixtures("needs_extension")

WIDTHS = (1, 7, 16, 17, 64, 100, 768, 1000, 4097)
ROWS = (0, 1, 3, 130)
P = 0.3
SEED = 20


def norm(function, shape, eps=1e-5, **options):
    """A layer norm as an op of tensors by name."""

    def op(input, weight=None, bias=None):
        return function(input, shape, weight, bias, eps, **options)

    return op


def add_norm(function, shape, eps=1e-5, **options):
    """An add + layer norm as an op of tensors by name."""

    def op(input, residual, weight=None, bias=None):
        return function(input, residual, shape, weight, bias, eps, **options)

    return op


def seeded(op):
    """The op with PyTorch's generator, and so its dropout, always in the same state."""

    def run(**inputs):
        torch.manual_seed(SEED)
        return op(**inputs)

    return run


def drawn_seed():
    """The seed that a `seeded` op draws."""
    torch.manual_seed(SEED)
    return draw_seed()


def eager_add_norm(input, residual, shape, weight, bias, eps, *, keep=None, return_sum=True):
    """What eager PyTorch would run; `keep`: dropout's mask."""
    if keep is not None:
        input = input * keep.to(input.dtype).div(1 - P).reshape(input.shape)
    total = residual + input
    normed = F.layer_norm(total, shape, weight, bias, eps)
    return (normed, total) if return_sum else normed


CPU_NORM = partial(functional.layer_norm, backend="cpu")
CPU_ADD = partial(functional.add_layer_norm, backend="cpu")


def norm_inputs(*shape, dims=1, parameters=("weight", "bias")):
    """input (shape) and the parameters, of its last `dims` dims."""
    inputs = {"input": draw(*shape) * 2 + 0.5}
    return inputs | {name: draw(*shape[-dims:]) for name in parameters}


def add_inputs(*shape, **options):
    """The same, with the residual."""
    rest = norm_inputs(*shape, **options)
    return {"input": rest.pop("input"), "residual": draw(*shape), **rest}


def check_norm(inputs, shape, dtype, eps=1e-5):
    """layer_norm within the budget on every instruction set."""
    assert_within_budget_on_every_isa(
        norm(CPU_NORM, shape, eps),
        eager=norm(F.layer_norm, shape, eps),
        reference=norm(reference.layer_norm, shape, eps),
        inputs=inputs,
        dtype=dtype,
    )


def check_add_norm(inputs, shape, dtype, *, dropout=False, return_sum=True):
    """add_layer_norm within the budget on every instruction set, its sum too."""
    options = {"return_sum": return_sum}
    if dropout:
        options |= {"dropout_p": P, "training": True}
    seed = {"seed": drawn_seed()} if dropout else {}
    sizes = inputs["input"].shape
    columns = math.prod(shape)
    rows = sizes.numel() // columns
    keep = philox.matrix_keep_mask(seed["seed"], rows, columns, P) if dropout else None
    assert_within_budget_on_every_isa(
        seeded(add_norm(CPU_ADD, shape, **options)),
        eager=add_norm(partial(eager_add_norm, keep=keep), shape, return_sum=return_sum),
        reference=add_norm(reference.add_layer_norm, shape, **options, **seed),
        inputs=inputs,
        dtype=dtype,
    )


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm(dtype, width):
    for rows in ROWS:
        check_norm(norm_inputs(rows, width), (width,), dtype)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_layer_norm(dtype, width, dropout):
    for rows in ROWS:
        check_add_norm(add_inputs(rows, width), (width,), dtype, dropout=dropout)


@pytest.mark.parametrize("parameters", [(), ("weight",), ("bias",)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_absent_parameters(dtype, parameters):
    check_norm(norm_inputs(5, 33, parameters=parameters), (33,), dtype)
    check_add_norm(add_inputs(5, 33, parameters=parameters), (33,), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalized_shape_of_two_dims(dtype):
    check_norm(norm_inputs(2, 3, 5, 7, dims=2), (5, 7), dtype)
    for dropout in (False, True):
        check_add_norm(add_inputs(2, 3, 5, 7, dims=2), (5, 7), dtype, dropout=dropout)


def test_normalized_shape_of_every_dim():
    """One row, and a number in place of a sequence."""
    check_norm(norm_inputs(9), (9,), torch.float32)


def test_forms_of_normalized_shape():
    x = draw(4, 9, dtype=torch.float32)
    assert same_bits(CPU_NORM(x, 9), CPU_NORM(x, (9,)))
    assert same_bits(CPU_NORM(x, [4, 9]), CPU_NORM(x.reshape(36), 36).reshape(4, 9))


def test_sums_over_many_rows():
    """dweight and dbias add 20,000 addends each."""
    check_norm(norm_inputs(20_000, 24), (24,), torch.float32)



@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(isa, layout):
    make = LAYOUTS[layout]
    inputs = {"input": make(4, 6, 19), "residual": make(4, 6, 19)}
    inputs |= {name: draw(38, dtype=torch.float32)[::2] for name in ("weight", "bias")}
    op = seeded(add_norm(CPU_ADD, (19,), dropout_p=P, training=True, return_sum=True))
    assert_layouts_do_not_matter(op, inputs)
    del inputs["residual"]
    assert_layouts_do_not_matter(norm(CPU_NORM, (19,)), inputs)
    assert CPU_NORM(inputs["input"], (19,)).is_contiguous()


def test_layouts_of_incoming_gradients(isa):
    assert_gradients_of_any_layout(norm(CPU_NORM, (19,)), norm_inputs(4, 6, 19))
    assert_gradients_of_any_layout(
        add_norm(CPU_ADD, (19,), return_sum=True), add_inputs(4, 6, 19)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_mean(dtype):
    """A variance taken from a mean of squares would be lost in 1e8."""
    inputs = norm_inputs(20, 100) | {"input": draw(20, 100) + 1e4}
    check_norm(inputs, (100,), dtype)
    check_add_norm({**inputs, "residual": draw(20, 100)}, (100,), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("value", [0.0, -3.0, 2.0**120])
def test_constant_rows(isa, dtype, value):
    """No variance: the bias remains, and gradients are finite however large the mean."""
    inputs = norm_inputs(3, 5) | {"input": torch.full((3, 5), value)}
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    found = results(norm(CPU_NORM, (5,)), inputs)
    assert same_bits(found["output 0"], inputs["bias"].expand(3, 5))
    assert torch.count_nonzero(found["d weight"]) == 0
    expected = results(norm(reference.layer_norm, (5,)), inputs)
    torch.testing.assert_close(found["d input"], expected["d input"], rtol=0.02, atol=0.0)


@pytest.mark.parametrize("eps", [0.0, 1e-12, 0.1, 10.0])
def test_eps(eps):
    check_norm(norm_inputs(6, 40), (40,), torch.float32, eps)
    changed = CPU_NORM(torch.tensor([[-1.0, 1.0]]), (2,), eps=eps)
    torch.testing.assert_close(changed, torch.tensor([[-1.0, 1.0]]) / math.sqrt(1 + eps))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_are_not_finite_stay_in_their_row(isa, dtype, value):
    inputs = {name: x.to(dtype) for name, x in add_inputs(5, 37).items()}
    op = add_norm(CPU_ADD, (37,), return_sum=True)
    clean = results(op, inputs, ["input", "residual"])
    inputs["input"][2, 36] = value
    spoiled = results(op, inputs, ["input", "residual"])
    others = torch.tensor([0, 1, 3, 4])
    assert_same_bits(
        {name: x[others] for name, x in spoiled.items()},
        {name: x[others] for name, x in clean.items()},
    )
    assert spoiled["output 0"][2].isnan().all() and spoiled["d input"][2].isnan().all()
    assert same_bits(spoiled["output 1"][2, :36], clean["output 1"][2, :36])


def test_dropout_removes_what_is_not_finite(isa):
    """A dropped value has no part in the result, whatever it was."""
    keep = philox.matrix_keep_mask(drawn_seed(), 3, 40, P)
    inputs = {n: x.float() for n, x in add_inputs(3, 40).items()}
    options = {"dropout_p": P, "training": True, "return_sum": True}
    op = seeded(add_norm(CPU_ADD, (40,), **options))
    clean = results(op, inputs)
    inputs["input"] = inputs["input"].masked_fill(~keep, math.inf)
    assert_same_bits(results(op, inputs), clean)


def test_dropout_is_the_mask_of_its_seed(isa):
    """What is kept is scaled; what is dropped adds nothing and gets no gradient."""
    inputs = {"input": torch.ones(300, 70), "residual": torch.zeros(300, 70)}
    options = {"dropout_p": P, "training": True, "return_sum": True}
    found = results(seeded(add_norm(CPU_ADD, (70,), **options)), inputs)
    keep = philox.matrix_keep_mask(drawn_seed(), 300, 70, P)
    torch.testing.assert_close(found["output 1"], keep / (1 - P))
    assert 0.68 < keep.double().mean() < 0.72
    assert torch.equal(found["d input"] != 0, keep)
    assert (found["d residual"] != 0).all()


def test_dropout_follows_the_generator(isa):
    x, residual = draw(9, 70, dtype=torch.float32), draw(9, 70, dtype=torch.float32)
    call = partial(CPU_ADD, x, residual, (70,), dropout_p=P)
    torch.manual_seed(SEED)
    first, second = call(training=True), call(training=True)
    torch.manual_seed(SEED)
    assert same_bits(call(training=True), first)
    assert not torch.equal(first, second)

    state = torch.get_rng_state()
    without = CPU_ADD(x, residual, (70,), training=True)
    assert same_bits(call(training=False), without) and same_bits(call(), without)
    assert torch.equal(torch.get_rng_state(), state)


OPS = {
    "layer_norm": (norm(CPU_NORM, (23,)), norm_inputs),
    "bare layer_norm": (norm(CPU_NORM, (23,)), partial(norm_inputs, parameters=())),
    "add_layer_norm": (add_norm(CPU_ADD, (23,)), add_inputs),
    "bare add_layer_norm": (add_norm(CPU_ADD, (23,)), partial(add_inputs, parameters=())),
    "add_layer_norm with its sum": (add_norm(CPU_ADD, (23,), return_sum=True), add_inputs),
    "add_layer_norm with dropout": (
        add_norm(CPU_ADD, (23,), dropout_p=P, training=True, return_sum=True),
        add_inputs,
    ),
}
every_op = pytest.mark.parametrize("op, make", OPS.values(), ids=OPS.keys())


@every_op
def test_gradcheck(op, make):
    inputs = {name: x.requires_grad_() for name, x in make(3, 23).items()}
    names = list(inputs)
    assert torch.autograd.gradcheck(
        lambda *given: seeded(op)(**dict(zip(names, given, strict=True))), tuple(inputs.values())
    )


@every_op
def test_threads_do_not_matter(isa, threads, op, make):
    inputs = {name: x.float() for name, x in make(1500, 23).items()}
    assert_threads_do_not_matter(seeded(op), inputs, threads)


@every_op
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles(op, make):
    assert_compiles(op, make(5, 23))


@every_op
def test_second_derivatives_are_refused(op, make):
    assert_refuses_second_derivatives(op, make(5, 23))


@pytest.mark.parametrize("name", OPS)
def test_gradients_only_where_asked(name):
    op, make = OPS[name]
    shared = {} if "dropout" in name else {"input": "residual"}
    backward = "add_layer_norm_bwd" if "add" in name else "layer_norm_bwd"
    assert_gradients_only_where_asked(seeded(op), make(5, 23), backward, shared)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [7, 64, 1000])
def test_a_row_does_not_depend_on_the_batch(isa, dtype, width):
    inputs = {name: x.to(dtype) for name, x in add_inputs(130, width).items()}
    op = add_norm(CPU_ADD, (width,))
    whole = op(**inputs)
    gradient = results(op, inputs, ["input"])["d input"]
    for row in (0, 63, 64, 129):
        alone = {n: x[row : row + 1] if x.dim() == 2 else x for n, x in inputs.items()}
        assert same_bits(op(**alone)[0], whole[row])
    # The incoming gradients of a prefix are those of the whole.
    prefix = {n: x[:3] if x.dim() == 2 else x for n, x in inputs.items()}
    assert same_bits(results(op, prefix, ["input"])["d input"], gradient[:3])


def test_addends_do_not_share_a_gradient():
    """Without dropout both gradients are equal: changing one must leave the other alone."""
    given = {name: x.requires_grad_() for name, x in add_inputs(3, 5).items()}
    add_norm(CPU_ADD, (5,))(**given).square().sum().backward()
    before = given["residual"].grad.clone()
    given["input"].grad.zero_()
    assert same_bits(given["residual"].grad, before) and before.abs().sum() > 0


def test_one_tensor_as_both_addends():
    assert_within_budget_on_every_isa(
        lambda input: CPU_ADD(input, input, (20,)),
        eager=lambda input: F.layer_norm(input + input, (20,)),
        reference=lambda input: reference.add_layer_norm(input, input, (20,)),
        inputs={"input": draw(4, 20)},
        dtype=torch.float32,
    )


@pytest.mark.parametrize("used", [0, 1])
def test_one_of_two_outputs_differentiated(used):
    """The gradient that reaches only the normed values, or only the sum."""
    inputs = add_inputs(3, 11)

    def part(function):
        return lambda **given: add_norm(function, (11,), return_sum=True)(**given)[used]

    wanted = ["input", "residual"]
    found = results(part(CPU_ADD), inputs, wanted)
    expected = results(part(reference.add_layer_norm), inputs, wanted)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5)])
def test_empty(isa, shape):
    inputs = add_inputs(*shape)
    found = results(add_norm(CPU_ADD, shape[-1:], return_sum=True), inputs)
    expected = results(add_norm(reference.add_layer_norm, shape[-1:], return_sum=True), inputs)
    torch.testing.assert_close(found, expected)


def test_rows_of_nothing():
    """A width of zero is left to the reference."""
    inputs = add_inputs(2, 0)
    options = {"return_sum": True}
    found = results(add_norm(functional.add_layer_norm, (0,), **options), inputs)
    expected = results(add_norm(reference.add_layer_norm, (0,), **options), inputs)
    torch.testing.assert_close(found, expected)
    with pytest.raises(UnsupportedError, match="holds nothing"):
        CPU_NORM(inputs["input"], (0,))


def raw_samples():
    """Arguments of every raw op, with and without options."""
    x, residual, weight, bias = (draw(*s) for s in ((4, 6), (4, 6), (6,), (6,)))
    seed = torch.tensor(5)
    ops = torch.ops.fasttx
    with_grad = [t.clone().requires_grad_() for t in (x, residual, weight, bias)]
    yield ops.layer_norm_fwd.default, (x, 6, None, None, 1e-5)
    yield ops.layer_norm_fwd.default, (with_grad[0], 6, *with_grad[2:], 1e-5)
    yield ops.layer_norm_fwd.default, (with_grad[0], 6, None, with_grad[3], 1e-5)
    for needs in ((True, True, True), (True, False, False), (False, False, True)):
        yield ops.layer_norm_bwd.default, (residual, x, weight, 6, 1e-5, *needs)
    yield ops.layer_norm_bwd.default, (residual, x, None, 6, 1e-5, True, False, False)
    yield ops.add_layer_norm_fwd.default, (x, residual, 6, None, None, 1e-5, 0.0, None, False)
    for dropout in ((0.0, None), (P, seed)):
        yield (
            ops.add_layer_norm_fwd.default,
            (*with_grad[:2], 6, *with_grad[2:], 1e-5, *dropout, True),
        )
        for needs in ((True,) * 4, (True, False, False, True), (False,) * 4):
            yield (
                ops.add_layer_norm_bwd.default,
                (x, residual, x, weight, 6, 1e-5, *dropout, *needs),
            )
    yield (
        ops.add_layer_norm_bwd.default,
        (x, None, x, None, 6, 1e-5, 0.0, None, True, True, False, False),
    )


@pytest.mark.parametrize("op, args", list(raw_samples()))
def test_opcheck(op, args):
    torch.library.opcheck(op, args)


def test_raw_forward_must_keep_the_sum_for_gradients():
    x = draw(2, 3).requires_grad_()
    output, _ = torch.ops.fasttx.add_layer_norm_fwd(x, x, 3, None, None, 1e-5, 0.0, None, False)
    with pytest.raises(RuntimeError, match="add_layer_norm_fwd kept nothing for a gradient"):
        output.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", [norm_inputs, add_inputs])
def test_results_larger_than_caches_have_the_same_bits(isa, dtype, make, width=768):
    """They are written past the caches, on another path: a slice of the rows gives what it gives by itself."""
    rows = 65 * 2**20 // (2 * width * dtype.itemsize)
    # Few rows are drawn, and come again after a prime number of others: no part of the work begins at just as many.
    drawn = {name: x.to(dtype) for name, x in make(997, width).items()}
    inputs = {name: x.repeat(rows // 997 + 1, 1)[:rows] if x.dim() == 2 else x for name, x in drawn.items()}
    op = norm(CPU_NORM, (width,)) if make is norm_inputs else add_norm(CPU_ADD, (width,), return_sum=True)

    def run(kept):
        given = {name: (x[kept] if x.dim() == 2 else x).clone().requires_grad_() for name, x in inputs.items()}
        outputs = op(**given)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        names = [name for name, x in given.items() if x.dim() == 2]
        slopes = [x[kept] for x in (inputs["input"].flip(0), inputs["input"])]
        gradients = torch.autograd.grad(outputs, [given[name] for name in names], slopes[: len(outputs)])
        return [*outputs, *gradients]

    whole = run(slice(None))
    for kept in (slice(0, 3), slice(rows // 2 - 1, rows // 2 + 2), slice(rows - 2, rows)):
        for large, small in zip(whole, run(kept), strict=True):
            assert same_bits(large[kept].detach(), small.detach())
