"""Linear layers and the feed-forward half of a layer, in Triton on the emulator, against float64 by the budget."""

import pytest
import torch
import torch.nn.functional as F
from budget import assert_op_within_budget
from properties import draw

from fasttx import philox, reference
from fasttx.ops import feed_forward as ops
from fasttx.ops import feed_forward_block as block_ops
from fasttx.ops import linear as linear_ops
from gpu.launchers import by_dtype, by_target, full, on_triton, shipped, using

P, EPS = 0.3, 1e-5
SEED1, SEED2 = torch.tensor(2**62 + 12345), torch.tensor(-7)
EAGER = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def check_linear(target, dtype, rows, width, out, with_bias=True, transpose=False):
    inputs = {"input": draw(*rows, width), "weight": draw(out, width) / width**0.5}
    if with_bias:
        inputs["bias"] = draw(out)
    if transpose:
        inputs["weight"] = inputs["weight"].to(dtype).t().contiguous().t()
    with on_triton(target) as machine:
        assert_op_within_budget(
            lambda input, weight, bias=None: linear_ops.linear(input, weight, bias),
            eager=F.linear,
            reference=reference.linear,
            inputs=inputs,
            dtype=dtype,
        )
    return machine


def feed_forward_inputs(rows, width, hidden, with_bias=True):
    inputs = {
        "input": draw(*rows, width), "weight1": draw(hidden, width) / width**0.5, "bias1": draw(hidden),
        "weight2": draw(width, hidden) / hidden**0.5, "bias2": draw(width),
    }  # fmt: skip
    return inputs if with_bias else {name: x for name, x in inputs.items() if "bias" not in name}


def dropped(x, seed, p):
    """Dropout of the last dim's columns over all rows, as eager PyTorch would apply a mask."""
    keep = philox.matrix_keep_mask(seed, x.numel() // x.shape[-1], x.shape[-1], p)
    return x * keep.view(x.shape).to(x) / (1 - p) if p else x


def check_feed_forward(target, dtype, rows, width, hidden, activation="gelu", p=P, with_bias=True):
    def op(input, weight1, weight2, bias1=None, bias2=None):
        return ops.feed_forward(input, weight1, bias1, weight2, bias2, activation, p, SEED1 if p else None)

    def eager(input, weight1, weight2, bias1=None, bias2=None):
        return F.linear(dropped(EAGER[activation](F.linear(input, weight1, bias1)), SEED1, p), weight2, bias2)

    def truth(input, weight1, weight2, bias1=None, bias2=None):
        return reference.feed_forward(
            input, weight1, bias1, weight2, bias2, activation=activation, dropout_p=p, training=True, seed=SEED1
        )

    with on_triton(target):
        assert_op_within_budget(
            op, eager=eager, reference=truth, inputs=feed_forward_inputs(rows, width, hidden, with_bias), dtype=dtype
        )


def check_block(target, dtype, rows, width, hidden, norm_first=False, activation="gelu", p=P):
    inputs = feed_forward_inputs(rows, width, hidden) | {"norm_weight": draw(width), "norm_bias": draw(width)}
    seeds = (SEED1, SEED2) if p else (None, None)

    def op(input, weight1, bias1, weight2, bias2, norm_weight, norm_bias):
        return block_ops.feed_forward_block(
            input, weight1, bias1, weight2, bias2, norm_weight, norm_bias, EPS, norm_first, activation,
            p, seeds[0], p, seeds[1],
        )  # fmt: skip

    def eager(input, weight1, bias1, weight2, bias2, norm_weight, norm_bias):
        x = F.layer_norm(input, (width,), norm_weight, norm_bias, EPS) if norm_first else input
        y = F.linear(dropped(EAGER[activation](F.linear(x, weight1, bias1)), SEED1, p), weight2, bias2)
        y = input + dropped(y, SEED2, p)
        return y if norm_first else F.layer_norm(y, (width,), norm_weight, norm_bias, EPS)

    def truth(input, weight1, bias1, weight2, bias2, norm_weight, norm_bias):
        x = reference.layer_norm(input, width, norm_weight, norm_bias, EPS) if norm_first else input
        y = reference.feed_forward(
            x, weight1, bias1, weight2, bias2, activation=activation, dropout_p=p, training=True, seed=SEED1
        )
        if norm_first:
            return input + dropped(y, SEED2, p)
        return reference.add_layer_norm(
            y, input, width, norm_weight, norm_bias, EPS, dropout_p=p, training=True, seed=SEED2
        )

    with on_triton(target):
        assert_op_within_budget(op, eager=eager, reference=truth, inputs=inputs, dtype=dtype, gradients=not norm_first)


@by_target
@by_dtype
@pytest.mark.parametrize(
    ("rows", "width", "out"),
    [((2, 17), 100, 72), pytest.param((5,), 128, 130, marks=full), pytest.param((300,), 136, 264, marks=full)],
)
def test_linear(target, dtype, rows, width, out):
    check_linear(target, dtype, rows, width, out)


@by_target
def test_linear_without_bias_and_transposed(target):
    check_linear(target, torch.bfloat16, (33,), 40, 24, with_bias=False, transpose=True)


@by_target
@pytest.mark.parametrize(("rows", "width", "out"), [(0, 8, 16), (3, 8, 0), (3, 0, 8)])
def test_linear_of_nothing(target, rows, width, out):
    x, weight, bias = torch.randn(rows, width), torch.randn(out, width), torch.randn(out)
    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    expected = torch.autograd.grad(F.linear(x, weight, bias).sum(), (x, weight, bias))
    with on_triton(target):
        y = linear_ops.linear(x, weight, bias)
        gradients = torch.autograd.grad(y.sum(), (x, weight, bias))
    torch.testing.assert_close(y, F.linear(x, weight, bias))
    for actual, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@by_target
@by_dtype
@pytest.mark.parametrize("activation", ["gelu", *(pytest.param(a, marks=full) for a in ("gelu_tanh", "relu"))])
@pytest.mark.parametrize("p", [P, pytest.param(0.0, marks=full)])
def test_feed_forward(target, dtype, activation, p):
    check_feed_forward(target, dtype, (2, 37), 64, 200, activation, p)


@full
@by_target
def test_feed_forward_without_biases(target):
    check_feed_forward(target, torch.float16, (9,), 40, 56, with_bias=False)


@by_target
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, *(pytest.param(d, marks=full) for d in (torch.float16, torch.float32))]
)
@pytest.mark.parametrize("norm_first", [False, True])
def test_the_half_of_a_layer(target, dtype, norm_first):
    check_block(target, dtype, (2, 20), 64, 136, norm_first)


