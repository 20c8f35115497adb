// Rows of a matrix in registers: which thread has which values of which row, and sums over them.
#pragma once

#include "reduce.cuh"
#include "values.cuh"

namespace fasttx::cuda {

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
struct Turns {
  static constexpr uint32_t kOfWarp = Team::kSize < 32 ? 32 / Team::kSize : 1;
  uint32_t next_row, row, count;

  // The warp's number by a shuffle: so the compiler knows that it is the whole warp's, and no shuffle in the loop needs
  // another way for warps that have parted.
  explicit __device__ __forceinline__ Turns(uint32_t rows) : next_row(blockIdx.x * Team::kRows), count(rows) {
    if constexpr (Team::kSize <= 32) next_row += __shfl_sync(~0u, threadIdx.x / 32, 0) * kOfWarp;
  }
  __device__ __forceinline__ bool next() {
    const bool more = next_row < count;
    row = next_row + (kOfWarp > 1 ? threadIdx.x % 32 / Team::kSize : 0);
    next_row += gridDim.x * Team::kRows;
    return more;
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

  uint32_t first, end;  // end: of the row, 0 where there is none
  bool vector;

  __device__ __forceinline__ Columns(uint32_t width, bool vector)
      : first(threadIdx.x % Team::kSize * kWide), end(width), vector(vector) {}
  __device__ __forceinline__ uint32_t operator[](int group) const { return first + group * (Team::kSize * kWide); }
  __device__ __forceinline__ bool has(int group, int i = 0) const { return (*this)[group] + i < end; }
  __device__ __forceinline__ uint32_t left(int group) const { return has(group) ? end - (*this)[group] : 0; }

  // Of the whole team.
  static constexpr __device__ uint32_t all() { return Team::kSize * kGroups * kWide; }

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

 public:
  __device__ __forceinline__ Parameter(const void* at, float otherwise) : at_(at), otherwise_(otherwise) {}
  __device__ __forceinline__ Packed<T> fetch(const Mine& columns, int group) const {
    if (at_ != nullptr) return columns.fetch(at_, group);
    float x[Mine::kWide];
#pragma unroll
    for (float& value : x) value = otherwise_;
    return packed<T>(x);
  }
  __device__ __forceinline__ void hold(const Mine& columns) {
#pragma unroll
    for (int k = 0; k < Mine::kGroups && Mine::kFew; ++k) held_[k] = fetch(columns, k);
  }
  // Once it is held.
  __device__ __forceinline__ Packed<T> get(const Mine& columns, int group) {
    if constexpr (!Mine::kFew) return fetch(columns, group);
    hide(held_[group].words);
    return held_[group];
  }

 private:
  const void* at_;
  float otherwise_;
  typename Mine::Words held_;
};

// Where a row lies in each matrix: `at` bytes from its first.
struct Row {
  uint32_t number;
  int64_t at;

  template <class T>
  static __device__ __forceinline__ Row of(uint32_t row, uint32_t width) {
    return {row, int64_t(row) * width * int(sizeof(T))};
  }
  __device__ __forceinline__ const void* in(const void* matrix) const { return static_cast<const char*>(matrix) + at; }
  __device__ __forceinline__ void* in(void* matrix) const { return static_cast<char*>(matrix) + at; }
};

}  // namespace fasttx::cuda
