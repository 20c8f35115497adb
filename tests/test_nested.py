"""Jagged nested tensors: attention of them, and what treats each token by itself."""

import pytest
import torch
from budget import assert_within_budget
from properties import draw

import fasttx
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_is_torchs(dtype):
    query, _ = nested(5, 2, 9, dtype=dtype)
    wide = query.double()
    results = [functional.attention(query, query, query)]
    results += [torch.nn.functional.scaled_dot_product_attention(x, x, x) for x in (query, wide)]
    assert results[0].dtype == dtype
    actual, eager, truth = (x.transpose(1, 2).values() for x in results)
    assert_within_budget(actual=actual, eager=eager, truth=truth)


TOKENWISE = {
    "layer norm": lambda width: torch.nn.LayerNorm(width),
    "layer norm of two dims": lambda width: torch.nn.LayerNorm((H, width)),
    "layer norm without parameters": lambda width: torch.nn.LayerNorm(width, elementwise_affine=False),
    "gelu": lambda width: torch.nn.GELU(),
    "gelu tanh": lambda width: torch.nn.GELU("tanh"),
}


@pytest.mark.parametrize("name", TOKENWISE)
@pytest.mark.parametrize("ragged", ["first", "behind the heads"])
def test_what_treats_each_token_by_itself(name, ragged):
    """By the values, on the kernels; gradients too, and as ragged as the input."""
    heads_first, tokens = nested(5, 0, 9)
    x = heads_first.transpose(1, 2) if ragged == "first" else heads_first
    module = fasttx.optimize(TOKENWISE[name](D).double())
    if ragged != "first" and "two dims" in name:
        with pytest.raises(ValueError, match="input must not be ragged in its last dimensions|normalized_shape"):
            module(x)
        return
    with fasttx.strict():
        output = module(x)
    assert output.shape == x.shape and (output + x).shape == x.shape
    plain = tokens if ragged == "first" else tokens.transpose(0, 1)
    expected = module(plain)
    torch.testing.assert_close(output.values(), expected, rtol=0, atol=0)
    leaves, slope = (tokens, *module.parameters()), draw(*expected.shape)
    found, wanted = (torch.autograd.grad(y, leaves, slope) for y in (output.values(), expected))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_what_is_nested_otherwise_is_left_to_torch():
    parts = [torch.randn(3, D), torch.randn(5, D)]
    strided = torch.nested.nested_tensor(parts)
    norm = fasttx.nn.LayerNorm(D)
    for found, part in zip(norm(strided).unbind(), parts, strict=True):
        torch.testing.assert_close(found, norm(part))
    with pytest.raises(ValueError, match="torch.jagged without holes"):
        functional.gelu(strided)


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
