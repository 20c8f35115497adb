// Masked softmax over rows, forward and backward. Rows of up to 16384 values stay in registers between the passes; of
// wider ones the first pass finds the largest value and the sum together, and the second one reads them again.
#include "arguments.h"
#include "fetch.cuh"
#include "math.cuh"
#include "trees.cuh"

namespace fasttx::cuda {
namespace {

constexpr float kMaskedOut = -__builtin_inff();
constexpr int kLoopThreads = 512;

// `lanes` threads take a row: part of a warp or a block. Narrow rows share a block.
template <int lanes>
constexpr int kThreads = lanes < 128 ? 128 : lanes;
template <int lanes>
constexpr int kWarps = lanes < 32 ? 1 : lanes / 32;

struct Row {
  int64_t at;       // of its first value
  int64_t mask_at;  // of its first value's mask
  uint32_t end;     // the columns that it may keep; 0: there is no such row
};

__device__ __forceinline__ Row find_row(const SoftmaxFwd& args, uint32_t row) {
  Row found{int64_t(row) * args.width, 0, row < args.rows ? args.width : 0};
  if (args.mask.kind != MaskKind::none) {
    const uint32_t group = row / args.queries;
    found.mask_at = group / args.heads * args.mask.stride_b + group % args.heads * args.mask.stride_h +
                    row % args.queries * args.mask.stride_q;
  }
  if (args.is_causal) found.end = min(found.end, row % args.queries + 1);
  return found;
}

// What a mask stored as S makes of `accesses` of n scores each, `step` columns apart, from `column` on, before `end`.
// `mask` is its row. Its stride is for n = 1: otherwise neighbours lie together.
template <int step, class S, int accesses, int n>
__device__ __forceinline__ void apply_mask(float (&scores)[accesses][n], const S* mask, int64_t stride, uint32_t column,
                                           uint32_t end) {
  constexpr int kEach = n * int(sizeof(S)) <= 16 ? n : kLanes<S>;
  Raw<S, kEach> raw[accesses][n / kEach];
#pragma unroll
  for (int k = 0; k < accesses; ++k) {
    const uint32_t first = column + k * step;
#pragma unroll
    for (int i = 0; i < n; i += kEach) {
      const int64_t at = n > 1 ? first + i : first * stride;
      fetch(raw[k][i / kEach], mask + at, first < end);
    }
  }
#pragma unroll
  for (int k = 0; k < accesses; ++k) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const Raw<S, kEach>& here = raw[k][i / kEach];
      if constexpr (sizeof(S) == 1) {
        const bool kept = (here.words[i % kEach / 4] >> (i % 4 * 8 % (8 * kEach)) & 0xff) != 0;
        scores[k][i] = kept ? scores[k][i] : kMaskedOut;
      } else if (i % kEach == 0) {
        float added[kEach];
        widen(added, here);
#pragma unroll
        for (int each = 0; each < kEach; ++each) scores[k][i + each] += added[each];
      }
    }
  }
}

// The scores of a row: `accesses` of n columns each, `step` columns apart, from `column` on; from the row's end on,
// where nothing is read, they are masked out.
template <class T, int step, int accesses, int n>
__device__ __forceinline__ void load_scores(float (&scores)[accesses][n], const SoftmaxFwd& args, const Row& row,
                                            uint32_t column) {
  Raw<T, n> raw[accesses];
#pragma unroll
  for (int k = 0; k < accesses; ++k) {
    const uint32_t first = column + k * step;
    fetch(raw[k], static_cast<const T*>(args.x) + row.at + first, first < row.end);
  }
  const auto masked_by = [&](const auto* mask) {
    apply_mask<step>(scores, mask + row.mask_at, args.mask.stride_k, column, row.end);
  };
#pragma unroll
  for (int k = 0; k < accesses; ++k) widen(scores[k], raw[k]);
  if (args.mask.kind == MaskKind::boolean) {
    masked_by(static_cast<const uint8_t*>(args.mask.data));
  } else if (args.mask.kind == MaskKind::additive) {
    masked_by(static_cast<const T*>(args.mask.data));
  } else if (args.mask.kind == MaskKind::additive_float) {
    masked_by(static_cast<const float*>(args.mask.data));
  }
#pragma unroll
  for (int k = 0; k < accesses; ++k) {
#pragma unroll
    for (int i = 0; i < n; ++i) scores[k][i] = column + k * step + i < row.end ? scores[k][i] : kMaskedOut;
  }
}

// e^(score - base); the difference first, since multiplied out large scores would round it off.
__device__ __forceinline__ float exponential(float score, float base) { return exp2_approx((score - base) * kLog2e); }

// What is subtracted from scores the largest of which is given: not -infinity, from which it cannot be.
__device__ __forceinline__ float base_of(float largest) { return largest == kMaskedOut ? 0.f : largest; }

