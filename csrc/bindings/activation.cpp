#include "matmul.h"

namespace fasttx::bindings {
namespace {

struct Shape {
  int dtype;
  int64_t rows, width;
};

// Rows of the last dim, on which the bias lies; a 0-dim tensor is one row of one.
Shape check(const Tensor& input, const OptionalTensor& bias) {
  const int dtype = dtype_index(input, "input");
  STD_TORCH_CHECK(!bias.has_value() || input.dim() >= 1, "bias needs an input of at least one dimension");
  const int64_t width = input.dim() == 0 ? 1 : input.size(input.dim() - 1);
  check_like(bias, input, "bias", {width});
  return {dtype, width == 0 ? 0 : input.numel() / width, width};
}

Tensor gelu_fwd(const Tensor& input, const OptionalTensor& bias, int64_t activation) {
  const Shape s = check(input, bias);
  const Tensor x = dense(input);
  const OptionalTensor b = dense(bias);
  Tensor y = allocate_like(input);
  launch(table().activation_fwd[s.dtype],
         ActivationFwd{data(x), data(b), out(y), s.rows, s.width, make_activation(activation)});
  return y;
}

std::tuple<Tensor, Tensor> gelu_bwd(const Tensor& grad, const Tensor& input, const OptionalTensor& bias,
                                    int64_t activation, bool needs_bias) {
  const Shape s = check(input, bias);
  check_like(grad, input, "grad", sizes_of(input));
  const Tensor dy = dense(grad), x = dense(input);
  const OptionalTensor b = dense(bias);
  Tensor dx = allocate_like(input);
  launch(table().activation_bwd[s.dtype],
         ActivationBwd{data(dy), data(x), data(b), out(dx), s.rows, s.width, make_activation(activation)});
  return {dx, needs_bias ? column_sums(s.dtype, as_rows(dx, s.rows, s.width), input) : nothing(input)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasttx, CPU, m) {
  FASTTX_IMPL(m, gelu_fwd);
  FASTTX_IMPL(m, gelu_bwd);
}

}  // namespace fasttx::bindings
