// The gradient of an additive mask: a block owns a tile of it, and sums over what the mask is broadcast to, in order.
#pragma once

#include "attention_bwd.cuh"

namespace fasttx::cuda {

template <class T, int kWidth, int kKeys>
struct AttentionBiasGradient {
  using Rows_ = Tile<kWidth>;
  using Copier = typename Rows_::template Copier<T>;
  using ScoresOf = Scores<T, 1, kKeys, false>;
  static constexpr int kQueries = 16 * kAttentionWarps, kParts = kKeys / 8;
  static constexpr uint32_t kQueryBytes = kQueries * 2 * kWidth, kKeyBytes = kKeys * 2 * kWidth;

  const AttentionBiasBwd& args;
  const AttentionProblem& problem;
  ScoresOf of;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float sums[kParts][4] = {};

  __device__ __forceinline__ explicit AttentionBiasGradient(const AttentionBiasBwd& args)
      : args(args), problem(args.bwd.problem), of(args.bwd.problem) {}

  __device__ __forceinline__ void run() {
    // The tile: of a mask that repeats along a dim, all of it.
    const int across = (args.keys + kKeys - 1) / kKeys, down = (args.queries + kQueries - 1) / kQueries;
    const int tile = int(blockIdx.x % (across * down)), matrix = int(blockIdx.x / (across * down));
    const int own_row = tile / across * kQueries, own_key = tile % across * kKeys;
    const auto span = [](int own, int size, int step, bool repeats, int& first, int& last) {
      first = repeats ? 0 : own, last = repeats ? size : min(own + step, size);
    };
    int first_sequence, last_sequence, first_head, last_head, first_row, last_row, first_key, last_key;
    span(matrix / args.heads, problem.sequences, 1, args.sequences == 1, first_sequence, last_sequence);
    span(matrix % args.heads, problem.heads, 1, args.heads == 1, first_head, last_head);
    span(own_row, problem.queries, kQueries, args.queries == 1, first_row, last_row);
    span(own_key, problem.keys, kKeys, args.keys == 1, first_key, last_key);
    for (int sequence = first_sequence; sequence < last_sequence; ++sequence)
      for (int head = first_head; head < last_head; ++head)
        for (int row = first_row; row < last_row; row += kQueries)
          for (int key = first_key; key < last_key; key += kKeys) add_tile(sequence, head, row, key);
    write(matrix, own_row, own_key);
  }

  // Adds the gradients of one tile's scores.
  __device__ __forceinline__ void add_tile(int sequence, int head, int row, int key) {
    const uint32_t queries = shared_address(attention_shared), grads = queries + kQueryBytes;
    const uint32_t keys = grads + kQueryBytes, values = keys + kKeyBytes;
    const int key_count = tokens_of(sequence, problem.keys, nullptr, problem.key_lengths).count;
    const int last_row = min(row + kQueries, problem.queries) - 1;
    if (key >= min(key_count, last_row + problem.hi + 1) || key + kKeys <= row + problem.lo) return;
    of.sequence = sequence, of.head = head, of.row_count = problem.queries, of.column_count = key_count;
    of.first_row = row + warp * 16, of.seen = nullptr;

    __syncthreads();  // all are done with the tile before
    const auto copy = [&](const Rows& from, int of_head, int at, int width, uint32_t to, auto rows, int count) {
      Copier(rows_at<T>(from, sequence, of_head, at), from.token, width).template copy<decltype(rows)::value>(to, count - at);
    };
    copy(problem.query, head, row, problem.width, queries, Constant<kQueries>{}, problem.queries);
    copy(args.bwd.grad, head, row, problem.value_width, grads, Constant<kQueries>{}, problem.queries);
    copy(problem.key, head / problem.group, key, problem.width, keys, Constant<kKeys>{}, key_count);
    copy(problem.value, head / problem.group, key, problem.value_width, values, Constant<kKeys>{}, key_count);
    commit_copies();
    float4 stats[2];
    const int64_t index = row_index(problem, sequence, head, 0);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      // A row that is not there has no probabilities.
      stats[h] = make_float4(0.f, -INFINITY, 0.f, 0.f);
      if (of.row_of(0, h) < problem.queries) stats[h] = args.bwd.rows[index + of.row_of(0, h)];
    }
    wait_copies<0>();
    __syncthreads();

