// Kernels whose items each write a line of partial sums, and the sum of those lines, in one parallel region.
#pragma once

#include <array>

#include "common.h"

namespace fasttx::bindings {

// Adds up lines while they are made: who finishes the last line of a block sums the block, and who sums the last block
// sums the blocks. Which thread that is changes no bit: reduce_rows adds by the same blocks.
class LineSums {
 public:
  // `sum` is that of all the lines; blocks are summed in place, to the first line of each.
  LineSums(int dtype, const ReduceRows& sum);
  // Lines `begin` to `end`, of one block, are made.
  void finished(int64_t begin, int64_t end);

 private:
  static constexpr int64_t kBlocks = (kSumMaxChunks + kSumBlock - 1) / kSumBlock;
  const int dtype_;
  const ReduceRows sum_;
  const int64_t blocks_;
  std::array<std::atomic<int64_t>, kBlocks> lines_finished_{};
  std::atomic<int64_t> blocks_finished_{0};
};

// Runs a kernel whose items are the lines that `sum` adds up.
template <class Args>
void launch_and_sum(int dtype, const Kernel<Args>& kernel, const Args& args, const ReduceRows& sum) {
  const Plan plan = kernel.plan(args);
  LineSums sums(dtype, sum);
  torch::stable::parallel_for(0, plan.items, plan.grain, [&](int64_t begin, int64_t end) {
    const Workspace scratch(plan.scratch_bytes);
    while (begin < end) {
      const int64_t stop = std::min(end, (begin / kSumBlock + 1) * kSumBlock);
      kernel.run(args, scratch.data(), begin, stop);
      sums.finished(begin, stop);
      begin = stop;
    }
  });
}

}  // namespace fasttx::bindings
