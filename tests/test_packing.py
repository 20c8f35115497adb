"""The packed copies of weights: kept while the weight is what it was, and never longer."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from properties import draw, every_isa

import fasttx
from fasttx import functional, packing
from fasttx.dispatch import extension
from fasttx.nn import _blocks
from fasttx.nn.attention import _split_rows
from fasttx.packing import packed

pytestmark = pytest.mark.usefixtures("needs_extension", "_empty_cache")


@pytest.fixture
def _empty_cache():
    packing.invalidate()
    yield
    packing.invalidate()


def parameter(*shape, dtype=torch.float32):
    """A weight that an optimizer can step."""
    return torch.nn.Parameter(draw(*shape, dtype=dtype))


def assert_current(weight):
    """A linear layer without gradients gives what the weight gives now, cached and not."""
    x = draw(3, weight.shape[1], dtype=weight.dtype)
    with torch.no_grad():
        found = [functional.linear(x, weight, backend="cpu") for _ in range(2)]
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if weight.dtype == torch.float32 else {}
    for result in found:
        torch.testing.assert_close(result, F.linear(x, weight.detach()), **tolerance)


@torch.no_grad()
def test_one_copy_serves_every_call():
    weight = parameter(70, 33)
    first = packed(weight)
    assert first.dtype == torch.uint8 and packing.packed_bytes() == first.nbytes > 0
    assert_current(weight)
    assert packed(weight) is first
    with torch.inference_mode():
        assert packed(weight) is first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_vector_unit_has_a_copy_of_its_own_where_it_reads_another(dtype):
    """Both count, and both are forgotten; elsewhere one copy serves both."""
    weight = parameter(70, 33, dtype=dtype)
    for isa in every_isa():
        first, second = packed(weight), packed(weight, on_vectors=True)
        assert packed(weight) is first and packed(weight, on_vectors=True) is second
        if isa == "amx_float32" and dtype == torch.float32:
            assert first.nbytes > second.nbytes
            assert packing.packed_bytes() == first.nbytes + second.nbytes
        else:
            assert first is second
            assert packing.packed_bytes() == first.nbytes
        packing.invalidate()
        assert packing.packed_bytes() == 0


@torch.no_grad()
def test_feed_forward_uses_the_copies(monkeypatch):
    """After the first call nothing is packed any more."""
    x, weight1, weight2 = draw(3, 5).float(), parameter(7, 5), parameter(4, 7)
    first = functional.feed_forward(x, weight1, None, weight2, None, backend="cpu")
    assert len(packing._packed) == 2
    monkeypatch.setattr(packing, "pack_weight", None)
    assert torch.equal(
        functional.feed_forward(x, weight1, None, weight2, None, backend="cpu"), first
    )


def replace(weight, values):
    weight.data = values


OTHER_DTYPE = {torch.float32: torch.float64, torch.float64: torch.float32}
EDITS = {
    "in place": lambda w: w.mul_(2),
    "in place, one value": lambda w: w[1, 2].fill_(7),
    "in place through a view": lambda w: w.view(-1)[3:].zero_(),
    "in place through detach": lambda w: w.detach().add_(1),
    "data in place": lambda w: w.data.mul_(2),
    "data copied": lambda w: w.data.copy_(draw(*w.shape)),
    "data replaced": lambda w: replace(w, draw(*w.shape, dtype=w.dtype)),
    "data replaced by another shape": lambda w: replace(w, draw(9, w.shape[1], dtype=w.dtype)),
    "data of another dtype": lambda w: replace(w, w.data.to(OTHER_DTYPE[w.dtype])),
    "numpy": lambda w: w.detach().numpy().__imul__(3),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
@torch.no_grad()
def test_an_edit_is_seen(isa, edit):
    weight = parameter(70, 33)
    for _ in range(2):
        before = packed(weight)
        edit(weight)
        assert packed(weight) is not before
        assert_current(weight)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1), (1, 65), (9, 57)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@torch.no_grad()
def test_an_edit_of_the_data_is_seen_at_any_size(shape, dtype):
    """Also where the weight takes less than one sampled word."""
    weight = parameter(*shape, dtype=dtype)
    before = packed(weight)
    weight.data.neg_()
    assert packed(weight) is not before
    assert_current(weight)


@torch.no_grad()
def test_other_strides_over_the_same_memory_are_seen():
    """A square weight whose data is turned around: its memory, version and shape are what they were."""
    weight = parameter(33, 33)
    before, turned = packed(weight), packing.transposed(weight)
    weight.data = weight.data.t()
    assert packed(weight) is not before
    assert_current(weight)
    assert packing.transposed(weight) is not turned
    assert torch.equal(packing.transposed(weight), weight.t())


@torch.no_grad()
def test_other_strides_of_joined_projections_are_seen():
    """As before, of the rows for queries and those for keys and values, which attention keeps."""
    weight = parameter(9, 9)
    _split_rows(weight, 3)
    weight.data = weight.data.t()
    assert all(map(torch.equal, _split_rows(weight, 3), weight.split((3, 6))))


@torch.no_grad()
def test_a_partial_edit_of_the_data_needs_invalidate():
    """What the docstring says; the way out is public."""
    weight = parameter(70, 33)
    before = packed(weight)
    weight.data[35, 16] += 1
    fasttx.invalidate_packed_weights()
    assert packing.packed_bytes() == 0
    assert packed(weight) is not before
    assert_current(weight)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW], ids=lambda k: k.__name__)
@pytest.mark.parametrize("foreach", [False, True])
def test_an_optimizer_step_is_seen(kind, foreach):
    weight = parameter(70, 33)
    optimizer = kind([weight], lr=0.1, foreach=foreach)
    for _ in range(2):
        assert_current(weight)
        functional.linear(draw(2, 33).float(), weight, backend="cpu").sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_current(weight)


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_is_seen(assign):
    layer = torch.nn.Linear(33, 70)
    assert_current(layer.weight)
    layer.load_state_dict(torch.nn.Linear(33, 70).state_dict(), assign=assign)
    assert_current(layer.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_change_of_dtype_is_seen(dtype):
    layer = torch.nn.Linear(33, 70)
    assert_current(layer.weight)
    layer.to(dtype)
    assert_current(layer.weight)
    layer.to(torch.float32)
    assert_current(layer.weight)


@torch.no_grad()
def test_a_change_of_instruction_set_is_seen():
    weight = parameter(70, 33)
    for _ in range(2):
        for name in every_isa():
            before = packed(weight)
            assert_current(weight)
            extension.set_isa(name)
            assert packed(weight) is before
    copies = [packed(weight) for _ in every_isa()]
    assert len({id(x) for x in copies}) == len(copies)


@torch.no_grad()
def test_freed_with_the_weight():
    weight = parameter(70, 33)
    gone = weakref.ref(packed(weight))
    assert gone() is not None
    del weight
    gc.collect()
    assert gone() is None and packing.packed_bytes() == 0


@torch.no_grad()
def test_a_stale_copy_is_freed_at_once():
    weight = parameter(70, 33)
    gone = weakref.ref(packed(weight))
    weight.mul_(2)
    packed(weight)
    gc.collect()
    assert gone() is None


@torch.no_grad()
def test_many_weights_each_have_their_own():
    weights = [parameter(9, 5) for _ in range(20)]
    copies = [packed(weight) for weight in weights]
    assert all(packed(w) is c for w, c in zip(weights, copies, strict=True))
    for weight in weights:
        assert_current(weight)


@torch.no_grad()
def test_deepcopy_does_not_share():
    layer = torch.nn.Linear(33, 70)
    original = packed(layer.weight)
    twin = copy.deepcopy(layer)
    assert packed(twin.weight) is not original
    twin.weight.data.mul_(-1)
    assert_current(twin.weight)
    assert_current(layer.weight)
    assert packed(layer.weight) is original


def test_what_is_not_kept():
    """A weight in training, and what may change unseen."""
    weight = parameter(70, 33)
    assert packed(weight) is None
    with torch.no_grad():
        assert packed(weight) is not None
        assert packed(weight[:, 1:]) is None
    with torch.inference_mode():
        inference = draw(70, 33, dtype=torch.float32)
        assert packed(inference) is None
        assert_current(inference)
    assert packed(weight.detach()) is not None


@torch.no_grad()
def test_a_view_follows_its_base():
    """Rows of a fused weight, as attention has them."""
    base = parameter(30, 7)
    rows = base[10:20]
    assert_current(rows)
    base.mul_(3)
    assert_current(rows)
    base[15].zero_()
    assert_current(rows)


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
@torch.no_grad()
def test_a_transposed_weight(isa, edit):
    """A weight that is kept as (in, out): one view and one packed copy, until it changes."""
    weight = parameter(33, 70)
    for _ in range(2):
        view = packing.transposed(weight)
        before = packed(view)
        assert packing.transposed(weight) is view and packed(view) is before is not None
        edit(weight)
        assert torch.equal(packing.transposed(weight), weight.t())
        assert packed(packing.transposed(weight)) is not before
        assert_current(packing.transposed(weight))


@torch.no_grad()
def test_a_transposed_view_is_freed_with_the_weight():
    weight = parameter(33, 70)
    gone = weakref.ref(packed(packing.transposed(weight)))
    del weight
    gc.collect()
    assert gone() is None and packing.packed_bytes() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_transposed_weights_give_the_bits_of_dense_ones(isa, dtype):
    """Forward and gradients, in linear, feed_forward and as halves of a layer; gradients arrive as (in, out)."""
    x = draw(5, 3, 16, dtype=dtype)
    shapes = {"qkv": (16, 48), "out": (16, 16), "w1": (16, 40), "w2": (40, 16)}
    kept = {name: parameter(*shape, dtype=dtype) for name, shape in shapes.items()}
    dense = {name: torch.nn.Parameter(w.detach().t().contiguous()) for name, w in kept.items()}
    biases = {name: draw(shape[1], dtype=dtype) for name, shape in shapes.items()}
    norm, no_dropout = torch.nn.LayerNorm(16).to(dtype).eval(), torch.nn.Dropout(0.0).eval()

    def evaluate(weights):
        half = _blocks.attention_half(
            x, (weights["qkv"], biases["qkv"], weights["out"], biases["out"]), norm, no_dropout,
            norm_first=not torch.is_grad_enabled(), heads=2, scale=0.3, dropout_p=0.0,
        )  # fmt: skip
        return (
            half,
            functional.linear(x, weights["qkv"], biases["qkv"], backend="cpu"),
            functional.feed_forward(x, weights["w1"], biases["w1"], weights["w2"], biases["w2"], backend="cpu"),
        )

    with torch.no_grad():
        for _ in range(2):
            views = {name: packing.transposed(weight) for name, weight in kept.items()}
            assert all(map(torch.equal, evaluate(views), evaluate(dense)))
    outputs = [evaluate({name: packing.transposed(weight) for name, weight in kept.items()}), evaluate(dense)]
    assert all(map(torch.equal, *outputs))
    slopes = [torch.randn_like(output) for output in outputs[0]]
    of_kept = torch.autograd.grad(outputs[0], list(kept.values()), slopes)
    of_dense = torch.autograd.grad(outputs[1], list(dense.values()), slopes)
    for a, b in zip(of_kept, of_dense, strict=True):
        assert torch.equal(a, b.t())


@torch.no_grad()
def test_empty_weights():
    for shape in ((0, 5), (5, 0), (0, 0)):
        assert_current(parameter(*shape))
