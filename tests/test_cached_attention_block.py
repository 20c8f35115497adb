"""The attention half of a decoder layer over kept keys and values: against float64, step by step, in every form."""

import math
from functools import partial

import pytest
import torch
from budget import DTYPES, assert_meets
from properties import THREADS, draw

from fasttx import reference
from fasttx.dispatch import extension
from fasttx.measure import Standard
from fasttx.ops.cached_attention_block import cached_attention_block, cached_attention_block_fwd

pytestmark = pytest.mark.usefixtures("needs_extension")

B, H, E, CAPACITY = 2, 3, 24, 200
D = E // H
SCALE = D**-0.5


def inputs(tokens, parts=3, width=E):
    return {
        "x": draw(B, tokens, width), "weight_in": draw(parts * E, width) / math.sqrt(width), "bias_in": draw(parts * E),
        "weight_out": draw(width, E) / math.sqrt(E), "bias_out": draw(width), "norm_weight": draw(width),
        "norm_bias": draw(width), "keys": draw(B, H, CAPACITY, D), "values": draw(B, H, CAPACITY, D),
    }  # fmt: skip


def in_steps(
    x, weight_in, bias_in, weight_out, bias_out, norm_weight, norm_bias, keys, values, *,
    norm_first=False, length, mask=None, is_causal=False,
):  # fmt: skip
    """Output, keys and values, by the reference."""

    def norm(x):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, 1e-5)

    projected = torch.nn.functional.linear(norm(x) if norm_first else x, weight_in, bias_in)
    query, *new = (part.unflatten(-1, (H, D)).transpose(1, 2) for part in projected.split(E, -1))
    keys, values = keys[:, :, :length], values[:, :, :length]
    if new:
        keys, values = torch.cat((keys, new[0]), 2), torch.cat((values, new[1]), 2)
    mask = mask.to(x.dtype) if mask is not None and mask.is_floating_point() else mask
    attended = reference.attention(
        query, keys, values, attn_mask=mask, is_causal=is_causal, query_offset=length if new else 0, scale=SCALE
    )
    x = x + torch.nn.functional.linear(attended.transpose(1, 2).flatten(2), weight_out, bias_out)
    return (x if norm_first else norm(x)), keys, values


def fused(
    x, weight_in, bias_in, weight_out, bias_out, norm_weight, norm_bias, keys, values, *,
    norm_first=False, length, mask=None, is_causal=False,
):  # fmt: skip
    mask = mask.to(x.dtype) if mask is not None and mask.is_floating_point() else mask
    keys, values = keys.clone(), values.clone()
    with torch.no_grad():
        output = cached_attention_block(
            x, weight_in, bias_in, weight_out, bias_out, norm_weight, norm_bias, 1e-5, norm_first, keys, values, length,
            mask, is_causal, SCALE,
        )  # fmt: skip
    seen = length + (x.shape[1] if len(weight_in) == 3 * E else 0)
    return output, keys[:, :, :seen], values[:, :, :seen]


PAST = 20
BOOL = torch.rand(B, 1, 1, PAST + 3, generator=torch.Generator().manual_seed(2)) < 0.6
FLOAT = torch.randn(1, H, 3, PAST + 3, generator=torch.Generator().manual_seed(2)).bfloat16().float()
CASES = {
    "one token": (1, 3, {"length": PAST}),
    "one token, many before": (1, 3, {"length": 170}),
    "the first tokens": (5, 3, {"length": 0, "is_causal": True}),
    "several, causal": (3, 3, {"length": PAST, "is_causal": True}),
    "keys masked": (3, 3, {"length": PAST, "mask": BOOL}),
    "bias of each head": (3, 3, {"length": PAST, "mask": FLOAT}),
    "queries alone": (3, 1, {"length": PAST + 3, "mask": BOOL}),
    "one query alone": (1, 1, {"length": 150}),
}


