// Reductions of values that a thread holds, and over the threads of a row: trees of a fixed shape.
#pragma once

#include "reduce.cuh"

namespace fasttx::cuda {

// A number and what rounding has left out of it.
struct Pair {
  float high, low;
};

// How the sums of a row of T are kept. Those of a 16-bit T, whose results are rounded far coarser, are plain.
template <class T>
struct Total {
  using Value = float;
  static __device__ __forceinline__ float of(float x) { return x; }
  static __device__ __forceinline__ float of_product(float x, float y) { return x * y; }
  static __device__ __forceinline__ float join(float a, float b) { return a + b; }
  static __device__ __forceinline__ float scaled(float sum, float by) { return sum * by; }
  static __device__ __forceinline__ float rounded(float sum) { return sum; }
  static __device__ __forceinline__ float subtract(float x, float sum) { return x - sum; }
};
// Those of float32 carry what is rounded off (Ogita, Rump and Oishi, "Accurate sum and dot product", 2005): a softmax's
// largest errors come from its two sums, as everything in a row depends on them.
template <>
struct Total<float> {
  using Value = Pair;
  static __device__ __forceinline__ Pair of(float x) { return {x, 0.f}; }
  static __device__ __forceinline__ Pair of_product(float x, float y) {
    const float product = __fmul_rn(x, y);
    return {product, fmaf(x, y, -product)};
  }
  static __device__ __forceinline__ Pair join(Pair a, Pair b) {
    const float sum = __fadd_rn(a.high, b.high), second = __fsub_rn(sum, a.high);
    const float rest = __fadd_rn(__fsub_rn(a.high, __fsub_rn(sum, second)), __fsub_rn(b.high, second));
    return {sum, __fadd_rn(rest, __fadd_rn(a.low, b.low))};
  }
  static __device__ __forceinline__ Pair scaled(Pair sum, float by) { return {sum.high * by, sum.low * by}; }
  static __device__ __forceinline__ float rounded(Pair sum) { return sum.high + rest(sum); }
  static __device__ __forceinline__ float subtract(float x, Pair sum) { return x - sum.high - rest(sum); }

 private:
  // Of an infinity nothing is left out, but what join finds there is NaN.
  static __device__ __forceinline__ float rest(Pair sum) { return sum.low == sum.low ? sum.low : 0.f; }
};

// Over at(first) .. at(first + n - 1) of one thread, n a power of two.
template <class Op, int n, class At>
__device__ __forceinline__ auto over_values(const At& at, int first = 0) {
  if constexpr (n == 1) {
    return at(first);
  } else {
    return Op::join(over_values<Op, n / 2>(at, first), over_values<Op, n / 2>(at, first + n / 2));
  }
}

__device__ __forceinline__ float exchange(float x, int step) { return __shfl_xor_sync(~0u, x, step); }
__device__ __forceinline__ Pair exchange(Pair x, int step) { return {exchange(x.high, step), exchange(x.low, step)}; }

// Over a team of `lanes` neighbours, a power of two: part of a warp, or the whole block, which shares `shared`
// (lanes / 32) and reads it last. Every thread gets the result.
template <class Op, int lanes, class Value>
__device__ __forceinline__ Value over_team(Value x, Value* shared) {
#pragma unroll
  for (int step = lanes < 32 ? lanes / 2 : 16; step > 0; step /= 2) x = Op::join(x, exchange(x, step));
  if constexpr (lanes > 32) {
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    x = over_team<Op, lanes / 32>(shared[threadIdx.x % (lanes / 32)], shared);
  }
  return x;
}

}  // namespace fasttx::cuda
