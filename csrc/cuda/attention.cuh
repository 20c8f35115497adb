// What attention's kernels share: where a block's rows lie, tiles of rows in shared memory, and products of them.
//
// Tiles are of 16-bit values, multiplied 16 x 8 x 16 at a time by mma.sync (primitives.cuh has the layouts). A warp owns
// 16 rows of a product, or two times that; lane l has of each 16 x 8 part rows l / 4 and l / 4 + 8, two neighbours of each.
#pragma once

#include "arguments.h"
#include "math.cuh"
#include "philox.cuh"
#include "primitives.cuh"

namespace fasttx::cuda {

constexpr int kAttentionThreads = 128, kAttentionWarps = kAttentionThreads / 32;

extern __shared__ __align__(1024) unsigned char attention_shared[];

// A tile of rows in shared memory, kWidth values each. The 16-byte chunks of a row are permuted by its number, so that
// eight rows' chunks of one column lie in different banks.
template <int kWidth>
struct Tile {
  static_assert(kWidth % 32 == 0);
  static constexpr int kChunks = kWidth / 8, kRowBytes = 2 * kWidth;

  static __device__ __forceinline__ int permute(int row) { return kWidth % 64 == 0 ? row & 7 : row >> 1 & 3; }
  static __device__ __forceinline__ uint32_t at(uint32_t tile, int row, int chunk) {
    return tile + row * kRowBytes + ((chunk ^ permute(row)) << 4);
  }

  // Begins to copy kRows rows, those from `count` on and columns from `width` on being zeros; and those that `seen`, where
  // there is such a thing, rules out.
  template <int kRows, class T>
  static __device__ __forceinline__ void copy(uint32_t tile, const T* from, int64_t stride, int count, int width,
                                              const uint8_t* seen = nullptr) {
    static_assert(kRows * kChunks % kAttentionThreads == 0);
#pragma unroll
    for (int i = 0; i < kRows * kChunks / kAttentionThreads; ++i) {
      const int place = threadIdx.x + i * kAttentionThreads, row = place / kChunks, chunk = place % kChunks;
      bool wanted = row < count && chunk * 8 < width;
      if (seen != nullptr && wanted) wanted = seen[row] != 0;
      copy_async(at(tile, row, chunk), from + row * stride + chunk * 8, wanted);
    }
  }

