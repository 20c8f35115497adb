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

// A number as a type, for a function that needs it when it is compiled.
template <int n>
struct Constant {
  static constexpr int value = n;
};

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

  // A thread's part in copies of tiles from global memory: one chunk of a row in kRowsAtOnce, which is a multiple of 8, so
  // that all of its chunks are permuted alike. Where that leaves threads over, they copy nothing.
  template <class T>
  struct Copier {
    static constexpr int kRowsAtOnce = kAttentionThreads / kChunks / 8 * 8;
    const T* from;
    int64_t stride;  // of a row
    int row;
    uint32_t to;
    bool within;  // the width, and the threads that there is work for

    __device__ __forceinline__ Copier(const T* first_row, int64_t stride, int width)
        : stride(stride), row(threadIdx.x / kChunks) {
      const int chunk = threadIdx.x % kChunks;
      from = first_row + row * stride + chunk * 8;
      to = at(0, row, chunk);
      within = chunk * 8 < width && row < kRowsAtOnce;
    }
    __device__ __forceinline__ void skip(int rows) { from += rows * stride; }

    // Begins to copy kRows rows; those from `count` on are zeros, columns beyond the width are, and rows that `seen`, where
    // there is such a thing, rules out.
    template <int kRows>
    __device__ __forceinline__ void copy(uint32_t tile, int count, const uint8_t* seen = nullptr) const {
      static_assert(kRows % kRowsAtOnce == 0);
      if (kAttentionThreads % kChunks != 0 && row >= kRowsAtOnce) return;
      const T* at = from;
#pragma unroll
      for (int i = 0; i < kRows; i += kRowsAtOnce) {
        bool wanted = within && row + i < count;
        if (seen != nullptr && wanted) wanted = seen[row + i] != 0;
        copy_async(tile + to + i * kRowBytes, at, wanted);
        at += kRowsAtOnce * stride;
      }
    }
  };

  // Where one lane finds what ldmatrix asks it for: its row, and which of the two chunks of 16 columns.
  struct Lane {
    uint32_t row, chunk;
    __device__ __forceinline__ Lane(int row, int half) : row(row * kRowBytes), chunk(half ^ permute(row)) {}
    // Keeps the compiler from knowing the addresses from before.
    __device__ __forceinline__ void forget() { asm volatile("" : "+r"(chunk)); }
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

// Where a block's rows lie, of one sequence and head: tokens from `first` on, and how many there are from there.
struct Place {
  int sequence, head;
  int first;      // in the sequence
  int64_t token;  // on the token axis
  int count;      // of the sequence's tokens
};
__device__ __forceinline__ Place place_of_queries(const AttentionProblem& problem, uint32_t block, int size) {
  const Owned owned = owned_tile(block, problem.queries, problem.heads, problem.cu_queries, problem.sequences, size);
  const Tokens tokens = tokens_of(owned.sequence, problem.queries, problem.cu_queries, nullptr);
  return {owned.sequence, owned.head, owned.first, tokens.first + owned.first, tokens.count};
}
// Of keys' heads. Keys beyond a sequence's length are counted, as they have gradients: zeros.
__device__ __forceinline__ Place place_of_keys(const AttentionProblem& problem, uint32_t block, int size) {
  const Owned owned =
      owned_tile(block, problem.keys, problem.heads / problem.group, problem.cu_keys, problem.sequences, size);
  const Tokens tokens = tokens_of(owned.sequence, problem.keys, problem.cu_keys, nullptr);
  return {owned.sequence, owned.head, owned.first, tokens.first + owned.first, tokens.count};
}

// Index of a sequence's first row in statistics.
__device__ __forceinline__ int64_t row_index(const AttentionProblem& problem, int sequence, int head, int64_t first) {
  if (problem.cu_queries != nullptr) return int64_t(head) * problem.queries + first;
  return (int64_t(sequence) * problem.heads + head) * problem.queries;
}

template <class T>
__device__ __forceinline__ T* rows_to(const Rows& rows, int sequence, int head, int64_t token) {
  return const_cast<T*>(static_cast<const T*>(rows.data)) + sequence * rows.sequence + head * rows.head + token * rows.token;
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

// Writes rows that lie in registers, as sums of products do, by way of a tile in shared memory of which this warp alone uses
// the rows from `first` on, and no longer reads them: 16 bytes an access. value(m, h, x): what becomes of x, of row 16 m + 8 h + l / 4. out: where the
// tile's first row goes; rows from `count` on go nowhere.
template <class T, int kWidth, int kTiles, class Value>
__device__ __forceinline__ void write_rows(const float (&sums)[kTiles][kWidth / 8][4], uint32_t tile, int first, Value value,
                                           T* out, int64_t stride, int count, int width) {
  using Rows_ = Tile<kWidth>;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int d = 0; d < kWidth / 8; ++d) {
        const uint32_t both = pack<T>(value(m, h, sums[m][d][2 * h]), value(m, h, sums[m][d][2 * h + 1]));
        store_shared(Rows_::at(tile, first + 16 * m + 8 * h + lane / 4, d) + lane % 4 * 4, both);
      }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 16 * kTiles * Rows_::kChunks / 32; ++i) {
    const int place = lane + i * 32, row = first + place / Rows_::kChunks, chunk = place % Rows_::kChunks;
    if (row >= count || chunk * 8 >= width) continue;
    *reinterpret_cast<uint4*>(out + row * stride + chunk * 8) = load_shared(Rows_::at(tile, row, chunk));
  }
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
