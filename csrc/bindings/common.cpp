#include "common.h"

#include <cmath>
#include <cstring>

namespace fasttx::bindings {

int dtype_index(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " is not on the CPU");
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return static_cast<int>(DType::f32);
    case ScalarType::BFloat16: return static_cast<int>(DType::bf16);
    case ScalarType::Half: return static_cast<int>(DType::f16);
    case ScalarType::Double: return static_cast<int>(DType::f64);
    default: break;
  }
  STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64");
  return -1;
}

ScalarType accumulate_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_like(const OptionalTensor& tensor, const Tensor& like, const char* name) {
  if (!tensor.has_value()) return;
  STD_TORCH_CHECK(tensor->is_cpu(), name, " is not on the CPU");
  STD_TORCH_CHECK(tensor->scalar_type() == like.scalar_type(), name, " differs in dtype from the input");
}

void check_like(const OptionalTensor& tensor, const Tensor& like, const char* name, const Sizes& sizes) {
  if (!tensor.has_value()) return;
  check_like(tensor, like, name);
  STD_TORCH_CHECK(sizes_of(*tensor) == sizes, name, " has the wrong shape");
}

Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

OptionalTensor dense(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(dense(*tensor)) : tensor;
}

Sizes as_four_dims(const Tensor& input) {
  Sizes four = {1, 1, 1, 1};
  for (int64_t dim = 0; dim < input.dim(); ++dim) {
    four[std::max<int64_t>(0, dim + 4 - input.dim())] *= input.size(dim);
  }
  return four;
}

Sizes broadcast_strides(const Tensor& mask, const Sizes& sizes) {
  Sizes strides(4, 0);
  for (int64_t dim = 0; dim < mask.dim(); ++dim) {
    const int64_t at = dim + 4 - mask.dim(), size = mask.size(dim);
    STD_TORCH_CHECK(size == 1 || size == sizes[at], "mask does not broadcast to the input: ", size, " against ",
                    sizes[at]);
    if (size != 1) strides[at] = mask.stride(dim);
  }
  return strides;
}

Sizes dense_strides(const Sizes& sizes) {
  Sizes strides(sizes.size(), 1);
  for (size_t dim = sizes.size(); dim-- > 1;) strides[dim - 1] = strides[dim] * std::max<int64_t>(sizes[dim], 1);
  return strides;
}

namespace {
std::atomic<bool> poison{false};
std::atomic<int64_t> poisoned{0};
}  // namespace

Tensor allocate(const Sizes& sizes, const Sizes& strides, ScalarType dtype) {
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made;
  STD_TORCH_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), code,
                                           aoti_torch_device_type_cpu(), 0, &made) == AOTI_TORCH_SUCCESS,
                  "no memory for a result");
  Tensor result(made);
  // Bytes of ones are NaN in every floating dtype.
  if (poison.load(std::memory_order_relaxed)) {
    memset(out(result), 0xff, result.numel() * result.element_size());
    ++poisoned;
  }
  return result;
}

int64_t poison_results(bool on) {
  poison.store(on);
  return poisoned.load();
}

Dropout make_dropout(double probability, const OptionalTensor& seed) {
  if (probability == 0.0) return {0, 0, 1.0, false};
  STD_TORCH_CHECK(probability > 0.0 && probability < 1.0, "dropout_p must be in [0, 1), got ", probability);
  STD_TORCH_CHECK(seed.has_value() && seed->is_cpu() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                  "dropout needs a seed: one int64 on the CPU");
  const double threshold = std::min(std::nearbyint(probability * 4294967296.0), 4294967295.0);
  return {static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr())),
          static_cast<uint32_t>(threshold), 1.0 / (1.0 - probability), true};
}

Activation make_activation(int64_t code) {
  STD_TORCH_CHECK(code >= 0 && code <= static_cast<int64_t>(Activation::gelu_tanh), "unknown activation ", code);
  return static_cast<Activation>(code);
}

}  // namespace fasttx::bindings
