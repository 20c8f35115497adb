// Attention's kernels and their tiles, for the compiler of the device and that of the host alike.
//
// plain: nothing but places says which keys a row sees. laden: something is added to scores, masks or drops them.
#pragma once

#include <stdint.h>

namespace fasttx::cuda {

enum class Level { plain, laden };

// Head widths that there are kernels for; another takes the next.
constexpr int kWidths[] = {32, 64, 96, 128};
constexpr int kMostWidth = 128, kWidthCount = 4;

// X(T, level, width, row tiles of a warp, keys of a tile): wide heads have smaller tiles, so that two blocks fit on a
// multiprocessor of sm_80 (65536 registers, 164 KiB of shared memory). Two row tiles halve what is read of shared memory.
#define FASTTX_ATTENTION_FWD_TILES(X, T) \
  X(T, plain, 32, 2, 64)                 \
  X(T, plain, 64, 2, 64)                 \
  X(T, plain, 96, 2, 32)                 \
  X(T, plain, 128, 2, 32)                \
  X(T, laden, 32, 1, 64)                 \
  X(T, laden, 64, 1, 64)                 \
  X(T, laden, 96, 1, 64)                 \
  X(T, laden, 128, 1, 64)

// Hopper's forward, of levels plain: warpgroups that compute, 64 queries each, keys of a tile, and tiles copied ahead. Its
// widths are 64 and 128.
constexpr int kSm90Groups = 2, kSm90Keys = 128, kSm90Stages = 2, kSm90Threads = 128 * (1 + kSm90Groups);

// X(T, level, width, keys of a tile).
#define FASTTX_ATTENTION_BWD_QUERIES_TILES(X, T) \
  X(T, plain, 32, 64)                            \
  X(T, plain, 64, 64)                            \
  X(T, plain, 96, 32)                            \
  X(T, plain, 128, 32)                           \
  X(T, laden, 32, 64)                            \
  X(T, laden, 64, 64)                            \
  X(T, laden, 96, 32)                            \
  X(T, laden, 128, 32)

// X(T, level, width, queries of a tile).
#define FASTTX_ATTENTION_BWD_KEYS_TILES(X, T) \
  X(T, plain, 32, 64)                         \
  X(T, plain, 64, 64)                         \
  X(T, plain, 96, 32)                         \
  X(T, plain, 128, 32)                        \
  X(T, laden, 32, 64)                         \
  X(T, laden, 64, 32)                         \
  X(T, laden, 96, 32)                         \
  X(T, laden, 128, 16)

// X(T, width, keys of a tile).
#define FASTTX_ATTENTION_BWD_BIAS_TILES(X, T) \
  X(T, 32, 64)                                \
  X(T, 64, 64)                                \
  X(T, 96, 32)                                \
  X(T, 128, 32)

}  // namespace fasttx::cuda
