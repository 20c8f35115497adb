// The gradients of attention's keys and values: a block owns 16 of them for each of its warps, of one head of theirs, and
// meets the queries that see any of them, of all heads that share it. Products are transposed: keys down, queries across.
#pragma once

#include "attention_bwd.cuh"

namespace fasttx::cuda {

template <class T, int kWidth, int kQueries, bool kLaden>
struct AttentionKeysGradient {
  using Rows_ = Tile<kWidth>;
  using Copier = typename Rows_::template Copier<T>;
  using ScoresOf = Scores<T, 1, kQueries, true>;
  static constexpr int kKeys = 16 * kAttentionWarps;
  static constexpr bool kKeepsRows = kWidth <= 32;  // in registers
  static constexpr uint32_t kKeyBytes = kKeys * 2 * kWidth, kQueryBytes = kQueries * 2 * kWidth;
  static constexpr uint32_t kStageBytes = 2 * kQueryBytes + kQueries * 16;

  static __device__ __forceinline__ void run(const AttentionBwd& args) {
    const AttentionProblem& problem = args.problem;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t key_tile = shared_address(attention_shared), value_tile = key_tile + kKeyBytes;
    const auto queries_of = [&](int stage) { return value_tile + kKeyBytes + stage * kStageBytes; };

    const Place place = place_of_keys(problem, block_number(), kKeys);
    const int sequence = place.sequence, first_key = place.first;
    if (first_key >= place.count) return;
    const Tokens rows = tokens_of(sequence, problem.queries, problem.cu_queries, nullptr);
    const int key_count = tokens_of(sequence, problem.keys, problem.cu_keys, problem.key_lengths).count;
    ScoresOf of(problem);
    of.sequence = sequence, of.row_count = key_count, of.column_count = rows.count;
    of.first_row = first_key + warp * 16;
    of.seen = kLaden && problem.seen != nullptr ? problem.seen + sequence * problem.seen_stride : nullptr;
    const float unit = kLaden && problem.scaled ? kLog2e : problem.scale * kLog2e;

    const int last_key = min(first_key + kKeys, key_count) - 1;
    const int begin = max(first_key - problem.hi, 0) / kQueries * kQueries;
    const int end = last_key < first_key ? begin : min(rows.count, last_key - problem.lo + 1);

    const auto copy_keys = [&](const Rows& from, int width, uint32_t tile) {
      const uint8_t* of_keys = of.seen == nullptr ? nullptr : of.seen + first_key;
      Copier(rows_at<T>(from, sequence, place.head, place.token), from.token, width)
          .template copy<kKeys>(tile, key_count - first_key, of_keys);
    };
    copy_keys(problem.key, problem.width, key_tile);
    copy_keys(problem.value, problem.value_width, value_tile);
    commit_copies();

    // The next tile of queries to be copied: of which head, and where.
    int head = place.head * problem.group, next_head = head, next = begin;
    const int last_head = next_head + problem.group;
    const auto step = [&] {
      next += kQueries;
      if (next >= end) next = begin, ++next_head;
    };
    const auto copy_next = [&](int stage) {
      if constexpr (kLaden) {
        // Tiles of which masks keep nothing are left out.
        for (; next_head < last_head; step()) {
          of.head = next_head;
          if (of.template kept_of<kKeys>(next, first_key) != Kept::nothing) break;
        }
        of.head = head;
      }
      if (next_head == last_head) return;
      const Copier query(rows_at<T>(problem.query, sequence, next_head, rows.first + next), problem.query.token,
                         problem.width);
      const Copier grad(rows_at<T>(args.grad, sequence, next_head, rows.first + next), args.grad.token,
                        problem.value_width);
      const uint32_t tile = queries_of(stage);
      query.template copy<kQueries>(tile, rows.count - next);
      grad.template copy<kQueries>(tile + kQueryBytes, rows.count - next);
      const float4* stats = args.rows + row_index(problem, sequence, next_head, rows.first) + next;
      if (threadIdx.x < kQueries)
        copy_async(tile + 2 * kQueryBytes + threadIdx.x * 16, stats + threadIdx.x, next + int(threadIdx.x) < rows.count);
      commit_copies();
      step();
    };
    if (begin < end) copy_next(0);

    auto of_key = Rows_::left(), of_query = Rows_::transposed(), as_right = Rows_::right();
    uint32_t kept_rows[2][kKeepsRows ? kWidth / 16 : 1][4];
    if constexpr (kKeepsRows) {
      wait_copies<0>();
      __syncthreads();
#pragma unroll
      for (int step = 0; step < kWidth / 16; ++step) {
        load_matrices(kept_rows[0][step], of_key.at(key_tile, warp * 16, step));
        load_matrices(kept_rows[1][step], of_key.at(value_tile, warp * 16, step));
      }
    }
    const auto load_key = [&](uint32_t tile, int which) {
      return [&, tile, which](uint32_t(&to)[4], int, int step) {
        if constexpr (kKeepsRows) {
#pragma unroll
          for (int i = 0; i < 4; ++i) to[i] = kept_rows[which][step][i];
        } else {
          load_matrices(to, of_key.at(tile, warp * 16, step));
        }
      };
    };

    float dkey[1][kWidth / 8][4] = {}, dvalue[1][kWidth / 8][4] = {};
    int stage = 0;
    for (head = place.head * problem.group; head < last_head; ++head) {
      of.head = head;
      for (int at = begin; at < end; at += kQueries) {
        Kept kept = Kept::all;
        if constexpr (kLaden) {
          of.forget();
          kept = of.template kept_of<kKeys>(at, first_key);
          if (kept == Kept::nothing) continue;
        }
        wait_copies<0>();
        __syncthreads();
        copy_next(stage ^ 1);
        of_key.forget(), of_query.forget(), as_right.forget();
        const uint32_t query_tile = queries_of(stage), grad_tile = query_tile + kQueryBytes;
        typename ScoresOf::Values scores, gradients;
        multiply_rows<T, kWidth, 1, kQueries>(scores, load_key(key_tile, 0), query_tile, of_query);
        multiply_rows<T, kWidth, 1, kQueries>(gradients, load_key(value_tile, 1), grad_tile, of_query);
        if constexpr (kLaden) of.add_to(scores, at, kept);
        if (first_key + kKeys - 1 > at + problem.hi || first_key < at + kQueries - 1 + problem.lo)
          of.mask_places(scores, at);
        const bool drops = kLaden && problem.dropout.active;
        const uint64_t seed = drops ? seed_of(problem.dropout) : 0;
#pragma unroll
        for (int j = 0; j < kQueries / 8; ++j) {
          const uint32_t drawn = drops ? of.drawn(seed, 0, at + 8 * j) : ~0u;
          float4 stats[2];
#pragma unroll
          for (int e = 0; e < 2; ++e)
            stats[e] = load_shared_floats(query_tile + 2 * kQueryBytes + (8 * j + lane % 4 * 2 + e) * 16);
#pragma unroll
          for (int i = 0; i < 4; ++i)
            differentiate<kLaden>(scores[0][j][i], gradients[0][j][i], stats[i % 2], unit, drawn >> i & 1,
                                  problem.dropout.keep_scale);
        }
        add_product<T, kWidth, 1, kQueries>(dvalue, scores, grad_tile, as_right);
        add_product<T, kWidth, 1, kQueries>(dkey, gradients, query_tile, as_right);
        stage ^= 1;
      }
    }
    // Of a block that has met no tile, the first one's copies may still be on their way.
    wait_copies<0>();
    __syncthreads();
    const Place end_place = place_of_keys(problem, block_number(), kKeys);
    const int there =
        tokens_of(end_place.sequence, problem.keys, problem.cu_keys, problem.key_lengths).count - end_place.first;
    const auto write = [&](const float(&sums)[1][kWidth / 8][4], uint32_t tile, float factor, const Rows& to, int width) {
      write_rows<T, kWidth, 1>(
          sums, tile, warp * 16,
          [&](int, int h, float x) { return warp * 16 + h * 8 + lane / 4 < there ? x * factor : 0.f; },
          rows_to<T>(to, end_place.sequence, end_place.head, end_place.token), to.token, end_place.count - end_place.first,
          width);
    };
    write(dkey, key_tile, problem.scale, args.dkey, problem.width);
    write(dvalue, value_tile, kLaden ? problem.dropout.keep_scale : 1.f, args.dvalue, problem.value_width);
  }
};

}  // namespace fasttx::cuda

// The kernels of a dtype.
#define FASTTX_ATTENTION_BWD_KEYS(T, level, width, queries)                                                   \
  extern "C" __global__ void __launch_bounds__(fasttx::cuda::kAttentionThreads, 2)                            \
      attention_bwd_keys_##level##_##width##_##T(const __grid_constant__ fasttx::cuda::AttentionBwd args) {    \
    constexpr bool kLaden = fasttx::cuda::Level::level == fasttx::cuda::Level::laden;                         \
    fasttx::cuda::AttentionKeysGradient<fasttx::cuda::T, width, queries, kLaden>::run(args);                  \
  }
