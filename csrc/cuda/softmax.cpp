#include "launchers.h"

namespace fasttx::cuda {
namespace {

// Kernels for rows of up to `widest` values, by `threads` that share `rows` rows.
struct Class {
  uint32_t widest, threads, rows;
  Kernel forward[3], backward[3];
};

#define FASTTX_BOTH(name) \
  {FASTTX_BY_DTYPE("softmax", "softmax_fwd_" name)}, {FASTTX_BY_DTYPE("softmax", "softmax_bwd_" name)}
Class classes[] = {
    {64, 128, 16, FASTTX_BOTH("64")},      {256, 128, 4, FASTTX_BOTH("256")},
    {1024, 128, 4, FASTTX_BOTH("1024")},   {4096, 128, 1, FASTTX_BOTH("4096")},
    {16384, 512, 1, FASTTX_BOTH("16384")}, {UINT32_MAX, 512, 1, FASTTX_BOTH("wide")},
};

Class& class_of(uint32_t width) {
  Class* found = classes;
  while (width > found->widest) ++found;
  return *found;
}

}  // namespace

extern "C" int fasttx_cuda_softmax_fwd(const SoftmaxFwd* args, int dtype, Queue queue) {
  Class& c = class_of(args->width);
  return launch(c.forward[dtype], {(args->rows + c.rows - 1) / c.rows}, c.threads, 0, *args, queue);
}

extern "C" int fasttx_cuda_softmax_bwd(const SoftmaxBwd* args, int dtype, Queue queue) {
  Class& c = class_of(args->width);
  return launch(c.backward[dtype], {(args->rows + c.rows - 1) / c.rows}, c.threads, 0, *args, queue);
}

}  // namespace fasttx::cuda
