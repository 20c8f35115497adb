// Attention's forward, tile by tile without a (queries, keys) matrix: Dao et al. 2022, Dao 2023.
//
// A block owns 16 kRowTiles rows for each of its warps. Of the keys it meets the tiles that places allow some row, in
// order, and leaves out those of which a boolean mask keeps nothing; so a row's result depends on neither the batch nor
// the padding, bit for bit. The next tile is copied while one is computed with.
//
// Scores are kept as the products themselves, whose exponential is 2^(scale / ln 2 * score), the scale costing nothing; or,
// where something is added to them (kLaden), as they are: a mask's lowest finite number would overflow if it were multiplied.
#pragma once

#include "attention.cuh"

namespace fasttx::cuda {

template <class T, int kWidth, int kRowTiles, int kKeys, bool kLaden>
struct AttentionForward {
  using Rows_ = Tile<kWidth>;
  static constexpr int kQueries = 16 * kRowTiles * kAttentionWarps;
  static constexpr bool kKeepsQueries = kWidth <= 64;  // in registers
  static constexpr uint32_t kQueryBytes = kQueries * 2 * kWidth, kKeyBytes = kKeys * 2 * kWidth;
  static constexpr uint32_t kShared = kQueryBytes + 4 * kKeyBytes;

  const AttentionFwd& args;
  const AttentionProblem& problem;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t queries = shared_address(attention_shared);

  // Of this block.
  int sequence, head, first_row, row_count, key_count;
  const uint8_t* seen;
  float unit;  // scores are multiplied by it to be exponents of 2

  // Of this lane: sums of its rows, their largest score, and its part of their sum of exponentials.
  float sums[kRowTiles][kWidth / 8][4] = {};
  float largest[kRowTiles][2], total[kRowTiles][2] = {};

  __device__ __forceinline__ explicit AttentionForward(const AttentionFwd& args) : args(args), problem(args.problem) {}

  __device__ __forceinline__ uint32_t keys_of(int stage) const { return queries + kQueryBytes + stage * 2 * kKeyBytes; }

  __device__ __forceinline__ int row_of(int tile, int half) const {
    return first_row + (warp * kRowTiles + tile) * 16 + half * 8 + lane / 4;
  }

  __device__ __forceinline__ void run() {
    // Under a causal mask the last rows have most to do: they begin first.
    const Owned owned = owned_tile(gridDim.x - 1 - blockIdx.x, problem.queries, problem.heads, problem.cu_queries,
                                   problem.sequences, kQueries);
    sequence = owned.sequence, head = owned.head, first_row = owned.first;
    const Tokens rows = tokens_of(sequence, problem.queries, problem.cu_queries, nullptr);
    const Tokens keys = tokens_of(sequence, problem.keys, problem.cu_keys, problem.key_lengths);
    row_count = rows.count, key_count = keys.count;
    if (first_row >= row_count) return;
    unit = kLaden ? kLog2e : problem.scale * kLog2e;
    seen = kLaden && problem.seen != nullptr ? problem.seen + sequence * problem.seen_stride : nullptr;
    for (auto& tile : largest) tile[0] = tile[1] = -INFINITY;

    const T* key = rows_at<T>(problem.key, sequence, head / problem.group, keys.first);
    const T* value = rows_at<T>(problem.value, sequence, head / problem.group, keys.first);
    const int last_row = min(first_row + kQueries, row_count) - 1;
    const int begin = max(first_row + problem.lo, 0) / kKeys * kKeys, end = min(key_count, last_row + problem.hi + 1);
    // Every row sees all of the tiles from `full` to `ragged`.
    const int full = last_row + problem.lo, ragged = min(key_count, first_row + problem.hi + 1);

    const auto copy = [&](int at, int stage) {
      const uint8_t* of_keys = seen == nullptr ? nullptr : seen + at;
      const int count = key_count - at;
      Rows_::template copy<kKeys>(keys_of(stage), key + at * problem.key.token, problem.key.token, count, problem.width,
                                  of_keys);
      Rows_::template copy<kKeys>(keys_of(stage) + kKeyBytes, value + at * problem.value.token, problem.value.token, count,
                                  problem.value_width, of_keys);
      commit_copies();
    };
    Rows_::template copy<kQueries>(queries, rows_at<T>(problem.query, sequence, head, rows.first + first_row),
                                   problem.query.token, row_count - first_row, problem.width);
    copy(begin, 0);

    const auto of_query = Rows_::left();
    const auto of_key = Rows_::transposed();
    const auto of_value = Rows_::right();
    uint32_t kept_queries[kKeepsQueries ? kRowTiles : 1][kKeepsQueries ? kWidth / 16 : 1][4];
    if constexpr (kKeepsQueries) {
      wait_copies<0>();
      __syncthreads();
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int step = 0; step < kWidth / 16; ++step)
          load_matrices(kept_queries[m][step], of_query.at(queries, (warp * kRowTiles + m) * 16, step));
    }
    const auto load_query = [&](uint32_t(&to)[4], int m, int step) {
      if constexpr (kKeepsQueries) {
#pragma unroll
        for (int i = 0; i < 4; ++i) to[i] = kept_queries[m][step][i];
      } else {
        load_matrices(to, of_query.at(queries, (warp * kRowTiles + m) * 16, step));
      }
    };

