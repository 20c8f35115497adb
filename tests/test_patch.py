"""optimize, restore and explain on models of torch.nn's modules, and what they leave alone."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch

import fasttx
from fasttx.nn.transformer import PackingTransformerEncoder

B, T, E = 3, 7, 16


class Model(torch.nn.Module):
    """Known modules at several depths, among others."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(11, E)
        layer = torch.nn.TransformerEncoderLayer(E, 4, 24, dropout=0.0, batch_first=True)
        self.encoder = torch.nn.TransformerEncoder(layer, 2, torch.nn.LayerNorm(E))
        self.cross = torch.nn.MultiheadAttention(E, 4, batch_first=True)
        self.head = torch.nn.Sequential(torch.nn.Linear(E, E), torch.nn.GELU(), CustomNorm(E))

    def forward(self, tokens, padding=None):
        x = self.encoder(self.embed(tokens), src_key_padding_mask=padding)
        return self.head(self.cross(x, x, x, key_padding_mask=padding)[0])


class CustomNorm(torch.nn.LayerNorm):
    """A subclass: it may do something else."""


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def inputs():
    return torch.randint(11, (B, T)), torch.arange(T) >= torch.tensor([[7], [3], [5]])


def test_swaps_classes_and_nothing_else(model):
    before = dict(model.named_parameters())
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert fasttx.optimize(model) is model
    assert type(model.encoder) is PackingTransformerEncoder
    assert type(model.encoder.layers[1]) is fasttx.nn.TransformerEncoderLayer
    assert type(model.encoder.layers[1].self_attn) is fasttx.nn.MultiheadAttention
    assert type(model.encoder.norm) is type(model.encoder.layers[0].norm2) is fasttx.nn.LayerNorm
    assert type(model.head[1]) is fasttx.nn.GELU
    assert type(model.head[2]) is CustomNorm and type(model.head[0]) is torch.nn.Linear
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    assert optimizer.param_groups[0]["params"][0] is model.embed.weight


def test_round_trip_is_bitwise(model, inputs):
    classes = [type(m) for m in model.modules()]
    with torch.no_grad():
        expected = model(*inputs)
        fasttx.optimize(fasttx.optimize(model))
        optimized = model(*inputs)
        assert fasttx.restore(model) is model
        assert [type(m) for m in model.modules()] == classes
        assert torch.equal(model(*inputs), expected)
        assert fasttx.restore(model) is model
    valid = ~inputs[1]
    torch.testing.assert_close(optimized[valid], expected[valid], atol=1e-5, rtol=1e-4)


def test_padding_may_be_changed(model):
    fasttx.optimize(model, padding="keep")
    assert type(model.encoder) is fasttx.nn.TransformerEncoder
    fasttx.optimize(model)
    assert type(model.encoder) is PackingTransformerEncoder
    fasttx.optimize(model, padding="keep")
    assert type(model.encoder) is fasttx.nn.TransformerEncoder


def test_refuses_bad_arguments(model):
    with pytest.raises(ValueError, match="padding must be one of remove, keep, got 'drop'"):
        fasttx.optimize(model, padding="drop")
    for function in (fasttx.optimize, fasttx.restore, fasttx.explain):
        with pytest.raises(TypeError, match="must be a torch.nn.Module, got list"):
            function([model])


def test_copies_pickles_and_state_dicts(model, inputs):
    fasttx.optimize(model)
    with torch.no_grad():
        expected = model(*inputs)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
            assert torch.equal(twin(*inputs), expected)
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        plain = Model()
        plain.load_state_dict(torch.load(file))
        assert torch.equal(fasttx.optimize(plain)(*inputs), expected)


def test_training_steps_agree(model, inputs):
    """Weights that an optimizer changed are the weights used next, in float64 as torch's to rounding."""
    theirs, ours = model.double(), fasttx.optimize(copy.deepcopy(model).double())
    for module in (theirs, ours):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            module(*inputs)[~inputs[1]].square().mean().backward()
            optimizer.step()
        module.eval()
    with torch.no_grad():
        for _ in range(2):  # the second time with what was kept of the first
            expected, actual = theirs(*inputs)[~inputs[1]], ours(*inputs)[~inputs[1]]
            torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-7)
            for module in (theirs, ours):
                module.encoder.layers[0].linear1.weight.mul_(1.5)