// What exponentials are multiplied by: nothing where nothing is kept.
__device__ __forceinline__ float scale_of(float total) { return total == 0.f ? 0.f : __frcp_rn(total); }

// Each thread holds `held` values of a row.
template <class T, int lanes, int held, int n>
__device__ __forceinline__ void forward(const SoftmaxFwd& args) {
  constexpr int kAccesses = held / n, kStep = lanes * n, kRows = kThreads<lanes> / lanes;
  using Sum = Total<T>;
  __shared__ float largest[kWarps<lanes>];
  __shared__ typename Sum::Value totals[kWarps<lanes>];
  const uint32_t index = blockIdx.x * kRows + threadIdx.x / lanes, column = threadIdx.x % lanes * n;
  const Row row = find_row(args, index);
  float values[kAccesses][n];
  load_scores<T, kStep>(values, args, row, column);
  const auto value = [&](int i) -> float& { return values[i / n][i % n]; };
  const float base = base_of(over_team<Max, lanes>(over_values<Max, held>(value), largest));
  const auto powers = [&](int i) { return Sum::of(value(i) = exponential(value(i), base)); };
  const float scale = scale_of(Sum::rounded(over_team<Sum, lanes>(over_values<Sum, held>(powers), totals)));
  if (index >= args.rows) return;
#pragma unroll
  for (int k = 0; k < kAccesses; ++k) {
    if (column + k * kStep >= args.width) return;
#pragma unroll
    for (float& value : values[k]) value *= scale;
    store(static_cast<T*>(args.y) + row.at + column + k * kStep, values[k]);
  }
}

// A block takes a row of any width, in pieces. Each thread's sum is of e^(score - its largest) until the end.
template <class T, int accesses, int n>
__device__ __forceinline__ void forward_wide(const SoftmaxFwd& args) {
  constexpr int kStep = kLoopThreads * n, kPiece = kStep * accesses;
  using Sum = Total<T>;
  __shared__ float all_largest[kWarps<kLoopThreads>];
  __shared__ typename Sum::Value totals[kWarps<kLoopThreads>];
  const Row row = find_row(args, blockIdx.x);
  float values[accesses][n], largest = kMaskedOut;
  auto total = Sum::of(0.f);
  for (uint32_t column = threadIdx.x * n; column - threadIdx.x * n < row.end; column += kPiece) {
    load_scores<T, kStep>(values, args, row, column);
    const auto value = [&](int i) { return values[i / n][i % n]; };
    const float higher = Max::join(largest, over_values<Max, accesses * n>(value));
    const float base = base_of(higher);
    const auto powers = [&](int i) { return Sum::of(exponential(value(i), base)); };
    total = Sum::join(Sum::scaled(total, exponential(largest, base)), over_values<Sum, accesses * n>(powers));
    largest = higher;
  }
  const float base = base_of(over_team<Max, kLoopThreads>(largest, all_largest));
  total = over_team<Sum, kLoopThreads>(Sum::scaled(total, exponential(largest, base)), totals);
  const float scale = scale_of(Sum::rounded(total));
  for (uint32_t column = threadIdx.x * n; column < args.width; column += kPiece) {
    load_scores<T, kStep>(values, args, row, column);
#pragma unroll
    for (int k = 0; k < accesses; ++k) {
      if (column + k * kStep >= args.width) return;
#pragma unroll
      for (float& value : values[k]) value = exponential(value, base) * scale;
      store(static_cast<T*>(args.y) + row.at + column + k * kStep, values[k]);
    }
  }
}

// y and dy of a row: `accesses` of n columns each, `step` columns apart, from `column` on; zeros from `end` on.
template <int step, class T, int accesses, int n>
__device__ __forceinline__ void load_both(float (&y)[accesses][n], float (&dy)[accesses][n], const SoftmaxBwd& args,
                                          int64_t at, uint32_t column, uint32_t end) {
  Raw<T, n> raw[2][accesses];
#pragma unroll
  for (int k = 0; k < accesses; ++k) {
    const uint32_t first = column + k * step;
    fetch(raw[0][k], static_cast<const T*>(args.y) + at + first, first < end);
    fetch(raw[1][k], static_cast<const T*>(args.dy) + at + first, first < end);
  }
#pragma unroll
  for (int k = 0; k < accesses; ++k) {
    widen(y[k], raw[0][k]);
    widen(dy[k], raw[1][k]);
  }
}

// The sum of y dy over what load_both has loaded.
template <class Sum, int accesses, int n>
__device__ __forceinline__ auto sum_products(const float (&y)[accesses][n], const float (&dy)[accesses][n]) {
  const auto product = [&](int i) { return Sum::of_product(y[i / n][i % n], dy[i / n][i % n]); };
  return over_values<Sum, accesses * n>(product);
}

