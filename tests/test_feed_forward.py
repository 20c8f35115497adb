"""Feed-forward layers on the CPU kernels."""

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

from fasttx import functional, philox, reference
from fasttx.rng import draw_seed

pytestmark = pytest.mark.usefixtures("needs_extension")

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}
SIZES = (1, 5, 6, 7, 63, 64, 65)
CHUNK_BYTES = 3 << 20  # of hidden values that the kernel takes through both layers together, but 512 rows at least
CHUNK_ROWS, CHUNK_HIDDEN = 512, 1536  # in float32
P = 0.3
SEED = 20
DROPOUT = {"dropout_p": P, "training": True}


def ff(function, **options):
    """A feed-forward function as an op of tensors by name, either bias of which may be absent."""

    def op(input, weight1, weight2, bias1=None, bias2=None):
        return function(input, weight1, bias1, weight2, bias2, **options)

    return op


def seeded(op):
    """The op with PyTorch's generator, and so its dropout, always in the same state."""

    def run(*args, **inputs):
        torch.manual_seed(SEED)
        return op(*args, **inputs)

    return run


def drawn_seed():
    """The seed that a `seeded` op draws."""
    torch.manual_seed(SEED)
    return draw_seed()


def eager(input, weight1, bias1, weight2, bias2, *, activation="gelu", keep=None):
    """What eager PyTorch would run; `keep`: dropout's mask."""
    hidden = ACTIVATIONS[activation](F.linear(input, weight1, bias1))
    if keep is not None:
        hidden = hidden * keep.to(hidden.dtype).div(1 - P).reshape(hidden.shape)
    return F.linear(hidden, weight2, bias2)


CPU_FF = partial(functional.feed_forward, backend="cpu")


def ff_inputs(*outer, width=19, hidden=35, out=11, biases=("bias1", "bias2")):
    """input (*outer, width), the weights as nn.Linear keeps them, and the biases."""
    inputs = {
        "input": draw(*outer, width),
        "weight1": draw(hidden, width) / math.sqrt(max(width, 1)),
        "weight2": draw(out, hidden) / math.sqrt(max(hidden, 1)),
    }
    sizes = {"bias1": hidden, "bias2": out}
    return inputs | {name: draw(sizes[name]) for name in biases}


def check(inputs, dtype, *, activation="gelu", dropout=False):
    """feed_forward within the budget on every instruction set."""
    options = {"activation": activation} | (DROPOUT if dropout else {})
    seed, keep = {}, None
    if dropout:
        seed = {"seed": drawn_seed()}
        rows = inputs["input"].shape[:-1].numel()
        keep = philox.matrix_keep_mask(seed["seed"], rows, len(inputs["weight1"]), P)
    assert_within_budget_on_every_isa(
        seeded(ff(CPU_FF, **options)),
        eager=ff(eager, activation=activation, keep=keep),
        reference=ff(reference.feed_forward, **options, **seed),
        inputs=inputs,
        dtype=dtype,
    )


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("width", [1, 2, 3, 63])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_edges_of_tiles(dtype, width, dropout):
    """Exact values: every number of rows, hidden values and outputs about the edges of tiles."""
    options = {"activation": "relu"} | ({"dropout_p": 0.5, "training": True} if dropout else {})
    seed = {"seed": drawn_seed()} if dropout else {}
    for i, rows in enumerate(SIZES):
        hidden, out = SIZES[(i + width) % len(SIZES)], SIZES[(i + 5) % len(SIZES)]
        made = ff_inputs(rows, width=width, hidden=hidden, out=out)
        assert_exact_on_every_isa(
            seeded(ff(CPU_FF, **options)),
            ff(reference.feed_forward, **options, **seed),
            {name: integers(*x.shape) for name, x in made.items()},
            integers(rows, out),
            dtype,
        )


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_feed_forward(dtype, activation, dropout):
    sizes = {"width": 65, "hidden": 257, "out": 63}
    check(ff_inputs(64, **sizes), dtype, activation=activation, dropout=dropout)


