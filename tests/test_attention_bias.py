"""The gradient of attention's additive mask: a learned bias."""

import math
from collections.abc import Callable

import pytest
import torch
from attention_calls import SEED, draw_inputs, run_eager, run_reference
from budget import DTYPES, assert_within_budget, poisoned
from properties import (
    Recorder,
    assert_compiles,
    assert_gradients_of_any_layout,
    assert_refuses_second_derivatives,
    assert_same_bits,
    assert_threads_do_not_matter,
    assert_within_budget_on_every_isa,
    draw,
    results,
    same_bits,
)
from torch import Tensor
from torch.autograd import gradcheck

import fasttx.functional as F
from fasttx.ops import attention as ops

pytestmark = pytest.mark.usefixtures("needs_extension")

SIZES = (2, 4, 2, 70, 150, 20, 12)  # batch, heads, kv heads, queries, keys, width, value width
SHAPES = (
    (1, 4, 70, 150), (2, 4, 70, 150), (1, 4, 1, 1), (2, 1, 1, 150), (2, 1, 70, 1), (70, 150), (4, 1, 150),
    (1, 1, 1, 1),
)  # fmt: skip


def run_op(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, **options) -> tuple[Tensor, Tensor]:
    """The op with a mask of its own shape, by the reference's arguments."""
    mask = bias[(None,) * (4 - bias.dim())]
    return ops.attention(
        query, key, value, mask, options.get("key_lengths"), None, None, options.get("alibi_slopes"),
        options.get("is_causal", False), options.get("query_offset", 0), *options.get("window", (-1, -1)),
        options.get("dropout_p", 0.0), options.get("seed"), options.get("scale", query.shape[-1] ** -0.5),
    )  # fmt: skip


