// Attention's backward, tile by tile: Dao et al. 2022, Dao 2023. Probabilities are made again from the forward's statistics.
//
// Three kernels: of each row what its tiles need (AttentionRows); the gradient of queries, whose blocks own rows; those of
// keys and values, whose blocks own keys. Every sum is one thread's, in order.
#pragma once

#include "attention_scores.cuh"
#include "attention_tiles.h"

namespace fasttx::cuda {

// delta = the sum of grad * out over a row, less lse's gradient; and the offset that makes 2^(unit score + offset) a
// probability. 16 lanes take a row.
template <class T>
__device__ __forceinline__ void attention_rows(const AttentionBwd& args) {
  const AttentionProblem& problem = args.problem;
  const bool packed = problem.cu_queries != nullptr;
  const int64_t row = int64_t(blockIdx.x) * (kAttentionThreads / 16) + threadIdx.x / 16;
  const int64_t heads = row / problem.queries, token = row % problem.queries;
  const bool is_there = heads < int64_t(packed ? 1 : problem.sequences) * problem.heads;
  const int lane = threadIdx.x % 16, sequence = int(heads / problem.heads), head = int(heads % problem.heads);
  float sum = 0.f;
  if (is_there && lane * 8 < problem.value_width) {
    float out[8], grad[8];
    load(out, rows_at<T>(args.out, sequence, head, token) + lane * 8);
    load(grad, rows_at<T>(args.grad, sequence, head, token) + lane * 8);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(out[i], grad[i], sum);
  }
#pragma unroll
  for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (!is_there || lane != 0) return;
  if (args.grad_lse != nullptr) sum -= args.grad_lse[row];
  const float2 stats = reinterpret_cast<const float2*>(args.stats)[row];
  const float offset = log2f(stats.y) - (problem.scaled ? 0.f : stats.x * problem.scale * kLog2e);
  args.rows[row] = make_float4(problem.scaled ? stats.x : 0.f, offset, sum, 0.f);
}

// A probability of a score in the kernels' own units: of a row's statistics, as attention_rows leaves them, its largest score
// being 0 there where scores are not scaled.
template <bool kLaden>
__device__ __forceinline__ float probability(float score, const float4& row, float unit) {
  return exp2_approx(fmaf(kLaden ? score - row.x : score, unit, row.y));
}

// Scores become the probabilities that dropout kept, and gradients of probabilities those of scores.
template <bool kLaden>
__device__ __forceinline__ void differentiate(float& score, float& gradient, const float4& row, float unit, bool keep,
                                              float keep_scale) {
  const float p = probability<kLaden>(score, row, unit);
  if constexpr (kLaden) {
    gradient = keep ? gradient * keep_scale : 0.f;
    score = keep ? p : 0.f;
  } else {
    score = p;
  }
  gradient = p * (gradient - row.z);
}

}  // namespace fasttx::cuda
