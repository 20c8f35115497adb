"""Real Triton kernels on the emulator against PyTorch in float64, for sm_80 and sm_90."""

import math

import pytest
import torch
from budget import assert_within_budget

pytest.importorskip("triton")

import triton  # noqa: E402

from gpu import sample_kernels as kernels  # noqa: E402
from gpu.driver import emulated  # noqa: E402

TARGETS = ["sm_80", "sm_90"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# float32 goes through TF32: Triton rounds nothing, so the tensor core truncates to 11 bits, an error of up to 2^-10.
EPSILON = {torch.float32: 2**-10, torch.bfloat16: 2**-8, torch.float16: 2**-11}

full = pytest.mark.emulated_full
by_target = pytest.mark.parametrize("target", TARGETS)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def agree(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, steps: float = 2) -> None:
    """Within `steps` roundings of the largest element, and of its own size."""
    epsilon = EPSILON[dtype] * steps
    bound = epsilon * (expected.abs() + expected.abs().max())
    assert ((actual.double() - expected).abs() <= bound).all(), (actual.double() - expected).abs().max()


@by_target
def test_a_masked_vector(target: str) -> None:
    x, y = torch.randn(1000), torch.randn(1000)
    out = torch.full((1000,), math.nan)
    with emulated(target) as machine:
        kernels.add_rows[(8,)](x, y, out, 1000, BLOCK=128)
    assert torch.equal(out, x + y)
    assert machine.counts.loaded_bytes == 8000 and machine.counts.stored_bytes == 4000
    assert (machine.counts.read, machine.counts.written) == (8000, 4000)
    assert machine.counts.flops >= 1000 and machine.counts.programs == 8


@by_target
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [33, 1000])
def test_layer_norm(target: str, dtype: torch.dtype, width: int) -> None:
    x, weight, bias = torch.randn(19, width).to(dtype), torch.randn(width).to(dtype), torch.randn(width).to(dtype)
    out = torch.full_like(x, math.nan)
    with emulated(target):
        kernels.layer_norm[(19,)](x, out, weight, bias, width, width, 1e-5, BLOCK=triton.next_power_of_2(width))
    agree(out, torch.nn.functional.layer_norm(x.double(), (width,), weight.double(), bias.double(), 1e-5), dtype)


@by_target
def test_special_functions(target: str) -> None:
    x = torch.cat([torch.linspace(-12, 12, 250), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 88.0, -88.0])])
    out = torch.full((3, 256), math.nan)
    with emulated(target):
        kernels.activations[(2,)](x, out, 256, BLOCK=128)
    functions = {
        "gelu": torch.nn.functional.gelu,
        "gelu, tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        "sigmoid": torch.sigmoid,
    }
    for got, (name, function) in zip(out, functions.items(), strict=True):
        assert_within_budget(actual=got, eager=function(x), truth=function(x.double()), name=name)


@by_target
def test_atomics(target: str) -> None:
    x = torch.randint(0, 8, (300,), dtype=torch.int32)
    sums = torch.zeros(11, dtype=torch.int32)
    order = torch.full((3,), -1, dtype=torch.int32)
    with emulated(target) as machine:
        kernels.tally[(3,)](x, sums, order, 300, BLOCK=128)
    assert torch.equal(sums[:8].long(), torch.bincount(x, minlength=8))
    assert sums[8] == x.max() and sums[9] == 0 and sums[10] == 3
    assert sorted(order.tolist()) == [0, 1, 2]
    assert machine.counts.atomics >= 300


@by_target
def test_philox_uniforms_do_not_depend_on_the_block(target: str) -> None:
    few, many = torch.empty(512), torch.empty(512)
    with emulated(target):
        kernels.dropout[(2,)](few, 512, 1234, BLOCK=256)
        kernels.dropout[(4,)](many, 512, 1234, BLOCK=128)
    assert torch.equal(few, many)
    assert 0 <= few.min() and few.max() < 1 and abs(few.mean() - 0.5) < 0.05


@by_target
def test_scan_and_sort(target: str) -> None:
    x = torch.randint(-1000, 1000, (256,), dtype=torch.int32)
    out = torch.empty(2, 256, dtype=torch.int32)
    with emulated(target):
        kernels.cumulative[(1,)](x, out, BLOCK=256)
    assert torch.equal(out[0], x.cumsum(0).int()) and torch.equal(out[1], x.sort().values)


