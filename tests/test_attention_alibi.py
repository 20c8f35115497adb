"""The gradient of attention's ALiBi slopes, where they are learned."""

import pytest
import torch
from attention_calls import SEED, draw_inputs, run_eager, run_op, run_reference
from budget import DTYPES
from properties import (
    Recorder,
    assert_compiles,
    assert_refuses_second_derivatives,
    assert_same_bits,
    assert_threads_do_not_matter,
    assert_within_budget_on_every_isa,
    draw,
    results,
)
from torch.autograd import gradcheck

import fasttx
import fasttx.functional as F
from fasttx.ops import attention as ops

pytestmark = pytest.mark.usefixtures("needs_extension")

# Sizes (batch, heads, kv heads, queries, keys, width, value width) and what else holds.
CASES = {
    "alone": ((2, 4, 2, 70, 150, 20, 12), {}),
    "causal, a window, an offset": (
        (2, 6, 2, 90, 170, 20, 12), {"is_causal": True, "query_offset": 60, "window": (150, -1)}
    ),
    "padding and dropout": (
        (2, 4, 4, 60, 140, 16, 16), {"key_lengths": torch.tensor([140, 33]), "dropout_p": 0.2, "seed": SEED}
    ),
    "holes": ((2, 2, 2, 60, 200, 16, 16), {"attn_mask": (torch.arange(200) % 5 < 3).expand(2, 1, 1, 200)}),
    "few queries": ((3, 2, 2, 2, 300, 16, 16), {"query_offset": 298}),
}


def drawn(*sizes):
    return draw_inputs(*sizes) | {"slopes": torch.linspace(0.01, 0.2, sizes[1], dtype=torch.float64)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_within_budget(dtype, case):
    sizes, options = CASES[case]

    def of(run):
        return lambda query, key, value, slopes: run(query, key, value, alibi_slopes=slopes, **options)

    assert_within_budget_on_every_isa(
        of(run_op), reference=of(run_reference), eager=of(run_eager), inputs=drawn(*sizes), dtype=dtype,
        frozen=("query", "key", "value"),
    )  # fmt: skip


def test_gradcheck():
    given = [x.requires_grad_() for x in drawn(2, 4, 2, 5, 6, 3, 2).values()]
    for options in ({}, {"is_causal": True, "dropout_p": 0.4, "seed": SEED}):
        assert gradcheck(lambda q, k, v, slopes, o=options: run_op(q, k, v, alibi_slopes=slopes, **o), given)


def test_of_packed_sequences():
    """The sum of each sequence's own."""
    inputs = drawn(1, 2, 1, 9, 9, 8, 6)
    packed = {name: x[0].transpose(0, 1) if name != "slopes" else x for name, x in inputs.items()}
    offsets = torch.tensor([0, 4, 4, 9])
    found = results(
        lambda slopes, **x: F.attention_varlen(
            **x, cu_seqlens_q=offsets, cu_seqlens_k=offsets, alibi_slopes=slopes, enable_gqa=True, backend="cpu"
        ),
        packed,
    )
    expected = results(
        lambda slopes, query, key, value: torch.cat([
            run_op(query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], alibi_slopes=slopes)[0]
            for a, b in ((0, 4), (4, 9))
        ], 2)[0].transpose(0, 1),
        inputs,
    )  # fmt: skip
    torch.testing.assert_close(found["d slopes"], expected["d slopes"], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_same_bits_on_any_number_of_threads_and_beside_padding(isa, dtype, threads):
    inputs = {name: x.to(dtype) for name, x in drawn(3, 4, 2, 70, 150, 20, 12).items()}
    assert_threads_do_not_matter(lambda slopes, **x: run_op(**x, alibi_slopes=slopes)[0], inputs, threads)
    lengths = torch.tensor([150] * 3)
    padded = inputs | {
        name: torch.cat((inputs[name], torch.full_like(inputs[name], 7.0)), 2) for name in ("key", "value")
    }
    found, expected = (
        results(lambda slopes, **x: run_op(**x, alibi_slopes=slopes, key_lengths=lengths)[0], x, ("slopes",))
        for x in (padded, inputs)
    )
    assert_same_bits(found, expected)


def test_only_what_is_asked_for():
    inputs = drawn(2, 4, 2, 30, 40, 8, 8)
    for wanted, called in ((("slopes",), {"attention_alibi_bwd"}), (("query",), {"attention_bwd"})):
        with Recorder() as recorder:
            results(lambda slopes, **x: run_op(**x, alibi_slopes=slopes)[0], inputs, wanted)
        assert {name for name, _ in recorder.calls if name.endswith("bwd")} == called


def test_of_narrower_slopes_and_without_elements():
    """bfloat16 slopes have a bfloat16 gradient; with nothing to attend to, it is zero."""
    x = torch.randn(2, 4, 5, 8).bfloat16()
    slopes = torch.rand(4).bfloat16().requires_grad_()
    with fasttx.strict():
        F.attention(x, x, x, alibi_slopes=slopes).sum().backward()
    assert slopes.grad.dtype == torch.bfloat16
    for sizes in ((0, 2, 2, 5, 6, 8, 8), (2, 2, 2, 0, 6, 8, 8), (2, 2, 2, 5, 0, 8, 8)):
        found = results(lambda slopes, **x: run_op(**x, alibi_slopes=slopes)[0], drawn(*sizes))
        assert found["d slopes"].shape == (2,) and not found["d slopes"].any()


def test_compiled_checked_and_derived_once():
    inputs = {name: x.float() for name, x in drawn(2, 4, 2, 30, 40, 16, 12).items()}
    assert_compiles(lambda slopes, **x: F.attention(**x, alibi_slopes=slopes, enable_gqa=True), inputs)
    assert_refuses_second_derivatives(lambda slopes, **x: run_op(**x, alibi_slopes=slopes), inputs)
    query, key, value, slopes = inputs.values()
    options = (None, None, None, None, slopes, True, 1, 5, -1, 0.1, SEED, 0.3)
    output, lse, stats, _ = ops.attention_fwd(query, key, value, *options)
    slope = draw(*output.shape, dtype=torch.float32)
    torch.library.opcheck(
        ops.attention_alibi_bwd.registered, (slope, torch.randn_like(lse), query, key, value, output, stats, *options)
    )
