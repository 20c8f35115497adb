"""The halves of transformer layers as single operators: against float64, on every instruction set, in every form."""

import itertools
import math
from functools import partial

import pytest
import torch
from budget import DTYPES, assert_within_budget
from module_checks import assert_gradients_within_budget
from properties import assert_compiles, assert_refuses_second_derivatives, draw
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fasttx import philox, reference
from fasttx.dispatch import extension
from fasttx.ops.attention_block import attention_block
from fasttx.ops.feed_forward_block import feed_forward_block

pytestmark = pytest.mark.usefixtures("needs_extension")

B, T, H, E, F = 3, 9, 4, 24, 40
P, SEEDS = 0.3, (torch.tensor(3), torch.tensor(4))
LENGTHS = (9, 0, 4)
CU = torch.tensor([0, 9, 9, 13])
BIASED = ("bias_in", "bias_out", "norm_weight", "norm_bias")


def attention_inputs(*outer, affine=True):
    inputs = {
        "x": draw(*outer, E),
        "weight_in": draw(3 * E, E) / math.sqrt(E),
        "weight_out": draw(E, E) / math.sqrt(E),
    }
    sizes = dict(zip(BIASED, (3 * E, E, E, E), strict=True))
    return inputs | ({name: draw(size) for name, size in sizes.items()} if affine else {})


def feed_forward_inputs(*outer, affine=True):
    inputs = {
        "x": draw(*outer, E),
        "weight1": draw(F, E) / math.sqrt(E),
        "weight2": draw(E, F) / math.sqrt(F),
    }
    sizes = {"bias1": F, "bias2": E, "norm_weight": E, "norm_bias": E}
    return inputs | ({name: draw(size) for name, size in sizes.items()} if affine else {})


def end(x, value, norm_weight, norm_bias, norm_first, dropout):
    """What comes after a half's last product, step by step."""
    if dropout:
        rows = x.numel() // E
        keep = philox.matrix_keep_mask(SEEDS[1], rows, E, P).view(x.shape)
        value = value * keep.to(x.dtype).div(1 - P)
    x = x + value
    return x if norm_first else torch.nn.functional.layer_norm(x, (E,), norm_weight, norm_bias, 1e-5)


def start(x, norm_weight, norm_bias, norm_first):
    return torch.nn.functional.layer_norm(x, (E,), norm_weight, norm_bias, 1e-5) if norm_first else x


def attention_in_steps(
    x, weight_in, weight_out, bias_in=None, bias_out=None, norm_weight=None, norm_bias=None, *,
    norm=True, norm_first=False, batch_first=True, mask=None, packed=False, is_causal=False, dropout=False,
):  # fmt: skip
    seed = {"dropout_p": P, "seed": SEEDS[0]} if dropout else {}
    y = start(x, norm_weight, norm_bias, norm_first)
    q, k, v = torch.nn.functional.linear(y, weight_in, bias_in).unflatten(-1, (3, H, -1)).unbind(-3)
    if packed:
        attended = reference.attention_varlen(q, k, v, CU, CU, is_causal=is_causal, **seed).flatten(1)
    else:
        order = (0, 2, 1, 3) if batch_first else (1, 2, 0, 3)
        q, k, v = (t.permute(order) for t in (q, k, v))
        mask = mask.to(x.dtype) if mask is not None and mask.is_floating_point() else mask
        out = reference.attention(q, k, v, attn_mask=mask, is_causal=is_causal, **seed)
        attended = out.permute((0, 2, 1, 3) if batch_first else (2, 0, 1, 3)).flatten(2)
    value = torch.nn.functional.linear(attended, weight_out, bias_out)
    return end(x, value, norm_weight, norm_bias, norm_first, dropout) if norm else value