@pytest.mark.parametrize("norm_first", [False, True], ids=["", "norm first"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(dtype, case, norm_first):
    tokens, parts, options = CASES[case]
    in_use = {**options, "norm_first": norm_first}
    steps = partial(in_steps, **in_use)
    standard = Standard(
        reference=steps, eager=steps, inputs=inputs(tokens, parts), dtype=dtype, gradients=False
    )
    for isa in (name for name, present in extension.isas() if present):
        extension.set_isa(isa)
        assert_meets(standard, partial(fused, **in_use))


def test_what_is_kept_is_not_touched():
    """Neither the places before the new ones nor those after; the buffers may have any strides with unit rows."""
    given = inputs(2)
    keys, values = (torch.empty(B, CAPACITY, H, D).transpose(1, 2).copy_(given[name]) for name in ("keys", "values"))
    before = keys.clone(), values.clone()
    parameters = [given[name].float() for name in list(given)[:7]]
    keys, values = keys.float(), values.float()
    cached_attention_block(*parameters, 1e-5, True, keys, values, 7, None, True, SCALE)
    dense = fused(**{k: v.float() for k, v in given.items()}, norm_first=True, length=7, is_causal=True)
    for kept, old, expected in zip((keys, values), before, dense[1:], strict=True):
        assert torch.equal(kept[:, :, :7], old[:, :, :7].float()) and torch.equal(kept[:, :, 9:], old[:, :, 9:].float())
        assert torch.equal(kept[:, :, 7:9], expected[:, :, 7:9])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_invariance(dtype, threads):
    """A sequence alone and among others, on any number of threads: the same bits."""
    given = {k: v.to(dtype) for k, v in inputs(1).items()}
    options = {"norm_first": True, "length": 150}
    expected = fused(**given, **options)[0]
    for count in THREADS:
        with threads(count):
            assert torch.equal(fused(**given, **options)[0], expected)
            for row in range(B):
                alone = given | {name: given[name][row : row + 1] for name in ("x", "keys", "values")}
                assert torch.equal(fused(**alone, **options)[0], expected[row : row + 1])


@pytest.mark.parametrize("norm_first", [False, True], ids=["", "norm first"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_sequences_have_the_bits_of_each_alone(dtype, norm_first):
    """Queries alone, among them sequences of none, and to no keys."""
    of_queries, of_keys = (torch.tensor(lengths).cumsum(0) for lengths in ([0, 4, 0, 1, 7], [0, 9, 3, 0, 140]))
    given = {k: v.to(dtype) for k, v in inputs(1, parts=1).items()}
    parameters = [given[name] for name in list(given)[1:7]]
    x, keys, values = draw(12, E).to(dtype), draw(152, H, D).to(dtype), draw(152, H, D).to(dtype)

    def run(x, keys, values, *cu_seqlens):
        return cached_attention_block(
            x, *parameters, 1e-5, norm_first, keys, values, keys.shape[0 if cu_seqlens else 2], None, False, SCALE,
            *cu_seqlens,
        )  # fmt: skip

    together = run(x, keys, values, of_queries, of_keys)
    for n in range(4):
        queries, seen = (slice(cu[n], cu[n + 1]) for cu in (of_queries, of_keys))
        alone = run(x[None, queries], *(t[seen].transpose(0, 1)[None] for t in (keys, values)))
        assert torch.equal(together[queries], alone[0])


@pytest.mark.parametrize("outer", [(0, 3), (2, 0)])
def test_empty(outer):
    given = inputs(3) | {"x": draw(*outer, E)}
    given |= {name: given[name][: outer[0]] for name in ("keys", "values")}
    output, *_ = fused(**given, length=2, is_causal=True)
    assert output.shape == (*outer, E)


def test_opcheck():
    given = {name: value.float() for name, value in inputs(2).items()}
    arguments = [given[name] for name in list(given)[:7]]
    torch.library.opcheck(
        cached_attention_block_fwd.registered,
        (*arguments, 1e-5, True, given["keys"], given["values"], 4, None, None, None, True, SCALE, None, None, False),
        test_utils=("test_schema", "test_faketensor"),
    )
    called = torch.compile(cached_attention_block, fullgraph=True, backend="aot_eager")
    results = []
    for call in (cached_attention_block, called):
        keys, values = given["keys"].clone(), given["values"].clone()
        with torch.no_grad():
            results.append((call(*arguments, 1e-5, True, keys, values, 4, None, True, SCALE), keys, values))
    torch.testing.assert_close(*results)
