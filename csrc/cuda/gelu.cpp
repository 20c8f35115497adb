#include "launchers.h"

namespace fasttx::cuda {
namespace {

constexpr uint32_t kThreads = 256, kAccesses = 2;

Kernel forward[2][3] = {{FASTTX_BY_DTYPE("gelu", "gelu_fwd_none")}, {FASTTX_BY_DTYPE("gelu", "gelu_fwd_tanh")}};
Kernel backward[2][3] = {{FASTTX_BY_DTYPE("gelu", "gelu_bwd_none")}, {FASTTX_BY_DTYPE("gelu", "gelu_bwd_tanh")}};
Kernel backward_with_sums[2][3] = {{FASTTX_BY_DTYPE("gelu", "gelu_bwd_sums_none")},
                                   {FASTTX_BY_DTYPE("gelu", "gelu_bwd_sums_tanh")}};

// Values of one access.
int64_t lanes(bool vector, int dtype) { return vector ? (dtype == 0 ? 4 : 8) : 1; }

Grid one_thread_each(int64_t groups) {
  constexpr int64_t kGroups = kThreads * kAccesses;
  return {uint32_t((groups + kGroups - 1) / kGroups)};
}

}  // namespace

extern "C" int fasttx_cuda_gelu_fwd(const GeluFwd* args, int dtype, int tanh, Queue queue) {
  const Grid grid = one_thread_each(args->size / lanes(args->vector, dtype));
  return launch(forward[tanh][dtype], grid, kThreads, 0, *args, queue);
}

extern "C" int fasttx_cuda_gelu_bwd(const GeluBwd* args, int dtype, int tanh, Queue queue) {
  const int64_t n = lanes(args->vector, dtype);
  if (args->dbias == nullptr) {
    return launch(backward[tanh][dtype], one_thread_each(args->size / n), kThreads, 0, *args, queue);
  }
  const Grid grid{uint32_t((args->width + 32 * n - 1) / (32 * n)), partial_lines(args->size / args->width)};
  return launch(backward_with_sums[tanh][dtype], grid, kThreads, 0, *args, queue);
}

}  // namespace fasttx::cuda