def _matmul(target, dtype, m, n, k, trans_a, trans_b, warps=4, stages=3, tile=(64, 64, 32)) -> None:
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    out = torch.full((m, n), math.nan, dtype=torch.float32)
    stored_a = a.t().contiguous() if trans_a else a
    stored_b = b.t().contiguous() if trans_b else b
    grid = triton.cdiv(m, tile[0]), triton.cdiv(n, tile[1])
    with emulated(target) as machine:
        kernels.matmul[grid](
            stored_a, stored_b, out, m, n, k, *tile, trans_a, trans_b, num_warps=warps, num_stages=stages
        )
    agree(out, a.double() @ b.double(), dtype)
    padded = [-(-size // step) * step for size, step in zip((m, n, k), tile, strict=True)]
    assert sum(machine.counts.matrix_flops.values()) == 2 * math.prod(padded)


@by_target
@by_dtype
def test_matmul(target: str, dtype: torch.dtype) -> None:
    _matmul(target, dtype, 80, 96, 144, False, False)


@full
@by_target
@by_dtype
@pytest.mark.parametrize("trans_a", [False, True], ids=["a", "at"])
@pytest.mark.parametrize("trans_b", [False, True], ids=["b", "bt"])
@pytest.mark.parametrize(
    ("warps", "stages", "tile"),
    [(4, 1, (64, 64, 64)), (4, 4, (128, 64, 32)), (8, 3, (128, 128, 64)), (4, 2, (64, 256, 16)), (4, 3, (16, 32, 32))],
    ids=str,
)
@pytest.mark.parametrize(("m", "n", "k"), [(128, 256, 128), (77, 33, 51)], ids=str)
def test_matmul_of_every_layout(target, dtype, trans_a, trans_b, warps, stages, tile, m, n, k) -> None:
    if dtype == torch.float32 and stages > 3 and tile[2] > 32:
        tile = (*tile[:2], 32)
    _matmul(target, dtype, m, n, k, trans_a, trans_b, warps, stages, tile)


def _attention(target, dtype, length, width, causal, warps=4, stages=2, tile=(64, 64)) -> None:
    q, k, v = torch.randn(3, 2, length, width).to(dtype).unbind()
    out = torch.full_like(q, math.nan)
    with emulated(target):
        kernels.attention[(triton.cdiv(length, tile[0]), 2)](
            q,
            k,
            v,
            out,
            width**-0.5 * math.log2(math.e),
            length,
            causal,
            width,
            *tile,
            num_warps=warps,
            num_stages=stages,
        )
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=causal)
    agree(out, expected, dtype)


@by_target
@by_dtype
def test_attention(target: str, dtype: torch.dtype) -> None:
    _attention(target, dtype, 100, 64, True)


@full
@by_target
@by_dtype
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("width", "warps", "stages", "tile"),
    [(16, 4, 1, (64, 32)), (32, 4, 3, (64, 64)), (64, 8, 2, (128, 64)), (128, 8, 2, (128, 32)), (64, 4, 3, (128, 128))],
    ids=str,
)
@pytest.mark.parametrize("length", [1, 130])
def test_attention_of_every_tile(target, dtype, causal, width, warps, stages, tile, length) -> None:
    _attention(target, dtype, length, width, causal, warps, stages, tile)


@by_target
@by_dtype
def test_gradients_of_keys_and_values(target: str, dtype: torch.dtype) -> None:
    length, width = 100, 64
    q, k, v, dout = torch.randn(4, 2, length, width).to(dtype).unbind()
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    score = wide[0] @ wide[1].mT * width**-0.5
    expected = score.softmax(-1) @ wide[2]
    expected.backward(dout.double())
    lse = (torch.logsumexp(score.detach(), -1) * math.log2(math.e)).float()
    delta = (expected.detach() * dout.double()).sum(-1).float()
    dk, dv = torch.full_like(k, math.nan), torch.full_like(v, math.nan)
    with emulated(target):
        kernels.weight_gradients[(triton.cdiv(length, 64), 2)](
            q, k, v, dout, lse, delta, dk, dv, width**-0.5, length, width, 64, 64, num_warps=4, num_stages=1
        )
    agree(dk, wide[1].grad, dtype, 4)
    agree(dv, wide[2].grad, dtype, 4)