    const auto of_row = Rows_::left();
    const auto of_key = Rows_::transposed();
    const auto load = [&](uint32_t from) {
      return [&, from](uint32_t(&to)[4], int, int step) { load_matrices(to, of_row.at(from, warp * 16, step)); };
    };
    typename ScoresOf::Values scores, gradients;
    multiply_rows<T, kWidth, 1, kKeys>(scores, load(queries), keys, of_key);
    multiply_rows<T, kWidth, 1, kKeys>(gradients, load(grads), values, of_key);
    of.add_to(scores, key, Kept::all);
    of.mask_places(scores, key);
    const bool drops = problem.dropout.active;
    const uint64_t seed = drops ? seed_of(problem.dropout) : 0;
#pragma unroll
    for (int j = 0; j < kParts; ++j) {
      const uint32_t kept = drops ? of.drawn(seed, 0, key + 8 * j) : ~0u;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        differentiate<true>(scores[0][j][i], gradients[0][j][i], stats[i / 2], kLog2e, kept >> i & 1,
                            problem.dropout.keep_scale);
        sums[j][i] += gradients[0][j][i];
      }
    }
  }

  // Sums along what repeats, in order, and writes.
  __device__ __forceinline__ void write(int matrix, int own_row, int own_key) {
    __shared__ float shared[kAttentionWarps][kKeys];
    if (args.keys == 1) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float sum = 0.f;
#pragma unroll
        for (int j = 0; j < kParts; ++j) sum += sums[j][2 * h] + sums[j][2 * h + 1];
        sums[0][2 * h] = sum_of_row(sum);
      }
    }
    if (args.queries == 1) {
#pragma unroll
      for (int j = 0; j < kParts; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float sum = sums[j][e] + sums[j][2 + e];
#pragma unroll
          for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
          if (lane < 4) shared[warp][8 * j + lane * 2 + e] = sum;
        }
      __syncthreads();
      for (int column = threadIdx.x; column < kKeys && own_key + column < args.keys; column += kAttentionThreads) {
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < kAttentionWarps; ++w) sum += shared[w][column];
        store(matrix, 0, own_key + column, sum);
      }
      return;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = own_row + warp * 16 + h * 8 + lane / 4;
      if (row >= args.queries) continue;
      if (args.keys == 1) {
        if (lane % 4 == 0) store(matrix, row, 0, sums[0][2 * h]);
        continue;
      }
#pragma unroll
      for (int j = 0; j < kParts; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = own_key + 8 * j + lane % 4 * 2 + e;
          if (column < args.keys) store(matrix, row, column, sums[j][2 * h + e]);
        }
    }
  }

  __device__ __forceinline__ void store(int matrix, int row, int column, float x) const {
    const int64_t at = (int64_t(matrix) * args.queries + row) * args.keys + column;
    if (problem.mask.kind == MaskKind::additive_float) {
      static_cast<float*>(args.dmask)[at] = x;
    } else {
      static_cast<T*>(args.dmask)[at] = narrow<T>(x);
    }
  }
};

}  // namespace fasttx::cuda

// The kernels of a dtype.
#define FASTTX_ATTENTION_BWD_BIAS(T, width, keys)                                                        \
  extern "C" __global__ void __launch_bounds__(fasttx::cuda::kAttentionThreads, 2)                       \
      attention_bwd_bias_##width##_##T(const __grid_constant__ fasttx::cuda::AttentionBiasBwd args) {    \
    fasttx::cuda::AttentionBiasGradient<fasttx::cuda::T, width, keys>(args).run();                       \
  }
