#include "common.h"

namespace fasttx::bindings {
namespace {

Mask make_mask(const OptionalTensor& mask, const Tensor& input, const Sizes& sizes) {
  if (!mask.has_value()) return {nullptr, MaskKind::none, false, 0, 0, 0, 0};
  STD_TORCH_CHECK(mask->is_cpu(), "mask is not on the CPU");
  const ScalarType dtype = mask->scalar_type();
  const bool boolean = dtype == ScalarType::Bool;
  STD_TORCH_CHECK(boolean || dtype == input.scalar_type() || dtype == accumulate_type(input),
                  "mask must be bool, of the input's dtype, or float32");
  STD_TORCH_CHECK(mask->dim() <= std::min<int64_t>(4, input.dim()), "mask has more dimensions than the input");
  const Sizes strides = broadcast_strides(*mask, sizes);
  return {data(mask), boolean ? MaskKind::boolean : MaskKind::additive, dtype != input.scalar_type(),
          strides[0], strides[1], strides[2], strides[3]};
}

Tensor softmax_fwd(const Tensor& input, const OptionalTensor& mask, bool is_causal) {
  const int dtype = dtype_index(input, "input");
  STD_TORCH_CHECK(input.dim() >= (is_causal ? 2 : 1), "input has too few dimensions");
  const Sizes sizes = as_four_dims(input);
  const Mask broadcast = make_mask(mask, input, sizes);
  const Tensor x = dense(input);
  Tensor y = allocate_like(input);
  if (input.numel() == 0) return y;
  launch(table().softmax_fwd[dtype],
         SoftmaxFwd{data(x), out(y), sizes[0], sizes[1], sizes[2], sizes[3], broadcast, is_causal});
  return y;
}

Tensor softmax_bwd(const Tensor& grad, const Tensor& output) {
  const int dtype = dtype_index(output, "output");
  STD_TORCH_CHECK(output.dim() >= 1, "output has too few dimensions");
  check_like(grad, output, "grad", sizes_of(output));
  const Tensor dy = dense(grad), y = dense(output);
  Tensor dx = allocate_like(output);
  if (output.numel() == 0) return dx;
  const int64_t width = output.size(output.dim() - 1);
  launch(table().softmax_bwd[dtype], SoftmaxBwd{data(dy), data(y), out(dx), output.numel() / width, width});
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasttx, CPU, m) {
  FASTTX_IMPL(m, softmax_fwd);
  FASTTX_IMPL(m, softmax_bwd);
}

}  // namespace fasttx::bindings
