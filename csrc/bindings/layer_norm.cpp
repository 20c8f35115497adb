#include "layers.h"

namespace fasttx::bindings {
namespace {

// Rows of `width` values that the tensor consists of.
int64_t rows_of(const Tensor& input, int64_t width) {
  STD_TORCH_CHECK(width > 0 && input.numel() % width == 0, "input does not consist of rows of ", width);
  return input.numel() / width;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& input, const OptionalTensor& residual, int64_t width,
                                                   const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                                                   const Dropout& dropout, bool store_sum) {
  const int dtype = dtype_index(input, "input");
  const int64_t rows = rows_of(input, width);
  check_like(residual, input, "residual", sizes_of(input));
  check_like(weight, input, "weight");
  check_like(bias, input, "bias");
  STD_TORCH_CHECK(!weight.has_value() || weight->numel() == width, "weight must hold ", width, " values");
  STD_TORCH_CHECK(!bias.has_value() || bias->numel() == width, "bias must hold ", width, " values");

  const Tensor x = dense(input);
  const OptionalTensor r = dense(residual), w = dense(weight), b = dense(bias);
  Tensor y = allocate_like(input);
  Tensor sum = store_sum ? allocate_like(input) : nothing(input);
  Tensor mean = allocate({rows}, accumulate_type(input)), rstd = allocate({rows}, accumulate_type(input));
  launch(table().layer_norm_fwd[dtype],
         LayerNormFwd{data(x), data(r), data(w), data(b), out(y), out_or_null(sum), out(mean), out(rstd), rows, width,
                      eps, dropout});
  return {y, sum, mean, rstd};
}

// Sums the partial gradients of a parameter, chunk by chunk.
Tensor reduce(const Tensor& partial, const Tensor& like, int dtype) {
  const int64_t chunks = partial.size(0), width = partial.size(1);
  Tensor sum = allocate({width}, like.scalar_type());
  launch(table().reduce_rows[dtype], ReduceRows{data(partial), out(sum), chunks, width});
  return sum;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad, const OptionalTensor& grad_sum,
                                                    const Tensor& input, const Tensor& mean, const Tensor& rstd,
                                                    const OptionalTensor& weight, int64_t width, const Dropout& dropout,
                                                    bool needs_input, bool needs_dropped, bool needs_weight,
                                                    bool needs_bias) {
  const int dtype = dtype_index(input, "input");
  const int64_t rows = rows_of(input, width);
  const ScalarType accumulate = accumulate_type(input);
  check_like(grad, input, "grad", sizes_of(input));
  check_like(grad_sum, input, "grad_sum", sizes_of(input));
  check_like(weight, input, "weight");
  STD_TORCH_CHECK(!weight.has_value() || weight->numel() == width, "weight must hold ", width, " values");
  STD_TORCH_CHECK(mean.numel() == rows && rstd.numel() == rows && mean.scalar_type() == accumulate &&
                      rstd.scalar_type() == accumulate,
                  "mean and rstd must be those of the forward");

  const Tensor dy = dense(grad), x = dense(input), m = dense(mean), s = dense(rstd);
  const OptionalTensor ds = dense(grad_sum), w = dense(weight);
  Tensor dx = needs_input ? allocate_like(input) : nothing(input);
  Tensor dropped = needs_dropped ? allocate_like(input) : nothing(input);
  const Sizes partial = {sum_chunks(rows), width};
  Tensor dw = needs_weight ? allocate(partial, accumulate) : nothing(m);
  Tensor db = needs_bias ? allocate(partial, accumulate) : nothing(m);
  launch(table().layer_norm_bwd[dtype],
         LayerNormBwd{data(dy), data(ds), data(x), data(m), data(s), data(w), out_or_null(dx), out_or_null(dropped),
                      out_or_null(dw), out_or_null(db), rows, width, dropout});
  return {dx, dropped, needs_weight ? reduce(dw, input, dtype) : nothing(input),
          needs_bias ? reduce(db, input, dtype) : nothing(input)};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd(const Tensor& input, int64_t width, const OptionalTensor& weight,
                                                  const OptionalTensor& bias, double eps) {
  auto [y, sum, mean, rstd] =
      forward(input, std::nullopt, width, weight, bias, eps, make_dropout(0.0, std::nullopt), false);
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(const Tensor& grad, const Tensor& input, const Tensor& mean,
                                                  const Tensor& rstd, const OptionalTensor& weight, int64_t width,
                                                  bool needs_input, bool needs_weight, bool needs_bias) {
  auto [dx, dropped, dw, db] = backward(grad, std::nullopt, input, mean, rstd, weight, width,
                                        make_dropout(0.0, std::nullopt), needs_input, false, needs_weight, needs_bias);
  return {dx, dw, db};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_fwd(const Tensor& input, const Tensor& residual,
                                                              int64_t width, const OptionalTensor& weight,
                                                              const OptionalTensor& bias, double eps, double dropout_p,
                                                              const OptionalTensor& seed, bool store_sum) {
  return forward(input, residual, width, weight, bias, eps, make_dropout(dropout_p, seed), store_sum);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_bwd(
    const Tensor& grad, const OptionalTensor& grad_sum, const Tensor& sum, const Tensor& mean, const Tensor& rstd,
    const OptionalTensor& weight, int64_t width, double dropout_p, const OptionalTensor& seed, bool needs_input,
    bool needs_residual, bool needs_weight, bool needs_bias) {
  return backward(grad, grad_sum, sum, mean, rstd, weight, width, make_dropout(dropout_p, seed), needs_residual,
                  needs_input, needs_weight, needs_bias);
}

STABLE_TORCH_LIBRARY_IMPL(fasttx, CPU, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&layer_norm_fwd));
  m.impl("layer_norm_bwd", TORCH_BOX(&layer_norm_bwd));
  m.impl("add_layer_norm_fwd", TORCH_BOX(&add_layer_norm_fwd));
  m.impl("add_layer_norm_bwd", TORCH_BOX(&add_layer_norm_bwd));
}

}  // namespace fasttx::bindings
