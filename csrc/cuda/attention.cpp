#include "attention_tiles.h"
#include "launchers.h"

namespace fasttx::cuda {
namespace {

constexpr uint32_t kThreads = 128, kRowsOfTile = 16 * kThreads / 32;

// A kernel with its tile: tokens that a block owns, and the bytes of shared memory that it takes.
struct Tiled {
  Kernel kernel;
  int owned;
  uint32_t shared;
};

#define FASTTX_FWD(T, level, width, tiles, keys)                       \
  {{"attention_fwd_" #T, "attention_fwd_" #level "_" #width "_" #T},   \
   int(tiles * kRowsOfTile),                                           \
   2 * width * (tiles * kRowsOfTile + 4 * keys)},
Tiled bf16_forward[2 * kWidthCount] = {FASTTX_ATTENTION_FWD_TILES(FASTTX_FWD, bf16)};
Tiled fp16_forward[2 * kWidthCount] = {FASTTX_ATTENTION_FWD_TILES(FASTTX_FWD, fp16)};

int width_index(const AttentionProblem& problem) {
  const int width = problem.width > problem.value_width ? problem.width : problem.value_width;
  int index = 0;
  while (kWidths[index] < width) ++index;
  return index;
}

// Blocks that own a tile of one head each.
Grid blocks(const AttentionProblem& problem, int tokens, int heads, int owned) {
  const int64_t tiles = problem.cu_queries == nullptr ? (int64_t(tokens) + owned - 1) / owned
                                                      : int64_t(tokens) / owned + problem.sequences;
  return {uint32_t(tiles * heads * (problem.cu_queries == nullptr ? problem.sequences : 1))};
}

Kernel keys_seen{"keys_seen", "keys_seen"};

}  // namespace

extern "C" int fasttx_cuda_attention_fwd(const AttentionFwd* args, int dtype, int laden, Queue queue) {
  Tiled& tiled = (dtype == 1 ? bf16_forward : fp16_forward)[laden * kWidthCount + width_index(args->problem)];
  const Grid grid = blocks(args->problem, args->problem.queries, args->problem.heads, tiled.owned);
  return launch(tiled.kernel, grid, kThreads, tiled.shared, *args, queue);
}

extern "C" int fasttx_cuda_keys_seen(const KeysSeen* args, int sequences, Queue queue) {
  return launch(keys_seen, {uint32_t((args->keys + 31) / 32), uint32_t(sequences)}, 256, 0, *args, queue);
}

}  // namespace fasttx::cuda
