"""Attention over parts of the keys, merged: as over all of them."""

import math

import pytest
import torch
from attention_calls import draw_inputs
from budget import DTYPES, assert_op_within_budget
from properties import draw, results
from torch.autograd import gradcheck
from torch.testing import assert_close

from fasttx import functional, reference

B, H, T, D = 2, 3, 7, 8
BACKENDS = pytest.mark.parametrize("backend", [None, "reference"])


def of_parts(query, key, value, cuts, backend=None, **options):
    """Output and lse over keys that come in parts, merged in turn."""
    bounds = [0, *cuts, key.shape[2]]
    merged = None
    for first, last in zip(bounds, bounds[1:], strict=False):
        part = functional.attention(
            query, key[:, :, first:last], value[:, :, first:last], return_lse=True,
            query_offset=-first, backend=backend, **options,
        )  # fmt: skip
        merged = part if merged is None else functional.merge_attention(*merged, *part, backend=backend)
    return merged


def eagerly(out1, lse1, out2, lse2):
    """By PyTorch's own logaddexp."""
    lse = torch.logaddexp(lse1, lse2)
    shares = (lse1 - lse).exp(), (lse2 - lse).exp()
    if out1.dim() == 3:
        shares = [share.mT for share in shares]
    output = shares[0][..., None] * out1 + shares[1][..., None] * out2
    return output.to(out1.dtype), lse.to(torch.promote_types(lse.dtype, torch.float32))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_within_budget(dtype, packed):
    out, rows = ((70, H, D), (H, 70)) if packed else ((B, H, 35, D), (B, H, 35))
    inputs = {"out1": draw(*out), "lse1": 3 * draw(*rows), "out2": draw(*out), "lse2": 3 * draw(*rows)}
    assert_op_within_budget(
        functional.merge_attention, eager=eagerly, reference=reference.merge_attention, inputs=inputs, dtype=dtype
    )


@BACKENDS
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (3, 2)}], ids=str)
@pytest.mark.parametrize("cuts", [(4,), (1, 9), (0,), (3, 5, 11)], ids=str)
def test_parts_are_the_whole(cuts, options, backend):
    """Two, three and four parts, one of them empty; gradients too. A causal row sees nothing in the later ones."""
    inputs = draw_inputs(B, H, H, T, 12, D, 5)
    whole = results(lambda **x: functional.attention(**x, **options, return_lse=True, backend=backend), inputs)
    parts = results(lambda **x: of_parts(**x, cuts=cuts, backend=backend, **options), inputs)
    assert_close(parts, whole, rtol=1e-12, atol=1e-13)


def test_packed_parts_are_the_whole():
    inputs = {"query": draw(9, H, D), "key": draw(14, H, D), "value": draw(14, H, D)}
    at_q, at_k = torch.tensor([0, 4, 9]), torch.tensor([0, 6, 14])
    here = torch.tensor([True] * 2 + [False] * 4 + [True] * 5 + [False] * 3)

    def parts(query, key, value):
        first = functional.attention_varlen(
            query, key[here], value[here], at_q, torch.tensor([0, 2, 7]), return_lse=True
        )
        second = functional.attention_varlen(
            query, key[~here], value[~here], at_q, torch.tensor([0, 4, 7]), return_lse=True
        )
        return functional.merge_attention(*first, *second)

    def all_keys(**x):
        return functional.attention_varlen(**x, cu_seqlens_q=at_q, cu_seqlens_k=at_k, return_lse=True)

    whole = results(all_keys, inputs)
    assert_close(results(parts, inputs), whole, rtol=1e-12, atol=1e-13)


def test_a_ring_and_any_order():
    """Each of four machines meets the parts from its own on; what they find is the same."""
    x = draw_inputs(B, H, H, T, 12, D, D)
    parts = [
        functional.attention(x["query"], k, v, return_lse=True)
        for k, v in zip(x["key"].chunk(4, 2), x["value"].chunk(4, 2), strict=True)
    ]
    whole = functional.attention(**x, return_lse=True)
    for start in range(4):
        merged = parts[start]
        for step in range(1, 4):
            merged = functional.merge_attention(*merged, *parts[(start + step) % 4])
        assert_close(merged, whole, rtol=1e-12, atol=1e-13)
    pairs = functional.merge_attention(*parts[0], *parts[1]), functional.merge_attention(*parts[2], *parts[3])
    assert_close(functional.merge_attention(*pairs[0], *pairs[1]), whole, rtol=1e-12, atol=1e-13)


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_keys(dtype, backend):
    """In one part: the other as it is. In both: zeros, -inf, and zero gradients."""
    wide = torch.promote_types(dtype, torch.float32)
    lse = [draw(B, H, T, dtype=wide) for _ in range(2)]
    out = [draw(B, H, T, D, dtype=dtype) for _ in range(2)]
    lse[0][0], lse[1][:, 1] = -math.inf, -math.inf
    out[0][0], out[1][:, 1] = 0.0, 0.0
    given = [x.requires_grad_() for x in (out[0], lse[0], out[1], lse[1])]
    output, merged = functional.merge_attention(*given, backend=backend)
    assert output.dtype == dtype and merged.dtype == wide
    assert torch.equal(output[0, 0], out[1][0, 0]) and torch.equal(merged[0, 0], lse[1][0, 0])
    assert torch.equal(output[1, 1], out[0][1, 1]) and torch.equal(merged[1, 1], lse[0][1, 1])
    assert (output[0, 1] == 0).all() and (merged[0, 1] == -math.inf).all()
    gradients = torch.autograd.grad((output, merged), given, (torch.ones_like(output), torch.ones_like(merged)))
    assert all(x.isfinite().all() for x in gradients)
    assert all((x[0, 1] == 0).all() for x in gradients)


def test_gradcheck():
    inputs = [draw(B, H, T, D), draw(B, H, T), draw(B, H, T, D), draw(B, H, T)]
    assert gradcheck(functional.merge_attention, [x.requires_grad_() for x in inputs])
