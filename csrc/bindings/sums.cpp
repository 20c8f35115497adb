#include "sums.h"

namespace fasttx::bindings {
namespace {

void reduce(int dtype, const ReduceRows& sum) {
  const Kernel<ReduceRows>& kernel = table().reduce_rows[dtype];
  kernel.run(sum, nullptr, 0, kernel.plan(sum).items);
}

}  // namespace

LineSums::LineSums(int dtype, const ReduceRows& sum)
    : dtype_(dtype), sum_(sum), blocks_((sum.rows + kSumBlock - 1) / kSumBlock) {
  STD_TORCH_CHECK(blocks_ <= kBlocks, "more lines than sums are taken of");
  if (blocks_ == 0) reduce(dtype, sum);
}

void LineSums::finished(int64_t begin, int64_t end) {
  const int64_t block = begin / kSumBlock, rows = std::min(kSumBlock, sum_.rows - block * kSumBlock);
  if (lines_finished_[block].fetch_add(end - begin) + end - begin < rows) return;
  if (blocks_ == 1) return reduce(dtype_, sum_);

  const auto accumulate = static_cast<DType>(dtype_) == DType::f64 ? DType::f64 : DType::f32;
  const int64_t bytes = accumulate == DType::f64 ? sizeof(double) : sizeof(float);
  char* first = static_cast<char*>(const_cast<void*>(sum_.partial)) + block * kSumBlock * sum_.width * bytes;
  reduce(static_cast<int>(accumulate),
         {.partial = first, .out = first, .rows = rows, .width = sum_.width, .row_stride = sum_.width});
  if (blocks_finished_.fetch_add(1) + 1 < blocks_) return;
  ReduceRows blocks = sum_;
  blocks.rows = blocks_;
  blocks.row_stride = kSumBlock * sum_.width;
  reduce(dtype_, blocks);
}

}  // namespace fasttx::bindings
