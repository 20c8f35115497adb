"""Attention of float32 and float16 where it may run in bf16 parts: shapes that take them, values they do not hold."""

import math

import pytest
import torch
from attention_calls import SEED, draw_inputs, run_eager, run_op, run_reference
from properties import assert_within_budget_on_every_isa, results, same_bits
from torch import Tensor

pytestmark = pytest.mark.usefixtures("needs_extension")

DTYPES = (torch.float32, torch.float16)
# By name: batch, heads, kv heads, queries, keys, width, value width; and options.
CASES = {
    "a tile": ((4, 3, 3, 32, 128, 64, 64), {}),
    "one more of everything": ((4, 3, 3, 33, 129, 33, 65), {}),
    "one fewer": ((4, 3, 3, 31, 127, 63, 31), {}),
    "few queries": ((8, 4, 2, 7, 150, 64, 64), {}),
    "few keys": ((8, 4, 4, 70, 33, 17, 17), {}),
    "wide": ((2, 2, 2, 70, 140, 256, 200), {}),
    "heads in a tile": ((4, 8, 2, 6, 190, 48, 40), {"scale": -0.3}),
    "causal": ((2, 4, 2, 150, 150, 64, 64), {"is_causal": True}),
    "window": ((2, 2, 2, 300, 300, 40, 40), {"window": (60, 3), "query_offset": 10}),
    "lengths": ((4, 2, 2, 50, 290, 32, 32), {"key_lengths": torch.tensor([290, 1, 33, 145])}),
    "alibi": ((4, 2, 2, 60, 140, 64, 64), {"alibi_slopes": torch.tensor([0.5, 0.0625])}),
    "dropout": ((4, 4, 2, 60, 140, 64, 64), {"dropout_p": 0.3, "seed": SEED}),
    "chunks of keys": ((1, 2, 2, 100, 900, 64, 64), {}),
}


def _assert_within_budget(inputs: dict[str, Tensor], dtype: torch.dtype, **options) -> None:
    assert_within_budget_on_every_isa(
        lambda query, key, value: run_op(query, key, value, **options),
        reference=lambda query, key, value: run_reference(query, key, value, **options),
        eager=lambda query, key, value: run_eager(query, key, value, **options),
        inputs=inputs,
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_within_budget(dtype, case):
    sizes, options = CASES[case]
    slopes = options.get("alibi_slopes")
    if slopes is not None:
        options = options | {"alibi_slopes": slopes.float()}
    _assert_within_budget(draw_inputs(*sizes), dtype, **options)


@pytest.mark.parametrize("power", (-100, -70, -55, 30, 45, 100))
@pytest.mark.parametrize("name", ("query", "key", "value"))
def test_magnitudes_within_budget(name, power):
    """Parts of very small values would be lost below the smallest normal number, and sums of large ones overflow."""
    inputs = draw_inputs(2, 2, 2, 70, 150, 64, 64)
    inputs[name] = inputs[name] * 2.0**power
    # What makes scores large makes the softmax one of a single key: there the scale takes it back.
    scale = 0.125 if name == "value" else 0.125 * 2.0 ** min(-power, 100)
    _assert_within_budget(inputs, torch.float32, scale=scale)


@pytest.mark.parametrize("value", (math.inf, -math.inf, math.nan, torch.finfo(torch.float32).max), ids=str)
@pytest.mark.parametrize("name", ("key", "value"))
def test_values_that_parts_do_not_hold(isa, name, value):
    """One such value: what is not finite in eager PyTorch is so here, and the rest is within their budget."""
    inputs = {n: x.float() for n, x in draw_inputs(1, 2, 2, 70, 150, 64, 64).items()}
    inputs[name][0, 1, 40, 3] = value
    found = run_op(**inputs)[0]
    expected = run_reference(**{n: x.double() for n, x in inputs.items()})[0]
    eager = run_eager(**inputs)
    eager = eager[0] if isinstance(eager, tuple) else eager
    assert torch.equal(found.isnan(), eager.isnan())
    assert torch.equal(found.isinf(), eager.isinf())
    finite = eager.isfinite()
    assert (found - expected)[finite].abs().max() <= 2 * (eager - expected)[finite].abs().max() + 2**-24


def test_queries_that_are_not_finite_change_no_others(isa):
    inputs = {n: x.float() for n, x in draw_inputs(2, 2, 2, 70, 150, 64, 64).items()}
    expected = run_op(**inputs)[0]
    inputs["query"][:, :, 50:] = math.nan
    found = run_op(**inputs)[0]
    assert same_bits(found[:, :, :50], expected[:, :, :50])
    assert found[:, :, 50:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_no_query_sees_change_no_bit(isa, dtype):
    """Keys beyond a sequence's length may hold anything."""
    inputs = {n: x.to(dtype) for n, x in draw_inputs(2, 2, 2, 70, 150, 64, 64).items()}
    lengths = torch.tensor([90, 150])
    expected = results(lambda **x: run_op(**x, key_lengths=lengths), inputs)
    for name in ("key", "value"):
        inputs[name][0, :, 90:] = math.nan
    found = results(lambda **x: run_op(**x, key_lengths=lengths), inputs)
    for name, x in expected.items():
        assert same_bits(found[name], x), name


@pytest.mark.parametrize("power", (-75, 45))
def test_gradients_of_any_magnitude(isa, power):
    """Gradients are linear in the output's, up to rounding."""
    inputs = {n: x.float().requires_grad_() for n, x in draw_inputs(1, 2, 2, 70, 150, 64, 64).items()}
    out = run_op(**inputs)[0]
    slope = torch.randn_like(out)
    plain = torch.autograd.grad(out, list(inputs.values()), slope, retain_graph=True)
    scaled = torch.autograd.grad(out, list(inputs.values()), slope * 2.0**power)
    for a, b in zip(plain, scaled, strict=True):
        assert (b * 2.0**-power - a).abs().max() <= 2**-20 * a.abs().max()
