"""GELU and bias + GELU, Triton's kernels and the CUDA C++ ones, on the emulator against float64 by the error budget."""

import pytest
import torch
import torch.nn.functional as F
from budget import assert_op_within_budget
from properties import draw

from fasttx import reference
from fasttx.ops import gelu as ops
from gpu.launchers import (
    BINARY,
    backend_of,
    by_dtype,
    by_kernels,
    counted,
    full,
    needs_binary,
    on_kernels,
    shipped,
    using,
)

by_variant = pytest.mark.parametrize("approximate", ["none", "tanh"])


def check(target, dtype, shape, approximate, with_bias):
    inputs = {"input": 3 * draw(*shape)}
    if with_bias:
        inputs["bias"] = draw(shape[-1])

    def op(input, bias=None):
        backend = backend_of(target)
        if bias is None:
            return ops.gelu(input, approximate, backend)
        return ops.bias_gelu(input, bias, approximate, backend)

    def eager(input, bias=None):
        return F.gelu(input if bias is None else input + bias, approximate=approximate)

    def truth(input, bias=None):
        return reference.gelu(input, approximate) if bias is None else reference.bias_gelu(input, bias, approximate)

    with on_kernels(target):
        assert_op_within_budget(op, eager=eager, reference=truth, inputs=inputs, dtype=dtype)


@by_kernels
@by_dtype
@by_variant
@pytest.mark.parametrize("shape", [(5, 3, 100), pytest.param((3, 3000), marks=full), pytest.param((7,), marks=full)])
def test_bias_gelu(target, dtype, approximate, shape):
    check(target, dtype, shape, approximate, with_bias=True)


@by_kernels
@by_dtype
@by_variant
@pytest.mark.parametrize("shape", [(2, 3000), pytest.param((4, 5, 33), marks=full), pytest.param((1,), marks=full)])
def test_gelu(target, dtype, approximate, shape):
    check(target, dtype, shape, approximate, with_bias=False)


BLOCKS = (64, 512, 1024, 2048)


@full
@pytest.mark.parametrize(
    ("block", "target", "config"),
    [pytest.param(b, *p.values, id=f"{b}-{p.id}") for b in BLOCKS for p in shipped("gelu_fwd", block=b)],
)
def test_shipped_configurations(block, target, config):
    with using(gelu_fwd=config, gelu_bwd=config):
        check(target, torch.bfloat16, (40, block - 9), "none", with_bias=True)


@by_kernels
def test_more_rows_than_partial_sums(target):
    check(target, torch.bfloat16, (700, 24), "none", with_bias=True)


@by_kernels
@by_variant
def test_what_is_not_finite(target, approximate):
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e20, -1e20, 50.0, -50.0], requires_grad=True)
    with on_kernels(target):
        y = ops.gelu(x, approximate, backend_of(target))
        (dx,) = torch.autograd.grad(y.sum(), x)
    # -infinity gives 0, where PyTorch's formula is NaN.
    torch.testing.assert_close(
        y.detach(), torch.tensor([0.0, 0, torch.inf, 0, torch.nan, 1e20, 0, 50, 0]), equal_nan=True
    )
    torch.testing.assert_close(dx, torch.tensor([0.5, 0.5, 1, 0, torch.nan, 1, 0, 1, 0]), equal_nan=True)


@by_kernels
def test_nothing(target):
    x, bias = torch.empty(0, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    with on_kernels(target):
        ops.bias_gelu(x, bias, "none", backend_of(target)).sum().backward()
        assert ops.gelu(torch.empty(3, 0), "none", backend_of(target)).shape == (3, 0)
    assert x.grad.shape == (0, 4) and torch.equal(bias.grad, torch.zeros(4))


@counted
@needs_binary
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_each_byte_is_moved_once_by_wide_accesses(dtype, with_bias):
    rows, width = 96, 512
    x, dy, bias = (torch.randn(shape).to(dtype) for shape in ((rows, width), (rows, width), (width,)))
    raw = torch.ops.fasttx_cuda
    with on_kernels(BINARY) as machine:
        raw.gelu_fwd.raw(x, bias if with_bias else None, 2)
        raw.gelu_bwd.raw(dy, x, bias if with_bias else None, 2, with_bias)
    forward, backward, *of_sums = machine.launches
    for launch, operands in ((forward, 2), (backward, 3)):
        counts = launch.counts
        assert counts.read + counts.written <= 1.05 * (operands * x.nbytes + bias.nbytes) + launch.grid[1] * 4 * width
        assert set(counts.loads) == {16}
        # The sums of each block, which the next kernel joins, are written one by one.
        assert set(counts.stores) == ({4, 16} if launch is backward and with_bias else {16})
        if not with_bias:
            assert counts.loaded_bytes + counts.stored_bytes == operands * x.nbytes
    assert len(of_sums) == with_bias
