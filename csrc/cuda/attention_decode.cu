// Attention of a few queries over many keys: the keys of a sequence are split among blocks, and their results joined.
// Dao et al. 2023 (Flash-Decoding).
//
// A block takes kSplit keys of one sequence and key head, and all rows of that head: its group's queries. A split is
// always the same keys, however many there are, and splits are joined in a fixed order: a row's result depends on
// neither the batch nor the padding, bit for bit. What no row sees is not read. Memory bounds it, so products are plain
// multiplications: a key's row is met by as many lanes as it has 16 bytes.
#include "attention.cuh"
#include "attention_splits.h"
#include "fetch.cuh"
#include "reduce.cuh"

namespace fasttx::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kJoinWarps = 8;

__device__ __forceinline__ float base_of(float largest) { return largest == -INFINITY ? 0.f : largest; }

// The sums over `lanes` neighbours of `count` values: x[0] .. x[max(count / lanes, 1) - 1] become those of the values
// from `first` on. Halves are exchanged rather than all of them, so that no lane adds up what another does.
template <int lanes, int count, int n>
__device__ __forceinline__ void scatter_sums(float (&x)[n], int& first) {
  if constexpr (lanes > 1) {
    constexpr int kStep = lanes / 2;
    if constexpr (count > 1) {
      const bool upper = (threadIdx.x & kStep) != 0;
#pragma unroll
      for (int i = 0; i < count / 2; ++i) {
        const float given = upper ? x[i] : x[i + count / 2], kept = upper ? x[i + count / 2] : x[i];
        x[i] = kept + __shfl_xor_sync(~0u, given, kStep);
      }
      first += upper ? count / 2 : 0;
      scatter_sums<kStep, count / 2>(x, first);
    } else {
      x[0] += __shfl_xor_sync(~0u, x[0], kStep);
      scatter_sums<kStep, 1>(x, first);
    }
  }
}

template <class T, int kWidth, int kRows>
struct Decoding {
  static constexpr int kLanesOfRow = kWidth / 8, kKeysOfWarp = 32 / kLanesOfRow;
  static constexpr int kStep = kKeysOfWarp * kWarps;  // keys that a block has on their way with one access a thread
  // Rows of keys, or of values, that a thread has on their way at once: as many as there are registers for.
  static constexpr int kInFlight = kRows <= 2 ? 8 : 4;
  static constexpr int kRound = kStep * kInFlight;
  static constexpr int kQuads = kSplit / 128;  // four keys each, of a lane

  struct Shared {
    union {
      float4 scores[kRows][kSplit / 4];  // then exponentials
      float4 sums[kStep][kRows][kWidth / 4];
    };
    float2 stats[kRows];
  };

  const AttentionDecode& args;
  const AttentionProblem& problem;
  Shared& shared;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, chunk = lane % kLanesOfRow;
  const int own = warp * kKeysOfWarp + lane / kLanesOfRow;  // of kStep keys
  const int rows;                                           // of the group
  int split, sequence, kv_head;
  int start, begin, end;  // the split's first key; those that places allow some row
  const uint8_t* seen;

  __device__ __forceinline__ Decoding(const AttentionDecode& args, Shared& shared)
      : args(args), problem(args.fwd.problem), shared(shared), rows(problem.group * problem.queries) {
    const uint32_t pair = blockIdx.x / args.splits, kv_heads = problem.heads / problem.group;
    split = blockIdx.x % args.splits, sequence = pair / kv_heads, kv_head = pair % kv_heads;
    const int count = tokens_of(sequence, problem.keys, nullptr, problem.key_lengths).count;
    start = split * kSplit;
    begin = max(start, problem.lo);
    end = min(min(start + kSplit, count), problem.queries + problem.hi);
    seen = problem.seen == nullptr ? nullptr : problem.seen + sequence * problem.seen_stride;
  }

