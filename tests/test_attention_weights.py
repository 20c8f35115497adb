"""The weights that attention applies, by themselves and beside its output."""

import math
from functools import partial

import pytest
import torch
from attention_calls import SEED, bias_of, draw_inputs
from budget import DTYPES, assert_op_within_budget
from properties import (
    assert_compiles,
    assert_gradients_of_any_layout,
    assert_same_bits,
    assert_threads_do_not_matter,
    assert_within_budget_on_every_isa,
    results,
)
from torch.autograd import gradcheck
from torch.testing import assert_close

from fasttx import functional, philox, reference
from fasttx.ops import attention as ops

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


def test_masked_keys_weigh_nothing_whatever_lse_is():
    query, key = torch.randn(1, 2, 3, D), torch.randn(1, 2, 4, D)
    for lse in (torch.full((1, 2, 3), -1e4), torch.full((1, 2, 3), -math.inf)):
        weights = functional.attention_weights(query, key, lse, is_causal=True)
        assert not weights.triu(1).any() and not weights.isnan().any()


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
        for some in (key, key[:, :1]):
            weights = functional.attention_weights(query, some, lse, dropout_p=0.1, seed=SEED, enable_gqa=heads > 0)
            assert weights.shape == sizes


# Several tiles of queries and keys, a few queries over many keys, and keys with holes between them.
LARGE = {
    "tiles": ((2, 4, 2, 210, 300, 20, 12), {}),
    "few queries": ((2, 4, 4, 1, 300, 20, 12), {}),
    "causal, alibi, dropout": (
        (2, 6, 3, 90, 170, 20, 12),
        {"is_causal": True, "query_offset": 80, "alibi_slopes": torch.linspace(0.01, 0.2, 6), "dropout_p": 0.2,
         "seed": SEED, "key_lengths": torch.tensor([170, 133]), "scale": -0.3},
    ),
    "holes": ((2, 4, 4, 70, 200, 16, 16), {"attn_mask": (torch.arange(200) % 5 < 3).expand(2, 1, 1, 200)}),
    "bias": ((2, 4, 4, 70, 150, 16, 16), {"attn_mask": torch.linspace(-1, 1, 70 * 150).view(1, 1, 70, 150)}),
}  # fmt: skip
both_kinds = pytest.mark.parametrize("kind", [ops.EACH, ops.MEAN], ids=["each", "mean"])


def run_op(query, key, value, *, kind, **options):
    """Output and weights of the op, by the reference's arguments."""
    mask = options.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        mask = mask.to(query.dtype)
    output, _, weights = ops.attention(
        query, key, value, mask, options.get("key_lengths"), None, None, options.get("alibi_slopes"),
        options.get("is_causal", False), options.get("query_offset", 0), -1, -1, options.get("dropout_p", 0.0),
        options.get("seed"), options.get("scale", query.shape[-1] ** -0.5), weights=kind,
    )  # fmt: skip
    return output, weights


def averaged(weights, kind):
    return weights.mean(1) if kind == ops.MEAN else weights


def run_true(query, key, value, *, kind, **options):
    output = reference.attention(query, key, value, **options, enable_gqa=True)
    return output, averaged(true(query=query, key=key, **options), kind)


def run_eagerly(query, key, value, *, kind, **options):
    weights = eagerly(query, key, **options)
    return weights @ value.repeat_interleave(query.shape[1] // value.shape[1], 1), averaged(weights, kind)


@pytest.mark.usefixtures("needs_extension")
@both_kinds
@pytest.mark.parametrize("case", LARGE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_beside_the_output_within_budget(dtype, case, kind):
    """Gradients through both, on every instruction set."""
    sizes, options = LARGE[case]
    assert_within_budget_on_every_isa(
        partial(run_op, kind=kind, **options), reference=partial(run_true, kind=kind, **options),
        eager=partial(run_eagerly, kind=kind, **options), inputs=draw_inputs(*sizes), dtype=dtype,
    )  # fmt: skip


@pytest.mark.usefixtures("needs_extension")
@both_kinds
def test_of_the_op(kind):
    inputs = {name: x.float() for name, x in draw_inputs(2, 4, 2, 60, 140, 16, 12).items()}
    op = partial(run_op, kind=kind, dropout_p=0.2, seed=SEED)
    assert torch.equal(op(**inputs)[0], ops.attention(
        *inputs.values(), None, None, None, None, None, False, 0, -1, -1, 0.2, SEED, 0.25
    )[0])  # fmt: skip
    assert_gradients_of_any_layout(op, inputs)
    assert_compiles(op, inputs)
    options = (None, None, None, None, None, False, 0, -1, -1, 0.2, SEED, 0.25, True, kind)
    torch.library.opcheck(ops.attention_fwd.registered, (*(x.requires_grad_() for x in inputs.values()), *options))


@pytest.mark.usefixtures("needs_extension")
@both_kinds
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_same_bits_on_any_number_of_threads_and_beside_any_padding(isa, dtype, kind, threads):
    inputs = {name: x.to(dtype) for name, x in draw_inputs(3, 4, 4, 70, 150, 16, 12).items()}
    op = partial(run_op, kind=kind, dropout_p=0.1, seed=SEED)
    assert_threads_do_not_matter(op, inputs, threads)
    alone = results(op, {name: x[:1] for name, x in inputs.items()})
    keep = torch.ones(1, 1, 1, 190, dtype=torch.bool)
    keep[..., 150:] = False
    padded = {name: torch.cat((x, x.new_full((3, 4, 40, x.shape[-1]), 9.0)), 2)[:1] for name, x in inputs.items()}

    def cut(query, key, value):
        output, weights = op(query, key, value, attn_mask=keep)
        assert not weights[..., 150:].any()
        return output[:, :, :70], weights[..., :70, :150].contiguous()

    padded["query"] = padded["query"][:, :, :110]
    padded["query"][:, :, 70:] = 9.0
    found = results(cut, padded)
    for name, size in (("d query", 70), ("d key", 150), ("d value", 150)):
        assert not found[name][:, :, size:].any()
        found[name] = found[name][:, :, :size].contiguous()
    assert_same_bits(found, {name: x.contiguous() for name, x in alone.items()})


@pytest.mark.usefixtures("needs_extension")
@both_kinds
def test_a_gradient_of_the_weights_alone(kind):
    """It reaches query, key and bias, and no value."""
    inputs = draw_inputs(1, 2, 2, 5, 6, 8, 8) | {"bias": torch.randn(1, 2, 5, 6, dtype=torch.float64)}

    def of(run):
        return lambda bias, **x: run(**x, attn_mask=bias, kind=kind)[1]

    found = results(of(run_op), inputs)
    assert not found.pop("d value").any()
    expected = results(of(run_true), inputs, ("query", "key", "bias"))
    assert_close(found, expected, rtol=1e-10, atol=1e-12)
