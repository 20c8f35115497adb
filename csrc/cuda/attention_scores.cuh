// What becomes of products on the way to scores: places, masks, what is added, and what dropout keeps.
//
// A warp has products of rows and columns in registers, as mma.sync leaves them. Queries are the rows and keys the columns,
// or, transposed, the other way around: the gradients of keys and values.
#pragma once

#include "attention.cuh"

namespace fasttx::cuda {

// Two neighbours of a mask.
template <class V>
struct alignas(2 * sizeof(V)) Pair {
  V first, second;
};

// One head's scores, as a warp meets them.
template <class T, int kTiles, int kColumns, bool kTransposed>
struct Scores {
  static constexpr int kParts = kColumns / 8;
  using Values = float[kTiles][kParts][4];

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

  // What masks keep of a block's tile of up to kTileQueries queries and kKeys keys.
  template <int kKeys>
  __device__ __forceinline__ Kept kept_of(int query, int key) const {
    if (problem.tiles == nullptr) return Kept::all;
    const uint8_t* tiles = problem.tiles + sequence * problem.tile_strides[0] + head * problem.tile_strides[1] +
                           query / kTileQueries * problem.tile_strides[2] + key / kTileKeys;
    // Beyond the last keys there is nothing to mask.
    const bool has_second = kKeys > kTileKeys && key + kTileKeys < problem.keys;
    const int first = tiles[0], second = has_second ? tiles[1] : first;
    return first == second ? Kept(first) : Kept::some;
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

  // Products become scores: scaled, if something is added to them, with that, and -infinity where masks keep nothing.
  __device__ __forceinline__ void add_to(Values& scores, int at, Kept kept) const {
    if (problem.slopes != nullptr) {
      scale_and_add_slopes(scores, at);
    } else if (problem.scaled) {
#pragma unroll
      for (auto& tile : scores)
#pragma unroll
        for (auto& part : tile)
#pragma unroll
          for (float& score : part) score *= problem.scale;
    }
    if (problem.mask.kind == MaskKind::additive_float) {
      for_mask(static_cast<const float*>(problem.mask.data), at, [&](float& score, float x) { score += x; }, scores);
    } else if (problem.mask.kind == MaskKind::additive) {
      for_mask(static_cast<const T*>(problem.mask.data), at, [&](float& score, T x) { score += widen(x); }, scores);
    }
    if (kept == Kept::all) return;
    const auto keep = [](float& score, uint8_t x) { score = x == 0 ? -INFINITY : score; };
    if (problem.mask.kind == MaskKind::boolean) {
      for_mask(static_cast<const uint8_t*>(problem.mask.data), at, keep, scores);
    } else if (seen != nullptr) {
      keep_seen(scores, at);
    }
  }

  // Which elements of a 16 x 8 part dropout keeps: bit 2 h + e is that of row l / 4 + 8 h, column 2 (l % 4) + e. Each lane
  // draws the four words of one query and four keys.
  __device__ __forceinline__ uint32_t drawn(uint64_t seed, int tile, int column) const {
    const int row = first_row + tile * 16;
    const uint32_t query = kTransposed ? column + lane % 8 : row + lane % 16;
    const uint32_t quad = kTransposed ? row / 4 + lane / 8 : column / 4 + lane / 16;
    uint32_t words[4], bits = 0;
    philox<false>(words, seed, sequence, head, query, quad);
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

 private:
  // ALiBi: less the slope times the distance.
  __device__ __forceinline__ void scale_and_add_slopes(Values& scores, int at) const {
    const float slope = -problem.slopes[head];
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int ahead = column_of(at) - row_of(m, h);
        const float from = kTransposed ? float(ahead) + problem.origin : float(ahead) - problem.origin;
#pragma unroll
        for (int j = 0; j < kParts; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& score = scores[m][j][2 * h + e];
            score = fmaf(score, problem.scale, slope * fabsf(from + float(8 * j + e)));
          }
      }
  }

  // use(score, mask) for every score that is of a row and a column.
  template <class V, class Use>
  __device__ __forceinline__ void for_mask(const V* mask, int at, Use use, Values& scores) const {
    const int64_t row_stride = kTransposed ? problem.mask.stride_k : problem.mask.stride_q;
    const int64_t column_stride = kTransposed ? problem.mask.stride_q : problem.mask.stride_k;
    mask += sequence * problem.mask.stride_b + head * problem.mask.stride_h + column_of(at) * column_stride;
    const bool inside = at + kColumns <= column_count;
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const V* row = mask + min(row_of(m, h), row_count - 1) * row_stride;
        if (!kTransposed && inside && problem.mask.vector) {
#pragma unroll
          for (int j = 0; j < kParts; ++j) {
            const Pair<V> pair = *reinterpret_cast<const Pair<V>*>(row + 8 * j);
            use(scores[m][j][2 * h], pair.first);
            use(scores[m][j][2 * h + 1], pair.second);
          }
        } else if (inside) {
#pragma unroll
          for (int j = 0; j < kParts; ++j, row += 8 * column_stride) {
            use(scores[m][j][2 * h], row[0]);
            use(scores[m][j][2 * h + 1], row[column_stride]);
          }
        } else {
#pragma unroll
          for (int j = 0; j < kParts; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e)
              if (column_of(at) + 8 * j + e < column_count) use(scores[m][j][2 * h + e], row[(8 * j + e) * column_stride]);
        }
      }
  }

  // -infinity for keys that no query of the sequence sees.
  __device__ __forceinline__ void keep_seen(Values& scores, int at) const {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      if constexpr (kTransposed) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          if (row_of(m, h) >= row_count || seen[row_of(m, h)] != 0) continue;
#pragma unroll
          for (int j = 0; j < kParts; ++j) scores[m][j][2 * h] = scores[m][j][2 * h + 1] = -INFINITY;
        }
      } else {
#pragma unroll
        for (int j = 0; j < kParts; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int column = column_of(at) + 8 * j + e;
            if (column >= column_count || seen[column] != 0) continue;
            scores[m][j][e] = scores[m][j][2 + e] = -INFINITY;
          }
      }
    }
  }
};

}  // namespace fasttx::cuda
