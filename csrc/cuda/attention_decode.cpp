#include "attention_splits.h"
#include "launchers.h"

namespace fasttx::cuda {
namespace {

struct Split {
  int width, rows;  // at most
  Kernel kernel;
};

#define FASTTX_SPLIT(T, width, rows) \
  {width, rows, {"attention_decode", "attention_split_" #width "_" #rows "_" #T}},
Split splits[2][12] = {{FASTTX_DECODE_KERNELS(FASTTX_SPLIT, bf16)}, {FASTTX_DECODE_KERNELS(FASTTX_SPLIT, fp16)}};
Kernel joins[2] = {{"attention_decode", "attention_join_bf16"}, {"attention_decode", "attention_join_fp16"}};

}  // namespace

extern "C" int fasttx_cuda_attention_decode(const AttentionDecode* args, int dtype, Queue queue) {
  const AttentionProblem& problem = args->fwd.problem;
  const int width = problem.width > problem.value_width ? problem.width : problem.value_width;
  Split* found = splits[dtype - 1];
  while (found->width < width || found->rows < problem.group * problem.queries) ++found;
  const Grid grid{uint32_t(args->splits) * uint32_t(problem.heads / problem.group) * uint32_t(problem.sequences)};
  const int error = launch(found->kernel, grid, 128, 0, *args, queue);
  if (error != 0 || args->splits == 1) return error;
  return launch(joins[dtype - 1], {args->rows}, 256, 0, *args, queue);
}

}  // namespace fasttx::cuda
