// Layer norm, alone and of residual + dropout(x), forward and backward. Ba, Kiros and Hinton 2016.
//
// A row belongs to a team of threads, lanes of a warp or a block, which hold it in registers from the first sum to the
// last result. Teams go through the rows, and keep the weights. Which thread has which column depends on the width alone,
// so that a row gives the same bits wherever it lies, aligned or not.
#include "arguments.h"
#include "philox.cuh"
#include "rows.cuh"

namespace fasttx::cuda {
namespace {

// Which of a thread's values dropout keeps, a bit each, the first group's lowest. One group after the other, in few
// registers, and to be asked for while the row is on its way.
template <class T, class Team>
__device__ __forceinline__ uint32_t kept(const Dropout& dropout, const Columns<T, Team>& columns, uint32_t row) {
  constexpr int kWide = kLanes<T>;
  static_assert(Team::kAccesses * kWide <= 32);
  const uint64_t seed = seed_of(dropout);
  uint32_t bits = 0;
#pragma unroll 1
  for (int k = 0; k < Team::kAccesses; ++k) bits |= kept<kWide>(dropout, seed, 0, 0, row, columns[k]) << (k * kWide);
  return bits;
}

// residual + dropout(x).
template <class T, class Team>
__device__ __forceinline__ void add(typename Columns<T, Team>::Values& sum, const LayerNormFwd& args,
                                    const Columns<T, Team>& columns, const Row& row) {
  using Mine = Columns<T, Team>;
  typename Mine::Words own, residual;
  columns.fetch(own, row.in(args.x));
  if (args.residual != nullptr) columns.fetch(residual, row.in(args.residual));
  const uint32_t keep = args.dropout.active ? kept(args.dropout, columns, row.number) : 0;
#pragma unroll
  for (int k = 0; k < Mine::kGroups; ++k) {
    widen<T>(sum[k], own[k]);
    if (args.dropout.active) drop(sum[k], args.dropout, keep >> (k * Mine::kWide));
    if (args.residual == nullptr) continue;
    float addend[Mine::kWide];
    widen<T>(addend, residual[k]);
#pragma unroll
    for (int i = 0; i < Mine::kWide; ++i) sum[k][i] += addend[i];
  }
}

// x, centred, times rstd and the weight, and the bias added.
template <class T>
__device__ __forceinline__ void finish(float (&x)[kLanes<T>], float rstd, const Packed<T>& weight, const Packed<T>& bias) {
  float w[kLanes<T>], b[kLanes<T>];
  widen<T>(w, weight);
  widen<T>(b, bias);
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) x[i] = fmaf(x[i] * rstd, w[i], b[i]);
}

template <class T, class Team>
__device__ __forceinline__ void fwd(const LayerNormFwd& args) {
  using Mine = Columns<T, Team>;
  Mine columns(args.width, args.vector);
  Parameter<T, Team> weight(args.weight, 1.f), bias(args.bias, 0.f);
  weight.hold(columns);
  bias.hold(columns);
  const float share = 1.f / float(args.width);
  for (Turns<Team> turns(args.rows); turns.next();) {
    columns.end = turns.row < args.rows ? args.width : 0;
    const Row row = Row::of<T>(turns.row, args.width);
    typename Mine::Values x;
    add<T, Team>(x, args, columns, row);
    if (args.sum != nullptr) columns.store(row.in(args.sum), x);
    float sum[1] = {};
#pragma unroll
    for (const auto& group : x) sum[0] += sum_of(group);
    Team::sum(sum, 0);
    const float mean = sum[0] * share;
    sum[0] = 0.f;
#pragma unroll
    for (int k = 0; k < Mine::kGroups; ++k) {
#pragma unroll
      for (float& value : x[k]) value -= mean;
      sum[0] += columns.squares(x[k], k);
    }
    Team::sum(sum, 1);
    const float rstd = rsqrtf(fmaf(sum[0], share, args.eps));
#pragma unroll
    for (int k = 0; k < Mine::kGroups; ++k) {
      finish<T>(x[k], rstd, weight.get(columns, k), bias.get(columns, k));
    }
    columns.store(row.in(args.y), x);
  }
}

// Rows that no block can hold, one piece after the other, three times: from memory, and then from the L2 cache.
template <class T, class Team>
__device__ __forceinline__ void fwd_wide(const LayerNormFwd& args) {
  using Mine = Columns<T, Team>;
  Mine columns(args.width, args.vector);
  const uint32_t first = columns.first;
  const Parameter<T, Team> weight(args.weight, 1.f), bias(args.bias, 0.f);
  const float share = 1.f / float(args.width);
  for (Turns<Team> turns(args.rows); turns.next();) {
    const Row row = Row::of<T>(turns.row, args.width);
    typename Mine::Values x;
    float sum[1] = {};
    for (uint32_t start = 0; start < args.width; start += Mine::all()) {
      columns.first = start + first;
      add<T, Team>(x, args, columns, row);
      if (args.sum != nullptr) columns.store(row.in(args.sum), x);
#pragma unroll
      for (const auto& group : x) sum[0] += sum_of(group);
    }
    Team::sum(sum, 0);
    const float mean = sum[0] * share;
    sum[0] = 0.f;
    for (uint32_t start = 0; start < args.width; start += Mine::all()) {
      columns.first = start + first;
      add<T, Team>(x, args, columns, row);
#pragma unroll
      for (int k = 0; k < Mine::kGroups; ++k) {
#pragma unroll
        for (float& value : x[k]) value -= mean;
        sum[0] += columns.squares(x[k], k);
      }
    }
    Team::sum(sum, 1);
    const float rstd = rsqrtf(fmaf(sum[0], share, args.eps));
    for (uint32_t start = 0; start < args.width; start += Mine::all()) {
      columns.first = start + first;
      add<T, Team>(x, args, columns, row);
#pragma unroll
      for (int k = 0; k < Mine::kGroups; ++k) {
#pragma unroll
        for (float& value : x[k]) value -= mean;
        finish<T>(x[k], rstd, weight.fetch(columns, k), bias.fetch(columns, k));
      }
      columns.store(row.in(args.y), x);
    }
  }
}

// The block's line of sums, those of its teams added up in order: the first `count` of them.
template <class T, class Team>
__device__ __forceinline__ void store_line(float* to, const typename Columns<T, Team>::Values& sums, uint32_t count) {
  constexpr int kGroups = Team::kAccesses, kWide = kLanes<T>, kWarps = Team::kSize > 32 ? 1 : Team::kThreads / 32;
  constexpr int kMine = Team::kSize * kWide;
  const uint32_t thread = threadIdx.x % Team::kSize, warp = threadIdx.x / 32;
  if constexpr (Team::kSize > 32) {
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
#pragma unroll
      for (int i = 0; i < kWide; ++i) {
        const uint32_t column = k * kMine + thread * kWide + i;
        if (column < count) to[column] = sums[k][i];
      }
    }
  } else {
    // A group's i-th values lie side by side.
    __shared__ float shared[kWarps][kGroups * kMine];
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
#pragma unroll
      for (int i = 0; i < kWide; ++i) {
        float sum = sums[k][i];
#pragma unroll
        for (int step = Team::kSize; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
        if (threadIdx.x % 32 < Team::kSize) shared[warp][(k * kWide + i) * Team::kSize + thread] = sum;
      }
    }
    __syncthreads();
    for (uint32_t column = threadIdx.x; column < count; column += Team::kThreads) {
      const uint32_t place = (column / kMine * kWide + column % kWide) * Team::kSize + column % kMine / kWide;
      float sum = 0.f;
#pragma unroll
      for (int other = 0; other < kWarps; ++other) sum += shared[other][place];
      to[column] = sum;
    }
  }
}

