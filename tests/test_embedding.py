"""Embeddings with layer norm and dropout: the CPU kernels against float64, the public function and the module."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from budget import DTYPES, assert_within_budget, poisoned
from properties import (
    assert_compiles,
    assert_gradients_of_any_layout,
    assert_gradients_only_where_asked,
    assert_refuses_second_derivatives,
    assert_same_bits,
    assert_threads_do_not_matter,
    assert_within_budget_on_every_isa,
    draw,
    integers,
    results,
)
from torch.autograd import gradcheck

import fasttx
from fasttx import functional, philox, reference
from fasttx.cli import eager
from fasttx.ops import embedding as ops
from fasttx.rng import draw_seed

pytestmark = pytest.mark.usefixtures("needs_extension")

P, SEED = 0.3, 7
TOKENS, POSITIONS, SEGMENTS = 23, 40, 2
CPU = partial(functional.embedding, backend="cpu")


def ids(*shape, entries=TOKENS):
    return torch.randint(0, entries, shape)


def tables(width, norm=True, position=True, segment=True, dtype=torch.float64):
    weights = {"token_weight": draw(TOKENS, width)}
    weights |= {"position_weight": draw(POSITIONS, width)} if position else {}
    weights |= {"segment_weight": draw(SEGMENTS, width)} if segment else {}
    weights |= {"norm_weight": draw(width), "norm_bias": draw(width)} if norm else {}
    return {name: x.to(dtype) for name, x in weights.items()}


def seeded(function):
    """The function, drawing the same mask each time."""

    def run(*args, **kwargs):
        torch.manual_seed(SEED)
        return function(*args, **kwargs)

    return run


def drawn_seed():
    torch.manual_seed(SEED)
    return draw_seed()


def of(function, tokens, **options):
    """The function of the weights alone."""
    return lambda **weights: function(tokens, **weights, **options)


def check(weights, dtype, tokens, *, dropout=False, **options):
    options |= {"dropout_p": P, "training": True} if dropout else {}
    known = options | ({"seed": drawn_seed()} if dropout else {})
    assert_within_budget_on_every_isa(
        seeded(of(CPU, tokens, **options)), eager=of(eager.embedding, tokens, **known),
        reference=of(reference.embedding, tokens, **known), inputs=weights, dtype=dtype,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", (1, 5, 64, 77, 300))
@pytest.mark.parametrize("norm", (True, False))
def test_within_budget(dtype, width, norm):
    # The layer norm of one value is its bias: eager's error is zero there, and no budget.
    norm &= width > 1
    check(tables(width, norm), dtype, ids(4, 33), segment_ids=ids(4, 33, entries=SEGMENTS), token_scale=1.5, offset=3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", (True, False))
def test_dropout(dtype, norm):
    check(tables(72, norm), dtype, ids(3, 20), dropout=True, padding_idx=4)


@pytest.mark.parametrize("position", (True, False))
@pytest.mark.parametrize("segment", (True, False))
def test_absent_weights(position, segment):
    check(tables(40, position=position, segment=segment), torch.float32, ids(3, 20))


@pytest.mark.parametrize("shape", ((), (9,), (2, 3, 9)))
def test_dimensions(shape):
    tokens = ids(*shape)
    y = functional.embedding(tokens, **tables(16, dtype=torch.float32))
    assert y.shape == (*shape, 16)
    for backend in ("cpu", "reference"):
        same = functional.embedding(tokens, **tables(16, dtype=torch.float32), backend=backend)
        assert same.shape == y.shape
    weights = tables(16, dtype=torch.float64)
    torch.testing.assert_close(CPU(tokens, **weights), reference.embedding(tokens, **weights))


def test_the_reference_is_torchs():
    tokens, segments = ids(3, 9), ids(3, 9, entries=SEGMENTS)
    for options in ({}, {"position_ids": ids(3, 9, entries=POSITIONS)}, {"offset": 4}, {"padding_idx": 2}):
        given = {"segment_ids": segments, **options}
        ours = results(of(reference.embedding, tokens, **given), tables_of_one_seed())
        theirs = results(of(eager.embedding, tokens, **given), tables_of_one_seed())
        for name, x in ours.items():
            torch.testing.assert_close(x, theirs[name])


def tables_of_one_seed():
    torch.manual_seed(0)
    return tables(16)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_entries_that_repeat_are_summed(isa, dtype):
    """Exactly, where sums of integers are: also of an entry that nearly every token shares."""
    tokens = ids(600, entries=4)
    tokens[:500] = 1
    weight = torch.zeros(TOKENS, 70, dtype=dtype, requires_grad=True)
    slope = integers(600, 70).to(dtype)
    (found,) = torch.autograd.grad(CPU(tokens, weight), weight, slope)
    expected = torch.zeros(TOKENS, 70, dtype=torch.float64).index_add_(0, tokens, slope.double())
    assert torch.equal(found, expected.to(dtype))


def test_padding_gets_no_gradient(isa):
    weights, tokens = tables(16, dtype=torch.float32), ids(3, 20)
    tokens[:, 10:] = 5
    plain = results(of(CPU, tokens), weights)
    for padding in (5, 5 - TOKENS):
        padded = results(of(CPU, tokens, padding_idx=padding), weights)
        assert not padded["d token_weight"][5].any() and plain["d token_weight"][5].any()
        assert_same_bits({n: x for n, x in padded.items() if n != "d token_weight"},
                         {n: x for n, x in plain.items() if n != "d token_weight"})  # fmt: skip


def test_indices_of_any_kind_and_layout(isa):
    weights, tokens, positions = tables(24, dtype=torch.float32), ids(9, 4), ids(9, 4, entries=POSITIONS)
    expected = results(of(CPU, tokens.t().contiguous(), position_ids=positions.t().contiguous()), weights)
    assert_same_bits(results(of(CPU, tokens.t(), position_ids=positions.t()), weights), expected)
    assert_same_bits(results(of(CPU, tokens.t().int(), position_ids=positions.t().int()), weights), expected)
    # Positions of one sequence serve them all.
    row = ids(9, entries=POSITIONS)
    expanded = results(of(CPU, tokens.t(), position_ids=row.expand(4, 9).contiguous()), weights)
    assert_same_bits(results(of(CPU, tokens.t(), position_ids=row), weights), expanded)


def test_default_positions_and_segments(isa):
    weights, tokens = tables(24, dtype=torch.float32), ids(3, 9)
    given = {"position_ids": torch.arange(9) + 5, "segment_ids": torch.zeros(3, 9, dtype=torch.int64)}
    assert_same_bits(results(of(CPU, tokens, offset=5), weights), results(of(CPU, tokens, **given), weights))


def test_layouts_of_weights(isa):
    weights, tokens = tables(24, dtype=torch.float32), ids(3, 9)
    strided = {name: x.repeat_interleave(2, -1)[..., ::2] for name, x in weights.items()}
    assert_same_bits(results(of(CPU, tokens), strided), results(of(CPU, tokens), weights))


def test_layouts_of_incoming_gradients(isa):
    assert_gradients_of_any_layout(of(CPU, ids(3, 9)), tables(24, dtype=torch.float32))


def test_gradcheck():
    weights, tokens = tables(5), ids(2, 7)
    names = list(weights)
    op = seeded(of(CPU, tokens, dropout_p=P, training=True, token_scale=2.0))
    assert gradcheck(lambda *x: op(**dict(zip(names, x, strict=True))), [x.requires_grad_() for x in weights.values()])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_threads_do_not_matter(isa, threads, dtype):
    op = seeded(of(CPU, ids(5, 40), dropout_p=P, training=True))
    assert_threads_do_not_matter(op, tables(72, dtype=dtype), threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_does_not_depend_on_the_batch(isa, dtype):
    weights, tokens = tables(72, dtype=dtype), ids(50, 6)
    together = CPU(tokens, **weights)
    assert torch.equal(together, torch.cat([CPU(part, **weights) for part in tokens.split([1, 30, 19])]))


def test_dropout_is_the_mask_of_its_seed(isa):
    y = seeded(CPU)(ids(2, 9, entries=5), torch.ones(5, 100), dropout_p=P, training=True)
    assert torch.equal(y != 0, philox.matrix_keep_mask(drawn_seed(), 18, 100, P).view(2, 9, 100))


def test_dropout_acts_in_training_only(isa):
    weights, tokens = tables(16, dtype=torch.float32), ids(9)
    assert torch.equal(CPU(tokens, **weights, dropout_p=P), CPU(tokens, **weights))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ((0,), (2, 0), (0, 3)))
def test_nothing_to_look_up(isa, dtype, shape):
    with poisoned():
        found = results(of(CPU, ids(*shape)), tables(16, dtype=dtype))
    assert found["output 0"].shape == (*shape, 16)
    assert not any(x.any() for x in found.values())


def test_values_that_are_not_finite_stay_in_their_rows(isa):
    weights, tokens = tables(24, dtype=torch.float32), torch.tensor([1, 2, 3, 2])
    expected = CPU(tokens, **weights)
    weights["token_weight"][3, 5] = torch.nan
    found = CPU(tokens, **weights)
    assert found[2].isnan().all() and torch.equal(found[[0, 1, 3]], expected[[0, 1, 3]])


def test_compiles():
    assert_compiles(of(functional.embedding, ids(3, 9), dropout_p=P, training=True), tables(24, dtype=torch.float32))


def test_compiles_with_symbolic_sizes():
    torch._dynamo.reset()
    weights = tables(24, dtype=torch.float32)
    compiled = torch.compile(functional.embedding, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 9), (3, 7), (5, 8)):
        tokens, segments = ids(*shape), ids(*shape, entries=SEGMENTS)
        for offset in (0, 3):
            given = weights | {"segment_ids": segments, "offset": offset}
            assert torch.equal(compiled(tokens, **given), functional.embedding(tokens, **given))


def test_meta():
    weights = {name: x.to("meta") for name, x in tables(24, dtype=torch.bfloat16).items()}
    y = functional.embedding(ids(3, 9).to("meta"), **weights)
    assert (y.shape, y.dtype, y.device.type) == ((3, 9, 24), torch.bfloat16, "meta")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_opcheck(dtype):
    weights = tables(16, dtype=dtype)
    token, position, segment, norm, bias = (x.requires_grad_() for x in weights.values())
    options = (1.5, 2, 1e-5, P, torch.tensor(5), 3)
    arguments = (ids(2, 7), token, None, position, ids(2, 7, entries=SEGMENTS), segment, norm, bias, *options)
    torch.library.opcheck(ops.embedding_fwd.registered, arguments)
    torch.library.opcheck(ops.embedding_fwd.registered, (ids(5), token, *[None] * 6, *options))
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    torch.library.opcheck(ops.embedding_bwd.registered, (draw(2, 7, 16, dtype=dtype), *plain, *[True] * 5))


def test_second_derivatives_are_refused():
    assert_refuses_second_derivatives(of(CPU, ids(3, 9)), tables(24, dtype=torch.float32))


def test_gradients_only_where_asked():
    assert_gradients_only_where_asked(of(CPU, ids(3, 9)), tables(24, dtype=torch.float32), "embedding_bwd")


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("norm", (True, False))
def test_autocast_gives_the_dtype_that_torch_gives(dtype, norm):
    tokens = ids(3, 9)
    for kept in (torch.float32, dtype):
        weights = tables(24, norm, dtype=kept)
        with torch.autocast("cpu", dtype):
            ours, theirs = (f(tokens, **weights) for f in (functional.embedding, eager.embedding))
        assert ours.dtype == theirs.dtype
        truth = reference.embedding(tokens, **{name: x.double() for name, x in weights.items() if x is not None})
        assert_within_budget(actual=ours, eager=theirs, truth=truth)


WRONG = {
    "a token too large": ({"token_ids": torch.tensor([0, TOKENS])}, r"token_ids must lie in \[0, 22\], got 23"),
    "a negative token": ({"token_ids": torch.tensor([-1, 0])}, r"token_ids must lie in \[0, 22\], got -1"),
    "a position": ({"position_ids": torch.tensor([0, POSITIONS])}, r"position_ids must lie in \[0, 39\], got 40"),
    "a segment": ({"segment_ids": torch.tensor([0, SEGMENTS])}, r"segment_ids must lie in \[0, 1\], got 2"),
    "an offset": ({"offset": POSITIONS - 1}, "offset must leave room for 2 positions among .* 40, got 39"),
    "a negative offset": ({"offset": -1}, "offset must leave room"),
    "a padding token": ({"padding_idx": TOKENS}, r"padding_idx must be in \[-23, 22\], got 23"),
    "a table of another width": ({"position_weight": draw(9, 8)}, r"position_weight must have the shape"),
    "a table of one dim": ({"token_weight": draw(9)}, r"token_weight must have the shape"),
    "an empty table": ({"segment_weight": draw(0, 16)}, "segment_weight has no entries"),
    "positions of another shape": ({"position_ids": ids(3, 2, entries=4)}, "position_ids of shape .* not broadcast"),
    "segments without a table": ({"segment_ids": ids(2), "segment_weight": None}, "segment_ids are given without"),
    "a bias alone": ({"norm_weight": None}, "norm_bias needs a norm_weight"),
    "a norm of another width": ({"norm_weight": draw(8)}, "norm_weight must have the shape"),
}


def test_a_padding_token_beyond_the_entries_is_told_apart_from_one_within_its_values():
    """Whatever quick way a call takes."""
    with pytest.raises(ValueError, match="padding_idx must be in"):
        functional.embedding(ids(2), torch.randn(TOKENS, 16), padding_idx=TOKENS)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    changes, message = WRONG[name]
    weights = tables(16)
    with pytest.raises(ValueError, match=message):
        functional.embedding(**{"token_ids": ids(2), **weights} | changes)


def test_wrong_types():
    for name, value in (("padding_idx", 1.0), ("offset", 1.0), ("token_ids", torch.rand(2))):
        with pytest.raises(TypeError, match=name):
            functional.embedding(**{"token_ids": ids(2), **tables(16), name: value})


def test_what_runs_it_is_told_and_strict():
    weights, found = tables(16, dtype=torch.float32), []
    fasttx.dispatch.listeners.append(found.append)
    try:
        functional.embedding(ids(4), **weights)
    finally:
        fasttx.dispatch.listeners.clear()
    assert [(d.op, d.backend, d.kernel) for d in found] == [("embedding", "cpu", "embedding_fwd")]
    weights["norm_bias"] = weights["norm_bias"].double()
    with fasttx.strict(), pytest.raises(fasttx.FallbackError, match="embedding would run on the reference"):
        functional.embedding(ids(4), **weights)


class TestModule:
    def test_is_the_sum_of_torchs_modules(self):
        module = fasttx.nn.TransformerEmbedding(TOKENS, 16, POSITIONS, SEGMENTS, padding_idx=0, dropout=0.1).eval()
        parts = {name: torch.nn.Embedding(n, 16) for name, n in
                 (("token", TOKENS), ("position", POSITIONS), ("segment", SEGMENTS))}  # fmt: skip
        for name, part in parts.items():
            part.weight = getattr(module, f"{name}_weight")
        tokens, segments = ids(3, 9), ids(3, 9, entries=SEGMENTS)
        total = parts["token"](tokens) + parts["position"](torch.arange(9) + 4) + parts["segment"](segments)
        expected = F.layer_norm(total, (16,), module.norm_weight, module.norm_bias)
        torch.testing.assert_close(module(tokens, segments, offset=4), expected)
        assert not module.token_weight[0].any()
        module.train()
        dropped = module(tokens, segments)
        assert (dropped == 0).any()
        dropped.sum().backward()
        assert not module.token_weight.grad[0].any()

    def test_parameters(self):
        module = fasttx.nn.TransformerEmbedding(TOKENS, 16, norm=False, token_scale=4.0)
        assert list(dict(module.named_parameters())) == ["token_weight"]
        tokens = ids(3)
        torch.testing.assert_close(module(tokens), 4.0 * module.token_weight[tokens])
        copy = fasttx.nn.TransformerEmbedding(TOKENS, 16, norm=False)
        copy.load_state_dict(module.state_dict())
        assert "padding_idx=None" in repr(module)

    def test_wrong_arguments(self):
        for changes, message in (({"max_positions": 0}, "max_positions"), ({"padding_idx": 99}, "padding_idx"),
                                 ({"dropout": 1.0}, "dropout")):  # fmt: skip
            with pytest.raises(ValueError, match=message):
                fasttx.nn.TransformerEmbedding(TOKENS, 16, **changes)
