// The end of a sum over many rows: the lines that programs have written, added up in order.
#include "arguments.h"
#include "values.cuh"

namespace fasttx::cuda {
namespace {

constexpr int kThreads = 256, kLines = 8;

// A block takes 32 columns of one matrix: thread (line, lane) every kLines-th row of one, joined in order.
template <class T>
__device__ __forceinline__ void sum_partials(const SumPartials& args) {
  __shared__ float shared[kLines][32];
  const uint32_t lane = threadIdx.x % 32, line = threadIdx.x / 32, column = blockIdx.x * 32 + lane;
  const float* x = args.x + int64_t(blockIdx.y) * args.rows * args.width;
  float sum = 0.f;
  if (column < args.width) {
#pragma unroll 4
    for (uint32_t row = line; row < args.rows; row += kLines) sum += __ldg(x + int64_t(row) * args.width + column);
  }
  shared[line][lane] = sum;
  __syncthreads();
  if (line != 0 || column >= args.width) return;
#pragma unroll
  for (int other = 1; other < kLines; ++other) sum += shared[other][lane];
  static_cast<T*>(blockIdx.y == 0 ? args.out[0] : args.out[1])[column] = narrow<T>(sum);
}

}  // namespace

#define FASTTX_SUMS(T)                                                                                            \
  extern "C" __global__ void __launch_bounds__(kThreads) sum_partials_##T(const __grid_constant__ SumPartials args) { \
    sum_partials<T>(args);                                                                                        \
  }
FASTTX_SUMS(float)
FASTTX_SUMS(bf16)
FASTTX_SUMS(fp16)

}  // namespace fasttx::cuda