@pytest.mark.parametrize("biases", [(), ("bias1",), ("bias2",)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_absent_biases(dtype, biases):
    check(ff_inputs(9, biases=biases), dtype)


@pytest.mark.parametrize("outer", [(), (2, 3), (2, 1, 2, 3)], ids=str)
def test_dimensions(outer):
    """A vector, and more dims than two."""
    for dropout in (False, True):
        check(ff_inputs(*outer), torch.float32, dropout=dropout)


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("rows", [CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 1, 2 * CHUNK_ROWS + 7])
def test_chunks_of_rows(rows, dropout):
    """Rows that go through the layers one chunk after another; dropout's rows run on."""
    check(ff_inputs(rows, hidden=CHUNK_HIDDEN), torch.float32, dropout=dropout)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_weights_give_the_same_bits(isa, dtype, activation):
    """A call without gradients keeps its packed weights; the one with gradients packs anew."""
    inputs = {n: x.to(dtype) for n, x in ff_inputs(7, hidden=65).items()}
    op = seeded(ff(CPU_FF, activation=activation, **DROPOUT))
    fresh = results(op, inputs)["output 0"]
    for _ in range(2):
        assert same_bits(op(**inputs), fresh)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(isa, layout):
    make = LAYOUTS[layout]
    dense = {name: x.float() for name, x in ff_inputs(3, 9).items()}
    shapes = {name: x.shape for name, x in dense.items() if x.dim() > 1}
    laid_out = {name: make(*shape) for name, shape in shapes.items()}
    laid_out |= {n: draw(2 * len(dense[n])).float()[::2] for n in ("bias1", "bias2")}
    for names in (*([name] for name in dense), list(dense)):
        inputs = dense | {name: laid_out[name] for name in names}
        assert_layouts_do_not_matter(seeded(ff(CPU_FF, **DROPOUT)), inputs)


def test_layouts_of_incoming_gradients(isa):
    assert_gradients_of_any_layout(ff(CPU_FF), ff_inputs(4, 6))


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_are_not_finite_stay_in_their_row(isa, dtype, value):
    inputs = {n: x.to(dtype) for n, x in ff_inputs(9, hidden=71).items()}
    op = ff(CPU_FF)
    clean = op(**inputs)
    inputs["input"][4, 18] = value
    spoiled = op(**inputs)
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert same_bits(spoiled[others], clean[others])
    assert not spoiled[4].isfinite().any()


def dropout_probe(rows, hidden):
    """Inputs that make every hidden value 1, and show each in an output of its own."""
    return {
        "input": torch.zeros(rows, 1),
        "weight1": torch.zeros(hidden, 1),
        "weight2": torch.eye(hidden),
        "bias1": torch.ones(hidden),
    }


def test_dropout_is_the_mask_of_its_seed(isa):
    """What is kept is scaled, what is dropped is zero, across chunks of rows."""
    hidden = 70
    rows = CHUNK_BYTES // (4 * hidden) + 30
    op = seeded(ff(CPU_FF, activation="relu", **DROPOUT))
    found = results(op, dropout_probe(rows, hidden))
    keep = philox.matrix_keep_mask(drawn_seed(), rows, hidden, P)
    assert 0.68 < keep.double().mean() < 0.72
    assert torch.equal(found["output 0"] != 0, keep)
    torch.testing.assert_close(found["output 0"], keep / (1 - P))


def test_what_is_dropped_gets_no_gradient(isa):
    keep = philox.matrix_keep_mask(drawn_seed(), 1, 70, P)[0]
    found = results(seeded(ff(CPU_FF, activation="relu", **DROPOUT)), dropout_probe(1, 70))
    assert torch.equal(found["d bias1"] != 0, keep)
    assert torch.equal(found["d weight2"].abs().sum(0) != 0, keep)


def test_dropout_removes_what_is_not_finite(isa):
    """A dropped value has no part in the result, whatever it was."""
    keep = philox.matrix_keep_mask(drawn_seed(), 1, 70, P)[0]
    inputs = dropout_probe(1, 70)
    op = seeded(ff(CPU_FF, activation="relu", **DROPOUT))
    clean = results(op, inputs)
    inputs["bias1"] = torch.ones(70).masked_fill(~keep, math.inf)
    assert_same_bits(results(op, inputs), clean)


def test_dropout_follows_the_generator(isa):
    inputs = {n: x.float() for n, x in ff_inputs(9).items()}
    active = ff(CPU_FF, **DROPOUT)
    torch.manual_seed(SEED)
    first, second = active(**inputs), active(**inputs)
    torch.manual_seed(SEED)
    assert same_bits(active(**inputs), first)
    assert not torch.equal(first, second)

    state = torch.get_rng_state()
    without = ff(CPU_FF, training=True)(**inputs)
    assert same_bits(ff(CPU_FF, dropout_p=P)(**inputs), without)
    assert torch.equal(torch.get_rng_state(), state)


OPS = {
    "gelu": (ff(CPU_FF), ff_inputs),
    "relu": (ff(CPU_FF, activation="relu"), ff_inputs),
    "gelu_tanh": (ff(CPU_FF, activation="gelu_tanh"), ff_inputs),
    "no biases": (ff(CPU_FF), partial(ff_inputs, biases=())),
    "dropout": (ff(CPU_FF, **DROPOUT), ff_inputs),
}
every_op = pytest.mark.parametrize("op, make", OPS.values(), ids=OPS.keys())


@every_op
def test_gradcheck(op, make):
    inputs = make(3, width=5, hidden=6, out=4)
    names = list(inputs)
    given = tuple(x.requires_grad_() for x in inputs.values())
    assert torch.autograd.gradcheck(lambda *g: seeded(op)(**dict(zip(names, g, strict=True))), given)


@every_op
def test_threads_do_not_matter(isa, threads, op, make):
    inputs = {n: x.float() for n, x in make(CHUNK_ROWS + 88, hidden=70).items()}
    assert_threads_do_not_matter(seeded(op), inputs, threads)


@every_op
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles(op, make):
    assert_compiles(op, make(2, 5))


@every_op
def test_second_derivatives_are_refused(op, make):
    assert_refuses_second_derivatives(op, make(5))


@every_op
def test_gradients_only_where_asked(op, make):
    assert_gradients_only_where_asked(seeded(op), make(5), "feed_forward_bwd")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_batch(isa, dtype):
    inputs = {n: x.to(dtype) for n, x in ff_inputs(700, hidden=2 * CHUNK_HIDDEN).items()}
    op = ff(CPU_FF)
    whole = results(op, inputs, ["input"])
    for rows in (1, 6, 600):
        part = inputs | {"input": inputs["input"][:rows]}
        assert_same_bits(results(op, part, ["input"]), {n: x[:rows] for n, x in whole.items()})
    for row in (5, 511, 512, 699):
        alone = inputs | {"input": inputs["input"][row]}
        assert same_bits(op(**alone), whole["output 0"][row])


@pytest.mark.parametrize(
    "outer, sizes",
    [((0,), {}), ((2, 0), {}), ((3,), {"width": 0}), ((3,), {"hidden": 0}), ((3,), {"out": 0})],
    ids=str,
)
def test_empty(isa, outer, sizes):
    """Without rows the parameters' gradients are zero; without width a layer gives its bias."""
    inputs = ff_inputs(*outer, **sizes)
    expected = results(ff(reference.feed_forward), inputs)
    torch.testing.assert_close(results(ff(CPU_FF), inputs), expected)


def raw_samples():
    """Arguments of every raw op, with and without options."""
    ops, seed = torch.ops.fasttx, torch.tensor(5)
    x, w1, w2, b1, b2 = draw(2, 3, 5), draw(6, 5), draw(4, 6), draw(6), draw(4)
    packed = ops.pack_weight(w1), ops.pack_weight(w2)
    leaves = [t.clone().requires_grad_() for t in (x, w1, b1, w2, b2)]
    forward, backward = ops.feed_forward_fwd.default, ops.feed_forward_bwd.default
    yield forward, (x, w1, None, w2, None, 1, 0.0, None, False, None, None)
    yield forward, (x, w1, b1, w2, b2, 2, P, seed, False, *packed)
    yield forward, (*leaves, 3, P, seed, True, None, None)
    yield forward, (*leaves[:2], None, leaves[3], None, 2, 0.0, None, True, None, None)
    for needs in ((True,) * 5, (True, False, False, False, False), (False,) * 4 + (True,)):
        yield backward, (draw(2, 3, 4), x, draw(2, 3, 6), w1, w2, 2, P, seed, *needs)


@pytest.mark.parametrize("index", range(7))
def test_opcheck(index):
    op, args = list(raw_samples())[index]
    torch.library.opcheck(op, args)


def test_raw_forward_must_keep_the_preactivation_for_gradients():
    x, weight = draw(2, 3).requires_grad_(), draw(3, 3)
    output, _ = torch.ops.fasttx.feed_forward_fwd(x, weight, None, weight, None, 1, 0.0, None, False, None, None)
    with pytest.raises(RuntimeError, match="feed_forward_fwd kept nothing for a gradient"):
        output.sum().backward()
