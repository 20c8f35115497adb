#include "launchers.h"

namespace fasttx::cuda {
namespace {

// A kernel for rows of up to size * accesses * 16 bytes: `size` threads a row, in blocks of `threads`, as in layer_norm.cu.
struct Class {
  Kernel kernels[3];
  uint32_t size, accesses, threads;

  uint32_t widest(int dtype) const { return size * accesses * (dtype == 0 ? 4 : 8); }
  uint32_t rows() const { return threads / size; }  // that a block has at once
};

#define FASTTX_CLASS(way, size, accesses, threads) \
  {{FASTTX_BY_DTYPE("layer_norm", "layer_norm_" way "_" #size "x" #accesses)}, size, accesses, threads}

Class forward[] = {FASTTX_CLASS("fwd", 8, 1, 128),   FASTTX_CLASS("fwd", 32, 1, 128),  FASTTX_CLASS("fwd", 32, 2, 128),
                   FASTTX_CLASS("fwd", 32, 3, 128),  FASTTX_CLASS("fwd", 32, 4, 128),  FASTTX_CLASS("fwd", 128, 2, 128),
                   FASTTX_CLASS("fwd", 128, 4, 128), FASTTX_CLASS("fwd", 256, 4, 256), FASTTX_CLASS("fwd", 512, 4, 512)};
Class backward[] = {FASTTX_CLASS("bwd", 8, 1, 256),   FASTTX_CLASS("bwd", 32, 1, 256),  FASTTX_CLASS("bwd", 32, 2, 128),
                    FASTTX_CLASS("bwd", 32, 3, 128),  FASTTX_CLASS("bwd", 32, 4, 128),  FASTTX_CLASS("bwd", 128, 2, 128),
                    FASTTX_CLASS("bwd", 256, 2, 256), FASTTX_CLASS("bwd", 512, 2, 512)};
Kernel forward_wide[3] = {FASTTX_BY_DTYPE("layer_norm", "layer_norm_fwd_wide")};
Kernel backward_wide[3] = {FASTTX_BY_DTYPE("layer_norm", "layer_norm_bwd_wide")};
Kernel backward_sums[3] = {FASTTX_BY_DTYPE("layer_norm", "layer_norm_bwd_sums")};

// The first class that a row fits into; null: it is too wide for all.
template <size_t count>
Class* class_of(Class (&classes)[count], int dtype, uint32_t width) {
  for (Class& each : classes) {
    if (width <= each.widest(dtype)) return &each;
  }
  return nullptr;
}

uint32_t blocks(uint64_t count, uint64_t each) { return uint32_t((count + each - 1) / each); }

// Enough blocks for any GPU, and beyond that several turns for each: a team then keeps its weights.
uint32_t forward_blocks(uint32_t rows, uint32_t at_once) {
  constexpr uint32_t kEnough = 4096, kMostTurns = 16;
  const uint32_t all = blocks(rows, at_once), turns = all / kEnough;
  return blocks(all, turns < 1 ? 1 : turns > kMostTurns ? kMostTurns : turns);
}

}  // namespace

extern "C" uint32_t fasttx_cuda_layer_norm_lines(uint32_t rows, uint32_t width, int dtype) {
  constexpr uint32_t kMost = 256, kTurns = 4;
  const Class* fitting = class_of(backward, dtype, width);
  const uint32_t lines = blocks(rows, kTurns * uint64_t(fitting != nullptr ? fitting->rows() : 8));
  return lines < 1 ? 1 : lines < kMost ? lines : kMost;
}

extern "C" int fasttx_cuda_layer_norm_is_wide(uint32_t width, int dtype) {
  return class_of(backward, dtype, width) == nullptr;
}

extern "C" int fasttx_cuda_layer_norm_fwd(const LayerNormFwd* args, int dtype, Queue queue) {
  if (Class* fitting = class_of(forward, dtype, args->width)) {
    return launch(fitting->kernels[dtype], {forward_blocks(args->rows, fitting->rows())}, fitting->threads, 0, *args, queue);
  }
  return launch(forward_wide[dtype], {args->rows}, 512, 0, *args, queue);
}

extern "C" int fasttx_cuda_layer_norm_bwd(const LayerNormBwd* args, int dtype, Queue queue) {
  const uint32_t lines = fasttx_cuda_layer_norm_lines(args->rows, args->width, dtype);
  if (Class* fitting = class_of(backward, dtype, args->width)) {
    return launch(fitting->kernels[dtype], {lines}, fitting->threads, 0, *args, queue);
  }
  if (const int error = launch(backward_wide[dtype], {args->rows}, 512, 0, *args, queue); error != 0) return error;
  if (args->dweight == nullptr && args->dbias == nullptr) return 0;
  const Grid grid{blocks(args->width, 32 * (dtype == 0 ? 4 : 8)), lines};
  return launch(backward_sums[dtype], grid, 256, 0, *args, queue);
}

}  // namespace fasttx::cuda
