#include "cuda_common.h"

namespace fasttx::bindings {
namespace {

uint32_t rows_of(const Tensor& tensor) {
  const int64_t rows = tensor.numel() / tensor.size(tensor.dim() - 1);
  STD_TORCH_CHECK(rows < int64_t{1} << 31, "softmax has too many rows for one launch");
  return static_cast<uint32_t>(rows);
}

Tensor softmax_fwd(const Tensor& input, const OptionalTensor& mask, bool is_causal) {
  const CudaPlace place(input);
  const int dtype = cuda_dtype(input, "input");
  STD_TORCH_CHECK(input.dim() >= (is_causal ? 2 : 1), "input has too few dimensions");
  const Sizes sizes = as_four_dims(input);
  const cuda::Mask broadcast = make_cuda_mask(mask, input, sizes);
  const Tensor x = dense_beside(input);
  Tensor y = allocate_beside(input);
  if (input.numel() == 0) return y;
  const cuda::SoftmaxFwd args{data(x),
                              out(y),
                              broadcast,
                              rows_of(input),
                              static_cast<uint32_t>(sizes[1]),
                              static_cast<uint32_t>(sizes[2]),
                              static_cast<uint32_t>(sizes[3]),
                              is_causal,
                              broadcast.vector && in_vectors(dtype, sizes[3], {data(x), out(y)})};
  check_launch(fasttx_cuda_softmax_fwd(&args, dtype, place.queue()), "softmax_fwd");
  return y;
}

Tensor softmax_bwd(const Tensor& grad, const Tensor& output) {
  const CudaPlace place(output);
  const int dtype = cuda_dtype(output, "output");
  STD_TORCH_CHECK(output.dim() >= 1, "output has too few dimensions");
  check_beside(grad, output, "grad", sizes_of(output));
  const Tensor dy = dense_beside(grad), y = dense_beside(output);
  Tensor dx = allocate_beside(output);
  if (output.numel() == 0) return dx;
  const int64_t width = output.size(output.dim() - 1);
  const cuda::SoftmaxBwd args{data(dy), data(y), out(dx), rows_of(output), static_cast<uint32_t>(width),
                              in_vectors(dtype, width, {data(dy), data(y), out(dx)})};
  check_launch(fasttx_cuda_softmax_bwd(&args, dtype, place.queue()), "softmax_bwd");
  return dx;
}

}  // namespace

FASTTX_CUDA_LIBRARY(softmax, FASTTX_IMPL(m, softmax_fwd); FASTTX_IMPL(m, softmax_bwd);)

}  // namespace fasttx::bindings