// Both lines, as far as they are wanted, `at` values from the first ones.
template <class T, class Team>
__device__ __forceinline__ void store_lines(const LayerNormBwd& args, int64_t at,
                                            const typename Columns<T, Team>::Values& dweight,
                                            const typename Columns<T, Team>::Values& dbias, uint32_t count) {
  if (args.dweight != nullptr) store_line<T, Team>(args.dweight + at, dweight, count);
  // The second one takes the shared memory of the first.
  if (Team::kSize <= 32 && args.dweight != nullptr && args.dbias != nullptr) __syncthreads();
  if (args.dbias != nullptr) store_line<T, Team>(args.dbias + at, dbias, count);
}

// dx, the slope by the row itself added, and dropout(dx): as far as they are wanted.
template <class T, class Team>
__device__ __forceinline__ void store_slopes(float (&dx)[kLanes<T>], const LayerNormBwd& args,
                                             const Columns<T, Team>& columns, int group, const Row& row, uint32_t keep) {
  if (args.dsum != nullptr) {
    float dsum[kLanes<T>];
    widen<T>(dsum, columns.fetch(row.in(args.dsum), group));
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) dx[i] += dsum[i];
  }
  if (args.dx != nullptr) columns.store(row.in(args.dx), dx, group);
  if (args.dropped == nullptr) return;
  if (args.dropout.active) drop(dx, args.dropout, keep >> (group * kLanes<T>));
  columns.store(row.in(args.dropped), dx, group);
}