def attention_fused(
    x, weight_in, weight_out, bias_in=None, bias_out=None, norm_weight=None, norm_bias=None, *,
    norm_first=False, batch_first=True, mask=None, packed=False, is_causal=False, dropout=False,
):  # fmt: skip
    mask = mask.to(x.dtype) if mask is not None and mask.is_floating_point() else mask
    dropouts = (P, SEEDS[0], P, SEEDS[1]) if dropout else (0.0, None, 0.0, None)
    return attention_block(
        x, weight_in, bias_in, weight_out, bias_out, norm_weight, norm_bias, 1e-5, norm_first, H,
        batch_first, mask, CU if packed else None, is_causal, (E // H) ** -0.5, *dropouts,
    )  # fmt: skip


def feed_forward_in_steps(
    x, weight1, weight2, bias1=None, bias2=None, norm_weight=None, norm_bias=None, *,
    norm_first=False, activation="gelu", dropout=False,
):  # fmt: skip
    y = start(x, norm_weight, norm_bias, norm_first)
    seed = {"dropout_p": P, "training": True, "seed": SEEDS[0]} if dropout else {}
    value = reference.feed_forward(y, weight1, bias1, weight2, bias2, activation=activation, **seed)
    return end(x, value, norm_weight, norm_bias, norm_first, dropout)


def feed_forward_fused(
    x, weight1, weight2, bias1=None, bias2=None, norm_weight=None, norm_bias=None, *,
    norm_first=False, activation="gelu", dropout=False,
):  # fmt: skip
    dropouts = (P, SEEDS[0], P, SEEDS[1]) if dropout else (0.0, None, 0.0, None)
    return feed_forward_block(
        x, weight1, bias1, weight2, bias2, norm_weight, norm_bias, 1e-5, norm_first, activation,
        *dropouts,
    )  # fmt: skip


def results(op, inputs, dtype, gradients):
    leaves = {k: v.to(dtype).requires_grad_(gradients) for k, v in inputs.items()}
    output = op(**leaves)
    named = {"output": output.detach()}
    if gradients:
        slope = torch.rand(output.shape, generator=torch.Generator().manual_seed(1)).sub(0.5)
        found = torch.autograd.grad(output, list(leaves.values()), slope.bfloat16().to(dtype))
        named |= {f"d {k}": g for k, g in zip(leaves, found, strict=True)}
    return named


def check(fused, in_steps, inputs, dtype, **options):
    """Output, and gradients where the half has them, within twice eager's error on every instruction set."""
    gradients = not options.get("norm_first", False)
    eager_dtype = torch.float32 if dtype == torch.float64 else dtype
    given = {k: v.to(eager_dtype) for k, v in inputs.items()}
    steps = partial(in_steps, **options)
    eager = results(steps, given, eager_dtype, gradients)
    truth = results(steps, given, torch.float64, gradients)
    standard = {"eager": eager.pop("output"), "truth": truth.pop("output")}
    for isa in (name for name, present in extension.isas() if present):
        extension.set_isa(isa)
        actual = results(partial(fused, **options), given, dtype, gradients)
        assert_within_budget(actual=actual.pop("output"), **standard, name=f"output, {isa}")
        if gradients:
            assert_gradients_within_budget(actual, eager, truth)


BOOL = torch.rand(B, 1, 1, T, generator=torch.Generator().manual_seed(2)) < 0.6
FLOAT = torch.randn(1, H, T, T, generator=torch.Generator().manual_seed(2)).bfloat16().float()
ATTENTION_OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "keys masked": {"mask": BOOL},
    "bias of each head": {"mask": FLOAT},
    "sequence first": {"batch_first": False, "mask": BOOL},
    "packed": {"packed": True},
    "packed, causal": {"packed": True, "is_causal": True},
}


def outer_of(options):
    if options.get("packed"):
        return (sum(LENGTHS),)
    return (B, T) if options.get("batch_first", True) else (T, B)


