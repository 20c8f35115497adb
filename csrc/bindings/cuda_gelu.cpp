#include "cuda_common.h"

namespace fasttx::bindings {
namespace {

struct Shape {
  int dtype;
  int64_t size, width;  // width: the bias's, or else all values
};

Shape check(const Tensor& input, const OptionalTensor& bias, int64_t activation) {
  STD_TORCH_CHECK(activation == 2 || activation == 3, "activation must be GELU or its tanh approximation");
  const int dtype = cuda_dtype(input, "input");
  const int64_t size = input.numel();
  if (!bias.has_value()) return {dtype, size, size};
  STD_TORCH_CHECK(input.dim() >= 1, "bias needs an input of at least one dimension");
  const int64_t width = input.size(input.dim() - 1);
  check_beside(bias, input, "bias", {width});
  return {dtype, size, width};
}

// Whether accesses are of 16 bytes; they are counted in 32 bits.
bool takes_vectors(const Shape& s, std::initializer_list<const void*> pointers) {
  const bool vector = in_vectors(s.dtype, s.width, pointers);
  constexpr int64_t kMost = (int64_t{1} << 32) - 1024;
  STD_TORCH_CHECK(s.size / (!vector ? 1 : s.dtype == 0 ? 4 : 8) <= kMost, "input has too many values for one launch");
  return vector;
}

Tensor gelu_fwd(const Tensor& input, const OptionalTensor& bias, int64_t activation) {
  const CudaPlace place(input);
  const Shape s = check(input, bias, activation);
  const Tensor x = dense_beside(input);
  const OptionalTensor b = dense_beside(bias);
  Tensor y = allocate_beside(input);
  if (s.size == 0) return y;
  const cuda::GeluFwd args{data(x), data(b), out(y), s.size, b.has_value() ? static_cast<uint32_t>(s.width) : 0,
                           takes_vectors(s, {data(x), data(b), out(y)})};
  check_launch(fasttx_cuda_gelu_fwd(&args, s.dtype, activation == 3, place.queue()), "gelu_fwd");
  return y;
}

std::tuple<Tensor, Tensor> gelu_bwd(const Tensor& grad, const Tensor& input, const OptionalTensor& bias,
                                    int64_t activation, bool needs_bias) {
  const CudaPlace place(input);
  const Shape s = check(input, bias, activation);
  check_beside(grad, input, "grad", sizes_of(input));
  STD_TORCH_CHECK(!needs_bias || bias.has_value(), "a gradient of no bias");
  const Tensor dy = dense_beside(grad), x = dense_beside(input);
  const OptionalTensor b = dense_beside(bias);
  Tensor dx = allocate_beside(input), dbias = needs_bias ? allocate_beside(input, {s.width}, input.scalar_type())
                                                         : nothing_beside(input);
  if (s.width == 0) return {dx, dbias};
  const uint32_t lines = cuda::partial_lines(s.size / s.width);
  Tensor partials = needs_bias ? allocate_beside(input, {1, lines, s.width}, ScalarType::Float) : nothing_beside(input);
  const cuda::GeluBwd args{data(dy), data(x), data(b), out(dx), static_cast<float*>(out_or_null(partials)), s.size,
                           b.has_value() ? static_cast<uint32_t>(s.width) : 0,
                           takes_vectors(s, {data(dy), data(x), data(b), out(dx)})};
  check_launch(fasttx_cuda_gelu_bwd(&args, s.dtype, activation == 3, place.queue()), "gelu_bwd");
  if (needs_bias) sum_partials(partials, 1, dbias, dbias, place.queue());
  return {dx, dbias};
}

}  // namespace

FASTTX_CUDA_LIBRARY(gelu, FASTTX_IMPL(m, gelu_fwd); FASTTX_IMPL(m, gelu_bwd);)

}  // namespace fasttx::bindings
