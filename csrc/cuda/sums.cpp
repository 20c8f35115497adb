#include "launchers.h"

namespace fasttx::cuda {
namespace {

Kernel sum_partials[3] = {FASTTX_BY_DTYPE("sums", "sum_partials")};

}  // namespace

extern "C" int fasttx_cuda_sum_partials(const SumPartials* args, int matrices, int dtype, Queue queue) {
  return launch(sum_partials[dtype], {(args->width + 31) / 32, uint32_t(matrices)}, 256, 0, *args, queue);
}

}  // namespace fasttx::cuda
