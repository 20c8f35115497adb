#include "matmul.h"

namespace fasttx::bindings {
namespace {

struct Shape {
  int dtype;
  int64_t rows, in, out;
  Sizes output;  // the input's sizes with `out` in the last place
};

Shape check(const Tensor& input, const Tensor& weight) {
  const int dtype = dtype_index(input, "input");
  STD_TORCH_CHECK(weight.dim() == 2 && input.dim() >= 1 && input.size(input.dim() - 1) == weight.size(1),
                  "weight must be (out, in) with `in` the input's width");
  check_like(weight, input, "weight");
  Shape s{dtype, 1, weight.size(1), weight.size(0), sizes_of(input)};
  s.output.pop_back();
  for (const int64_t size : s.output) s.rows *= size;
  s.output.push_back(s.out);
  return s;
}

Tensor pack_weight(const Tensor& weight) {
  const int dtype = dtype_index(weight, "weight");
  STD_TORCH_CHECK(weight.dim() == 2, "weight must be (out, in)");
  return pack_right(dtype, as_matrix(weight).transposed());
}

Tensor linear_fwd(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& packed) {
  const Shape s = check(input, weight);
  check_like(bias, input, "bias", {s.out});
  if (packed.has_value()) check_packed(*packed, s.dtype, s.in, s.out, "packed");
  const Tensor x = dense(input);
  const OptionalTensor b = dense(bias);
  Tensor y = allocate(s.output, input.scalar_type());
  multiply(s.dtype, as_rows(x, s.rows, s.in), Right(s.dtype, as_matrix(weight).transposed(), s.rows, packed),
           {.bias = data(b), .c = out(y), .c_stride = s.out});
  return y;
}

std::tuple<Tensor, Tensor, Tensor> linear_bwd(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                              bool needs_input, bool needs_weight, bool needs_bias) {
  const Shape s = check(input, weight);
  check_like(grad, input, "grad", s.output);
  const Tensor dense_grad = dense(grad), dense_input = dense(input);
  const Matrix dy = as_rows(dense_grad, s.rows, s.out), x = as_rows(dense_input, s.rows, s.in);

  Tensor dx = needs_input ? allocate_like(input) : nothing(input);
  if (needs_input) {
    multiply(s.dtype, dy, Right(s.dtype, as_matrix(weight), s.rows), {.c = out(dx), .c_stride = s.in});
  }
  Tensor dw = needs_weight ? allocate_like(weight) : nothing(input);
  if (needs_weight) {
    multiply(s.dtype, dy.transposed(), Right(s.dtype, x, s.out), {.c = out(dw), .c_stride = s.in});
  }
  return {dx, dw, needs_bias ? column_sums(s.dtype, dy, input) : nothing(input)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasttx, CPU, m) {
  FASTTX_IMPL(m, pack_weight);
  FASTTX_IMPL(m, linear_fwd);
  FASTTX_IMPL(m, linear_bwd);
}

}  // namespace fasttx::bindings
