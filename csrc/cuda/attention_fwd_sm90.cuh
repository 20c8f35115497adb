// Attention's forward for Hopper, where places alone say which keys a row sees: Shah et al. 2024, FlashAttention-3.
//
// One thread of a block copies tiles by TMA; two warpgroups compute, with 64 rows of queries each. What there is room for
// in shared memory is copied ahead. While a tile's weights are multiplied with its values, the next tile's scores are
// computed, and made weights of. The tiles, and so a row's result, are the same whatever else is in the batch.
#pragma once

#include "attention_scores.cuh"
#include "attention_tiles.h"
#include "primitives_sm90.cuh"

namespace fasttx::cuda {

template <class T, int kWidth>
struct AttentionForwardSm90 {
  static_assert(kWidth % 64 == 0);
  static constexpr int kKeys = kSm90Keys, kGroups = kSm90Groups, kQueries = 64 * kGroups, kStages = kSm90Stages;
  static constexpr int kThreads = 128 * kGroups;  // that compute
  static constexpr int kColumns = kWidth / 64;    // blocks of 64 columns, 128 bytes a row, that a tile consists of
  // Of a warpgroup's queries, and of a tile of keys or values: a block of columns, and all of them.
  static constexpr uint32_t kQueryBlock = 64 * 128, kQueryBytes = kColumns * kQueryBlock;
  static constexpr uint32_t kKeyBlock = kKeys * 128, kKeyBytes = kColumns * kKeyBlock;
  static constexpr uint32_t kBarriers = kGroups * kQueryBytes + 2 * kStages * kKeyBytes;  // where they begin

  using ScoresOf = Scores<T, 1, kKeys, false>;
  using Values = typename ScoresOf::Values;
  enum { kOfKeys, kOfValues };

  const AttentionFwdSm90& args;
  const AttentionProblem& problem;
  const uint32_t shared = shared_address(attention_shared);
  const Place place;
  const Tokens keys;
  int begin, end;  // keys that some row of the block sees, the first of them a tile's

  __device__ __forceinline__ explicit AttentionForwardSm90(const AttentionFwdSm90& args)
      : args(args),
        problem(args.forward.problem),
        // Under a causal mask the last rows have most to do: they begin first.
        place(place_of_queries(problem, gridDim.x - 1 - block_number(), kQueries)),
        keys(tokens_of(place.sequence, problem.keys, problem.cu_keys, problem.key_lengths)) {
    begin = max(place.first + problem.lo, 0) / kKeys * kKeys;
    end = min(keys.count, last_row() + problem.hi + 1);
  }

  __device__ __forceinline__ int last_row() const { return min(place.first + kQueries, place.count) - 1; }
  __device__ __forceinline__ uint32_t queries_of(int group) const { return shared + group * kQueryBytes; }
  __device__ __forceinline__ uint32_t tile_of(int what, int stage) const {
    return shared + kGroups * kQueryBytes + (2 * stage + what) * kKeyBytes;
  }
  __device__ __forceinline__ uint32_t queries_there() const { return shared + kBarriers; }
  __device__ __forceinline__ uint32_t there(int what, int stage) const {
    return shared + kBarriers + 8 * (1 + 4 * stage + what);
  }
  // Whether all warps are done with the tile.
  __device__ __forceinline__ uint32_t free(int what, int stage) const { return there(what, stage) + 16; }

  __device__ __forceinline__ void run() {
    if (place.first >= place.count) return;
    if (threadIdx.x == 0) {
      init_barrier(queries_there(), 1);
      for (int stage = 0; stage < kStages; ++stage)
        for (int what = kOfKeys; what <= kOfValues; ++what) {
          init_barrier(there(what, stage), 1);
          init_barrier(free(what, stage), kThreads / 32);
        }
      fence_barrier_inits();
    }
    __syncthreads();
    // Warpgroups part with what they need of 65536 registers.
    if (threadIdx.x < 128) {
      set_registers<40, false>();
      if (threadIdx.x == 0) copy();
    } else {
      set_registers<232, true>();
      Consumer(*this).run();
    }
  }