// dx of what load_both has loaded, in place of dy.
template <int step, class T, int accesses, int n>
__device__ __forceinline__ void store_gradient(const float (&y)[accesses][n], float (&dy)[accesses][n],
                                               typename Total<T>::Value mean, const SoftmaxBwd& args, int64_t at,
                                               uint32_t column) {
#pragma unroll
  for (int k = 0; k < accesses; ++k) {
    if (column + k * step >= args.width) return;
#pragma unroll
    for (int i = 0; i < n; ++i) dy[k][i] = y[k][i] * Total<T>::subtract(dy[k][i], mean);
    store(static_cast<T*>(args.dx) + at + column + k * step, dy[k]);
  }
}

template <class T, int lanes, int held, int n>
__device__ __forceinline__ void backward(const SoftmaxBwd& args) {
  constexpr int kAccesses = held / n, kStep = lanes * n, kRows = kThreads<lanes> / lanes;
  using Sum = Total<T>;
  __shared__ typename Sum::Value sums[kWarps<lanes>];
  const uint32_t row = blockIdx.x * kRows + threadIdx.x / lanes, column = threadIdx.x % lanes * n;
  const int64_t at = int64_t(row) * args.width;
  float y[kAccesses][n], dy[kAccesses][n];
  load_both<kStep, T>(y, dy, args, at, column, row < args.rows ? args.width : 0);
  const auto mean = over_team<Sum, lanes>(sum_products<Sum>(y, dy), sums);
  if (row < args.rows) store_gradient<kStep, T>(y, dy, mean, args, at, column);
}

template <class T, int accesses, int n>
__device__ __forceinline__ void backward_wide(const SoftmaxBwd& args) {
  constexpr int kStep = kLoopThreads * n, kPiece = kStep * accesses;
  using Sum = Total<T>;
  __shared__ typename Sum::Value sums[kWarps<kLoopThreads>];
  const int64_t at = int64_t(blockIdx.x) * args.width;
  float y[accesses][n], dy[accesses][n];
  auto sum = Sum::of(0.f);
  for (uint32_t column = threadIdx.x * n; column - threadIdx.x * n < args.width; column += kPiece) {
    load_both<kStep, T>(y, dy, args, at, column, args.width);
    sum = Sum::join(sum, sum_products<Sum>(y, dy));
  }
  const auto mean = over_team<Sum, kLoopThreads>(sum, sums);
  for (uint32_t column = threadIdx.x * n; column < args.width; column += kPiece) {
    load_both<kStep, T>(y, dy, args, at, column, args.width);
    store_gradient<kStep, T>(y, dy, mean, args, at, column);
  }
}

}  // namespace

// By the widest row: `lanes` threads that hold `held` values each.
#define FASTTX_SOFTMAX(T, widest, lanes, held)                                                    \
  static_assert(widest == lanes * held);                                                          \
  extern "C" __global__ void __launch_bounds__(kThreads<lanes>)                                   \
      softmax_fwd_##widest##_##T(const __grid_constant__ SoftmaxFwd args) {                       \
    args.vector ? forward<T, lanes, held, kLanes<T>>(args) : forward<T, lanes, held, 1>(args);    \
  }                                                                                               \
  extern "C" __global__ void __launch_bounds__(kThreads<lanes>)                                   \
      softmax_bwd_##widest##_##T(const __grid_constant__ SoftmaxBwd args) {                       \
    args.vector ? backward<T, lanes, held, kLanes<T>>(args) : backward<T, lanes, held, 1>(args);  \
  }
#define FASTTX_SOFTMAXES(T)                                                                       \
  FASTTX_SOFTMAX(T, 64, 8, 8)                                                                     \
  FASTTX_SOFTMAX(T, 256, 32, 8)                                                                   \
  FASTTX_SOFTMAX(T, 1024, 32, 32)                                                                 \
  FASTTX_SOFTMAX(T, 4096, 128, 32)                                                                \
  FASTTX_SOFTMAX(T, 16384, 512, 32)                                                               \
  extern "C" __global__ void __launch_bounds__(kLoopThreads)                                      \
      softmax_fwd_wide_##T(const __grid_constant__ SoftmaxFwd args) {                             \
    args.vector ? forward_wide<T, 16 / kLanes<T>, kLanes<T>>(args) : forward_wide<T, 8, 1>(args); \
  }                                                                                               \
  extern "C" __global__ void __launch_bounds__(kLoopThreads)                                      \
      softmax_bwd_wide_##T(const __grid_constant__ SoftmaxBwd args) {                             \
    args.vector ? backward_wide<T, 2, kLanes<T>>(args) : backward_wide<T, 8, 1>(args);            \
  }
FASTTX_SOFTMAXES(float)
FASTTX_SOFTMAXES(bf16)
FASTTX_SOFTMAXES(fp16)

}  // namespace fasttx::cuda
