"""Embeddings with layer norm and dropout in Triton on the emulator, against float64 by the budget."""

import pytest
import torch
import torch.nn.functional as F
from budget import assert_op_within_budget, assert_within_budget
from properties import draw

from fasttx import philox, reference
from fasttx.cli import eager
from fasttx.ops import embedding as ops
from gpu.launchers import by_dtype, by_target, full, on_triton, shipped, using

P, EPS, SEED = 0.3, 1e-5, torch.tensor(2**62 + 12345)
TOKENS, POSITIONS, SEGMENTS = 23, 40, 2


def tables(width, norm=True):
    weights = {
        "token_weight": draw(TOKENS, width), "position_weight": draw(POSITIONS, width),
        "segment_weight": draw(SEGMENTS, width),
    }  # fmt: skip
    return weights | ({"norm_weight": draw(width), "norm_bias": draw(width)} if norm else {})


def check(target, dtype, weights, tokens, positions=None, segments=None, *, p=P, padding=None, scale=1.5, offset=3):
    order = ("token_weight", "position_weight", "segment_weight", "norm_weight", "norm_bias")
    options = {"position_ids": positions, "offset": offset, "token_scale": scale, "padding_idx": padding, "seed": SEED}
    options |= {"dropout_p": p, "training": True}

    def op(**weights):
        token, position, segment, norm, bias = (weights.get(name) for name in order)
        return ops.embedding(
            tokens, token, positions, position, segments, segment, norm, bias, scale, offset, EPS, p,
            SEED if p else None, -1 if padding is None else padding,
        )  # fmt: skip

    def of(function):
        return lambda **weights: function(tokens, segment_ids=segments, **weights, eps=EPS, **options)

    with on_triton(target) as machine:
        assert_op_within_budget(
            op, eager=of(eager.embedding), reference=of(reference.embedding), inputs=weights, dtype=dtype
        )
    return machine


def ids(*shape, entries=TOKENS):
    return torch.randint(0, entries, shape)


@by_target
@by_dtype
@pytest.mark.parametrize("width", [72, pytest.param(300, marks=full), pytest.param(1024, marks=full)])
def test_within_budget(target, dtype, width):
    """Every entry occurs several times, and more often than a block of places holds."""
    check(target, dtype, tables(width), ids(3, 33), segments=ids(3, 33, entries=SEGMENTS))


@full
@by_target
@by_dtype
def test_without_dropout_and_norm(target, dtype):
    check(target, dtype, tables(40, norm=False), ids(3, 17), p=0.0, offset=0)
    only = {"token_weight": draw(TOKENS, 40)}
    check(target, dtype, only, ids(51), p=0.0)


@by_target
def test_given_positions_and_a_padding_token(target):
    tokens = ids(2, 20)
    tokens[0, 5:] = 7
    check(target, torch.float32, tables(48), tokens, ids(2, 20, entries=POSITIONS), padding=7)


@by_target
def test_dropout_is_the_mask_of_its_seed(target):
    token = torch.ones(5, 100)
    with on_triton(target):
        y = ops.embedding(ids(2, 9, entries=5), token, None, None, None, None, None, None, 1.0, 0, EPS, P, SEED, -1)
    assert torch.equal((y != 0).cpu(), philox.matrix_keep_mask(SEED, 18, 100, P).view(2, 9, 100))


@by_target
@pytest.mark.parametrize("wrong", [-1, TOKENS, 2**40])
@pytest.mark.parametrize("place", ["token", "position", "segment"])
def test_an_index_without_an_entry_is_nan_and_touches_nothing(target, place, wrong):
    if place != "token" and wrong == TOKENS:
        wrong = {"position": POSITIONS, "segment": SEGMENTS}[place]
    weights = [draw(n, 24).float().requires_grad_() for n in (TOKENS, POSITIONS, SEGMENTS)]
    norm, bias = (draw(24).float().requires_grad_() for _ in range(2))
    indices = {"token": ids(8), "position": ids(8, entries=POSITIONS), "segment": ids(8, entries=SEGMENTS)}
    indices[place][3] = wrong

    def without_it(dtype):
        tables, ends = ([x.detach().to(dtype).requires_grad_() for x in tensors] for tensors in (weights, (norm, bias)))
        rows = torch.arange(8) != 3
        entries = sum(F.embedding(i[rows], table) for i, table in zip(indices.values(), tables, strict=True))
        return torch.autograd.grad(F.layer_norm(entries, (24,), *ends, EPS).square().sum(), [*tables, *ends])

    t, p, s = indices.values()
    with on_triton(target):
        y = ops.embedding(t, weights[0], p, weights[1], s, weights[2], norm, bias, 1.0, 0, EPS, 0.0, None, -1)
        gradients = torch.autograd.grad(y[~y.isnan().any(-1)].square().sum(), [*weights, norm, bias])
    assert y[3].isnan().all() and y.isnan().any(-1).sum() == 1
    for actual, theirs, truth in zip(gradients, without_it(torch.float32), without_it(torch.float64), strict=True):
        assert_within_budget(actual=actual, eager=theirs, truth=truth)


@by_target
def test_nothing_to_look_up(target):
    token, norm = torch.randn(4, 24).requires_grad_(), torch.ones(24, requires_grad=True)
    nothing = torch.zeros(2, 0, dtype=torch.int64)
    with on_triton(target):
        y = ops.embedding(nothing, token, None, None, None, None, norm, None, 1.0, 0, EPS, 0.0, None, -1)
        gradients = torch.autograd.grad(y.sum(), (token, norm))
    assert y.shape == (2, 0, 24) and not any(x.any() for x in gradients)


@by_target
def test_rows_do_not_depend_on_their_batch(target):
    token, norm, tokens = torch.randn(TOKENS, 48).bfloat16(), torch.randn(48).bfloat16(), ids(50)
    with on_triton(target):
        whole, *parts = (
            ops.embedding(t, token, None, None, None, None, norm, None, 1.0, 0, EPS, 0.0, None, -1)
            for t in (tokens, *tokens.split([1, 30, 19]))
        )
    assert torch.equal(whole, torch.cat(parts))


@by_target
def test_a_token_may_be_repeated_in_many_blocks(target):
    token, tokens = torch.randn(3, 40).requires_grad_(), ids(300, entries=3)
    slope = torch.randint(-3, 4, (300, 40)).float()  # whose sums are exact
    with on_triton(target):
        y = ops.embedding(tokens, token, None, None, None, None, None, None, 1.0, 0, EPS, 0.0, None, -1)
        (found,) = torch.autograd.grad(y, token, slope)
    assert torch.equal(found, torch.autograd.grad(F.embedding(tokens, token), token, slope)[0])


@full
@pytest.mark.parametrize(
    ("target", "config"), [pytest.param(*p.values, id=p.id) for p in shipped("embedding_fwd", block=64)]
)
def test_shipped_configurations(target, config):
    width = config.up_to["block"] - 3
    with using(embedding_fwd=config, embedding_bwd=config):
        check(target, torch.bfloat16, tables(width), ids(2, 6), segments=ids(2, 6, entries=SEGMENTS))