// dweight and dbias are summed over the rows of the block's teams, and joined at the end.
template <class T, class Team>
__device__ __forceinline__ void bwd(const LayerNormBwd& args) {
  using Mine = Columns<T, Team>;
  using Group = float[Mine::kWide];
  Mine columns(args.width, args.vector);
  Parameter<T, Team> weight(args.weight, 1.f);
  weight.hold(columns);
  const float share = 1.f / float(args.width);
  typename Mine::Values dweight = {}, dbias = {};
  for (Turns<Team> turns(args.rows); turns.next();) {
    columns.end = turns.row < args.rows ? args.width : 0;
    const Row row = Row::of<T>(turns.row, args.width);
    typename Mine::Words x_words, dy_words, weights;
    columns.fetch(x_words, row.in(args.x));
    columns.fetch(dy_words, row.in(args.dy));
    const uint32_t keep = args.dropout.active && args.dropped != nullptr ? kept(args.dropout, columns, row.number) : 0;
#pragma unroll
    for (int k = 0; k < Mine::kGroups; ++k) weights[k] = weight.get(columns, k);
    const auto unpack = [&](Group& x, Group& dy, Group& slope, int k) {
      float w[Mine::kWide];
      widen<T>(x, x_words[k]);
      widen<T>(dy, dy_words[k]);
      widen<T>(w, weights[k]);
#pragma unroll
      for (int i = 0; i < Mine::kWide; ++i) slope[i] = dy[i] * w[i];
      if constexpr (!Mine::kFew) hide(x_words[k].words), hide(dy_words[k].words), hide(weights[k].words);
    };
    Group x, dy, slope;  // slope: by the normed row
    float sums[2] = {};
#pragma unroll
    for (int k = 0; k < Mine::kGroups; ++k) {
      unpack(x, dy, slope, k);
      sums[0] += sum_of(x);
      sums[1] += sum_of(slope);
    }
    Team::sum(sums, 0);
    const float mean = sums[0] * share, mean_slope = sums[1] * share;
    sums[0] = sums[1] = 0.f;
#pragma unroll
    for (int k = 0; k < Mine::kGroups; ++k) {
      unpack(x, dy, slope, k);
#pragma unroll
      for (float& value : x) value -= mean;
      sums[0] += columns.squares(x, k);
      sums[1] += product_of(x, slope);
    }
    Team::sum(sums, 1);
    // Where there is no row, eps may be all that is under the root, and zero.
    const float rstd = columns.end > 0 ? rsqrtf(fmaf(sums[0], share, args.eps)) : 0.f;
    const float mean_product = sums[1] * share * rstd;
#pragma unroll
    for (int k = 0; k < Mine::kGroups; ++k) {
      unpack(x, dy, slope, k);
#pragma unroll
      for (int i = 0; i < Mine::kWide; ++i) {
        const float normed = (x[i] - mean) * rstd;
        dweight[k][i] = fmaf(dy[i], normed, dweight[k][i]);
        dbias[k][i] += dy[i];
        x[i] = rstd * (slope[i] - mean_slope - normed * mean_product);
      }
      store_slopes<T, Team>(x, args, columns, k, row, keep);
    }
  }
  const int64_t line = int64_t(blockIdx.x) * args.width;
  store_lines<T, Team>(args, line, dweight, dbias, args.width);
}

