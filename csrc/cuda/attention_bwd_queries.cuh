// The gradient of attention's queries: a block owns 16 of them for each of its warps.
#pragma once

#include "attention_bwd.cuh"

namespace fasttx::cuda {

template <class T, int kWidth, int kKeys, bool kLaden>
struct AttentionQueriesGradient {
  using Rows_ = Tile<kWidth>;
  using Copier = typename Rows_::template Copier<T>;
  using ScoresOf = Scores<T, 1, kKeys, false>;
  static constexpr int kQueries = 16 * kAttentionWarps;
  static constexpr bool kKeepsRows = kWidth <= 32;  // in registers
  static constexpr uint32_t kQueryBytes = kQueries * 2 * kWidth, kKeyBytes = kKeys * 2 * kWidth;

  static __device__ __forceinline__ void run(const AttentionBwd& args) {
    const AttentionProblem& problem = args.problem;
    const int warp = threadIdx.x / 32;
    const uint32_t queries = shared_address(attention_shared), grads = queries + kQueryBytes;
    const auto keys_of = [&](int stage) { return grads + kQueryBytes + stage * 2 * kKeyBytes; };

    const auto place_now = [&] { return place_of_queries(problem, gridDim.x - 1 - block_number(), kQueries); };
    const Place place = place_now();
    const int sequence = place.sequence, head = place.head, first_row = place.first;
    const Tokens keys = tokens_of(sequence, problem.keys, problem.cu_keys, problem.key_lengths);
    if (first_row >= place.count) return;
    ScoresOf of(problem);
    of.sequence = sequence, of.head = head, of.row_count = place.count, of.column_count = keys.count;
    of.first_row = first_row + warp * 16;
    of.seen = kLaden && problem.seen != nullptr ? problem.seen + sequence * problem.seen_stride : nullptr;
    const float unit = kLaden && problem.scaled ? kLog2e : problem.scale * kLog2e;

    const int last_row = min(first_row + kQueries, place.count) - 1;
    const int begin = max(first_row + problem.lo, 0) / kKeys * kKeys, end = min(keys.count, last_row + problem.hi + 1);
    const int full = last_row + problem.lo, ragged = min(keys.count, first_row + problem.hi + 1);

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
      key.template copy<kKeys>(keys_of(stage), keys.count - at, of_keys);
      value.template copy<kKeys>(keys_of(stage) + kKeyBytes, keys.count - at, of_keys);
      commit_copies();
    };
    Copier(rows_at<T>(problem.query, sequence, head, place.token), problem.query.token, problem.width)
        .template copy<kQueries>(queries, place.count - first_row);
    Copier(rows_at<T>(args.grad, sequence, head, place.token), args.grad.token, problem.value_width)
        .template copy<kQueries>(grads, place.count - first_row);
    copy(first_met, 0);

    float4 stats[2];
    const int64_t index = row_index(problem, sequence, head, place.token - first_row);
#pragma unroll
    for (int h = 0; h < 2; ++h) stats[h] = args.rows[index + min(of.row_of(0, h), place.count - 1)];

    auto of_row = Rows_::left(), of_key = Rows_::transposed(), as_right = Rows_::right();
    uint32_t kept_rows[2][kKeepsRows ? kWidth / 16 : 1][4];
    if constexpr (kKeepsRows) {
      wait_copies<0>();
      __syncthreads();
#pragma unroll
      for (int step = 0; step < kWidth / 16; ++step) {
        load_matrices(kept_rows[0][step], of_row.at(queries, warp * 16, step));
        load_matrices(kept_rows[1][step], of_row.at(grads, warp * 16, step));
      }
    }
    const auto load_row = [&](uint32_t tile, int which) {
      return [&, tile, which](uint32_t(&to)[4], int, int step) {
        if constexpr (kKeepsRows) {
#pragma unroll
          for (int i = 0; i < 4; ++i) to[i] = kept_rows[which][step][i];
        } else {
          load_matrices(to, of_row.at(tile, warp * 16, step));
        }
      };
    };

    float sums[1][kWidth / 8][4] = {};
    for (int at = first_met, stage = 0, next; at < end; at = next, stage ^= 1) {
      wait_copies<0>();
      __syncthreads();
      next = after(at);
      if (next < end) copy(next, stage ^ 1);
      if constexpr (kLaden) of.forget();
      of_row.forget(), of_key.forget(), as_right.forget();
      typename ScoresOf::Values scores, gradients;
      multiply_rows<T, kWidth, 1, kKeys>(scores, load_row(queries, 0), keys_of(stage), of_key);
      multiply_rows<T, kWidth, 1, kKeys>(gradients, load_row(grads, 1), keys_of(stage) + kKeyBytes, of_key);
      if constexpr (kLaden) of.add_to(scores, at, of.template kept_of<kKeys>(first_row, at));
      if (at < full || at + kKeys > ragged) of.mask_places(scores, at);
      const bool drops = kLaden && problem.dropout.active;
      const uint64_t seed = drops ? seed_of(problem.dropout) : 0;
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
        const uint32_t kept = drops ? of.drawn(seed, 0, at + 8 * j) : ~0u;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          differentiate<kLaden>(scores[0][j][i], gradients[0][j][i], stats[i / 2], unit, kept >> i & 1,
                                problem.dropout.keep_scale);
      }
      add_product<T, kWidth, 1, kKeys>(sums, gradients, keys_of(stage), as_right);
    }
    // Of a block that has met no tile, the first one's copies may still be on their way.
    wait_copies<0>();
    __syncthreads();
    const Place end_place = place_now();
    write_rows<T, kWidth, 1>(
        sums, queries, warp * 16, [&](int, int, float x) { return x * problem.scale; },
        rows_to<T>(args.dquery, end_place.sequence, end_place.head, end_place.token), args.dquery.token,
        end_place.count - end_place.first, problem.width);
  }
};

}  // namespace fasttx::cuda

// The kernels of a dtype.
#define FASTTX_ATTENTION_BWD_QUERIES(T, level, width, keys)                                                   \
  extern "C" __global__ void __launch_bounds__(fasttx::cuda::kAttentionThreads, 2)                            \
      attention_bwd_queries_##level##_##width##_##T(const __grid_constant__ fasttx::cuda::AttentionBwd args) { \
    constexpr bool kLaden = fasttx::cuda::Level::level == fasttx::cuda::Level::laden;                         \
    fasttx::cuda::AttentionQueriesGradient<fasttx::cuda::T, width, keys, kLaden>::run(args);                  \
  }