  // Copies the queries, unless they see no key, and each tile once there is room for it.
  __device__ __forceinline__ void copy() const {
    const bool packed = problem.cu_queries != nullptr;
    const int sequence = packed ? 0 : place.sequence, key_head = place.head / problem.group;
    const int first_key = int(keys.first);
    if (begin >= end) return;
    arrive_expecting(queries_there(), kGroups * kQueryBytes);
    for (int group = 0; group < kGroups; ++group)
      for (int i = 0; i < kColumns; ++i)
        copy_box(queries_of(group) + i * kQueryBlock, args.query,
                 {64 * i, int(place.token) + 64 * group, place.head, sequence}, queries_there());
    for (int at = begin, stage = 0, parity = 1; at < end; at += kKeys) {
      for (int what = kOfKeys; what <= kOfValues; ++what) {
        wait_barrier(free(what, stage), parity);
        arrive_expecting(there(what, stage), kKeyBytes);
        for (int i = 0; i < kColumns; ++i)
          copy_box(tile_of(what, stage) + i * kKeyBlock, what == kOfKeys ? args.key : args.value,
                   {64 * i, first_key + at, key_head, sequence}, there(what, stage));
      }
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
  }

  // A warpgroup's rows.
  struct Consumer {
    const AttentionForwardSm90& block;
    const AttentionProblem& problem;
    const int lane = threadIdx.x % 32, group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4;
    ScoresOf of;
    float unit;  // scores are multiplied by it to be exponents of 2
    int full, ragged;

    // Of this lane: sums of its rows, their largest score, and its part of their sum of exponentials; the weights of the
    // tile at hand, as the left operand of products; what sums have to shrink by.
    float sums[kWidth / 8][4] = {};
    float largest[2] = {-INFINITY, -INFINITY}, total[2] = {}, shrink[2];
    uint32_t weights[kKeys / 16][4];

    __device__ __forceinline__ explicit Consumer(const AttentionForwardSm90& block)
        : block(block), problem(block.problem), of(block.problem) {
      of.sequence = block.place.sequence, of.head = block.place.head;
      of.row_count = block.place.count, of.column_count = block.keys.count;
      of.first_row = block.place.first + 64 * group + 16 * warp;
      unit = problem.scale * kLog2e;
      // Every row sees all of the tiles from `full` to `ragged`.
      full = block.last_row() + problem.lo, ragged = min(block.keys.count, block.place.first + problem.hi + 1);
    }

    __device__ __forceinline__ void run() {
      if (block.begin < block.end) {
        Values scores;
        int at = block.begin, stage = 0, parity = 0;
        wait_barrier(block.queries_there(), 0);
        begin_scores(scores[0], stage, parity);
        wait_products<0>(scores[0]);
        release(kOfKeys, stage);
        take(scores, at);
        pack_weights(scores);
        while (at + kKeys < block.end) {
          const int next = stage + 1 == kStages ? 0 : stage + 1, next_parity = next == 0 ? parity ^ 1 : parity;
          begin_scores(scores[0], next, next_parity);
          begin_sums(stage, parity);
          wait_products<1>(scores[0]);
          release(kOfKeys, next);
          take(scores, at += kKeys);
          wait_products<0>(sums);
          release(kOfValues, stage);
#pragma unroll
          for (int d = 0; d < kWidth / 8; ++d)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[d][i] *= shrink[i / 2];
          pack_weights(scores);
          stage = next, parity = next_parity;
        }
        clear_values(at, stage, parity);
        begin_sums(stage, parity);
        wait_products<0>(sums);
      }
      finish();
    }

    __device__ __forceinline__ void release(int what, int stage) const {
      if (lane == 0) arrive(block.free(what, stage));
    }

    // scores = queries keys^T, one group of products.
    __device__ __forceinline__ void begin_scores(float (&scores)[kKeys / 8][4], int stage, int parity) const {
      wait_barrier(block.there(kOfKeys, stage), parity);
      const uint64_t queries = operand(block.queries_of(group)), keys = operand(block.tile_of(kOfKeys, stage));
      fence_products();
#pragma unroll
      for (int step = 0; step < kWidth / 16; ++step)
        begin_product<T>(scores, advance(queries, step / 4 * kQueryBlock + step % 4 * 32),
                         advance(keys, step / 4 * kKeyBlock + step % 4 * 32), step > 0);
      commit_products();
    }

    // sums += weights values, one group of products.
    __device__ __forceinline__ void begin_sums(int stage, int parity) {
      wait_barrier(block.there(kOfValues, stage), parity);
      const uint64_t values = operand(block.tile_of(kOfValues, stage), kKeyBlock);
      fence_products();
#pragma unroll
      for (int step = 0; step < kKeys / 16; ++step) begin_product<T>(sums, weights[step], advance(values, step * 2048));
      commit_products();
    }

    // Values of the last tile that are beyond the sequence's end, but not the tensor's, become zeros: their weights are, and
    // they may be no numbers.
    __device__ __forceinline__ void clear_values(int at, int stage, int parity) const {
      const int rows = block.keys.count - at;
      if (rows >= kKeys || (problem.key_lengths == nullptr && problem.cu_keys == nullptr)) return;
      wait_barrier(block.there(kOfValues, stage), parity);
      const uint32_t tile = block.tile_of(kOfValues, stage);
      for (int i = threadIdx.x - 128 + rows * 8; i < kKeys * 8; i += kThreads)
#pragma unroll
        for (int column = 0; column < kColumns; ++column)
          store_shared(tile + column * kKeyBlock + i * 16, make_uint4(0, 0, 0, 0));
      fence_shared_writes();
      sync_some<1, kThreads>();
    }

    // Takes the tile into the online softmax (Milakov and Gimelshein 2018): scores become exponentials.
    __device__ __forceinline__ void take(Values& scores, int at) {
      if (at < full || at + kKeys > ragged) of.mask_places(scores, at);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float larger = largest[h];
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) larger = fmaxf(fmaxf(scores[0][j][2 * h], scores[0][j][2 * h + 1]), larger);
        larger = max_of_row(larger);
        // A finite base in place of -infinity keeps -inf - -inf out: rows with no key yet get zeros.
        const float base = larger == -INFINITY ? 0.f : larger;
        shrink[h] = exp2_approx((largest[h] - base) * unit);
        float sum = 0.f;
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& score = scores[0][j][2 * h + e];
            score = exp2_approx(fmaf(score, unit, -base * unit));
            sum += score;
          }
        largest[h] = larger;
        total[h] = fmaf(total[h], shrink[h], sum);
      }
    }

