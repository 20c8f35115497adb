"""Self-attention with its projections, and the attention half of a layer, in Triton on the emulator, by the budget."""

import pytest
import torch
import torch.nn.functional as F
from budget import assert_op_within_budget
from properties import draw

from fasttx import philox, reference
from fasttx.ops.attention_block import attention_block
from fasttx.ops.self_attention import self_attention
from gpu.launchers import by_dtype, by_target, full, on_triton

HEADS, WIDTH, EPS = 2, 32, 1e-5
SEED1, SEED2 = torch.tensor(2**62 + 12345), torch.tensor(-7)
LENGTHS = torch.tensor([0, 5, 5, 18])


def inputs_of(rows, norm=False):
    shapes = {
        "input": (*rows, WIDTH), "weight_in": (3 * WIDTH, WIDTH), "bias_in": (3 * WIDTH,),
        "weight_out": (WIDTH, WIDTH), "bias_out": (WIDTH,),
    }  # fmt: skip
    tensors = {n: draw(*shape) / (WIDTH**0.5 if "weight" in n else 1) for n, shape in shapes.items()}
    return tensors | ({"norm_weight": draw(WIDTH), "norm_bias": draw(WIDTH)} if norm else {})


def attend(x, weight_in, bias_in, weight_out, bias_out, batch_first, causal, packed, p, linear, attention):
    """out(attention(in(x))), of an implementation's two parts."""
    qkv = linear(x, weight_in, bias_in).unflatten(-1, (3, HEADS, WIDTH // HEADS)).unbind(-3)
    if packed:
        out = attention(*qkv).flatten(-2)
    else:
        q, k, v = (t.transpose(1, 2) if batch_first else t.permute(1, 2, 0, 3) for t in qkv)
        out = attention(q, k, v)
        out = (out.transpose(1, 2) if batch_first else out.permute(2, 0, 1, 3)).flatten(-2)
    return linear(out, weight_out, bias_out)


def parts(batch_first, causal, packed, p):
    """The eager and the reference implementation."""

    def eager_attention(q, k, v):
        if packed:
            pieces = [eager_sdpa(*(t[a:b].transpose(0, 1)[None] for t in (q, k, v))) for a, b in spans() if b > a]
            return torch.cat([piece[0].transpose(0, 1) for piece in pieces])
        return eager_sdpa(q, k, v)

    def eager_sdpa(q, k, v):
        scores = q @ k.mT * (WIDTH // HEADS) ** -0.5
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
        weights = torch.softmax(scores, -1)
        if p:
            keep = philox.keep_mask(
                SEED1, torch.arange(q.shape[0]).cpu(), torch.arange(q.shape[1]).cpu(), *scores.shape[2:], p
            )
            weights = weights * keep.to(weights) / (1 - p)
        return weights @ v

    options = {"is_causal": causal, "dropout_p": p, "seed": SEED1 if p else None}

    def true_attention(q, k, v):
        if packed:
            return reference.attention_varlen(q, k, v, LENGTHS, LENGTHS, **options)
        return reference.attention(q, k, v, **options)

    common = (batch_first, causal, packed, p)
    return (
        lambda *tensors: attend(*tensors, *common, F.linear, eager_attention),
        lambda *tensors: attend(*tensors, *common, reference.linear, true_attention),
    )


def spans():
    return list(zip(LENGTHS.tolist(), LENGTHS.tolist()[1:], strict=False))


def rows_of(packed):
    return (18,) if packed else (3, 20)


def options_of(batch_first, causal, packed, p):
    """The ops' arguments after the tensors."""
    scale = (WIDTH // HEADS) ** -0.5
    return HEADS, batch_first, None, LENGTHS if packed else None, causal, scale, p, SEED1 if p else None


# batch_first, causal, packed, dropout.
CALLS = [(True, False, False, 0.2), (False, True, False, 0.0), (True, True, True, 0.0)]
by_call = pytest.mark.parametrize("call", [CALLS[0], *(pytest.param(c, marks=full) for c in CALLS[1:])], ids=str)


@by_target
@by_dtype
@by_call
def test_self_attention(target, dtype, call):
    eager, truth = parts(*call)
    with on_triton(target):
        assert_op_within_budget(
            lambda **x: self_attention(*x.values(), *options_of(*call)),
            eager=lambda **x: eager(*x.values()),
            reference=lambda **x: truth(*x.values()),
            inputs=inputs_of(rows_of(call[2])),
            dtype=dtype,
        )


@by_target
@by_dtype
@by_call
@pytest.mark.parametrize("norm_first", [False, True])
def test_the_half_of_a_layer(target, dtype, call, norm_first):
    p = call[3]

    def half(attended, norm, x, *tensors):
        *layers, weight, bias = tensors
        y = attended(norm(x, weight, bias) if norm_first else x, *layers)
        if p:
            keep = philox.matrix_keep_mask(SEED2, y.numel() // WIDTH, WIDTH, p)
            y = y * keep.view(y.shape).to(y) / (1 - p)
        return x + y if norm_first else norm(x + y, weight, bias)

    eager, truth = parts(*call)
    options = options_of(*call)
    with on_triton(target):
        assert_op_within_budget(
            lambda **x: attention_block(*x.values(), EPS, norm_first, *options, p, SEED2 if p else None),
            eager=lambda **x: half(eager, lambda y, w, b: F.layer_norm(y, (WIDTH,), w, b, EPS), *x.values()),
            reference=lambda **x: half(truth, lambda y, w, b: reference.layer_norm(y, WIDTH, w, b, EPS), *x.values()),
            inputs=inputs_of(rows_of(call[2]), norm=True),
            dtype=dtype,
            gradients=not norm_first,
        )
