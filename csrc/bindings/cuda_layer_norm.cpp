#include "cuda_common.h"

namespace fasttx::bindings {
namespace {

struct Shape {
  int dtype;
  uint32_t rows, width;
};

Shape check(const Tensor& input, int64_t width, const OptionalTensor& weight, const OptionalTensor& bias) {
  const int dtype = cuda_dtype(input, "input");
  constexpr int64_t kMost = int64_t{1} << 31;
  STD_TORCH_CHECK(width > 0 && width < kMost && input.numel() % width == 0, "input does not consist of rows of ", width);
  STD_TORCH_CHECK(input.numel() / width < kMost, "input has too many rows for one launch");
  check_beside(weight, input, "weight");
  check_beside(bias, input, "bias");
  STD_TORCH_CHECK(!weight.has_value() || weight->numel() == width, "weight must hold ", width, " values");
  STD_TORCH_CHECK(!bias.has_value() || bias->numel() == width, "bias must hold ", width, " values");
  return {dtype, static_cast<uint32_t>(input.numel() / width), static_cast<uint32_t>(width)};
}

struct Sum {
  Tensor output, sum;
};

Sum forward(const Tensor& input, const OptionalTensor& residual, int64_t width, const OptionalTensor& weight,
            const OptionalTensor& bias, double eps, double dropout_p, const OptionalTensor& seed, bool store_sum) {
  const CudaPlace place(input);
  const Shape s = check(input, width, weight, bias);
  check_beside(residual, input, "residual", sizes_of(input));
  const cuda::Dropout dropout = make_cuda_dropout(dropout_p, seed, input);
  const Tensor x = dense_beside(input);
  const OptionalTensor r = dense_beside(residual), w = dense_beside(weight), b = dense_beside(bias);
  Tensor y = allocate_beside(input), sum;
  if (residual.has_value()) sum = store_sum ? allocate_beside(input) : nothing_beside(input);
  void* const stored = store_sum ? out(sum) : nullptr;
  const cuda::LayerNormFwd args{data(x), data(r), data(w), data(b), out(y), stored, dropout, s.rows, s.width,
                                static_cast<float>(eps),
                                in_vectors(s.dtype, width, {data(x), data(r), data(w), data(b), out(y), stored})};
  check_launch(fasttx_cuda_layer_norm_fwd(&args, s.dtype, place.queue()), "layer_norm_fwd");
  return {y, sum};
}

struct Gradients {
  Tensor dx, dropped, dweight, dbias;
};

Gradients backward(const Tensor& grad, const OptionalTensor& grad_sum, const Tensor& input, const OptionalTensor& weight,
                   int64_t width, double eps, double dropout_p, const OptionalTensor& seed, bool needs_input,
                   bool needs_dropped, bool needs_weight, bool needs_bias) {
  const CudaPlace place(input);
  const Shape s = check(input, width, weight, std::nullopt);
  check_beside(grad, input, "grad", sizes_of(input));
  check_beside(grad_sum, input, "grad_sum", sizes_of(input));
  const cuda::Dropout dropout = make_cuda_dropout(dropout_p, seed, input);
  const Tensor dy = dense_beside(grad), x = dense_beside(input);
  const OptionalTensor ds = dense_beside(grad_sum), w = dense_beside(weight);
  const auto wanted = [&](bool needed) { return needed ? allocate_beside(input) : nothing_beside(input); };
  const auto parameter = [&](bool needed) {
    return needed ? allocate_beside(input, {width}, input.scalar_type()) : nothing_beside(input);
  };
  Gradients result{wanted(needs_input), wanted(needs_dropped), parameter(needs_weight), parameter(needs_bias)};

  const int matrices = needs_weight + needs_bias;
  const int64_t lines = cuda::fasttx_cuda_layer_norm_lines(s.rows, s.width, s.dtype);
  const bool with_stats = matrices > 0 && cuda::fasttx_cuda_layer_norm_is_wide(s.width, s.dtype);
  Tensor partials, stats;
  if (matrices > 0) partials = allocate_beside(input, {matrices, lines, width}, ScalarType::Float);
  if (with_stats) stats = allocate_beside(input, {s.rows, 2}, ScalarType::Float);
  float* const first = matrices > 0 ? static_cast<float*>(out(partials)) : nullptr;
  void* const dx = needs_input ? out(result.dx) : nullptr;
  void* const dropped = needs_dropped ? out(result.dropped) : nullptr;
  const cuda::LayerNormBwd args{data(dy), data(ds), data(x), data(w), dx, dropped,
                                needs_weight ? first : nullptr,
                                needs_bias ? first + (needs_weight ? lines * width : 0) : nullptr,
                                with_stats ? static_cast<float*>(out(stats)) : nullptr,
                                dropout, s.rows, s.width, static_cast<float>(eps),
                                in_vectors(s.dtype, width, {data(dy), data(ds), data(x), data(w), dx, dropped})};
  check_launch(fasttx_cuda_layer_norm_bwd(&args, s.dtype, place.queue()), "layer_norm_bwd");
  if (matrices > 0) {
    sum_partials(partials, matrices, needs_weight ? result.dweight : result.dbias, result.dbias, place.queue());
  }
  return result;
}

Tensor layer_norm_fwd(const Tensor& input, int64_t width, const OptionalTensor& weight, const OptionalTensor& bias,
                      double eps) {
  return forward(input, std::nullopt, width, weight, bias, eps, 0.0, std::nullopt, false).output;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(const Tensor& grad, const Tensor& input, const OptionalTensor& weight,
                                                  int64_t width, double eps, bool needs_input, bool needs_weight,
                                                  bool needs_bias) {
  const Gradients result = backward(grad, std::nullopt, input, weight, width, eps, 0.0, std::nullopt, needs_input, false,
                                    needs_weight, needs_bias);
  return {result.dx, result.dweight, result.dbias};
}

std::tuple<Tensor, Tensor> add_layer_norm_fwd(const Tensor& input, const Tensor& residual, int64_t width,
                                              const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                                              double dropout_p, const OptionalTensor& seed, bool store_sum) {
  const Sum result = forward(input, residual, width, weight, bias, eps, dropout_p, seed, store_sum);
  return {result.output, result.sum};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_bwd(const Tensor& grad, const OptionalTensor& grad_sum,
                                                              const Tensor& sum, const OptionalTensor& weight,
                                                              int64_t width, double eps, double dropout_p,
                                                              const OptionalTensor& seed, bool needs_input,
                                                              bool needs_residual, bool needs_weight, bool needs_bias) {
  const Gradients result = backward(grad, grad_sum, sum, weight, width, eps, dropout_p, seed, needs_residual, needs_input,
                                    needs_weight, needs_bias);
  return {result.dx, result.dropped, result.dweight, result.dbias};
}

}  // namespace

FASTTX_CUDA_LIBRARY(layer_norm, FASTTX_IMPL(m, layer_norm_fwd); FASTTX_IMPL(m, layer_norm_bwd);
                    FASTTX_IMPL(m, add_layer_norm_fwd); FASTTX_IMPL(m, add_layer_norm_bwd);)

}  // namespace fasttx::bindings
