#include "cuda_common.h"

#include <cmath>
#include <cstring>

// libtorch's, where it was built with CUDA. Weak: the binary loads on a build without.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace fasttx::bindings {

int cuda_dtype(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return 0;
    case ScalarType::BFloat16: return 1;
    case ScalarType::Half: return 2;
    default: break;
  }
  STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16 for the CUDA kernels");
  return -1;
}

CudaPlace::CudaPlace(const Tensor& tensor) {
  if (cuda::interceptor() != nullptr) return;
  STD_TORCH_CHECK(tensor.is_cuda(), "the CUDA kernels take tensors on a CUDA device, got one on the CPU");
  queue_.device = tensor.get_device_index();
  guard_.emplace(queue_.device);
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this build of PyTorch has no CUDA streams");
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(queue_.device, &stream) == AOTI_TORCH_SUCCESS,
                  "PyTorch gives no current CUDA stream");
  queue_.stream = static_cast<cudaStream_t>(stream);
}

namespace {

// Tells a stand-in for the driver of memory that a kernel may touch.
Tensor announced(Tensor fresh) {
  if (const auto* stand_in = cuda::interceptor(); stand_in != nullptr && fresh.numel() > 0)
    stand_in->allocated(data(fresh), fresh.numel() * fresh.element_size());
  return fresh;
}

}  // namespace

Tensor dense_beside(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : announced(dense(tensor)); }

OptionalTensor dense_beside(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(dense_beside(*tensor)) : tensor;
}

Tensor allocate_beside(const Tensor& like, const Sizes& sizes, const Sizes& strides, ScalarType dtype) {
  if (!like.is_cuda()) return announced(allocate(sizes, strides, dtype));
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made;
  STD_TORCH_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), code,
                                           aoti_torch_device_type_cuda(), like.get_device_index(),
                                           &made) == AOTI_TORCH_SUCCESS,
                  "no memory on the GPU for a result");
  return Tensor(made);
}

void check_beside(const OptionalTensor& tensor, const Tensor& like, const char* name) {
  if (!tensor.has_value()) return;
  STD_TORCH_CHECK(tensor->is_cuda() == like.is_cuda() && tensor->get_device_index() == like.get_device_index(), name,
                  " is on another device than the input");
  STD_TORCH_CHECK(tensor->scalar_type() == like.scalar_type(), name, " differs in dtype from the input");
}

void check_beside(const OptionalTensor& tensor, const Tensor& like, const char* name, const Sizes& sizes) {
  if (!tensor.has_value()) return;
  check_beside(tensor, like, name);
  STD_TORCH_CHECK(sizes_of(*tensor) == sizes, name, " has the wrong shape");
}

bool in_vectors(int dtype, int64_t width, std::initializer_list<const void*> pointers) {
  uintptr_t bits = 0;
  for (const void* pointer : pointers) bits |= reinterpret_cast<uintptr_t>(pointer);
  return bits % 16 == 0 && width % (dtype == 0 ? 4 : 8) == 0;
}

cuda::Mask make_cuda_mask(const OptionalTensor& mask, const Tensor& like, const Sizes& sizes) {
  if (!mask.has_value()) return {nullptr, 0, 0, 0, 0, cuda::MaskKind::none, true};
  const ScalarType dtype = mask->scalar_type();
  const bool boolean = dtype == ScalarType::Bool, same = dtype == like.scalar_type();
  STD_TORCH_CHECK(mask->is_cuda() == like.is_cuda() && mask->get_device_index() == like.get_device_index(),
                  "mask is on another device than the input");
  STD_TORCH_CHECK(boolean || same || dtype == ScalarType::Float, "mask must be bool, of the input's dtype, or float32");
  STD_TORCH_CHECK(mask->dim() <= std::min<int64_t>(4, like.dim()), "mask has more dimensions than the input");
  const Sizes strides = broadcast_strides(*mask, sizes);
  const int64_t size = mask->element_size(), access = std::min<int64_t>(16, 16 / like.element_size() * size);
  const int64_t bytes = reinterpret_cast<intptr_t>(data(mask)) | (strides[0] | strides[1] | strides[2]) * size;
  const auto kind = boolean ? cuda::MaskKind::boolean : same ? cuda::MaskKind::additive : cuda::MaskKind::additive_float;
  return {data(mask), strides[0], strides[1], strides[2], strides[3], kind, strides[3] == 1 && bytes % access == 0};
}

cuda::Dropout make_cuda_dropout(double probability, const OptionalTensor& seed, const Tensor& like) {
  if (probability == 0.0) return {nullptr, 0, 0, 1.f, false};
  STD_TORCH_CHECK(probability > 0.0 && probability < 1.0, "dropout_p must be in [0, 1), got ", probability);
  STD_TORCH_CHECK(seed.has_value() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                  "dropout needs a seed: one int64");
  const double threshold = std::min(std::nearbyint(probability * 4294967296.0), 4294967295.0);
  const auto* at = static_cast<const int64_t*>(seed->const_data_ptr());
  cuda::Dropout dropout{nullptr, 0, static_cast<uint32_t>(threshold), static_cast<float>(1.0 / (1.0 - probability)), true};
  if (seed->is_cpu()) {
    dropout.seed = static_cast<uint64_t>(*at);
  } else {
    STD_TORCH_CHECK(seed->is_cuda() && seed->get_device_index() == like.get_device_index(),
                    "the seed is on another GPU than the input");
    dropout.seed_at = at;
  }
  return dropout;
}

void check_launch(int error, const char* kernel) {
  STD_TORCH_CHECK(error == 0, "fasttx: ", kernel, " was not launched: ", cuda::error_text(error), " (", error, ")");
}

void sum_partials(const Tensor& partials, int matrices, const Tensor& first, const Tensor& second, cuda::Queue queue) {
  const auto lines = static_cast<uint32_t>(partials.size(1)), width = static_cast<uint32_t>(partials.size(2));
  const cuda::SumPartials args{static_cast<const float*>(partials.const_data_ptr()),
                               {first.mutable_data_ptr(), second.mutable_data_ptr()},
                               lines,
                               width};
  check_launch(fasttx_cuda_sum_partials(&args, matrices, cuda_dtype(first, "sums"), queue), "sum_partials");
}

}  // namespace fasttx::bindings
