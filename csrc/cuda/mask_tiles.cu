// What a mask keeps, in one look at it: tile by tile, and of which keys any query sees anything.
#include "arguments.h"
#include "values.cuh"

namespace fasttx::cuda {
namespace {

constexpr int kThreads = 256, kLines = 8;
static_assert(kTileKeys == 32);

// A warp takes a tile of keys, a lane one of them. Blocks follow each other along the keys, then along the queries of a
// head.
template <class T>
__device__ __forceinline__ void mask_tiles(const MaskTiles& args) {
  const int down = (args.queries + kTileQueries - 1) / kTileQueries, across = (args.keys + kTileKeys - 1) / kTileKeys;
  constexpr int kWarps = kThreads / 32;
  const int blocks = (across + kWarps - 1) / kWarps, lines = int(blockIdx.x / blocks);
  const int tile = int(blockIdx.x % blocks) * kWarps + threadIdx.x / 32, key = tile * kTileKeys + threadIdx.x % 32;
  const int line = lines % down, matrix = lines / down;
  if (tile >= across) return;
  const int64_t at = matrix / args.heads * args.mask.stride_b + matrix % args.heads * args.mask.stride_h +
                     key * args.mask.stride_k;
  const int first = line * kTileQueries, last = min(first + kTileQueries, args.queries);
  bool any = false, all = true;
  if (key < args.keys) {
#pragma unroll 8
    for (int row = first; row < last; ++row) {
      const int64_t place = at + row * args.mask.stride_q;
      bool is_kept;
      if (args.mask.kind == MaskKind::boolean) {
        is_kept = static_cast<const uint8_t*>(args.mask.data)[place] != 0;
      } else if (args.mask.kind == MaskKind::additive_float) {
        is_kept = static_cast<const float*>(args.mask.data)[place] != -INFINITY;
      } else {
        is_kept = widen(static_cast<const T*>(args.mask.data)[place]) != -INFINITY;
      }
      any |= is_kept;
      all &= is_kept;
    }
  }
  any = __any_sync(~0u, any);
  all = __all_sync(~0u, all);
  if (threadIdx.x % 32 == 0)
    args.tiles[int64_t(lines) * across + tile] = uint8_t(!any ? Kept::nothing : all ? Kept::all : Kept::some);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads) mask_tiles_bf16(const __grid_constant__ MaskTiles args) {
  mask_tiles<bf16>(args);
}
extern "C" __global__ void __launch_bounds__(kThreads) mask_tiles_fp16(const __grid_constant__ MaskTiles args) {
  mask_tiles<fp16>(args);
}

// Which keys any query of a sequence sees through a boolean mask: the others are padding, of which nothing is read. A block
// takes 32 keys of one sequence: thread (line, lane) every kLines-th row of the mask.
extern "C" __global__ void __launch_bounds__(kThreads) keys_seen(const __grid_constant__ KeysSeen args) {
  __shared__ bool shared[kLines][32];
  const int lane = threadIdx.x % 32, line = threadIdx.x / 32, key = blockIdx.x * 32 + lane;
  const auto* mask = static_cast<const uint8_t*>(args.mask.data) + blockIdx.y * args.mask.stride_b;
  bool any = false;
  if (key < args.keys) {
    for (int head = 0; head < args.heads; ++head)
#pragma unroll 8
      for (int row = line; row < args.queries; row += kLines)
        any |= mask[head * args.mask.stride_h + row * args.mask.stride_q + key * args.mask.stride_k] != 0;
  }
  shared[line][lane] = any;
  __syncthreads();
  if (line != 0 || key >= args.keys) return;
#pragma unroll
  for (int other = 1; other < kLines; ++other) any |= shared[other][lane];
  args.seen[int64_t(blockIdx.y) * args.keys + key] = any;
}

}  // namespace fasttx::cuda