// Rows that no block can hold: stats takes what the sums over rows need, which are another kernel's.
template <class T, class Team>
__device__ __forceinline__ void bwd_wide(const LayerNormBwd& args) {
  using Mine = Columns<T, Team>;
  using Group = float[Mine::kWide];
  Mine columns(args.width, args.vector);
  const uint32_t first = columns.first;
  const Parameter<T, Team> weight(args.weight, 1.f);
  const float share = 1.f / float(args.width);
  for (Turns<Team> turns(args.rows); turns.next();) {
    const Row row = Row::of<T>(turns.row, args.width);
    typename Mine::Words x_words, dy_words;
    float sum[1] = {};
    for (uint32_t start = 0; start < args.width; start += Mine::all()) {
      columns.first = start + first;
      columns.fetch(x_words, row.in(args.x));
#pragma unroll
      for (const auto& words : x_words) {
        Group x;
        widen<T>(x, words);
        sum[0] += sum_of(x);
      }
    }
    Team::sum(sum, 0);
    const float mean = sum[0] * share;
    const auto fetch = [&](uint32_t start) {
      columns.first = start + first;
      columns.fetch(x_words, row.in(args.x));
      columns.fetch(dy_words, row.in(args.dy));
    };
    const auto unpack = [&](Group& x, Group& slope, int k) {
      Group w;
      widen<T>(x, x_words[k]);
      widen<T>(slope, dy_words[k]);
      widen<T>(w, weight.fetch(columns, k));
#pragma unroll
      for (int i = 0; i < Mine::kWide; ++i) x[i] -= mean, slope[i] *= w[i];
    };
    Group x, slope;
    float sums[3] = {};
    for (uint32_t start = 0; start < args.width; start += Mine::all()) {
      fetch(start);
#pragma unroll
      for (int k = 0; k < Mine::kGroups; ++k) {
        unpack(x, slope, k);
        sums[0] += columns.squares(x, k);
        sums[1] += sum_of(slope);
        sums[2] += product_of(x, slope);
      }
    }
    Team::sum(sums, 1);
    const float rstd = rsqrtf(fmaf(sums[0], share, args.eps));
    const float mean_slope = sums[1] * share, mean_product = sums[2] * share * rstd;
    if (args.stats != nullptr && threadIdx.x == 0) {
      args.stats[2 * int64_t(row.number)] = mean;
      args.stats[2 * int64_t(row.number) + 1] = rstd;
    }
    if (args.dx == nullptr && args.dropped == nullptr) continue;
    for (uint32_t start = 0; start < args.width; start += Mine::all()) {
      fetch(start);
      const uint32_t keep = args.dropout.active && args.dropped != nullptr ? kept(args.dropout, columns, row.number) : 0;
#pragma unroll
      for (int k = 0; k < Mine::kGroups; ++k) {
        unpack(x, slope, k);
#pragma unroll
        for (int i = 0; i < Mine::kWide; ++i) {
          x[i] = rstd * (slope[i] - mean_slope - x[i] * rstd * mean_product);
        }
        store_slopes<T, Team>(x, args, columns, k, row, keep);
      }
    }
  }
}