@pytest.mark.parametrize("norm_first", [False, True], ids=["", "norm first"])
@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("options", ATTENTION_OPTIONS.values(), ids=ATTENTION_OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_half(dtype, options, dropout, norm_first):
    inputs = attention_inputs(*outer_of(options))
    options = {**options, "dropout": dropout, "norm_first": norm_first}
    check(attention_fused, attention_in_steps, inputs, dtype, **options)


@pytest.mark.parametrize("norm_first", [False, True], ids=["", "norm first"])
@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_feed_forward_half(dtype, activation, dropout, norm_first):
    options = {"activation": activation, "dropout": dropout, "norm_first": norm_first}
    check(feed_forward_fused, feed_forward_in_steps, feed_forward_inputs(2, 9), dtype, **options)


HALVES = {
    "attention": (attention_fused, attention_in_steps, attention_inputs),
    "feed_forward": (feed_forward_fused, feed_forward_in_steps, feed_forward_inputs),
}


@pytest.mark.parametrize("half", HALVES)
def test_without_biases_and_affine_norm(half):
    fused, in_steps, make = HALVES[half]
    check(fused, in_steps, make(B, T, affine=False), torch.float32)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("outer", [(0, T), (B, 0), (1, 1)])
def test_empty_and_single_batches(half, outer):
    fused, in_steps, make = HALVES[half]
    inputs = make(*outer)
    for gradients in (False, True):
        actual = results(fused, inputs, torch.float64, gradients)
        expected = results(in_steps, inputs, torch.float64, gradients)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("half", HALVES)
def test_gradients_only_where_asked(half):
    fused, _, make = HALVES[half]
    inputs = make(B, T)
    everything = results(fused, inputs, torch.float64, True)
    for name, dropout in itertools.product(inputs, (False, True)):
        run = partial(fused, dropout=dropout)
        leaves = {k: v.requires_grad_(k == name) for k, v in make(B, T).items()}
        with torch.no_grad():
            for k, v in inputs.items():
                leaves[k].copy_(v)
        output = run(**leaves)
        slope = torch.rand(output.shape, generator=torch.Generator().manual_seed(1)).sub(0.5)
        output.backward(slope.bfloat16().double())
        assert all((leaf.grad is None) == (k != name) for k, leaf in leaves.items())
        if not dropout:
            assert torch.equal(leaves[name].grad, everything[f"d {name}"])


@pytest.mark.parametrize("half", HALVES)
def test_one_derivative(half):
    fused, _, make = HALVES[half]
    inputs = {name: value.float() for name, value in make(B, T).items()}
    assert_refuses_second_derivatives(fused, inputs)
    output = fused(**{k: v.requires_grad_() for k, v in inputs.items()}, norm_first=True)
    with pytest.raises(RuntimeError, match="kept nothing for a gradient"):
        output.sum().backward()


@pytest.mark.parametrize("half", HALVES)
def test_compiles(half):
    fused, _, make = HALVES[half]
    assert_compiles(fused, {name: value.float() for name, value in make(2, 3).items()})


class Calls(TorchDispatchMode):
    """Checks every half that runs, in either direction, as torch.library does: schema, shapes, gradients."""

    checked = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "fasttx" and "block" in op._schema.name:
            self.checked += 1
            fresh = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
            with _disable_current_modes():
                torch.library.opcheck(op, tuple(fresh), test_utils=("test_schema", "test_faketensor"))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("half", HALVES)
def test_opcheck(half, dropout):
    fused, _, make = HALVES[half]
    inputs = {name: value.float() for name, value in make(2, 3).items()}
    with Calls() as calls:
        fused(**inputs, dropout=dropout)
        fused(**inputs, norm_first=True)
        leaves = {name: value.requires_grad_() for name, value in inputs.items()}
        fused(**leaves, dropout=dropout).sum().backward()
    assert calls.checked == 4


def test_shapes_are_checked_before_memory_is_touched():
    inputs = attention_inputs(B, T)
    for name, wrong in {
        "weight_in": draw(3 * E + 1, E), "weight_out": draw(E, E + 1), "bias_in": draw(E),
        "norm_weight": draw(E + 1), "x": draw(B, T, E).float(),
    }.items():  # fmt: skip
        with pytest.raises(RuntimeError):
            attention_fused(**{**inputs, name: wrong})
    with pytest.raises(RuntimeError, match="dimensions"):
        attention_fused(**inputs, packed=True)
    with pytest.raises(RuntimeError, match="broadcast"):
        attention_fused(**inputs, mask=torch.ones(B, 1, 1, T + 1, dtype=torch.bool))