    for (int at = begin, stage = 0; at < end; at += kKeys, stage ^= 1) {
      uint32_t keep[kRowTiles][2];
      bool any = true;
      if constexpr (kLaden) any = read_mask(keep, at);
      wait_copies<0>();
      // The other stage is free: all have computed with it.
      if constexpr (kLaden) {
        any = __syncthreads_or(any);
      } else {
        __syncthreads();
      }
      if (at + kKeys < end) copy(at + kKeys, stage ^ 1);
      if (!any) continue;
      float scores[kRowTiles][kKeys / 8][4];
      multiply_rows<T, kWidth, kRowTiles, kKeys>(scores, load_query, keys_of(stage), of_key);
      if constexpr (kLaden) add_to(scores, keep, at);
      if (at < full || at + kKeys > ragged) mask_places(scores, at);
      take(scores);
      if (kLaden && problem.dropout.active) drop(scores, at);
      add_product<T, kWidth, kRowTiles, kKeys>(sums, scores, keys_of(stage) + kKeyBytes, of_value);
    }
    finish(rows.first);
  }

  // What places forbid becomes -infinity.
  __device__ __forceinline__ void mask_places(float (&scores)[kRowTiles][kKeys / 8][4], int at) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = row_of(m, h), column = at + lane % 4 * 2;
        const int first = row + problem.lo - column, last = min(key_count - 1, row + problem.hi) - column;
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (8 * j + e < first || 8 * j + e > last) scores[m][j][2 * h + e] = -INFINITY;
      }
  }

  // Takes the tile into the online softmax (Milakov and Gimelshein 2018): scores become exponentials, sums shrink.
  __device__ __forceinline__ void take(float (&scores)[kRowTiles][kKeys / 8][4]) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float larger = largest[m][h];
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) larger = fmaxf(fmaxf(scores[m][j][2 * h], scores[m][j][2 * h + 1]), larger);
        larger = max_of_row(larger);
        // A finite base in place of -infinity keeps -inf - -inf out: rows with no key yet get zeros.
        const float base = larger == -INFINITY ? 0.f : larger;
        const float shrink = exp2_approx((largest[m][h] - base) * unit);
        float sum = 0.f;
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& score = scores[m][j][2 * h + e];
            score = exp2_approx(kLaden ? (score - base) * unit : fmaf(score, unit, -base * unit));
            sum += score;
          }
        largest[m][h] = larger;
        total[m][h] = fmaf(total[m][h], shrink, sum);