  __device__ __forceinline__ int head_of(int row) const { return kv_head * problem.group + row / problem.queries; }
  __device__ __forceinline__ int64_t index_of(int row) const {
    return (int64_t(sequence) * problem.heads + head_of(row)) * problem.queries + row % problem.queries;
  }
  __device__ __forceinline__ float unit() const { return problem.scaled ? kLog2e : problem.scale * kLog2e; }

  __device__ __forceinline__ void run() {
    if (begin < end) {
      const int first = (begin - start) / kRound * kRound;
      multiply_keys(first);
      __syncthreads();
#pragma unroll
      for (int row = warp; row < kRows; row += kWarps) weigh(row);
      __syncthreads();
      add_values(first);
    } else if (threadIdx.x < kRows) {
      shared.stats[threadIdx.x] = make_float2(-INFINITY, 0.f);
    }
    __syncthreads();
    finish();
  }

  // The products of the rows with the keys from `first` of the split on.
  __device__ __forceinline__ void multiply_keys(int first) {
    float q[kRows][8];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      Raw<T, 8> raw;
      const int of_rows = min(row, rows - 1);
      fetch(raw, rows_at<T>(problem.query, sequence, head_of(of_rows), of_rows % problem.queries) + chunk * 8,
            row < rows && chunk * 8 < problem.width);
      widen(q[row], raw);
    }
    const T* from = rows_at<T>(problem.key, sequence, kv_head, 0) + chunk * 8;
    for (int round = start + first; round < end; round += kRound) {
      Raw<T, 8> raw[kInFlight];
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        const int key = round + k * kStep + own;
        bool wanted = key >= begin && key < end && chunk * 8 < problem.width;
        if (seen != nullptr && wanted) wanted = seen[key] != 0;
        fetch(raw[k], from + key * problem.key.token, wanted);
      }
      float products[kInFlight * kRows];
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        float x[8];
        widen(x, raw[k]);
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
          float sum = q[row][0] * x[0];
#pragma unroll
          for (int i = 1; i < 8; ++i) sum = fmaf(q[row][i], x[i], sum);
          products[k * kRows + row] = sum;
        }
      }
      int place = 0;
      scatter_sums<kLanesOfRow, kInFlight * kRows>(products, place);
      // Lanes that have the same sum let one of them write it.
      constexpr int kEach = kInFlight * kRows / kLanesOfRow, kSame = kEach == 0 ? kLanesOfRow / (kInFlight * kRows) : 1;
      if (lane % kSame != 0) continue;
