// Attention's forward, tile by tile without a (queries, keys) matrix: Dao et al. 2022, Dao 2023.
//
// A block owns 16 kRowTiles rows for each of its warps. Of the keys it meets the tiles that places allow some row, in
// order, and leaves out those of which a boolean mask keeps nothing; so a row's result depends on neither the batch nor
// the padding, bit for bit. The next tile is copied while one is computed with.
//
// Scores are kept as the products themselves, whose exponential is 2^(scale / ln 2 * score), the scale costing nothing; or,
// where something is added to them (kLaden), as they are: a mask's lowest finite number would overflow if it were multiplied.
#pragma once

#include "attention_scores.cuh"
#include "attention_tiles.h"

namespace fasttx::cuda {

template <class T, int kWidth, int kRowTiles, int kKeys, bool kLaden>
struct AttentionForward {
  using Rows_ = Tile<kWidth>;
  static constexpr int kQueries = 16 * kRowTiles * kAttentionWarps;
  static constexpr bool kKeepsQueries = kWidth <= 32;  // in registers
  static constexpr uint32_t kQueryBytes = kQueries * 2 * kWidth, kKeyBytes = kKeys * 2 * kWidth;

  using ScoresOf = Scores<T, kRowTiles, kKeys, false>;
  using Values = typename ScoresOf::Values;

  const AttentionFwd& args;
  const AttentionProblem& problem;
  ScoresOf of;  // the warp's rows
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t queries = shared_address(attention_shared);
  float unit;  // scores are multiplied by it to be exponents of 2

  // Of this lane: sums of its rows, their largest score, and its part of their sum of exponentials.
  float sums[kRowTiles][kWidth / 8][4] = {};
  float largest[kRowTiles][2], total[kRowTiles][2] = {};

  __device__ __forceinline__ explicit AttentionForward(const AttentionFwd& args)
      : args(args), problem(args.problem), of(args.problem) {}

  __device__ __forceinline__ uint32_t keys_of(int stage) const { return queries + kQueryBytes + stage * 2 * kKeyBytes; }

  // Under a causal mask the last rows have most to do: they begin first.
  __device__ __forceinline__ Place place() const {
    return place_of_queries(problem, gridDim.x - 1 - block_number(), kQueries);
  }

  __device__ __forceinline__ void run() {
    const Place place = this->place();
    const int sequence = place.sequence, head = place.head, row_count = place.count;
    const Tokens keys = tokens_of(sequence, problem.keys, problem.cu_keys, problem.key_lengths);
    const int key_count = keys.count, first_row = place.first;
    if (first_row >= row_count) return;
    of.sequence = sequence, of.head = head, of.row_count = row_count, of.column_count = key_count;
    of.first_row = first_row + warp * kRowTiles * 16;
    of.seen = kLaden && problem.seen != nullptr ? problem.seen + sequence * problem.seen_stride : nullptr;
    unit = kLaden && problem.scaled ? kLog2e : problem.scale * kLog2e;
    for (auto& tile : largest) tile[0] = tile[1] = -INFINITY;

    const int last_row = min(first_row + kQueries, row_count) - 1;
    const int begin = max(first_row + problem.lo, 0) / kKeys * kKeys, end = min(key_count, last_row + problem.hi + 1);
    // Every row sees all of the tiles from `full` to `ragged`.
    const int full = last_row + problem.lo, ragged = min(key_count, first_row + problem.hi + 1);

    using Copier = typename Rows_::template Copier<T>;
    Copier key(rows_at<T>(problem.key, sequence, head / problem.group, keys.first), problem.key.token,
               problem.width);
    Copier value(rows_at<T>(problem.value, sequence, head / problem.group, keys.first), problem.value.token,
                 problem.value_width);
    // The next tile of which masks keep anything.
    const auto met = [&](int at) {
      if constexpr (kLaden) {
        while (at < end && of.template kept_of<kKeys>(first_row, at) == Kept::nothing) at += kKeys;
      }
      return at;
    };
    const auto after = [&](int at) { return met(at + kKeys); };
    const int first_met = met(begin);
    int copied = 0;  // where the copiers are
    const auto copy = [&](int at, int stage) {
      const uint8_t* of_keys = of.seen == nullptr ? nullptr : of.seen + at;
      key.skip(at - copied);
      value.skip(at - copied);
      copied = at;
      key.template copy<kKeys>(keys_of(stage), key_count - at, of_keys);
      value.template copy<kKeys>(keys_of(stage) + kKeyBytes, key_count - at, of_keys);
      commit_copies();
    };
    Copier(rows_at<T>(problem.query, sequence, head, place.token), problem.query.token, problem.width)
        .template copy<kQueries>(queries, row_count - first_row);
    copy(first_met, 0);

    auto of_query = Rows_::left();
    auto of_key = Rows_::transposed();
    auto of_value = Rows_::right();
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

    for (int at = first_met, stage = 0, next; at < end; at = next, stage ^= 1) {
      wait_copies<0>();
      // The other stage is free: all have computed with it.
      __syncthreads();
      next = after(at);
      if (next < end) copy(next, stage ^ 1);
      if constexpr (kLaden) of.forget();
      // Addresses are worked out anew for each tile: kept, they would be too many registers.
      of_query.forget(), of_key.forget(), of_value.forget();
      Values scores;
      multiply_rows<T, kWidth, kRowTiles, kKeys>(scores, load_query, keys_of(stage), of_key);
      if constexpr (kLaden) of.add_to(scores, at, of.template kept_of<kKeys>(first_row, at));
      if (at < full || at + kKeys > ragged) of.mask_places(scores, at);
      take(scores);
      if (kLaden && problem.dropout.active) drop(scores, at);
      add_product<T, kWidth, kRowTiles, kKeys>(sums, scores, keys_of(stage) + kKeyBytes, of_value);
    }
    // Of a block that has met no tile, the first one's copies may still be on their way.
    wait_copies<0>();
    __syncthreads();
    finish();
  }

