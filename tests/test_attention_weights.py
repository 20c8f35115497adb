"""The weights that attention applies, by themselves."""

import math
from functools import partial

import pytest
import torch
from attention_calls import SEED, bias_of, draw_inputs
from budget import DTYPES, assert_op_within_budget
from properties import assert_compiles, results
from torch.autograd import gradcheck
from torch.testing import assert_close

from fasttx import functional, philox, reference

B, H, KV, TQ, TK, D = 2, 4, 2, 7, 9, 8
OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True, "query_offset": 2},
    "window": {"window": (2, 1)},
    "lengths": {"key_lengths": torch.tensor([9, 4])},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 1.0])},
    "scale": {"scale": 0.7},
    "bool mask": {"attn_mask": torch.arange(TK) % 3 != torch.arange(TQ)[:, None] % 3},
    "dropout": {"dropout_p": 0.3, "seed": SEED},
}
OPTIONS["all"] = {k: v for name in OPTIONS for k, v in OPTIONS[name].items()}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def tensors(*names):
    drawn = draw_inputs(B, H, KV, TQ, TK, D, D)
    return {name: drawn[name] for name in names}


def eagerly(query, key, lse=None, *, dropout_p=0.0, seed=None, **options):
    """torch's softmax of its own scores."""
    bias = bias_of(query.shape[2], key.shape[2], query.dtype, **options)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query @ key.mT * options.get("scale", query.shape[-1] ** -0.5) + bias
    weights = scores.softmax(-1) if lse is None else (scores - lse[..., None]).exp()
    if dropout_p:
        batch, heads = (torch.arange(n) for n in query.shape[:2])
        weights = weights * philox.keep_mask(seed, batch, heads, *weights.shape[2:], dropout_p) / (1 - dropout_p)
    return weights.to(query.dtype)


def own(**x):
    return functional.attention_weights(**x, enable_gqa=True)


def true(**x):
    return reference.attention_weights(**x, enable_gqa=True)


@every_option
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_within_budget(dtype, options):
    assert_op_within_budget(
        partial(own, **options), eager=partial(eagerly, **options), reference=partial(true, **options),
        inputs=tensors("query", "key"), dtype=dtype,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_given_lse_within_budget(dtype):
    inputs = tensors("query", "key") | {"lse": 3.0 + torch.rand(B, H, TQ).double()}
    assert_op_within_budget(own, eager=eagerly, reference=true, inputs=inputs, dtype=dtype)


@pytest.mark.parametrize("backend", [None, "reference"])
@every_option
def test_are_what_attention_applies(options, backend):
    """weights @ value is the output, with the gradients of both ways; with lse and without."""
    options = {k: v for k, v in options.items() if k != "attn_mask"}
    seed, dropout = options.get("seed"), options.get("dropout_p")
    inputs = tensors("query", "key", "value")

    def fused(query, key, value):
        return reference.attention(query, key, value, **options, enable_gqa=True)

    def in_steps(query, key, value, *, of_lse):
        kept = {k: v for k, v in options.items() if k not in ("seed", "dropout_p")}
        lse = functional.attention(
            query, key, value, **kept, enable_gqa=True, return_lse=True, backend=backend
        )[1] if of_lse else None
        weights = functional.attention_weights(
            query, key, lse, **kept, dropout_p=dropout or 0.0, seed=seed, enable_gqa=True, backend=backend
        )
        return weights @ value.repeat_interleave(H // KV, 1)

    expected = results(fused, inputs)
    for of_lse in (False, True):
        assert_close(results(partial(in_steps, of_lse=of_lse), inputs), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_part_of_the_keys(backend):
    """Under the lse of all keys, parts give their columns."""
    x = tensors("query", "key", "value")
    weights = partial(functional.attention_weights, x["query"], enable_gqa=True, backend=backend)
    _, lse = functional.attention(**x, enable_gqa=True, return_lse=True)
    parts = [weights(key, lse) for key in x["key"].split((4, 5), 2)]
    assert_close(torch.cat(parts, -1), weights(x["key"]), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("given", [False, True], ids=["own lse", "lse given"])
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_keys(dtype, backend, given):
    x = {name: t.to(dtype).requires_grad_() for name, t in tensors("query", "key", "value").items()}
    mask = torch.ones(TQ, TK, dtype=torch.bool)
    mask[3] = False
    lse = None
    if given:
        lse = functional.attention(**x, attn_mask=mask, enable_gqa=True, return_lse=True)[1]
        assert (lse[:, :, 3] == -math.inf).all()
    weights = functional.attention_weights(
        x["query"], x["key"], lse, attn_mask=mask, enable_gqa=True, backend=backend
    )
    assert weights.dtype == dtype and (weights[:, :, 3] == 0).all()
    gradients = torch.autograd.grad(weights.square().sum(), (x["query"], x["key"]))
    assert all(g.isfinite().all() for g in gradients) and (gradients[0][:, :, 3] == 0).all()


@pytest.mark.parametrize("with_lse", [False, True])
def test_gradcheck(with_lse):
    x = tensors("query", "key") | {"attn_mask": torch.randn(1, H, TQ, 1, dtype=torch.float64)}
    if with_lse:
        x["lse"] = torch.randn(B, H, TQ, dtype=torch.float64)
    given = [t.requires_grad_() for t in x.values()]
    options = {"is_causal": True, "dropout_p": 0.2, "seed": SEED}
    assert gradcheck(lambda *args: own(**dict(zip(x, args, strict=True)), **options), given)


def test_compiles():
    x = {name: t.float() for name, t in tensors("query", "key").items()}
    assert_compiles(partial(own, is_causal=True, dropout_p=0.3, seed=SEED), x)


def test_dropout_of_more_than_is_made_at_a_time(monkeypatch):
    """The mask is the same in pieces."""
    x = tensors("query", "key")
    whole = own(**x, dropout_p=0.3, seed=SEED)
    monkeypatch.setitem(functional.attention_weights.__globals__, "_WEIGHTS_AT_A_TIME", 1)
    assert torch.equal(own(**x, dropout_p=0.3, seed=SEED), whole)


@pytest.mark.parametrize("sizes", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)], ids=str)
def test_without_elements(sizes):
    batch, heads, queries, keys = sizes
    query, key = torch.randn(batch, heads, queries, D), torch.randn(batch, heads, keys, D)
    for lse in (None, torch.zeros(batch, heads, queries)):
        assert functional.attention_weights(query, key, lse, dropout_p=0.1, seed=SEED).shape == sizes
