"""What nvcc compiles, on the same emulator."""

import numpy as np
import pytest
import torch
from budget import assert_within_budget

from gpu.nvcc import cannot_compile, compile_ptx
from gpu.ptx import CheckFailed, PTXError, launch, parse
from gpu.ptx.tensor_map import encode
from gpu.tensors import allocation

pytestmark = pytest.mark.skipif(cannot_compile() is not None, reason=str(cannot_compile()))

REDUCTION = r"""
extern "C" __global__ void row_sums(const float* __restrict__ x, float* out, int rows, int width, double bias) {
  __shared__ float partial[8];
  int row = blockIdx.x;
  if (row >= rows) return;
  float sum = 0.f;
  for (int i = threadIdx.x; i < width; i += blockDim.x) sum += x[row * (long)width + i];
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  SYNC
  if (threadIdx.x < 8) {
    sum = partial[threadIdx.x];
    for (int step = 4; step; step /= 2) sum += __shfl_xor_sync(0xff, sum, step);
    if (threadIdx.x == 0) out[row GUARD] = sum + (float)bias;
  }
}
"""

HALF = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>
struct Step { float scale; short shift; };
extern "C" __global__ void mixed(const __nv_bfloat162* x, const __half* y, float* out, Step step, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float2 pair = __bfloat1622float2(__hmul2(x[i], x[i]));
  float history[4];
  #pragma unroll 1
  for (int j = 0; j < 4; j++) history[j] = pair.x * j;
  float late = history[(i * 7) & 3];
  unsigned votes = __ballot_sync(__activemask(), i & 1);
  out[i] = fmaf(pair.y, step.scale, __half2float(y[i])) + late + sinf(pair.x) + __popc(votes) * (float)step.shift;
}
"""


CALLS = r"""
#include <cassert>
#include <cstdio>
#include <cuda_bf16.h>
__noinline__ __device__ float polynomial(float x, int n) {
  float sum = 0.f;
  for (int i = 0; i < n; i++) sum = sum * x + i;
  return sum;
}
extern "C" __global__ void calls(const float* x, float* out, int n) {
  out[threadIdx.x] = polynomial(x[threadIdx.x], n);
}
extern "C" __global__ void asserts(const __nv_bfloat162* x, __nv_bfloat162* out, int n) {
  if (threadIdx.x >= n) return;
  assert(n < 30);
  if (n == 0) printf("%d", n);
  out[threadIdx.x] = h2exp2(x[threadIdx.x]);
}
"""

BOX = r"""
struct alignas(64) Map { unsigned long long words[16]; };
struct Arguments { Map map; float* out; };
extern "C" __global__ void box(const __grid_constant__ Arguments args) {
  __shared__ alignas(128) float tile[8 * 32];
  __shared__ unsigned long long barrier;
  unsigned at = __cvta_generic_to_shared(&barrier), to = __cvta_generic_to_shared(tile);
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" :: "r"(at));
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(at), "r"(8 * 32 * 4) : "memory");
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3}], [%4];" :: "r"(to), "l"(&args.map), "r"(0), "r"(8 * blockIdx.x), "r"(at)
                 : "memory");
  }
  SYNC
  unsigned done = 0;
  while (!done)
    asm volatile("{.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;\nselp.u32 %0, 1, 0, p;}"
                 : "=r"(done) : "r"(at) : "memory");
  for (int i = threadIdx.x; i < 8 * 32; i += blockDim.x) args.out[blockIdx.x * 8 * 32 + i] = tile[i];
}
"""


def _reduction(sync: str = "__syncthreads();", guard: str = "") -> str:
    return compile_ptx(REDUCTION.replace("SYNC", sync).replace("GUARD", guard), "sm_80")


def _run_reduction(text: str) -> tuple[torch.Tensor, torch.Tensor]:
    # Whole numbers: their sums are exact in any order.
    x, out = torch.randint(-999, 1000, (5, 1000)).float(), torch.zeros(5)
    memory = [allocation(x, "x"), allocation(out, "out")]
    arguments = [x.data_ptr(), out.data_ptr(), 5, 1000, 0.5]
    launch(parse(text)["row_sums"], (5,), (256,), arguments, memory)
    return out, x.sum(1) + 0.5


def test_a_reduction() -> None:
    out, expected = _run_reduction(_reduction())
    assert torch.equal(out, expected)


def test_its_mistakes_are_found_with_their_line() -> None:
    with pytest.raises(CheckFailed, match=r"(shared race|uninitialised shared memory).*kernel.cu:\d+"):
        _run_reduction(_reduction(sync=""))
    with pytest.raises(CheckFailed, match=r"global bounds.*byte 20 of out \(20 bytes\).*kernel.cu:14"):
        _run_reduction(_reduction(guard="+ 1"))
    with pytest.raises(CheckFailed, match="warp divergence|divergent barrier"):
        _run_reduction(_reduction(sync="if (threadIdx.x < 100) __syncthreads();"))


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_half_precision_local_arrays_and_structures(target: str) -> None:
    n = 200
    x, y, out = torch.randn(n, 2).bfloat16(), torch.randn(n).half(), torch.zeros(n)
    step = np.array([(1.5, 3, 0)], dtype=np.dtype([("scale", "<f4"), ("shift", "<i2"), ("pad", "<i2")])).tobytes()
    memory = [allocation(t, name) for t, name in ((x, "x"), (y, "y"), (out, "out"))]
    kernel = parse(compile_ptx(HALF, target))["mixed"]
    launch(kernel, (2,), (128,), [x.data_ptr(), y.data_ptr(), out.data_ptr(), step, n], memory)
    square = x * x
    # The last warp is cut off at n, and only the threads that are left vote.
    votes = torch.tensor([sum(j & 1 for j in range(i // 32 * 32, min(i // 32 * 32 + 32, n))) for i in range(n)])

    def mixed(first: torch.Tensor, second: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return second * 1.5 + y + first * ((torch.arange(n) * 7) & 3) + torch.sin(first) + votes * 3

    inputs = square[:, 0], square[:, 1], y
    eager, truth = (mixed(*(part.to(dtype) for part in inputs)) for dtype in (torch.float32, torch.float64))
    assert_within_budget(actual=out, eager=eager, truth=truth)


def test_assertions_trap_and_what_is_called_is_named_once_it_runs() -> None:
    kernels = parse(compile_ptx(CALLS, "sm_80"))
    x, out = torch.randn(32, 2).bfloat16(), torch.zeros(32, 2).bfloat16()
    memory = [allocation(t, name) for t, name in ((x, "x"), (out, "out"))]
    launch(kernels["asserts"], (1,), (32,), [x.data_ptr(), out.data_ptr(), 29], memory)
    torch.testing.assert_close(out[:29], x[:29].exp2())
    assert not out[29:].any()
    with pytest.raises(CheckFailed, match="trap.*kernel.cu:15"):
        launch(kernels["asserts"], (1,), (32,), [x.data_ptr(), out.data_ptr(), 30], memory)
    with pytest.raises(PTXError, match="call.uni is not implemented"):
        launch(kernels["calls"], (1,), (32,), [x.data_ptr(), out.data_ptr(), 3], memory)


def test_a_tensor_map_among_the_parameters() -> None:
    x, out = torch.randn(19, 32), torch.zeros(24, 32)
    map_ = encode(x.data_ptr(), 4, (32, 19), (128,), (32, 8))
    memory = [allocation(x, "x"), allocation(out, "out")]

    def run(sync: str) -> None:
        kernel = parse(compile_ptx(BOX.replace("SYNC", sync), "sm_90a"))["box"]
        launch(kernel, (3,), (64,), [map_ + out.data_ptr().to_bytes(8, "little") + bytes(56)], memory)

    run("__syncthreads();")
    assert torch.equal(out[:19], x) and not out[19:].any()
    with pytest.raises(CheckFailed, match=r"(mbarrier|shared race).*kernel.cu:\d+"):
        run("")