  // Takes the tile into the online softmax (Milakov and Gimelshein 2018): scores become exponentials, sums shrink.
  __device__ __forceinline__ void take(Values& scores) {
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
        const auto exponentials = [&](auto exponent) {
#pragma unroll
          for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float& score = scores[m][j][2 * h + e];
              score = exp2_approx(exponent(score));
              sum += score;
            }
        };
        if (kLaden && problem.scaled) {
          exponentials([&](float score) { return (score - base) * unit; });
        } else {
          exponentials([&](float score) { return fmaf(score, unit, -(base * unit)); });
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

  __device__ __forceinline__ void drop(Values& exponentials, int at) const {
    const uint64_t seed = seed_of(problem.dropout);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
        const uint32_t bits = of.drawn(seed, m, at + 8 * j);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          exponentials[m][j][i] = (bits & 1u << i) != 0 ? exponentials[m][j][i] : 0.f;
      }
  }

  // Normalises and writes the rows.
  __device__ __forceinline__ void finish() const {
    const Place place = this->place();
    const int64_t index = row_index(problem, place.sequence, place.head, place.token - place.first);
    float factor[kRowTiles][2];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float sum = sum_of_row(total[m][h]), inverse = sum == 0.f ? 0.f : 1.f / sum;
        const int row = place.first + (warp * kRowTiles + m) * 16 + h * 8 + lane / 4;
        factor[m][h] = kLaden ? inverse * problem.dropout.keep_scale : inverse;
        if (args.lse == nullptr || lane % 4 != 0 || row >= place.count) continue;
        args.lse[index + row] = fmaf(largest[m][h], unit * kLn2, logf(sum));
        const float base = largest[m][h] == -INFINITY ? 0.f : largest[m][h];
        reinterpret_cast<float2*>(args.stats)[index + row] = make_float2(base, inverse);
      }
    write_rows<T, kWidth, kRowTiles>(
        sums, queries, warp * kRowTiles * 16, [&](int m, int h, float x) { return x * factor[m][h]; },
        rows_to<T>(args.out, place.sequence, place.head, place.token), args.out.token, place.count - place.first,
        problem.value_width);
  }
};

}  // namespace fasttx::cuda

// The kernels of a dtype.
#define FASTTX_ATTENTION_FWD(T, level, width, tiles, keys)                                                    \
  extern "C" __global__ void __launch_bounds__(fasttx::cuda::kAttentionThreads, 2)                            \
      attention_fwd_##level##_##width##_##T(const __grid_constant__ fasttx::cuda::AttentionFwd args) {        \
    constexpr bool kLaden = fasttx::cuda::Level::level == fasttx::cuda::Level::laden;                         \
    fasttx::cuda::AttentionForward<fasttx::cuda::T, width, tiles, keys, kLaden>(args).run();                  \
  }
