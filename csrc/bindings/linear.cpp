#include "layers.h"
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

Tensor pack_weight(const Tensor& weight, bool on_vectors) {
  const int dtype = dtype_index(weight, "weight");
  STD_TORCH_CHECK(weight.dim() == 2, "weight must be (out, in)");
  return pack_right(dtype, as_matrix(weight).transposed(), on_vectors);
}

Tensor linear_fwd(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& packed) {
  Tensor y = allocate(check(input, weight).output, input.scalar_type());
  linear_forward(input, weight, bias, packed, {std::nullopt, 0.0, std::nullopt}, y);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> linear_bwd(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                              bool needs_input, bool needs_weight, bool needs_bias) {
  Tensor dx = needs_input ? allocate_like(input) : nothing(input);
  auto [dw, db] =
      linear_backward(grad, input, weight, std::nullopt, needs_input ? &dx : nullptr, needs_weight, needs_bias);
  return {dx, dw, db};
}

}  // namespace

void linear_forward(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& packed,
                    const Ending& ending, Tensor& output, bool on_vectors) {
  const Shape s = check(input, weight);
  check_like(bias, input, "bias", {s.out});
  check_like(ending.residual, input, "residual", s.output);
  check_like(output, input, "output", s.output);
  if (packed.has_value()) check_packed(*packed, s.dtype, s.in, s.out, on_vectors, "packed");
  const Tensor x = dense(input);
  const OptionalTensor b = dense(bias), r = dense(ending.residual);
  multiply(s.dtype, as_rows(x, s.rows, s.in),
           Right(s.dtype, as_matrix(weight).transposed(), s.rows, packed, on_vectors),
           {.bias = data(b), .residual = data(r), .c = out(output), .c_stride = s.out,
            .dropout = make_dropout(ending.dropout_p, ending.seed)});
}

std::tuple<Tensor, Tensor> linear_backward(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                           const OptionalTensor& residual, Tensor* dinput, bool needs_weight,
                                           bool needs_bias) {
  const Shape s = check(input, weight);
  check_like(grad, input, "grad", s.output);
  check_like(residual, input, "residual", sizes_of(input));
  const Tensor dense_grad = dense(grad), dense_input = dense(input);
  const Matrix dy = as_rows(dense_grad, s.rows, s.out), x = as_rows(dense_input, s.rows, s.in);

  if (dinput != nullptr) {
    check_like(*dinput, input, "dinput", sizes_of(input));
    const OptionalTensor r = dense(residual);
    multiply(s.dtype, dy, Right(s.dtype, as_matrix(weight), s.rows),
             {.residual = data(r), .c = out(*dinput), .c_stride = s.in});
  }
  Tensor dw = needs_weight ? allocate_like(weight) : nothing(input);
  if (needs_weight) {
    multiply(s.dtype, dy.transposed(), Right(s.dtype, x, s.out), {.c = out(dw), .c_stride = s.in});
  }
  return {dw, needs_bias ? column_sums(s.dtype, dy, input) : nothing(input)};
}

STABLE_TORCH_LIBRARY_IMPL(fasttx, CPU, m) {
  FASTTX_IMPL(m, pack_weight);
  FASTTX_IMPL(m, linear_fwd);
  FASTTX_IMPL(m, linear_bwd);
}

}  // namespace fasttx::bindings
