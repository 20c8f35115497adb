"""Layer norm, alone and of residual + dropout(input), Triton's kernels and the CUDA C++ ones, on the emulator against
float64 by the error budget."""

import pytest
import torch
import torch.nn.functional as F
from budget import assert_op_within_budget
from properties import draw

from fasttx import philox, reference
from fasttx.ops import layer_norm as ops
from gpu.launchers import backend_of, by_dtype, by_kernels, full, on_kernels, shipped, using

P, SEED, EPS = 0.3, torch.tensor(2**62 + 12345), 1e-5
# Rows by widths: less than a block, ragged, several programs, and what the looping kernels take.
SHAPES = [(5, 33), (37, 100), (3, 768), (2, 1000)]
WIDE = [(2, 9000), (2, 20000)]


def inputs_of(shape, affine=True, residual=False):
    tensors = {"input": draw(*shape)}
    if residual:
        tensors["residual"] = draw(*shape)
    return tensors | ({"weight": draw(shape[-1]), "bias": draw(shape[-1])} if affine else {})


def check_norm(target, dtype, shape, affine=True):
    width = shape[-1]

    def op(input, weight=None, bias=None):
        return ops.layer_norm(input, width, weight, bias, EPS, backend_of(target))

    with on_kernels(target) as machine:
        assert_op_within_budget(
            op,
            eager=lambda input, weight=None, bias=None: F.layer_norm(input, (width,), weight, bias, EPS),
            reference=lambda input, weight=None, bias=None: reference.layer_norm(input, width, weight, bias, EPS),
            inputs=inputs_of(shape, affine),
            dtype=dtype,
        )
    return machine


def check_add_norm(target, dtype, shape, p, affine=True):
    width = shape[-1]
    keep = philox.matrix_keep_mask(SEED, shape[0], width, p)

    def op(input, residual, weight=None, bias=None):
        seed = SEED if p else None
        return ops.add_layer_norm(input, residual, width, weight, bias, EPS, p, seed, True, backend_of(target))

    def eager(input, residual, weight=None, bias=None):
        dropped = input * keep.to(input) / (1 - p) if p else input
        total = residual + dropped
        return F.layer_norm(total, (width,), weight, bias, EPS), total

    def truth(input, residual, weight=None, bias=None):
        return reference.add_layer_norm(
            input, residual, width, weight, bias, EPS, dropout_p=p, training=True, return_sum=True, seed=SEED
        )

    with on_kernels(target) as machine:
        assert_op_within_budget(
            op, eager=eager, reference=truth, inputs=inputs_of(shape, affine, residual=True), dtype=dtype
        )
    return machine


@by_kernels
@by_dtype
@pytest.mark.parametrize("shape", [SHAPES[1], *(pytest.param(s, marks=full) for s in (SHAPES[0], *SHAPES[2:]))])
def test_layer_norm(target, dtype, shape):
    check_norm(target, dtype, shape)


@by_kernels
@by_dtype
@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("shape", [SHAPES[0], *(pytest.param(s, marks=full) for s in SHAPES[1:])])
def test_add_layer_norm(target, dtype, p, shape):
    check_add_norm(target, dtype, shape, p)


@by_kernels
def test_without_weight_and_bias(target):
    check_norm(target, torch.bfloat16, (5, 40), affine=False)
    check_add_norm(target, torch.float32, (5, 40), P, affine=False)


@full
@by_kernels
@by_dtype
@pytest.mark.parametrize("shape", WIDE)
def test_wide_rows(target, dtype, shape):
    check_norm(target, dtype, shape)
    check_add_norm(target, dtype, shape, P)


@by_kernels
def test_the_widest_rows(target):
    check_norm(target, torch.bfloat16, (1, 65536))


BLOCKS = (64, 256, 1024, 2048, 4096, 8192)


@full
@pytest.mark.parametrize(
    ("block", "target", "config"),
    [pytest.param(b, *p.values, id=f"{b}-{p.id}") for b in BLOCKS for p in shipped("layer_norm_fwd", block=b)],
)
def test_shipped_configurations_forward(block, target, config):
    with using(layer_norm_fwd=config):
        check_norm(target, torch.bfloat16, (3, block - 9))


@full
@pytest.mark.parametrize(
    ("block", "target", "config"),
    [pytest.param(b, *p.values, id=f"{b}-{p.id}") for b in BLOCKS for p in shipped("layer_norm_bwd", block=b)],
)
def test_shipped_configurations_backward(block, target, config):
    with using(layer_norm_bwd=config):
        check_add_norm(target, torch.bfloat16, (5, block - 9), P)


@by_kernels
def test_more_rows_than_programs(target):
    check_norm(target, torch.float32, (600, 16))


@by_kernels
def test_no_rows(target):
    x = torch.empty(0, 8, requires_grad=True)
    weight = torch.randn(8, requires_grad=True)
    with on_kernels(target):
        y = ops.layer_norm(x, 8, weight, None, EPS, backend_of(target))
        y.sum().backward()
    assert y.shape == (0, 8) and x.grad.shape == (0, 8)
    assert torch.equal(weight.grad, torch.zeros(8))


@by_kernels
def test_rows_do_not_depend_on_their_batch(target):
    x, weight = torch.randn(9, 96).bfloat16(), torch.randn(96).bfloat16()
    backend = backend_of(target)
    with on_kernels(target):
        together = ops.layer_norm(x, 96, weight, None, EPS, backend)
        alone = torch.cat([ops.layer_norm(row[None], 96, weight, None, EPS, backend) for row in x])
    assert torch.equal(together, alone)


@by_kernels
def test_misaligned_and_strided_tensors(target):
    x = torch.randn(6, 49)[:, 1:]
    weight, backend = torch.randn(49)[1:], backend_of(target)
    with on_kernels(target):
        y = ops.layer_norm(x, 48, weight, None, EPS, backend)
        shifted = ops.layer_norm(torch.randn(1 + 6 * 48)[1:].view(6, 48).copy_(x), 48, weight, None, EPS, backend)
    expected = F.layer_norm(x, (48,), weight, None, EPS)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(shifted, expected)
