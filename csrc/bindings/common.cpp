#include "common.h"

#include <cmath>

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

Tensor allocate(const Sizes& sizes, ScalarType dtype) {
  return torch::stable::empty(sizes, dtype, std::nullopt,
                              torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

Tensor allocate_like(const Tensor& like, const int64_t* sizes, int64_t dims) {
  AtenTensorHandle made;
  STD_TORCH_CHECK(aoti_torch_aten_new_empty(like.get(), sizes, dims, nullptr, nullptr, nullptr, 0, nullptr, &made) ==
                      AOTI_TORCH_SUCCESS,
                  "no memory for a result");
  return Tensor(made);
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