#pragma unroll
      for (int i = 0; i < (kEach == 0 ? 1 : kEach); ++i) {
        const int k = (place + i) / kRows, row = (place + i) % kRows;
        reinterpret_cast<float*>(shared.scores[row])[round - start + k * kStep + own] = products[i];
      }
    }
  }

  // A row's scores become exponentials, of which dropout keeps some.
  __device__ __forceinline__ void weigh(int row) {
    const int query = row % problem.queries, head = head_of(min(row, rows - 1));
    const int from = max(query + problem.lo, begin), to = row < rows ? min(query + problem.hi + 1, end) : from;
    const Mask& mask = problem.mask;
    const int64_t mask_at = sequence * mask.stride_b + head * mask.stride_h + query * mask.stride_q;
    const float slope = problem.slopes == nullptr ? 0.f : problem.slopes[head];
    float x[kQuads][4], largest = -INFINITY;
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      const int first = start + quad * 128 + lane * 4;
      float4 products = {};
      if (first + 3 >= from && first < to) products = shared.scores[row][quad * 32 + lane];
      const float each[4] = {products.x, products.y, products.z, products.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = first + i;
        bool kept = key >= from && key < to;
        if (seen != nullptr && kept) kept = seen[key] != 0;
        float score = each[i];
        if (problem.scaled) score *= problem.scale;
        if (mask.kind != MaskKind::none && kept) {
          const int64_t at = mask_at + key * mask.stride_k;
          if (mask.kind == MaskKind::boolean) {
            kept = static_cast<const uint8_t*>(mask.data)[at] != 0;
          } else {
            score += mask_value<T>(mask, at);
          }
        }
        if (problem.slopes != nullptr) score -= slope * fabsf(float(key - query) - problem.origin);
        x[quad][i] = kept ? score : -INFINITY;
        largest = fmaxf(largest, x[quad][i]);
      }
    }
    largest = over_warp<Max>(largest);
    const float base = base_of(largest);
    float total = 0.f;
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad)
#pragma unroll
      for (int i = 0; i < 4; ++i) total += x[quad][i] = exp2_approx((x[quad][i] - base) * unit());
    total = over_warp<Sum>(total);
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      if (problem.dropout.active) {
        uint32_t words[4];
        philox(words, seed_of(problem.dropout), sequence, head, query, (start + quad * 128) / 4 + lane);
#pragma unroll
        for (int i = 0; i < 4; ++i) x[quad][i] = words[i] >= problem.dropout.threshold ? x[quad][i] : 0.f;
      }
      shared.scores[row][quad * 32 + lane] = make_float4(x[quad][0], x[quad][1], x[quad][2], x[quad][3]);
    }
    if (lane == 0) shared.stats[row] = make_float2(largest, total);
  }

  // The sums of exponentials times values, of each thread's keys.
  __device__ __forceinline__ void add_values(int first) {
    float sums[kRows][8] = {};
    const T* from = rows_at<T>(problem.value, sequence, kv_head, 0) + chunk * 8;
    for (int round = start + first; round < end; round += kRound) {
      Raw<T, 8> raw[kInFlight];
      float weights[kInFlight][kRows];
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        const int key = round + k * kStep + own;
        bool wanted = false;
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
          weights[k][row] = reinterpret_cast<const float*>(shared.scores[row])[key - start];
          wanted |= weights[k][row] != 0.f;
        }
        fetch(raw[k], from + key * problem.value.token, wanted && chunk * 8 < problem.value_width);
      }
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        float x[8];
        widen(x, raw[k]);
#pragma unroll
        for (int row = 0; row < kRows; ++row)
#pragma unroll
          for (int i = 0; i < 8; ++i) sums[row][i] = fmaf(weights[k][row], x[i], sums[row][i]);
      }
    }
    __syncthreads();
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      float4* to = &shared.sums[own][row][chunk * 2];
      to[0] = make_float4(sums[row][0], sums[row][1], sums[row][2], sums[row][3]);
      to[1] = make_float4(sums[row][4], sums[row][5], sums[row][6], sums[row][7]);
    }
  }

  // Adds up the threads' sums, and writes them: as a part, or as the result where there is but the one.
  __device__ __forceinline__ void finish() {
    constexpr int kQuarters = kWidth / 4;
    for (int place = threadIdx.x; place < kRows * kQuarters; place += kThreads) {
      const int row = place / kQuarters, column = place % kQuarters * 4;
      if (row >= rows || column >= problem.value_width) continue;
      const float2 stats = shared.stats[row];
      const bool empty = begin >= end;
      float4 sum = {};
#pragma unroll 4
      for (int k = 0; k < kStep && !empty; ++k) {
        const float4 one = shared.sums[k][row][column / 4];
        sum.x += one.x, sum.y += one.y, sum.z += one.z, sum.w += one.w;
      }
      const int64_t index = index_of(row);
      if (args.splits == 1) {
        store_result<T>(args, sequence, head_of(row), row % problem.queries, column, sum, stats, index);
      } else {
        const int64_t at = int64_t(split) * args.rows + index;
        // Of nothing, a part is not read.
        if (stats.y != 0.f) *reinterpret_cast<float4*>(args.parts + at * problem.value_width + column) = sum;
        if (column == 0) args.part_stats[at] = stats;
      }
    }
  }

  // Four columns of a row, of which sums and statistics are whole.
  template <class U>
  static __device__ __forceinline__ void store_result(const AttentionDecode& args, int sequence, int head, int query,
                                                      int column, float4 sum, float2 stats, int64_t index) {
    const AttentionProblem& problem = args.fwd.problem;
    const float inverse = stats.y == 0.f ? 0.f : 1.f / stats.y, factor = inverse * problem.dropout.keep_scale;
    const uint2 packed = {pack<U>(sum.x * factor, sum.y * factor), pack<U>(sum.z * factor, sum.w * factor)};
    *reinterpret_cast<uint2*>(rows_to<U>(args.fwd.out, sequence, head, query) + column) = packed;
    if (column != 0 || args.fwd.lse == nullptr) return;
    const float unit = problem.scaled ? kLog2e : problem.scale * kLog2e;
    args.fwd.lse[index] = fmaf(stats.x, unit * kLn2, logf(stats.y));
    reinterpret_cast<float2*>(args.fwd.stats)[index] = make_float2(base_of(stats.x), inverse);
  }
};

