"""Attention of jagged nested tensors."""

import pytest
import torch
from properties import draw

from fasttx import functional

pytestmark = pytest.mark.usefixtures("needs_extension")
H, D = 3, 8


def nested(*lengths, width=D, heads=H, dtype=torch.float64):
    """(batch, heads, ragged, width), and what a gradient of it arrives in."""
    tokens = draw(sum(lengths), heads, width, dtype=dtype).requires_grad_()
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    return torch.nested.nested_tensor_from_jagged(tokens, offsets=offsets).transpose(1, 2), tokens


def with_offsets_of(other, width=D):
    tokens = draw(other.transpose(1, 2).values().shape[0], other.shape[1], width, dtype=other.dtype).requires_grad_()
    return torch.nested.nested_tensor_from_jagged(tokens, offsets=other.offsets()).transpose(1, 2), tokens


def one_by_one(query, key, value, **options):
    """attention() of each sequence alone: outputs and lse as (tokens, heads, ...)."""
    found = [
        functional.attention(q[None], k[None], v[None], return_lse=True, **options)
        for q, k, v in zip(query.unbind(), key.unbind(), value.unbind(), strict=True)
    ]
    return torch.cat([o[0].transpose(0, 1) for o, _ in found]), torch.cat([lse[0].mT for _, lse in found])


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (2, 1)}, {"scale": 0.3}], ids=str)
def test_self_attention(options, backend):
    query, of_query = nested(5, 0, 9, 1)
    (key, of_key), (value, of_value) = with_offsets_of(query), with_offsets_of(query, 6)
    output, lse = functional.attention(query, key, value, return_lse=True, backend=backend, **options)
    expected, expected_lse = one_by_one(query, key, value, **options)
    tokens, rows = output.transpose(1, 2).values(), lse.transpose(1, 2).values()
    torch.testing.assert_close(tokens, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(rows, expected_lse, rtol=1e-12, atol=1e-13)
    leaves, slope = (of_query, of_key, of_value), draw(*tokens.shape)
    found = torch.autograd.grad((tokens, rows), leaves, (slope, torch.ones_like(rows)))
    wanted = torch.autograd.grad((expected, expected_lse), leaves, (slope, torch.ones_like(rows)))
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


def test_results_are_as_ragged_as_the_query():
    query, _ = nested(5, 2, 9)
    key, _ = nested(4, 7, 1)
    value, _ = with_offsets_of(key)
    output, lse = functional.attention(query, key, value, return_lse=True)
    assert output.shape == query.shape and lse.shape == query.shape[:3]
    assert (output + query).shape == query.shape  # the same nested int, else torch refuses
    expected, _ = one_by_one(query, key, value)
    torch.testing.assert_close(output.transpose(1, 2).values(), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_is_torchs(dtype):
    query, _ = nested(5, 2, 9, dtype=dtype)
    theirs = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    ours = functional.attention(query, query, query)
    torch.testing.assert_close(ours.transpose(1, 2).values(), theirs.transpose(1, 2).values())


def test_grouped_heads_and_dropout():
    query, _ = nested(5, 2, 9, heads=4)
    key, _ = nested(5, 2, 9, heads=2)
    torch.manual_seed(5)
    ours = functional.attention(query, key, key, enable_gqa=True, dropout_p=0.3)
    torch.manual_seed(5)
    packed = [x.transpose(1, 2).values() for x in (query, key, key)]
    offsets = query.offsets()
    theirs = functional.attention_varlen(*packed, offsets, offsets, enable_gqa=True, dropout_p=0.3)
    assert torch.equal(ours.transpose(1, 2).values(), theirs)


def _bad():
    good, _ = nested(5, 2, 9)
    same, dense = (good, good), draw(3, H, 9, D)
    strided = torch.nested.nested_tensor([draw(H, 5, D), draw(H, 2, D)])
    holes = torch.nested.nested_tensor_from_jagged(
        draw(16, H, D), offsets=torch.tensor([0, 6, 9, 16]), lengths=torch.tensor([5, 2, 7])
    ).transpose(1, 2)
    return {
        "a dense key": ("key must be nested", (good, dense, good), {}),
        "a dense query": ("query must be nested", (dense, *same), {}),
        "strided": ("query .*torch.jagged", (strided, strided, strided), {}),
        "ragged elsewhere": ("value .*ragged length", (*same, good.transpose(1, 2)), {}),
        "holes": ("key .*holes", (good, holes, holes), {}),
        "batch": ("batch", (good, nested(5, 2)[0], nested(5, 2)[0]), {}),
        "lengths": ("key and value", (*same, nested(4, 3, 9)[0]), {}),
        "attn_mask": ("attn_mask", (good, *same), {"attn_mask": torch.ones(9, 9) > 0}),
        "key_lengths": ("key_lengths", (good, *same), {"key_lengths": torch.tensor([1, 1, 1])}),
        "query_offset": ("query_offset", (good, *same), {"query_offset": 2}),
    }


@pytest.mark.parametrize("what", _bad())
def test_what_is_refused(what):
    message, tensors, options = _bad()[what]
    with pytest.raises(ValueError, match=message):
        functional.attention(*tensors, **options)
