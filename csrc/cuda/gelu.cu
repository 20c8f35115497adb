// GELU, and GELU of x + bias: forward, and backward with the bias's gradient in the same pass.
#include "arguments.h"
#include "math.cuh"
#include "values.cuh"

namespace fasttx::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kAccesses = 2;  // of a thread, in flight at once

// Group `group` of x, and the bias where there is one.
template <class T, int n, class Args>
__device__ __forceinline__ void load_group(float (&x)[n], const Args& args, uint32_t group) {
  load(x, static_cast<const T*>(args.x) + int64_t(group) * n);
  if (args.bias == nullptr) return;
  float b[n];
  load(b, static_cast<const T*>(args.bias) + group % (args.width / n) * n);
#pragma unroll
  for (int i = 0; i < n; ++i) x[i] += b[i];
}

// Each thread takes kAccesses groups of n neighbours, kThreads groups apart. Groups number less than 2^32.
template <class T, class Distribution, int n>
__device__ __forceinline__ void forward(const GeluFwd& args) {
  const uint32_t groups = uint32_t(args.size / n), first = blockIdx.x * (kThreads * kAccesses) + threadIdx.x;
  float values[kAccesses][n];
#pragma unroll
  for (int k = 0; k < kAccesses; ++k) {
    const uint32_t group = first + k * kThreads;
    if (group < groups) load_group<T>(values[k], args, group);
  }
#pragma unroll
  for (int k = 0; k < kAccesses; ++k) {
    const uint32_t group = first + k * kThreads;
    if (group >= groups) return;
#pragma unroll
    for (float& value : values[k]) value = gelu<Distribution>(value);
    store(static_cast<T*>(args.y) + int64_t(group) * n, values[k]);
  }
}

// dx of one group, from x + bias, and from dy to begin with.
template <class T, class Distribution, int n>
__device__ __forceinline__ void finish_group(float (&dx)[n], const float (&x)[n], const GeluBwd& args, int64_t at) {
#pragma unroll
  for (int i = 0; i < n; ++i) dx[i] *= gelu_grad<Distribution>(x[i]);
  store(static_cast<T*>(args.dx) + at, dx);
}

template <class T, class Distribution, int n>
__device__ __forceinline__ void backward(const GeluBwd& args) {
  const uint32_t groups = uint32_t(args.size / n), first = blockIdx.x * (kThreads * kAccesses) + threadIdx.x;
  float x[kAccesses][n], dx[kAccesses][n];
#pragma unroll
  for (int k = 0; k < kAccesses; ++k) {
    const uint32_t group = first + k * kThreads;
    if (group >= groups) continue;
    load_group<T>(x[k], args, group);
    load(dx[k], static_cast<const T*>(args.dy) + int64_t(group) * n);
  }
#pragma unroll
  for (int k = 0; k < kAccesses; ++k) {
    const uint32_t group = first + k * kThreads;
    if (group < groups) finish_group<T, Distribution>(dx[k], x[k], args, int64_t(group) * n);
  }
}

// The same with dbias: a block takes 32 groups of columns, and of each kThreads / 32 rows at once; blocks along y share
// the rows. Sums are kept in registers, and joined across the block in a fixed order.
template <class T, class Distribution, int n>
__device__ __forceinline__ void backward_with_sums(const GeluBwd& args) {
  constexpr int kRows = kThreads / 32;
  __shared__ float shared[kRows][32 * kLanes<T>];
  const uint32_t lane = threadIdx.x % 32, line = threadIdx.x / 32, column = (blockIdx.x * 32 + lane) * n;
  const int64_t rows = args.size / args.width;
  const int64_t share = (rows + gridDim.y - 1) / gridDim.y, begin = share * blockIdx.y;
  const int64_t end = begin + share < rows ? begin + share : rows;
  float sums[n] = {};
  if (column < args.width) {
    float bias[n] = {};
    if (args.bias != nullptr) load(bias, static_cast<const T*>(args.bias) + column);
#pragma unroll 2
    for (int64_t row = begin + line; row < end; row += kRows) {
      const int64_t at = row * args.width + column;
      float x[n], dx[n];
      load(x, static_cast<const T*>(args.x) + at);
      load(dx, static_cast<const T*>(args.dy) + at);
#pragma unroll
      for (int i = 0; i < n; ++i) x[i] += bias[i];
      finish_group<T, Distribution>(dx, x, args, at);
#pragma unroll
      for (int i = 0; i < n; ++i) sums[i] += dx[i];
    }
  }
#pragma unroll
  for (int i = 0; i < n; ++i) shared[line][i * 32 + lane] = sums[i];
  __syncthreads();
  // Thread t joins column t of the block's 32 n.
  for (uint32_t t = threadIdx.x; t < 32 * n; t += kThreads) {
    const uint32_t at = blockIdx.x * 32 * n + t;
    float sum = 0.f;
#pragma unroll
    for (int r = 0; r < kRows; ++r) sum += shared[r][t % n * 32 + t / n];
    if (at < args.width) args.dbias[int64_t(blockIdx.y) * args.width + at] = sum;
  }
}

}  // namespace

#define FASTTX_GELU(T, name, Distribution)                                                                     \
  extern "C" __global__ void __launch_bounds__(kThreads) gelu_fwd_##name##_##T(const __grid_constant__ GeluFwd args) { \
    args.vector ? forward<T, Distribution, kLanes<T>>(args) : forward<T, Distribution, 1>(args);               \
  }                                                                                                            \
  extern "C" __global__ void __launch_bounds__(kThreads) gelu_bwd_##name##_##T(const __grid_constant__ GeluBwd args) { \
    args.vector ? backward<T, Distribution, kLanes<T>>(args) : backward<T, Distribution, 1>(args);             \
  }                                                                                                            \
  extern "C" __global__ void __launch_bounds__(kThreads)                                                       \
      gelu_bwd_sums_##name##_##T(const __grid_constant__ GeluBwd args) {                                       \
    args.vector ? backward_with_sums<T, Distribution, kLanes<T>>(args) : backward_with_sums<T, Distribution, 1>(args); \
  }
#define FASTTX_GELUS(T) FASTTX_GELU(T, none, Normal) FASTTX_GELU(T, tanh, Logistic)
FASTTX_GELUS(float)
FASTTX_GELUS(bf16)
FASTTX_GELUS(fp16)

}  // namespace fasttx::cuda