    __device__ __forceinline__ void pack_weights(const Values& scores) {
#pragma unroll
      for (int step = 0; step < kKeys / 16; ++step)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const auto& part = scores[0][2 * step + i / 2];
          weights[step][i] = pack<T>(part[2 * (i % 2)], part[2 * (i % 2) + 1]);
        }
    }

    // Normalises and writes the rows, by way of the queries' memory, which all warps of the warpgroup are done with.
    __device__ __forceinline__ void finish() const {
      const Place& place = block.place;
      const AttentionFwd& forward = block.args.forward;
      const int64_t index = row_index(problem, place.sequence, place.head, place.token - place.first);
      float factor[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float sum = sum_of_row(total[h]), inverse = sum == 0.f ? 0.f : 1.f / sum;
        const int row = of.row_of(0, h);
        factor[h] = inverse;
        if (forward.lse == nullptr || lane % 4 != 0 || row >= place.count) continue;
        forward.lse[index + row] = fmaf(largest[h], unit * kLn2, logf(sum));
        const float base = largest[h] == -INFINITY ? 0.f : largest[h];
        reinterpret_cast<float2*>(forward.stats)[index + row] = make_float2(base, inverse);
      }
      if (group == 0) {
        sync_some<2, 128>();
      } else {
        sync_some<3, 128>();
      }
      const int first = 64 * group;
      write_rows<T, kWidth, 1>(
          reinterpret_cast<const float(&)[1][kWidth / 8][4]>(sums), block.queries_of(group), 16 * warp,
          [&](int, int h, float x) { return x * factor[h]; },
          rows_to<T>(forward.out, place.sequence, place.head, place.token + first), forward.out.token,
          place.count - place.first - first, problem.value_width);
    }
  };
};

}  // namespace fasttx::cuda

// The kernels of a dtype.
#define FASTTX_ATTENTION_FWD_SM90(T, width)                                                     \
  extern "C" __global__ void __launch_bounds__(fasttx::cuda::kSm90Threads, 1)                   \
      attention_fwd_sm90_##width##_##T(const __grid_constant__ fasttx::cuda::AttentionFwdSm90 args) { \
    fasttx::cuda::AttentionForwardSm90<fasttx::cuda::T, width>(args).run();                     \
  }