def draw_with_bias(*sizes: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    inputs = draw_inputs(*sizes) | {"bias": draw(*shape) / 2}  # small, as the scores are
    return {name: x.to(dtype) for name, x in inputs.items()}


def _assert_within_budget(
    inputs: dict[str, Tensor], dtype: torch.dtype, frozen: tuple[str, ...] = (), **options
) -> None:
    assert_within_budget_on_every_isa(
        lambda query, key, value, bias: run_op(query, key, value, bias, **options),
        reference=lambda query, key, value, bias: run_reference(query, key, value, attn_mask=bias, **options),
        eager=lambda query, key, value, bias: run_eager(query, key, value, attn_mask=bias, **options),
        inputs=inputs,
        dtype=dtype,
        frozen=frozen,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_broadcast_within_budget(dtype, shape):
    _assert_within_budget(draw_with_bias(*SIZES, shape=shape), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ((6, 90, 170), (2, 1, 1, 170)), ids=str)
def test_beside_everything_else_within_budget(dtype, shape):
    _assert_within_budget(
        draw_with_bias(2, 6, 2, 90, 170, 20, 12, shape=shape),
        dtype,
        key_lengths=torch.tensor([170, 133]),
        is_causal=True,
        query_offset=60,
        window=(150, -1),
        alibi_slopes=torch.linspace(0.01, 0.2, 6),
        dropout_p=0.2,
        seed=SEED,
        scale=-0.3,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_blocks_within_budget(dtype):
    _assert_within_budget(draw_with_bias(1, 2, 1, 300, 270, 8, 8, shape=(2, 300, 270)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_few_queries_over_many_keys_within_budget(dtype):
    # Gradients of key and value are sums of four terms here, whose error in eager is a matter of luck.
    inputs = draw_with_bias(8, 4, 2, 2, 300, 32, 32, shape=(1, 4, 2, 300))
    _assert_within_budget(inputs, dtype, frozen=("query", "key", "value"))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_float32_bias_has_a_float32_gradient(isa, dtype, shape):
    # lse's gradient has the errors of no rounded output: it is held to float32 eager on the same inputs. Of several
    # slopes: the error of a few values is a matter of luck.
    inputs = draw_with_bias(*SIZES, shape=shape, dtype=dtype)
    inputs["bias"] = draw(*shape).float()
    slopes = torch.randn(8, 2, 4, 70)

    def gradients(run: Callable[..., tuple[Tensor, Tensor]], kind: torch.dtype | None) -> Tensor:
        given = {name: x.to(kind or x.dtype).requires_grad_(name == "bias") for name, x in inputs.items()}
        lse = run(**given)[1]
        return torch.stack([
            torch.autograd.grad(lse, given["bias"], slope.to(lse.dtype), retain_graph=True)[0] for slope in slopes
        ])  # fmt: skip

    def masked(run: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        return lambda bias, **x: run(**x, attn_mask=bias)

    found = gradients(run_op, None)
    assert found.dtype == torch.float32 and found.shape == (8, *shape)
    eager, truth = gradients(masked(run_eager), torch.float32), gradients(masked(run_reference), torch.float64)
    assert_within_budget(actual=found, eager=eager, truth=truth)


def test_gradcheck():
    inputs = [x.requires_grad_() for x in draw_inputs(2, 4, 2, 5, 6, 3, 2).values()]
    options = {"key_lengths": torch.tensor([6, 3]), "alibi_slopes": draw(4), "window": (2, 1), "dropout_p": 0.4}
    for shape in ((1, 4, 5, 6), (2, 1, 5, 1), (6,)):
        for option in ({}, options | {"seed": SEED}):
            # A row that sees nothing has lse = -inf, whose differences are NaN.
            assert gradcheck(lambda *x, o=option: run_op(*x, **o)[0], (*inputs, draw(*shape).requires_grad_()))
        assert gradcheck(run_op, (*inputs, draw(*shape).requires_grad_()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_seen_gets_exact_zeros(isa, dtype):
    inputs = draw_with_bias(*SIZES, shape=(2, 4, 70, 150), dtype=dtype)
    lengths = torch.tensor([150, 20])
    inputs["bias"][0, :, 7] = -math.inf  # a row that sees nothing
    inputs["bias"][0, :, :, 40:60] = -math.inf
    with poisoned():
        found = results(lambda **x: run_op(**x, key_lengths=lengths, window=(60, 10)), inputs)
    distance = torch.arange(150) - torch.arange(70)[:, None]
    seen = ((distance >= -60) & (distance <= 10)).expand(2, 4, 70, 150) & (inputs["bias"] > -math.inf)
    seen[1, ..., 20:] = False
    assert not found["d bias"][~seen].any() and found["d bias"][seen].count_nonzero() > 0.9 * seen.sum()
    assert all(x.isfinite().all() for name, x in found.items() if name.startswith("d "))


EMPTY = {"sequences": (0, 2, 2, 5, 6, 8, 8), "heads": (2, 0, 0, 5, 6, 8, 8), "queries": (2, 2, 2, 0, 6, 8, 8),
         "keys": (2, 2, 2, 5, 0, 8, 8)}  # fmt: skip


@pytest.mark.parametrize("what", EMPTY)
def test_nothing_to_attend_to_gives_zeros(isa, what):
    sizes = EMPTY[what]
    for shape in ((1, 1, 1, 1), (sizes[0], sizes[1], sizes[3], sizes[4])):
        with poisoned():
            found = results(run_op, draw_with_bias(*sizes, shape=shape))
        assert found["d bias"].shape == shape and not found["d bias"].any()


@pytest.mark.parametrize("shape", ((1, 4, 70, 150), (2, 1, 1, 150), (2, 1, 70, 1), (1, 4, 1, 1)), ids=str)
def test_same_bits_on_any_number_of_threads(isa, shape, threads):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = draw_with_bias(*SIZES, shape=shape, dtype=dtype)
        assert_threads_do_not_matter(lambda **x: run_op(**x, dropout_p=0.1, seed=SEED), inputs, threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_alone_and_in_a_batch(isa, dtype):
    inputs = draw_with_bias(3, 4, 2, 70, 150, 20, 12, shape=(3, 4, 70, 150), dtype=dtype)
    slope = draw(3, 4, 70, 12).to(dtype)
    lengths = torch.tensor([150, 60, 131])

    def gradient(given: dict[str, Tensor], slope: Tensor, **options) -> Tensor:
        given = {name: x.detach().requires_grad_() for name, x in given.items()}
        return torch.autograd.grad(run_op(**given, **options)[0], given["bias"], slope)[0]

    together = gradient(inputs, slope, key_lengths=lengths)
    for b, n in enumerate(lengths):
        alone = {name: x[b : b + 1] for name, x in inputs.items()}
        alone |= {name: alone[name][:, :, :n] for name in ("key", "value")}
        found = gradient(alone | {"bias": alone["bias"][..., :n]}, slope[b : b + 1])
        assert same_bits(found, together[b : b + 1, ..., :n])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ((4, 1, 150), (1, 4, 70, 150)), ids=str)
def test_queries_that_no_gradient_reaches_change_no_bit(isa, dtype, shape):
    inputs = draw_with_bias(*SIZES, shape=shape, dtype=dtype)
    slope = draw(2, 4, 70, 12).to(dtype)

    def gradient(query: Tensor, bias: Tensor, slope: Tensor) -> Tensor:
        bias = bias.detach().requires_grad_()
        return torch.autograd.grad(run_op(query, inputs["key"], inputs["value"], bias)[0], bias, slope)[0]

    at = torch.randperm(90)[:70].sort().values
    query = torch.full((2, 4, 90, 20), math.nan, dtype=dtype)
    query[:, :, at] = inputs["query"]
    padded = torch.zeros(2, 4, 90, 12, dtype=dtype)
    padded[:, :, at] = slope
    expected, bias = gradient(inputs["query"], inputs["bias"], slope), inputs["bias"]
    if len(shape) == 4:
        bias = torch.zeros(1, 4, 90, 150, dtype=dtype)
        bias[:, :, at] = inputs["bias"]
    found = gradient(query, bias, padded)
    assert same_bits(found[:, :, at] if len(shape) == 4 else found, expected)


def test_masks_of_any_stride(isa):
    inputs = draw_with_bias(2, 3, 3, 50, 37, 8, 8, shape=(37, 50, 3, 4), dtype=torch.float32)
    values = inputs.pop("bias")
    for bias in (
        values.permute(3, 2, 1, 0)[::2],
        values[0, :, :1, :1].expand(50, 1, 37)[:, 0],
        values[:, 0, 0, 0],
    ):
        found = [results(run_op, inputs | {"bias": b}) for b in (bias, bias.contiguous())]
        assert_same_bits(*found)


def test_gradients_of_any_layout():
    inputs = draw_with_bias(2, 2, 2, 20, 30, 8, 6, shape=(2, 20, 30), dtype=torch.float32)
    assert_gradients_of_any_layout(run_op, inputs)


def test_only_what_is_asked_for():
    inputs = draw_with_bias(*SIZES, shape=(4, 70, 150), dtype=torch.float32)
    complete = results(run_op, inputs)
    for wanted, called in ((("bias",), {"attention_bias_bwd"}), (("query", "value"), {"attention_bwd"})):
        with Recorder() as recorder:
            found = results(run_op, inputs, wanted)
        assert {name for name, _ in recorder.calls if name.endswith("bwd")} == called
        assert_same_bits(found, {name: complete[name] for name in found})


def test_the_public_op_equals_the_reference():
    inputs = draw_with_bias(*SIZES, shape=(4, 70, 150))

    def run(backend: str) -> dict[str, Tensor]:
        options = {"enable_gqa": True, "is_causal": True, "return_lse": True, "backend": backend}
        return results(lambda bias, **x: F.attention(**x, attn_mask=bias, **options), inputs)

    found, expected = run("cpu"), run("reference")
    for name, x in found.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_opcheck(dtype):
    inputs = [x.to(dtype) for x in draw_inputs(2, 2, 1, 6, 9, 8, 5).values()]
    bias = torch.randn(9, 2).t()[:, None].requires_grad_()
    options = (bias[None], torch.tensor([9, 4]), None, None, torch.rand(2), True, 1, 5, -1, 0.1, SEED, 0.3)
    leaves = [x.detach().requires_grad_() for x in inputs]
    torch.library.opcheck(ops.attention_fwd.registered, (*leaves, *options))
    with torch.no_grad():
        output, lse, stats, _ = ops.attention_fwd(*inputs, *options)
    slopes = (torch.randn_like(output), torch.randn_like(lse))
    options = (bias[None].detach(), *options[1:])
    torch.library.opcheck(ops.attention_bias_bwd.registered, (*slopes, *inputs, output, stats, *options))


def test_compiled_equals_eager():
    inputs = draw_with_bias(2, 4, 2, 30, 40, 16, 12, shape=(4, 30, 40), dtype=torch.float32)
    assert_compiles(lambda bias, **x: F.attention(**x, attn_mask=bias, enable_gqa=True, backend="cpu"), inputs)


def test_second_derivative_is_refused():
    inputs = draw_with_bias(1, 1, 1, 3, 4, 8, 8, shape=(1, 1, 3, 4), dtype=torch.float32)
    assert_refuses_second_derivatives(run_op, inputs)
    only = {"bias": inputs.pop("bias")}
    assert_refuses_second_derivatives(lambda bias: run_op(**inputs, bias=bias), only)
