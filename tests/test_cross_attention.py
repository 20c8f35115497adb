"""Attention to a memory in training: one node of autograd, with the bits of the operations that it consists of."""

import contextlib
import copy

import pytest
import torch
from budget import assert_within_budget
from module_checks import evaluate
from torch.utils.checkpoint import checkpoint

import fasttx
from fasttx.dispatch import listeners

pytestmark = pytest.mark.usefixtures("needs_extension")
BATCH, QUERIES, KEYS, WIDTH, HEADS = 3, 5, 7, 16, 2
MASKS = {
    "none": {},
    "padding": {"key_padding_mask": torch.arange(KEYS) >= torch.tensor([KEYS, 2, 0])[:, None]},
    "a mask of each head": {"attn_mask": torch.randn(BATCH * HEADS, QUERIES, KEYS)},
    "causal": {"attn_mask": torch.ones(QUERIES, KEYS, dtype=torch.bool).triu(1), "is_causal": True},
}


@contextlib.contextmanager
def parts():
    """Whoever listens hears of every operation, so that each is called."""
    listeners.append(lambda decision: None)
    try:
        yield
    finally:
        listeners.pop()


def tensors(batch_first=True):
    x, memory = torch.randn(BATCH, QUERIES, WIDTH), torch.randn(BATCH, KEYS, WIDTH)
    return {"x": x, "memory": memory} if batch_first else {"x": x.transpose(0, 1), "memory": memory.transpose(0, 1)}


def run_with(masks, seed=0):
    def run(module, x, memory):
        torch.manual_seed(seed)
        return module(x, memory, memory, need_weights=False, **masks)[0]

    return run


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"dropout": 0.3}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_are_those_of_the_parts(batch_first, kind, options, dtype):
    mha = fasttx.nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, **options).to(dtype)
    inputs = {name: x.to(dtype) for name, x in tensors(batch_first).items()}
    run = run_with(MASKS[kind])
    assert run(mha, **inputs).grad_fn.name() == "_CrossAttentionBackward"
    found = evaluate(run, mha, inputs, True)
    with parts():
        assert run(mha, **inputs).grad_fn.name() != "_CrossAttentionBackward"
        expected = evaluate(run, mha, inputs, True)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("frozen", ["in_proj", "out_proj", "x", "memory", "bias"])
def test_only_what_is_wanted_gets_a_gradient(frozen):
    mha, inputs = fasttx.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), tensors()
    for name, parameter in mha.named_parameters():
        parameter.requires_grad_(frozen not in name)
    leaves = {name: x.requires_grad_(name != frozen) for name, x in inputs.items()}
    run_with({})(mha, **leaves).sum().backward()
    for name, leaf in (*leaves.items(), *mha.named_parameters()):
        assert (leaf.grad is None) == (not leaf.requires_grad), name


def test_second_derivatives_are_refused():
    mha, inputs = fasttx.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), tensors()
    x = inputs["x"].requires_grad_()
    (gradient,) = torch.autograd.grad(run_with({})(mha, x, inputs["memory"]).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="reference"):
        gradient.sum().backward()


def test_weights_that_changed_before_the_backward_are_an_error():
    mha, inputs = fasttx.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), tensors()
    loss = run_with({})(mha, **inputs).sum()
    with torch.no_grad():
        mha.in_proj_weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed(reentrant):
    mha, inputs = fasttx.nn.MultiheadAttention(WIDTH, HEADS, dropout=0.5, batch_first=True), tensors()
    run = run_with({})

    def again(module, x, memory):
        def call(x, memory):
            return module(x, memory, memory, need_weights=False)[0]

        torch.manual_seed(0)
        return checkpoint(call, x, memory, use_reentrant=reentrant)

    found, expected = evaluate(again, mha, inputs, True), evaluate(run, mha, inputs, True)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_transforms_and_compilers_see_the_operators():
    mha, inputs = fasttx.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), tensors()
    run = run_with({})

    def loss(parameters, x, memory):
        return torch.func.functional_call(mha, parameters, (x, memory, memory), {"need_weights": False})[0].sum()

    found = torch.func.grad(loss)(dict(mha.named_parameters()), **inputs)
    run(mha, **inputs).sum().backward()
    for name, parameter in mha.named_parameters():
        assert torch.equal(found[name], parameter.grad), name
    compiled = torch.compile(copy.deepcopy(mha), fullgraph=True, backend="aot_eager")
    assert torch.equal(run(compiled, **inputs), run(mha, **inputs))


def test_an_ensemble_of_weights():
    """Weights that vmap maps over have no memory by which their rows could be known again."""
    ensemble = [fasttx.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval() for _ in range(3)]
    parameters, _ = torch.func.stack_module_state(ensemble)
    inputs = tensors()

    def call(parameters):
        arguments = inputs["x"], inputs["memory"], inputs["memory"]
        return torch.func.functional_call(ensemble[0], parameters, arguments, {"need_weights": False})[0]

    with torch.no_grad():
        found = torch.func.vmap(call)({name: p.detach() for name, p in parameters.items()})
        for result, mha in zip(found, ensemble, strict=True):
            eager = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval()
            eager.load_state_dict(mha.state_dict())
            exact = {name: x.double() for name, x in inputs.items()}
            assert_within_budget(
                actual=result, eager=run_with({})(eager, **inputs),
                truth=run_with({})(copy.deepcopy(eager).double(), **exact),
            )  # fmt: skip
