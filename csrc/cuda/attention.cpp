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
// Of a dtype and level, by width; of a mask's gradient there is but the one level.
using Kernels = Tiled[2 * kWidthCount];

#define FASTTX_FWD(T, level, width, tiles, keys)                     \
  {{"attention_fwd_" #T, "attention_fwd_" #level "_" #width "_" #T}, \
   tiles * kRowsOfTile,                                              \
   2 * width * (tiles * kRowsOfTile + 4 * keys)},
#define FASTTX_BWD_QUERIES(T, level, width, keys)                                    \
  {{"attention_bwd_queries_" #T, "attention_bwd_queries_" #level "_" #width "_" #T}, \
   kRowsOfTile,                                                                      \
   2 * width * (2 * kRowsOfTile + 4 * keys)},
#define FASTTX_BWD_KEYS(T, level, width, queries)                              \
  {{"attention_bwd_keys_" #T, "attention_bwd_keys_" #level "_" #width "_" #T}, \
   kRowsOfTile,                                                                \
   2 * width * (2 * kRowsOfTile + 4 * queries) + 2 * 16 * queries},

#define FASTTX_BWD_BIAS(T, width, keys)                            \
  {{"attention_bwd_bias_" #T, "attention_bwd_bias_" #width "_" #T}, \
   keys,                                                           \
   2 * width * (2 * kRowsOfTile + 2 * keys)},

Kernels forward[2] = {{FASTTX_ATTENTION_FWD_TILES(FASTTX_FWD, bf16)}, {FASTTX_ATTENTION_FWD_TILES(FASTTX_FWD, fp16)}};
Kernels of_queries[2] = {{FASTTX_ATTENTION_BWD_QUERIES_TILES(FASTTX_BWD_QUERIES, bf16)},
                         {FASTTX_ATTENTION_BWD_QUERIES_TILES(FASTTX_BWD_QUERIES, fp16)}};
Kernels of_keys[2] = {{FASTTX_ATTENTION_BWD_KEYS_TILES(FASTTX_BWD_KEYS, bf16)},
                      {FASTTX_ATTENTION_BWD_KEYS_TILES(FASTTX_BWD_KEYS, fp16)}};
Kernels of_bias[2] = {{FASTTX_ATTENTION_BWD_BIAS_TILES(FASTTX_BWD_BIAS, bf16)},
                      {FASTTX_ATTENTION_BWD_BIAS_TILES(FASTTX_BWD_BIAS, fp16)}};
Kernel rows[2] = {{"attention_rows", "attention_rows_bf16"}, {"attention_rows", "attention_rows_fp16"}};
Kernel seen{"mask_tiles", "keys_seen"};
Kernel tiles_of_mask[2] = {{"mask_tiles", "mask_tiles_bf16"}, {"mask_tiles", "mask_tiles_fp16"}};

Tiled& choose(Kernels& kernels, const AttentionProblem& problem, int laden) {
  const int width = problem.width > problem.value_width ? problem.width : problem.value_width;
  int index = 0;
  while (kWidths[index] < width) ++index;
  return kernels[laden * kWidthCount + index];
}

// Of blocks that own a tile of one head each: of queries, or of keys.
Grid grid_of(const AttentionProblem& problem, int owned, bool keys) {
  const int64_t tokens = keys ? problem.keys : problem.queries, heads = problem.heads / (keys ? problem.group : 1);
  const bool packed = problem.cu_queries != nullptr;
  const int64_t tiles = packed ? tokens / owned + problem.sequences : (tokens + owned - 1) / owned;
  return {uint32_t(tiles * heads * (packed ? 1 : problem.sequences))};
}

template <class Args>
int launch_tiles(Tiled& tiled, const Args& args, bool keys, Queue queue) {
  return launch(tiled.kernel, grid_of(args.problem, tiled.owned, keys), kThreads, tiled.shared, args, queue);
}

// Hopper's forward, by dtype and width.
#define FASTTX_SM90(T) \
  {{"attention_fwd_sm90", "attention_fwd_sm90_64_" #T}, {"attention_fwd_sm90", "attention_fwd_sm90_128_" #T}}
Kernel forward_sm90[2][2] = {FASTTX_SM90(bf16), FASTTX_SM90(fp16)};

// Heads, tokens and width of a tensor, which TMA may copy: no dimension repeats what it has, nor is any too far.
MappedTensor mapped(const Rows& rows, const AttentionProblem& problem, int width, int tokens, int heads, int box_tokens,
                    int dtype) {
  const auto sequences = uint64_t(problem.cu_queries == nullptr ? problem.sequences : 1);
  MappedTensor tensor{rows.data, dtype == 1, {uint64_t(width), uint64_t(tokens), uint64_t(heads), sequences}, {},
                      {64, uint32_t(box_tokens), 1, 1}};
  const int64_t strides[] = {rows.token, rows.head, rows.sequence};
  for (int i = 0; i < 3; ++i) tensor.strides[i] = tensor.sizes[i + 1] == 1 ? 16 : 2 * uint64_t(strides[i]);
  return tensor;
}
bool can_be_mapped(const MappedTensor& tensor) {
  for (const uint64_t size : tensor.sizes)
    if (size == 0) return false;
  for (const uint64_t stride : tensor.strides)
    if (stride == 0 || stride >= uint64_t{1} << 40) return false;
  return true;
}

// Whether Hopper's kernel takes the call; then `error` is the launch's.
bool launch_sm90(const AttentionFwd& args, int dtype, Queue queue, int& error) {
  const AttentionProblem& problem = args.problem;
  const int width = problem.width > problem.value_width ? problem.width : problem.value_width;
  if (width <= 32 || capability(queue) != 90 || !has_image("attention_fwd_sm90")) return false;
  const int heads = problem.heads / problem.group;
  const auto query = mapped(problem.query, problem, problem.width, problem.queries, problem.heads, 64, dtype);
  const auto key = mapped(problem.key, problem, problem.width, problem.keys, heads, kSm90Keys, dtype);
  const auto value = mapped(problem.value, problem, problem.value_width, problem.keys, heads, kSm90Keys, dtype);
  if (!can_be_mapped(query) || !can_be_mapped(key) || !can_be_mapped(value)) return false;
  AttentionFwdSm90 of_maps{{}, {}, {}, args};
  error = encode(of_maps.query, query);
  if (error == 0) error = encode(of_maps.key, key);
  if (error == 0) error = encode(of_maps.value, value);
  if (error != 0) return true;
  const int columns = width <= 64 ? 64 : 128, queries = 64 * kSm90Groups;
  const uint32_t shared = 2 * columns * (queries + 2 * kSm90Stages * kSm90Keys) + 8 * (1 + 4 * kSm90Stages);
  Kernel& kernel = forward_sm90[dtype - 1][columns / 128];
  error = launch(kernel, grid_of(problem, queries, false), kSm90Threads, shared, of_maps, queue);
  return true;
}

int launch_rows(const AttentionBwd& args, int dtype, Queue queue) {
  const AttentionProblem& problem = args.problem;
  const int64_t sequences = problem.cu_queries == nullptr ? problem.sequences : 1;
  const int64_t count = sequences * problem.heads * problem.queries, rows_of_block = kThreads / 16;
  const Grid grid{uint32_t((count + rows_of_block - 1) / rows_of_block)};
  return launch(rows[dtype - 1], grid, kThreads, 0, args, queue);
}

}  // namespace

extern "C" int fasttx_cuda_attention_fwd(const AttentionFwd* args, int dtype, int laden, Queue queue) {
  if (int error = 0; !laden && launch_sm90(*args, dtype, queue, error)) return error;
  return launch_tiles(choose(forward[dtype - 1], args->problem, laden), *args, false, queue);
}

extern "C" int fasttx_cuda_attention_bwd(const AttentionBwd* args, int dtype, Queue queue) {
  const AttentionProblem& problem = args->problem;
  if (const int error = launch_rows(*args, dtype, queue); error != 0) return error;
  Tiled& queries = choose(of_queries[dtype - 1], problem, args->laden);
  if (const int error = launch_tiles(queries, *args, false, queue); error != 0) return error;
  return launch_tiles(choose(of_keys[dtype - 1], problem, args->laden), *args, true, queue);
}

extern "C" int fasttx_cuda_attention_bias_bwd(const AttentionBiasBwd* args, int dtype, Queue queue) {
  if (const int error = launch_rows(args->bwd, dtype, queue); error != 0) return error;
  Tiled& tiled = choose(of_bias[dtype - 1], args->bwd.problem, 0);
  const int64_t across = (args->keys + tiled.owned - 1) / tiled.owned, down = (args->queries + kRowsOfTile - 1) / kRowsOfTile;
  const Grid grid{uint32_t(across * down * args->sequences * args->heads)};
  return launch(tiled.kernel, grid, kThreads, tiled.shared, *args, queue);
}

extern "C" int fasttx_cuda_mask_tiles(const MaskTiles* args, int sequences, int dtype, Queue queue) {
  const int64_t down = (args->queries + kTileQueries - 1) / kTileQueries, across = (args->keys + kTileKeys - 1) / kTileKeys;
  const Grid grid{uint32_t((across + 7) / 8 * down * sequences * args->heads)};
  return launch(tiles_of_mask[dtype - 1], grid, 256, 0, *args, queue);
}

extern "C" int fasttx_cuda_keys_seen(const KeysSeen* args, int sequences, Queue queue) {
  return launch(seen, {uint32_t((args->keys + 31) / 32), uint32_t(sequences)}, 256, 0, *args, queue);
}

}  // namespace fasttx::cuda
