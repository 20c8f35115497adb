// What becomes of products on the way to scores: places, masks, what is added, and what dropout keeps.
//
// A warp has products of rows and columns in registers, as mma.sync leaves them. Queries are the rows and keys the columns,
// or, transposed, the other way around: the gradients of keys and values.
#pragma once

#include "attention.cuh"

namespace fasttx::cuda {

// One head's scores, as a warp meets them.
template <class T, int kTiles, int kColumns, bool kTransposed>
struct Scores {
  static constexpr int kParts = kColumns / 8;
  using Values = float[kTiles][kParts][4];
  // Of each row of a lane, bit 2 j + e: whether masks keep column 8 j + 2 (l % 4) + e.
  using Bits = uint32_t[kTiles][2];
  static_assert(2 * kParts <= 32);

  const AttentionProblem& problem;
  const int lane = threadIdx.x % 32;
  int first_row;  // of the warp
  int row_count, column_count;
  int sequence, head;
  const uint8_t* seen;  // by key, or null

  __device__ __forceinline__ explicit Scores(const AttentionProblem& problem) : problem(problem) {}

  // Keeps the compiler from knowing from before what follows from the row: kept, it would be too many registers.
  __device__ __forceinline__ void forget() { asm volatile("" : "+r"(first_row)); }
  __device__ __forceinline__ int row_of(int tile, int half) const { return first_row + tile * 16 + half * 8 + lane / 4; }
  __device__ __forceinline__ int column_of(int at) const { return at + lane % 4 * 2; }
  __device__ __forceinline__ int64_t row_stride() const { return kTransposed ? problem.mask.stride_k : problem.mask.stride_q; }
  __device__ __forceinline__ int64_t column_stride() const {
    return kTransposed ? problem.mask.stride_q : problem.mask.stride_k;
  }
  __device__ __forceinline__ int64_t mask_at(int row) const {
    return sequence * problem.mask.stride_b + head * problem.mask.stride_h + min(row, row_count - 1) * row_stride();
  }

  // What places forbid becomes -infinity: columns outside of row + lower to row + upper, and from column_count on. at: the
  // first column.
  __device__ __forceinline__ void mask_places(Values& scores, int at) const {
    const int lower = kTransposed ? -problem.hi : problem.lo, upper = kTransposed ? -problem.lo : problem.hi;
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = row_of(m, h), column = column_of(at);
        const int first = row + lower - column, last = min(column_count - 1, row + upper) - column;
#pragma unroll
        for (int j = 0; j < kParts; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (8 * j + e < first || 8 * j + e > last) scores[m][j][2 * h + e] = -INFINITY;
      }
  }

  // Returns whether a boolean mask, and what is known of keys, keep anything of this lane's.
  __device__ __forceinline__ bool read_mask(Bits& keep, int at) const {
    const bool boolean = problem.mask.kind == MaskKind::boolean;
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) keep[m][h] = ~0u;
    if (!boolean && seen == nullptr) return true;
    bool any = false;
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = row_of(m, h);
        const auto* mask = static_cast<const uint8_t*>(problem.mask.data) + mask_at(row);
        const bool of_row = !kTransposed || seen == nullptr || (row < row_count && seen[row] != 0);
        keep[m][h] = 0;
        if (!of_row) continue;
#pragma unroll
        for (int j = 0; j < kParts; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int column = column_of(at) + 8 * j + e;
            if (column >= column_count) continue;
            bool is_kept = kTransposed || seen == nullptr || seen[column] != 0;
            if (boolean) is_kept = is_kept && mask[column * column_stride()] != 0;
            keep[m][h] |= uint32_t(is_kept) << (2 * j + e);
          }
        any |= keep[m][h] != 0;
      }
    return any;
  }

  // Products become scores: scaled, with what is added to them, and -infinity where masks keep nothing.
  __device__ __forceinline__ void add_to(Values& scores, const Bits& keep, int at) const {
    const bool additive = problem.mask.kind == MaskKind::additive || problem.mask.kind == MaskKind::additive_float;
    const float slope = problem.slopes == nullptr ? 0.f : problem.slopes[head];
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = row_of(m, h);
        const int64_t of_row = mask_at(row);
#pragma unroll
        for (int j = 0; j < kParts; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int column = column_of(at) + 8 * j + e;
            float score = scores[m][j][2 * h + e] * problem.scale;
            if (additive && column < column_count) score += mask_value<T>(problem.mask, of_row + column * column_stride());
            if (problem.slopes != nullptr) {
              const int ahead = kTransposed ? row - column : column - row;
              score -= slope * fabsf(float(ahead) - problem.origin);
            }
            scores[m][j][2 * h + e] = keep[m][h] >> (2 * j + e) & 1 ? score : -INFINITY;
          }
      }
  }

  // Which elements of a 16 x 8 part dropout keeps: bit 2 h + e is that of row l / 4 + 8 h, column 2 (l % 4) + e. Each lane
  // draws the four words of one query and four keys.
  __device__ __forceinline__ uint32_t kept(uint64_t seed, int tile, int column) const {
    const int row = first_row + tile * 16;
    const uint32_t query = kTransposed ? column + lane % 8 : row + lane % 16;
    const uint32_t quad = kTransposed ? row / 4 + lane / 8 : column / 4 + lane / 16;
    uint32_t words[4], bits = 0;
    philox(words, seed, sequence, head, query, quad);
#pragma unroll
    for (int i = 0; i < 4; ++i) bits |= uint32_t(words[i] >= problem.dropout.threshold) << i;
    if constexpr (kTransposed) {
      const int source = lane / 16 * 8 + lane % 4 * 2, shift = lane / 4 % 4;
      uint32_t found = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) found |= (__shfl_sync(~0u, bits, source + i / 2 * 16 + i % 2) >> shift & 1) << i;
      return found;
    } else {
      const int source = lane / 4 + lane % 4 / 2 * 16, shift = lane % 2 * 2;
      const uint32_t upper = __shfl_sync(~0u, bits, source), lower = __shfl_sync(~0u, bits, source + 8);
      return (upper >> shift & 3) | (lower >> shift & 3) << 2;
    }
  }
};

}  // namespace fasttx::cuda