def test_hooks_and_functional_call_and_dtypes(model, inputs):
    seen = []
    model.encoder.layers[0].register_forward_hook(lambda m, args, out: seen.append(out.shape))
    fasttx.optimize(model).eval()
    with torch.no_grad():
        expected = model(*inputs)
        assert seen == [(B, T, E)]  # whoever looks at a layer sees the batch, not packed tokens
        doubled = {name: 2 * value for name, value in model.state_dict().items()}
        called = torch.func.functional_call(model, doubled, inputs)
        assert not torch.allclose(called, expected)
        model.load_state_dict(doubled)
        torch.testing.assert_close(model(*inputs), called)
        for dtype in (torch.bfloat16, torch.float64):
            assert model.to(dtype)(*inputs).dtype == dtype


def test_autocast_follows_torch(model, inputs):
    theirs, ours = model, fasttx.optimize(copy.deepcopy(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, expected = ours(*inputs), theirs(*inputs)
    valid = ~inputs[1]
    torch.testing.assert_close(actual[valid].float(), expected[valid].float(), atol=0.1, rtol=0.1)


def test_explain_modules(model):
    fasttx.optimize(model)
    explanation = fasttx.explain(model)
    rows = {row.module: row for row in explanation.rows}
    assert len(rows) == len(list(model.modules()))
    assert rows["encoder"].reason == rows["encoder"].status == "swapped"
    assert rows["encoder"].class_name == "TransformerEncoder -> fasttx's PackingTransformerEncoder"
    assert rows["encoder.layers.0.linear1"].reason == "fused into encoder.layers.0"
    out_proj = rows["encoder.layers.0.self_attn.out_proj"]
    assert out_proj.reason == "fused into encoder.layers.0.self_attn"
    assert "a subclass of LayerNorm" in rows["head.2"].reason
    assert "no fused form" in rows["embed"].reason
    statuses = {"embed": "as torch", "head.0": "as torch", "head.2": "left alone", "encoder.layers.0.linear1": "fused"}
    assert {name: rows[name].status for name in statuses} == statuses
    assert not explanation.slow and explanation.as_dicts()[0]["module"] == "(model)"
    lines = str(explanation).splitlines()
    assert len(lines) == len(rows) + 1
    starts = {line.rindex(rows[name].reason) for line, name in zip(lines[1:], rows, strict=True)}
    assert len(starts) == 1
    assert "optimize(model) would" in str(fasttx.explain(Model()))
    assert {row.status for row in fasttx.explain(Model()).slow} == {"not optimized"}


def test_explain_a_forward_replaced_before_the_swap():
    """As accelerate's hooks do: the instance's forward goes on running, the class's does not."""
    norm = torch.nn.LayerNorm(E)
    norm.forward = lambda input: input * 2
    (row,) = fasttx.explain(fasttx.optimize(norm)).slow
    assert row.status == "called" and "its forward was replaced" in row.reason
    assert torch.equal(norm(torch.ones(E)), torch.full((E,), 2.0))


def test_explain_a_run(model, inputs):
    fasttx.optimize(model)
    rows = fasttx.explain(model, *inputs).rows
    ran = {(row.module, row.op) for row in rows}
    assert {
        ("encoder.layers.0", "attention_block_varlen"), ("encoder.layers.1", "feed_forward_block"),
        ("encoder.norm", "layer_norm"),
        ("cross", "self_attention"), ("head.1", "gelu"),
    } <= ran  # fmt: skip
    assert {row.status for row in rows} == {"ran"} and not fasttx.explain(model, *inputs).slow
    assert {row.kernel for row in rows if row.op == "attention_block_varlen"} == {"attention_block_fwd"}
    with fasttx.backend("reference"):
        assert {row.backend for row in fasttx.explain(model, *inputs).rows} == {"reference"}
    nested = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(5, E)])
    reasons = [row for row in fasttx.explain(model.encoder.eval(), nested).rows]
    assert any(row.backend == "original" and "nested" in row.reason and row.module == "(model)" for row in reasons)


def test_explain_names_the_instruction_set(model, inputs, isa):
    fasttx.optimize(model)
    rows = fasttx.explain(model, *inputs).rows
    assert {row.isa for row in rows} == {isa} and {row.backend for row in rows} == {"cpu"}
    half = fasttx.explain(fasttx.nn.LayerNorm(E), torch.randn(2, E).half()).rows[0]
    assert half.backend == "reference" and half.status == "slow" and "dtypes differ" in half.reason


def test_transformers_is_not_imported():
    code = (
        "import sys, torch, fasttx; fasttx.optimize(torch.nn.LayerNorm(4));"
        "fasttx.explain(torch.nn.GELU()); assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)
