"""Self-attention with its projections as one operator, which is torch.nn.MultiheadAttention's plain call."""

from functools import partial

import pytest
import torch
from budget import DTYPES, assert_meets, poisoned
from module_checks import assert_gradients_within_budget
from properties import assert_compiles, assert_refuses_second_derivatives
from test_blocks import (
    ATTENTION_OPTIONS,
    CU,
    SEEDS,
    B,
    E,
    H,
    P,
    T,
    attention_in_steps,
    attention_inputs,
    outer_of,
    results,
)

import fasttx
from fasttx.dispatch import extension
from fasttx.measure import Standard
from fasttx.ops.self_attention import self_attention

pytestmark = pytest.mark.usefixtures("needs_extension")


def inputs_of(*outer, biased=True):
    wanted = ("x", "weight_in", "weight_out", *(("bias_in", "bias_out") if biased else ()))
    return {name: value for name, value in attention_inputs(*outer).items() if name in wanted}


def fused(
    x, weight_in, weight_out, bias_in=None, bias_out=None, *,
    batch_first=True, mask=None, packed=False, is_causal=False, dropout=False,
):  # fmt: skip
    mask = mask.to(x.dtype) if mask is not None and mask.is_floating_point() else mask
    return self_attention(
        x, weight_in, bias_in, weight_out, bias_out, H, batch_first, mask, CU if packed else None, is_causal,
        (E // H) ** -0.5, *((P, SEEDS[0]) if dropout else (0.0, None)),
    )  # fmt: skip


in_steps = partial(attention_in_steps, norm=False)


def meets_budget(inputs, dtype, **options):
    """Output and gradients, on every instruction set."""
    steps, op = partial(in_steps, **options), partial(fused, **options)
    standard = Standard(reference=steps, eager=steps, inputs=inputs, dtype=dtype, gradients=False)
    eager_dtype = torch.float32 if dtype == torch.float64 else dtype
    given = {name: value.to(eager_dtype) for name, value in inputs.items()}
    eager, truth = (results(steps, given, wanted, True) for wanted in (eager_dtype, torch.float64))
    for isa in (name for name, present in extension.isas() if present):
        extension.set_isa(isa)
        assert_meets(standard, op)
        with poisoned():
            actual = results(op, given, dtype, True)
        assert_gradients_within_budget(*({k: v for k, v in r.items() if k != "output"} for r in (actual, eager, truth)))


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("options", ATTENTION_OPTIONS.values(), ids=ATTENTION_OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_self_attention(dtype, options, dropout):
    meets_budget(inputs_of(*outer_of(options)), dtype, **options, dropout=dropout)


def test_without_biases():
    meets_budget(inputs_of(B, T, biased=False), torch.float32)


@pytest.mark.parametrize("outer", [(0, T), (B, 0), (1, 1)])
def test_empty_and_single_batches(outer):
    inputs = inputs_of(*outer)
    for gradients in (False, True):
        actual, expected = (results(op, inputs, torch.float64, gradients) for op in (fused, in_steps))
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", inputs_of(1, 1))
def test_gradients_only_where_asked(name):
    inputs = inputs_of(B, T)
    everything = results(fused, inputs, torch.float64, True)
    leaves = {k: v.detach().requires_grad_(k == name) for k, v in inputs.items()}
    output = fused(**leaves)
    slope = torch.rand(output.shape, generator=torch.Generator().manual_seed(1)).sub(0.5)
    output.backward(slope.bfloat16().double())
    assert all((leaf.grad is None) == (k != name) for k, leaf in leaves.items())
    assert torch.equal(leaves[name].grad, everything[f"d {name}"])


def test_one_derivative():
    assert_refuses_second_derivatives(fused, {k: v.float() for k, v in inputs_of(B, T).items()})


def test_compiles():
    assert_compiles(fused, {k: v.float() for k, v in inputs_of(2, 3).items()})


@pytest.mark.parametrize("op", ["default", "raw"])
def test_opcheck(op):
    x, weight_in, weight_out, bias_in, bias_out = (v.float() for v in inputs_of(2, 3).values())
    args = (x, weight_in, bias_in, weight_out, bias_out, H, True, None, None, False, 0.5, 0.0, None, True, None, None)
    op = getattr(torch.ops.fasttx.self_attention_fwd, op)
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_is_what_the_module_runs(batch_first, training):
    module = fasttx.nn.MultiheadAttention(E, H, batch_first=batch_first).train(training)
    x = torch.randn(B, T, E)
    with fasttx.backend("cpu"):
        seen = []
        fasttx.dispatch.listeners.append(seen.append)
        try:
            module(x, x, x, need_weights=False)
            module(x, x.clone(), x, need_weights=False)
        finally:
            fasttx.dispatch.listeners.pop()
    assert seen[0].op == "self_attention" and "self_attention" not in [decision.op for decision in seen[1:]]


def test_a_mask_that_wants_a_gradient_is_left_to_attention():
    module = fasttx.nn.MultiheadAttention(E, H, batch_first=True)
    x, mask = torch.randn(B, T, E), torch.zeros(T, T, requires_grad=True)
    module(x, x, x, attn_mask=mask, need_weights=False)[0].sum().backward()
    assert mask.grad is not None