// dweight and dbias of such rows. A block sums its columns of its share of the rows into a line: the blocks along y share
// the rows.
template <class T, class Team>
__device__ __forceinline__ void bwd_sums(const LayerNormBwd& args) {
  using Mine = Columns<T, Team>;
  Mine columns(args.width, args.vector);
  const uint32_t start = blockIdx.x * Mine::all();
  columns.first += start;
  typename Mine::Values dweight = {}, dbias = {};
#pragma unroll 2
  for (uint32_t number = blockIdx.y * Team::kRows + threadIdx.x / 32; number < args.rows;
       number += gridDim.y * Team::kRows) {
    const Row row = Row::of<T>(number, args.width);
    const float mean = args.stats[2 * int64_t(number)], rstd = args.stats[2 * int64_t(number) + 1];
    typename Mine::Words x_words, dy_words;
    columns.fetch(x_words, row.in(args.x));
    columns.fetch(dy_words, row.in(args.dy));
#pragma unroll
    for (int k = 0; k < Mine::kGroups; ++k) {
      float x[Mine::kWide], dy[Mine::kWide];
      widen<T>(x, x_words[k]);
      widen<T>(dy, dy_words[k]);
#pragma unroll
      for (int i = 0; i < Mine::kWide; ++i) {
        dweight[k][i] = fmaf(dy[i], (x[i] - mean) * rstd, dweight[k][i]);
        dbias[k][i] += dy[i];
      }
    }
  }
  const int64_t line = int64_t(blockIdx.y) * args.width + start;
  const uint32_t count = min(args.width - start, Mine::all());
  store_lines<T, Team>(args, line, dweight, dbias, count);
}

}  // namespace

#define FASTTX_LAYER_NORM(way, Args, name, T, ...)                                          \
  extern "C" __global__ void __launch_bounds__(__VA_ARGS__::kThreads, __VA_ARGS__::kBlocks) \
      layer_norm_##name##_##T(const __grid_constant__ Args args) {                          \
    way<T, __VA_ARGS__>(args);                                                              \
  }
#define FASTTX_FWD(name, T, ...) FASTTX_LAYER_NORM(fwd, LayerNormFwd, fwd_##name, T, __VA_ARGS__)
#define FASTTX_BWD(name, T, ...) FASTTX_LAYER_NORM(bwd, LayerNormBwd, bwd_##name, T, __VA_ARGS__)
#define FASTTX_LAYER_NORMS(T)                                                         \
  FASTTX_FWD(8x1, T, Team<8, 1, 128, 8>)                                              \
  FASTTX_FWD(32x1, T, Team<32, 1, 128, 8>)                                            \
  FASTTX_FWD(32x2, T, Team<32, 2, 128, 8>)                                            \
  FASTTX_FWD(32x3, T, Team<32, 3, 128, 7>)                                            \
  FASTTX_FWD(32x4, T, Team<32, 4, 128, 6>)                                            \
  FASTTX_FWD(128x2, T, Team<128, 2, 128, 8>)                                          \
  FASTTX_FWD(128x4, T, Team<128, 4, 128, 6>)                                          \
  FASTTX_FWD(256x4, T, Team<256, 4, 256, 3>)                                          \
  FASTTX_FWD(512x4, T, Team<512, 4, 512, 1>)                                          \
  FASTTX_LAYER_NORM(fwd_wide, LayerNormFwd, fwd_wide, T, Team<512, 2, 512, 2>)        \
  FASTTX_BWD(8x1, T, Team<8, 1, 256, 3>)                                              \
  FASTTX_BWD(32x1, T, Team<32, 1, 256, 4>)                                            \
  FASTTX_BWD(32x2, T, Team<32, 2, 128, 4>)                                            \
  FASTTX_BWD(32x3, T, Team<32, 3, 128, 3>)                                            \
  FASTTX_BWD(32x4, T, Team<32, 4, 128, 2>)                                            \
  FASTTX_BWD(128x2, T, Team<128, 2, 128, 4>)                                          \
  FASTTX_BWD(256x2, T, Team<256, 2, 256, 2>)                                          \
  FASTTX_BWD(512x2, T, Team<512, 2, 512, 1>)                                          \
  FASTTX_LAYER_NORM(bwd_wide, LayerNormBwd, bwd_wide, T, Team<512, 2, 512, 2>)        \
  FASTTX_LAYER_NORM(bwd_sums, LayerNormBwd, bwd_sums, T, Team<32, 1, 256, 4>)
FASTTX_LAYER_NORMS(float)
FASTTX_LAYER_NORMS(bf16)
FASTTX_LAYER_NORMS(fp16)

}  // namespace fasttx::cuda
