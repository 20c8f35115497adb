// Layer norm, alone and of residual + dropout(x), forward and backward. Ba, Kiros and Hinton 2016.
//
// A row belongs to a team of threads, lanes of a warp or a block, which hold it in registers from the first sum to the
// last result. Teams go through the rows, and keep the weights. Which thread has which column depends on the width alone,
// so that a row gives the same bits wherever it lies, aligned or not.
#include "arguments.h"
#include "philox.cuh"
#include "reduce.cuh"
#include "values.cuh"

namespace fasttx::cuda {
namespace {

// kSize threads with at most kAccesses times 16 bytes of a row each, in blocks of kThreads, of which a multiprocessor is
// to hold kBlocks.
template <int size, int accesses, int threads, int blocks>
struct Team {
  static constexpr int kSize = size, kAccesses = accesses, kThreads = threads, kBlocks = blocks;
  static constexpr int kRows = threads / size;  // that a block has at once
  static_assert(size <= 32 || size == threads);

  // Sums over the team. One of several warps needs shared memory: `turn` is 0 and 1 by turns.
  template <int n>
  static __device__ __forceinline__ void sum(float (&x)[n], int turn) {
    if constexpr (size <= 32) {
#pragma unroll
      for (float& value : x) value = over_warp<Sum, size>(value);
    } else {
      __shared__ float shared[2][n * size / 32];
      over_block<Sum, size>(x, shared[turn]);
    }
  }
};

// Goes through the rows of a team. Whole warps go on together: of the teams in one, some may be past the last row.
template <class Team>
struct Rows {
  static constexpr int kOfWarp = Team::kSize < 32 ? 32 / Team::kSize : 1;
  uint32_t first, row, count;

  explicit __device__ __forceinline__ Rows(uint32_t rows)
      : first(blockIdx.x * Team::kRows + (Team::kSize > 32 ? 0 : threadIdx.x / 32 * kOfWarp)), count(rows) {}
  __device__ __forceinline__ bool next() {
    row = first + threadIdx.x % 32 / Team::kSize % kOfWarp;
    first += gridDim.x * Team::kRows;
    return row - threadIdx.x % 32 / Team::kSize % kOfWarp < count;
  }
};

// Sums over neighbours, by halves.
template <int n>
__device__ __forceinline__ float sum_of(const float (&x)[n]) {
  if constexpr (n == 1) {
    return x[0];
  } else {
    float halves[n / 2];
#pragma unroll
    for (int i = 0; i < n / 2; ++i) halves[i] = x[i] + x[i + n / 2];
    return sum_of(halves);
  }
}
template <int n>
__device__ __forceinline__ float product_of(const float (&x)[n], const float (&y)[n]) {
  float halves[n / 2];
#pragma unroll
  for (int i = 0; i < n / 2; ++i) halves[i] = fmaf(x[i], y[i], x[i + n / 2] * y[i + n / 2]);
  return sum_of(halves);
}

// The columns of a thread: groups of kLanes neighbours, a team's first groups before its second.
template <class T, class Team>
struct Columns {
  static constexpr int kGroups = Team::kAccesses, kWide = kLanes<T>;
  static constexpr bool kFew = kGroups * kWide <= 16;  // values of a thread
  using Values = float[kGroups][kWide];
  using Words = Packed<T>[kGroups];

  uint32_t first = threadIdx.x % Team::kSize * kWide, end;  // of the row, or 0 where there is none
  bool vector;

  __device__ __forceinline__ uint32_t operator[](int group) const { return first + group * (Team::kSize * kWide); }
  __device__ __forceinline__ bool has(int group, int i = 0) const { return (*this)[group] + i < end; }
  __device__ __forceinline__ uint32_t left(int group) const { return has(group) ? end - (*this)[group] : 0; }

  // Zeros beyond the end.
  __device__ __forceinline__ Packed<T> fetch(const void* row, int group) const {
    const T* from = static_cast<const T*>(row) + (*this)[group];
    if (!vector) return fetch_some(from, left(group));
    return has(group) ? cuda::fetch(from) : Packed<T>{};
  }
  __device__ __forceinline__ void fetch(Words& words, const void* row) const {
#pragma unroll
    for (int k = 0; k < kGroups; ++k) words[k] = fetch(row, k);
  }
  __device__ __forceinline__ void store(void* row, const float (&x)[kWide], int group) const {
    T* to = static_cast<T*>(row) + (*this)[group];
    if (!vector) return store_some(to, x, left(group));
    if (has(group)) cuda::store(to, x);
  }
  __device__ __forceinline__ void store(void* row, const Values& x) const {
#pragma unroll
    for (int k = 0; k < kGroups; ++k) store(row, x[k], k);
  }
  // The squared distance of a group from zero, what lies beyond the end left out.
  __device__ __forceinline__ float squares(float (&x)[kWide], int group) const {
    if (!vector) {
#pragma unroll
      for (int i = 0; i < kWide; ++i) x[i] = has(group, i) ? x[i] : 0.f;
    }
    const float squares = product_of(x, x);
    return has(group) ? squares : 0.f;
  }
};

// Hides from the compiler where a value came from. What it unpacks twice it would keep unpacked, in twice the registers.
__device__ __forceinline__ void hide(uint4& words) {
  asm volatile("" : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w));
}

// A weight or a bias, or one value in place of it. A thread with few values keeps its part from row to row, others read
// it again, from the L1 cache.
template <class T, class Team>
class Parameter {
  using Mine = Columns<T, Team>;
  static constexpr bool kHeld = Mine::kFew;