#pragma unroll
        for (int d = 0; d < kWidth / 8; ++d) {
          sums[m][d][2 * h] *= shrink;
          sums[m][d][2 * h + 1] *= shrink;
        }
      }
  }

  // Bit 2 j + e of a row's word: whether the boolean mask, and what is known of keys, keep column 8 j + 2 (l % 4) + e.
  // Returns whether any is kept.
  __device__ __forceinline__ bool read_mask(uint32_t (&keep)[kRowTiles][2], int at) const {
    const bool boolean = problem.mask.kind == MaskKind::boolean;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) keep[m][h] = ~0u;
    if (!boolean && seen == nullptr) return true;
    bool any = false;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = min(row_of(m, h), row_count - 1);
        const auto* mask = static_cast<const uint8_t*>(problem.mask.data) + sequence * problem.mask.stride_b +
                           head * problem.mask.stride_h + row * problem.mask.stride_q;
        keep[m][h] = 0;
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int column = at + 8 * j + lane % 4 * 2 + e;
            if (column >= key_count) continue;
            bool is_kept = seen == nullptr || seen[column] != 0;
            if (boolean) is_kept = is_kept && mask[column * problem.mask.stride_k] != 0;
            keep[m][h] |= uint32_t(is_kept) << (2 * j + e);
          }
        any |= keep[m][h] != 0;
      }
    return any;
  }

  // Products become scores: scaled, with what is added to them, and -infinity where the boolean mask keeps nothing.
  __device__ __forceinline__ void add_to(float (&scores)[kRowTiles][kKeys / 8][4], const uint32_t (&keep)[kRowTiles][2],
                                         int at) const {
    const bool additive = problem.mask.kind == MaskKind::additive || problem.mask.kind == MaskKind::additive_float;
    const float slope = problem.slopes == nullptr ? 0.f : problem.slopes[head];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = row_of(m, h);
        const int64_t of_row = sequence * problem.mask.stride_b + head * problem.mask.stride_h +
                               min(row, row_count - 1) * problem.mask.stride_q;
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int column = at + 8 * j + lane % 4 * 2 + e;
            float score = scores[m][j][2 * h + e] * problem.scale;
            if (additive && column < key_count)
              score += mask_value<T>(problem.mask, of_row + column * problem.mask.stride_k);
            if (problem.slopes != nullptr) score -= slope * fabsf(float(column - row) - problem.origin);
            scores[m][j][2 * h + e] = keep[m][h] >> (2 * j + e) & 1 ? score : -INFINITY;
          }
      }
  }

  __device__ __forceinline__ void drop(float (&exponentials)[kRowTiles][kKeys / 8][4], int at) const {
    const uint64_t seed = seed_of(problem.dropout);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
        const uint32_t bits =
            kept(problem.dropout, seed, sequence, head, first_row + (warp * kRowTiles + m) * 16, at + 8 * j);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if ((bits >> i & 1) == 0) exponentials[m][j][i] = 0.f;
      }
  }

  // Normalises and writes the rows, by way of shared memory, where a warp's queries lay: 16 bytes an access.
  __device__ __forceinline__ void finish(int64_t first) const {
    const int64_t index = row_index(problem, sequence, head, first);
    const float keep_scale = kLaden ? problem.dropout.keep_scale : 1.f;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float sum = sum_of_row(total[m][h]), inverse = sum == 0.f ? 0.f : 1.f / sum;
        const int row = row_of(m, h);
        if (args.lse != nullptr && lane % 4 == 0 && row < row_count) {
          args.lse[index + row] = fmaf(largest[m][h], unit * kLn2, logf(sum));
          const float base = largest[m][h] == -INFINITY ? 0.f : largest[m][h];
          reinterpret_cast<float2*>(args.stats)[index + row] = make_float2(base, inverse);
        }
#pragma unroll
        for (int d = 0; d < kWidth / 8; ++d) {
          const float factor = inverse * keep_scale;
          const uint32_t both = pack<T>(sums[m][d][2 * h] * factor, sums[m][d][2 * h + 1] * factor);
          store_shared(Rows_::at(queries, row - first_row, d) + lane % 4 * 4, both);
        }
      }
    __syncwarp();
    const T* out = rows_at<T>(args.out, sequence, head, first + first_row);
    constexpr int kRows = 16 * kRowTiles;
#pragma unroll
    for (int i = 0; i < kRows * Rows_::kChunks / 32; ++i) {
      const int place = lane + i * 32, row = warp * kRows + place / Rows_::kChunks, chunk = place % Rows_::kChunks;
      if (first_row + row >= row_count || chunk * 8 >= problem.value_width) continue;
      *reinterpret_cast<uint4*>(const_cast<T*>(out) + row * args.out.token + chunk * 8) =
          load_shared(Rows_::at(queries, row, chunk));
    }
  }
};

}  // namespace fasttx::cuda

// The kernels of a dtype: by the width that holds a head's, plain or laden with what is added to scores, masks or drops.
#define FASTTX_ATTENTION_FWD(T, level, width, tiles, keys, laden)                                        \
  extern "C" __global__ void __launch_bounds__(fasttx::cuda::kAttentionThreads, 2)                       \
      attention_fwd_##level##_##width##_##T(const __grid_constant__ fasttx::cuda::AttentionFwd args) {   \
    fasttx::cuda::AttentionForward<fasttx::cuda::T, width, tiles, keys, laden>(args).run();              \
  }
#define FASTTX_ATTENTION_FWDS(T)                    \
  FASTTX_ATTENTION_FWD(T, plain, 32, 2, 64, false)  \
  FASTTX_ATTENTION_FWD(T, plain, 64, 2, 64, false)  \
  FASTTX_ATTENTION_FWD(T, plain, 96, 2, 32, false)  \
  FASTTX_ATTENTION_FWD(T, plain, 128, 2, 32, false) \
  FASTTX_ATTENTION_FWD(T, laden, 32, 1, 64, true)   \
  FASTTX_ATTENTION_FWD(T, laden, 64, 1, 64, true)   \
  FASTTX_ATTENTION_FWD(T, laden, 96, 1, 64, true)   \
  FASTTX_ATTENTION_FWD(T, laden, 128, 1, 64, true)