@full
@by_target
@pytest.mark.parametrize("activation", EAGER)
def test_the_half_of_a_layer_without_dropout(target, activation):
    check_block(target, torch.float16, (33,), 72, 136, activation=activation, p=0.0)


@full
@pytest.mark.parametrize(
    ("target", "config"), [pytest.param(*p.values, id=p.id) for p in shipped("matmul", bits=16, epilogue=0)]
)
def test_shipped_configurations(target, config):
    """Two tiles down and two across, both ragged, and a ragged sum."""
    dtype = torch.bfloat16 if config.up_to["bits"] == 16 else torch.float32
    rows, out = config.blocks["BLOCK_M"] + 9, config.blocks["BLOCK_N"] + 8
    with using(matmul=config):
        check_linear(target, dtype, (rows,), 72, out)
        check_feed_forward(target, dtype, (rows,), 48, out)


@by_target
def test_float32_products_are_tf32_only_where_pytorch_allows_it(target):
    x, weight = torch.randn(20, 64), torch.randn(24, 64)
    truth = x.double() @ weight.double().t()
    before = torch.backends.cuda.matmul.fp32_precision
    errors = {}
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            with on_triton(target) as machine:
                errors[precision] = (linear_ops.linear(x, weight, None) - truth).abs().max().item()
            if machine is not None:
                assert ("tf32" in str(machine.counts.matrix_flops)) == (precision == "tf32")
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert errors["ieee"] < 1e-5 < errors["tf32"] < 1e-1


@by_target
def test_rows_do_not_depend_on_their_batch(target):
    x, weight = torch.randn(140, 48).bfloat16(), torch.randn(40, 48).bfloat16()
    with on_triton(target):
        together = linear_ops.linear(x, weight, None)
        alone = torch.cat([linear_ops.linear(part, weight, None) for part in x.split([1, 100, 39])])
    assert torch.equal(together, alone)