 public:
  __device__ __forceinline__ Parameter(const void* at, float otherwise) : at_(at), otherwise_(otherwise) {}
  __device__ __forceinline__ void begin(const Mine& columns) {
    if constexpr (kHeld) {
#pragma unroll
      for (int k = 0; k < Mine::kGroups; ++k) words_[k] = read(columns, k);
    }
  }
  __device__ __forceinline__ Packed<T> get(const Mine& columns, int group) {
    if constexpr (kHeld) {
      hide(words_[group].words);
      return words_[group];
    } else {
      return read(columns, group);
    }
  }

 private:
  __device__ __forceinline__ Packed<T> read(const Mine& columns, int group) const {
    if (at_ != nullptr) return columns.fetch(at_, group);
    float x[Mine::kWide];
#pragma unroll
    for (float& value : x) value = otherwise_;
    return packed<T>(x);
  }

  const void* at_;
  float otherwise_;
  typename Mine::Words words_;
};

template <class T, class Team>
__device__ __forceinline__ void fwd(const LayerNormFwd& args) {
  using Mine = Columns<T, Team>;
  Mine columns{.end = args.width, .vector = args.vector};
  Parameter<T, Team> weight(args.weight, 1.f), bias(args.bias, 0.f);
  weight.begin(columns);
  bias.begin(columns);
  const uint64_t seed = args.dropout.active ? seed_of(args.dropout) : 0;
  const float share = 1.f / float(args.width);
  for (Rows<Team> rows(args.rows); rows.next();) {
    columns.end = rows.row < args.rows ? args.width : 0;
    const int64_t at = int64_t(rows.row) * args.width * int(sizeof(T));
    const auto of = [at](const void* matrix) { return static_cast<const char*>(matrix) + at; };
    typename Mine::Values x;
    {
      typename Mine::Words own, residual;
      columns.fetch(own, of(args.x));
      if (args.residual != nullptr) columns.fetch(residual, of(args.residual));
#pragma unroll
      for (int k = 0; k < Mine::kGroups; ++k) widen<T>(x[k], own[k]);
      if (args.dropout.active) {
#pragma unroll
        for (int k = 0; k < Mine::kGroups; ++k) drop(x[k], args.dropout, seed, 0, 0, rows.row, columns[k]);
      }
      if (args.residual != nullptr) {
#pragma unroll
        for (int k = 0; k < Mine::kGroups; ++k) {
          float addend[Mine::kWide];
          widen<T>(addend, residual[k]);
#pragma unroll
          for (int i = 0; i < Mine::kWide; ++i) x[k][i] += addend[i];
        }
      }
    }
    if (args.sum != nullptr) columns.store(static_cast<char*>(args.sum) + at, x);
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
      float w[Mine::kWide], b[Mine::kWide];
      widen<T>(w, weight.get(columns, k));
      widen<T>(b, bias.get(columns, k));
#pragma unroll
      for (int i = 0; i < Mine::kWide; ++i) x[k][i] = fmaf(x[k][i] * rstd, w[i], b[i]);
    }
    columns.store(static_cast<char*>(args.y) + at, x);
  }
}

// The block's line of column sums, those of its teams added up in order; no line where `to` is null.
template <class T, class Team>
__device__ __forceinline__ void store_line(float* to, typename Columns<T, Team>::Values& sums, uint32_t width) {
  constexpr int kGroups = Team::kAccesses, kWide = kLanes<T>, kWarps = Team::kSize > 32 ? 1 : Team::kThreads / 32;
  constexpr int kColumns = Team::kSize * kGroups * kWide, kMine = Team::kSize * kWide;
  if (to == nullptr) return;
  to += int64_t(blockIdx.x) * width;
  const uint32_t thread = threadIdx.x % Team::kSize, warp = threadIdx.x / 32;
  if constexpr (Team::kSize > 32) {
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
#pragma unroll
      for (int i = 0; i < kWide; ++i) {
        const uint32_t column = k * kMine + thread * kWide + i;
        if (column < width) to[column] = sums[k][i];
      }
    }
  } else {
    // A group's i-th values lie side by side.
    __shared__ float shared[kWarps][kColumns];
    __syncthreads();
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
    for (uint32_t column = threadIdx.x; column < width; column += Team::kThreads) {
      const uint32_t place = (column / kMine * kWide + column % kWide) * Team::kSize + column % kMine / kWide;
      float sum = 0.f;
#pragma unroll
      for (int other = 0; other < kWarps; ++other) sum += shared[other][place];
      to[column] = sum;
    }
  }
}

