"""The mended interpreter against PyTorch, and that it leaves Triton as it was."""

import math

import pytest
import torch

pytest.importorskip("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from gpu import sample_kernels as kernels  # noqa: E402
from gpu.driver import emulated  # noqa: E402
from gpu.interpreter import interpreted  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPSILON = {torch.float32: 2**-10, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@triton.jit
def _square(x):
    return x * x


@triton.jit
def half_precision(x, y, out, n, BLOCK: tl.constexpr):
    """Arithmetic that stays in the type of its operands."""
    at = tl.arange(0, BLOCK)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(out + at, a + b)
    tl.store(out + n + at, a * b - b)
    tl.store(out + 2 * n + at, tl.where(a > b, a, -b))
    tl.store(out + 3 * n + at, tl.abs(_square(a)))


@triton.autotune([triton.Config({"BLOCK": 64}), triton.Config({"BLOCK": 128})], key=["n"])
@triton.jit
def tuned(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < n) + 1, mask=at < n)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_after_each_step(dtype: torch.dtype) -> None:
    x, y = torch.randn(64).to(dtype), torch.randn(64).to(dtype)
    out = torch.empty(4, 64, dtype=dtype)
    with interpreted():
        half_precision[(1,)](x, y, out, 64, BLOCK=64)
    expected = torch.stack([x + y, x * y - y, torch.where(x > y, x, -y), x * x])
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 50, 32).to(dtype) for _ in range(3))
    out = torch.full_like(q, math.nan)
    with interpreted():
        kernels.attention[(2, 2)](q, k, v, out, 32**-0.5 * math.log2(math.e), 50, True, 32, 32, 32)
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    bound = 2 * EPSILON[dtype] * (expected.abs() + expected.abs().max())
    assert ((out.double() - expected).abs() <= bound).all()


def test_autotuning_takes_the_first_configuration() -> None:
    x, out = torch.randn(100), torch.empty(100)
    with interpreted():
        tuned[lambda meta: (triton.cdiv(100, meta["BLOCK"]),)](x, out, 100)
    assert torch.equal(out, x + 1) and tuned.best_config.kwargs["BLOCK"] == 64


def test_the_compiler_still_works_afterwards() -> None:
    x, y, out = torch.randn(100), torch.randn(100), torch.empty(100)
    for use in (interpreted, emulated, interpreted, emulated):
        out.fill_(math.nan)
        with use():
            kernels.add_rows[(1,)](x, y, out, 100, BLOCK=128)
        assert torch.equal(out, x + y)