// A block joins the splits of one row: each warp every kJoinWarps-th of them.
template <class T>
__device__ __forceinline__ void join(const AttentionDecode& args) {
  __shared__ float4 sums[kJoinWarps][32];
  __shared__ float largest_of[kJoinWarps], totals[kJoinWarps];
  const AttentionProblem& problem = args.fwd.problem;
  const uint32_t row = blockIdx.x, warp = threadIdx.x / 32;
  const int column = threadIdx.x % 32 * 4;
  float largest = -INFINITY;
  for (uint32_t split = threadIdx.x; split < args.splits; split += 32 * kJoinWarps)
    largest = fmaxf(largest, args.part_stats[int64_t(split) * args.rows + row].x);
  largest = over_block<Max, 32 * kJoinWarps>(largest, largest_of);
  const float base = base_of(largest), unit = problem.scaled ? kLog2e : problem.scale * kLog2e;
  float4 sum = {};
  float total = 0.f;
#pragma unroll 4
  for (uint32_t split = warp; split < args.splits; split += kJoinWarps) {
    const int64_t at = int64_t(split) * args.rows + row;
    const float2 stats = args.part_stats[at];
    const float share = exp2_approx((stats.x - base) * unit);
    Raw<float, 4> raw;
    float part[4];
    fetch(raw, args.parts + at * problem.value_width + column, stats.y != 0.f && column < problem.value_width);
    widen(part, raw);
    sum.x = fmaf(part[0], share, sum.x), sum.y = fmaf(part[1], share, sum.y);
    sum.z = fmaf(part[2], share, sum.z), sum.w = fmaf(part[3], share, sum.w);
    total = fmaf(stats.y, share, total);
  }
  sums[warp][threadIdx.x % 32] = sum;
  if (threadIdx.x % 32 == 0) totals[warp] = total;
  __syncthreads();
  if (warp != 0 || column >= problem.value_width) return;
#pragma unroll
  for (int other = 1; other < kJoinWarps; ++other) {
    const float4 one = sums[other][threadIdx.x];
    sum.x += one.x, sum.y += one.y, sum.z += one.z, sum.w += one.w;
    total += totals[other];
  }
  const uint32_t head = row / problem.queries;
  Decoding<T, 32, 1>::template store_result<T>(args, head / problem.heads, head % problem.heads, row % problem.queries,
                                               column, sum, make_float2(largest, total), row);
}

}  // namespace

#define FASTTX_SPLIT(T, width, rows)                                                         \
  extern "C" __global__ void __launch_bounds__(kThreads)                                     \
      attention_split_##width##_##rows##_##T(const __grid_constant__ AttentionDecode args) { \
    __shared__ Decoding<T, width, rows>::Shared shared;                                      \
    Decoding<T, width, rows>(args, shared).run();                                            \
  }
#define FASTTX_DECODE(T)                                                                     \
  FASTTX_DECODE_KERNELS(FASTTX_SPLIT, T)                                                     \
  extern "C" __global__ void __launch_bounds__(32 * kJoinWarps)                              \
      attention_join_##T(const __grid_constant__ AttentionDecode args) {                     \
    join<T>(args);                                                                           \
  }
FASTTX_DECODE(bf16)
FASTTX_DECODE(fp16)

}  // namespace fasttx::cuda