// dweight and dbias are summed over the rows of the block's teams, and joined at the end.
template <class T, class Team>
__device__ __forceinline__ void bwd(const LayerNormBwd& args) {
  using Mine = Columns<T, Team>;
  using Group = float[Mine::kWide];
  Mine columns{.end = args.width, .vector = args.vector};
  Parameter<T, Team> weight(args.weight, 1.f);
  weight.begin(columns);
  const uint64_t seed = args.dropout.active ? seed_of(args.dropout) : 0;
  const float share = 1.f / float(args.width);
  typename Mine::Values dweight = {}, dbias = {};
  for (Rows<Team> rows(args.rows); rows.next();) {
    columns.end = rows.row < args.rows ? args.width : 0;
    const int64_t at = int64_t(rows.row) * args.width * int(sizeof(T));
    const auto of = [at](const void* matrix) { return static_cast<const char*>(matrix) + at; };
    typename Mine::Words x_words, dy_words, weights;
    columns.fetch(x_words, of(args.x));
    columns.fetch(dy_words, of(args.dy));
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
      if (args.dsum != nullptr) {
        float dsum[Mine::kWide];
        widen<T>(dsum, columns.fetch(of(args.dsum), k));
#pragma unroll
        for (int i = 0; i < Mine::kWide; ++i) x[i] += dsum[i];
      }
      if (args.dx != nullptr) columns.store(static_cast<char*>(args.dx) + at, x, k);
      if (args.dropped == nullptr) continue;
      if (args.dropout.active) drop(x, args.dropout, seed, 0, 0, rows.row, columns[k]);
      columns.store(static_cast<char*>(args.dropped) + at, x, k);
    }
  }
  store_line<T, Team>(args.dweight, dweight, args.width);
  store_line<T, Team>(args.dbias, dbias, args.width);
}

}  // namespace

#define FASTTX_LAYER_NORM(way, Args, name, T, ...)                                          \
  extern "C" __global__ void __launch_bounds__(__VA_ARGS__::kThreads, __VA_ARGS__::kBlocks) \
      layer_norm_##way##_##name##_##T(const __grid_constant__ Args args) {                  \
    way<T, __VA_ARGS__>(args);                                                              \
  }
#define FASTTX_FWD(name, T, ...) FASTTX_LAYER_NORM(fwd, LayerNormFwd, name, T, __VA_ARGS__)
#define FASTTX_BWD(name, T, ...) FASTTX_LAYER_NORM(bwd, LayerNormBwd, name, T, __VA_ARGS__)
#define FASTTX_LAYER_NORMS(T)                   \
  FASTTX_FWD(8x1, T, Team<8, 1, 128, 8>)        \
  FASTTX_FWD(32x1, T, Team<32, 1, 128, 8>)      \
  FASTTX_FWD(32x2, T, Team<32, 2, 128, 6>)      \
  FASTTX_FWD(32x3, T, Team<32, 3, 128, 6>)      \
  FASTTX_FWD(32x4, T, Team<32, 4, 128, 5>)      \
  FASTTX_FWD(128x2, T, Team<128, 2, 128, 6>)    \
  FASTTX_FWD(128x4, T, Team<128, 4, 128, 5>)    \
  FASTTX_FWD(256x4, T, Team<256, 4, 256, 2>)    \
  FASTTX_FWD(512x4, T, Team<512, 4, 512, 1>)    \
  FASTTX_BWD(8x1, T, Team<8, 1, 256, 3>)        \
  FASTTX_BWD(32x1, T, Team<32, 1, 256, 3>)      \
  FASTTX_BWD(32x2, T, Team<32, 2, 128, 4>)      \
  FASTTX_BWD(32x3, T, Team<32, 3, 128, 3>)      \
  FASTTX_BWD(32x4, T, Team<32, 4, 128, 2>)      \
  FASTTX_BWD(128x2, T, Team<128, 2, 128, 4>)    \
  FASTTX_BWD(256x2, T, Team<256, 2, 256, 2>)    \
  FASTTX_BWD(512x2, T, Team<512, 2, 512, 1>)
FASTTX_LAYER_NORMS(float)
FASTTX_LAYER_NORMS(bf16)
FASTTX_LAYER_NORMS(fp16)

}  // namespace fasttx::cuda
