// Reductions over a warp or a block, in an order that depends on nothing but their size. Every thread gets the result.
#pragma once

#include <stdint.h>

namespace fasttx::cuda {

struct Sum {
  static constexpr float kNothing = 0.f;
  static __device__ __forceinline__ float join(float a, float b) { return a + b; }
};
struct Max {
  static constexpr float kNothing = -__builtin_inff();
  // Like torch's maximum, which keeps a NaN.
  static __device__ __forceinline__ float join(float a, float b) {
    float joined;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(joined) : "f"(a), "f"(b));
    return joined;
  }
};

// Over `lanes` neighbours, a power of two up to 32; all lanes of the warp take part.
template <class Op, int lanes = 32>
__device__ __forceinline__ float over_warp(float x) {
#pragma unroll
  for (int step = lanes / 2; step > 0; step /= 2) x = Op::join(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

// Over a block of `threads` threads; `shared` (threads / 32) is free again when the next reduction's other array is used:
// two that alternate need no barrier between.
template <class Op, int threads>
__device__ __forceinline__ float over_block(float x, float* shared) {
  constexpr int kWarps = threads / 32;
  x = over_warp<Op>(x);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  x = threadIdx.x % 32 < kWarps ? shared[threadIdx.x % 32] : Op::kNothing;
  return over_warp<Op>(x);
}

// The same of n values at once; `shared` (n, threads / 32).
template <class Op, int threads, int n>
__device__ __forceinline__ void over_block(float (&x)[n], float* shared) {
  constexpr int kWarps = threads / 32;
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    x[i] = over_warp<Op>(x[i]);
    if (lane == 0) shared[i * kWarps + warp] = x[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < n; ++i) x[i] = over_warp<Op, kWarps>(shared[i * kWarps + lane % kWarps]);
}

}  // namespace fasttx::cuda