  // Where one lane finds what ldmatrix asks it for: its row, and which of the two chunks of 16 columns.
  struct Lane {
    uint32_t row, chunk;
    __device__ __forceinline__ Lane(int row, int half) : row(row * kRowBytes), chunk(half ^ permute(row)) {}
    // Of 16 rows from `first` (a multiple of 8), columns 16 step to 16 step + 15.
    __device__ __forceinline__ uint32_t at(uint32_t tile, int first, int step) const {
      return tile + row + first * kRowBytes + ((2 * step ^ chunk) << 4);
    }
  };
  // 16 rows x 16 columns as a left operand.
  static __device__ __forceinline__ Lane left() { return Lane(threadIdx.x % 16, threadIdx.x / 16 % 2); }
  // 16 rows x 16 columns, transposed: a right operand of 16 columns, two of 8.
  static __device__ __forceinline__ Lane transposed() {
    return Lane(threadIdx.x % 8 + threadIdx.x / 16 % 2 * 8, threadIdx.x / 8 % 2);
  }
  // 16 rows x 16 columns as a right operand, which ldmatrix transposes.
  static __device__ __forceinline__ Lane right() { return left(); }
};

// products (kTiles x 16 rows, kRows) = a b^T. load(a, tile, step): the left operand's 16 columns of `step`.
template <class T, int kWidth, int kTiles, int kRows, class Load>
__device__ __forceinline__ void multiply_rows(float (&products)[kTiles][kRows / 8][4], Load load, uint32_t b,
                                              const typename Tile<kWidth>::Lane& lane) {
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) products[m][j][i] = 0.f;
#pragma unroll
  for (int step = 0; step < kWidth / 16; ++step) {
    uint32_t left[kTiles][4];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) load(left[m], m, step);
#pragma unroll
    for (int j = 0; j < kRows / 16; ++j) {
      uint32_t right[4];
      load_matrices(right, lane.at(b, 16 * j, step));
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        multiply<T>(products[m][2 * j], left[m], right[0], right[1]);
        multiply<T>(products[m][2 * j + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// sums (kTiles x 16 rows, kWidth) += a b: a (kTiles x 16 rows, kRows) as products lie in registers, rounded to T.
template <class T, int kWidth, int kTiles, int kRows>
__device__ __forceinline__ void add_product(float (&sums)[kTiles][kWidth / 8][4], const float (&a)[kTiles][kRows / 8][4],
                                            uint32_t b, const typename Tile<kWidth>::Lane& lane) {
#pragma unroll
  for (int step = 0; step < kRows / 16; ++step) {
    uint32_t left[kTiles][4];
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto& part = a[m][2 * step + i / 2];
        left[m][i] = pack<T>(part[2 * (i % 2)], part[2 * (i % 2) + 1]);
      }
#pragma unroll
    for (int d = 0; d < kWidth / 16; ++d) {
      uint32_t right[4];
      load_matrices_transposed(right, lane.at(b, 16 * step, d));
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        multiply<T>(sums[m][2 * d], left[m], right[0], right[1]);
        multiply<T>(sums[m][2 * d + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// Tokens of a sequence: where they begin on the token axis, and how many there are; never outside of `count`.
struct Tokens {
  int64_t first;
  int count;
};
__device__ __forceinline__ Tokens tokens_of(int sequence, int count, const int64_t* starts, const int64_t* lengths) {
  int64_t first = 0, tokens = count;
  if (starts != nullptr) {
    first = max(min(starts[sequence], int64_t(count)), int64_t(0));
    tokens = min(starts[sequence + 1], int64_t(count)) - first;
  } else if (lengths != nullptr) {
    tokens = min(lengths[sequence], tokens);
  }
  return {first, int(max(tokens, int64_t(0)))};
}

// The tile of one head's tokens that a block owns; blocks of a head follow each other.
//
// Packed sequences: tile t of sequence n is number starts[n] / kSize + n + t, so that each has numbers enough; its last
// may be one too many, and begins beyond the sequence's end.
struct Owned {
  int sequence, head, first;
};
__device__ __forceinline__ Owned owned_tile(uint32_t block, int count, int heads, const int64_t* starts, int sequences,
                                            int size) {
  if (starts == nullptr) {
    const uint32_t tiles = (count + size - 1) / size;
    return {int(block / tiles / heads), int(block / tiles % heads), int(block % tiles) * size};
  }
  const uint32_t tiles = count / size + sequences;
  const int tile = int(block % tiles);
  int sequence = 0;
  for (int above = sequences; above - sequence > 1;) {
    const int middle = (sequence + above) / 2;
    (int(starts[middle] / size) + middle <= tile ? sequence : above) = middle;
  }
  return {sequence, int(block / tiles), (tile - int(starts[sequence] / size) - sequence) * size};
}

// Index of a sequence's first row in statistics.
__device__ __forceinline__ int64_t row_index(const AttentionProblem& problem, int sequence, int head, int64_t first) {
  if (problem.cu_queries != nullptr) return int64_t(head) * problem.queries + first;
  return (int64_t(sequence) * problem.heads + head) * problem.queries;
}

template <class T>
__device__ __forceinline__ const T* rows_at(const Rows& rows, int sequence, int head, int64_t token) {
  return static_cast<const T*>(rows.data) + sequence * rows.sequence + head * rows.head + token * rows.token;
}

// Where a float of a mask is, as float32.
template <class T>
__device__ __forceinline__ float mask_value(const Mask& mask, int64_t at) {
  if (mask.kind == MaskKind::additive_float) return static_cast<const float*>(mask.data)[at];
  return widen(static_cast<const T*>(mask.data)[at]);
}

// Which elements of a 16 x 8 part dropout keeps, as a nibble: bit 2 h + e is that of row l / 4 + 8 h, column
// 2 (l % 4) + e of lane l. Each lane draws the four words of one row's half.
__device__ __forceinline__ uint32_t kept(const Dropout& dropout, uint64_t seed, int sequence, int head, int row, int column) {
  const int lane = threadIdx.x % 32;
  uint32_t words[4], bits = 0;
  philox(words, seed, sequence, head, row + lane % 16, column / 4 + lane / 16);
#pragma unroll
  for (int i = 0; i < 4; ++i) bits |= uint32_t(words[i] >= dropout.threshold) << i;
  const int source = lane / 4 + lane % 4 / 2 * 16, shift = lane % 2 * 2;
  const uint32_t upper = __shfl_sync(~0u, bits, source), lower = __shfl_sync(~0u, bits, source + 8);
  return (upper >> shift & 3) | (lower >> shift & 3) << 2;
}

// Over the four lanes that share a row.
__device__ __forceinline__ float max_of_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float sum_of_row(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

}  // namespace fasttx::cuda
