// What the bindings of the CUDA kernels share: where a call runs, its results' memory, and its errors.
//
// The kernels lie in a library of their own, fasttx_cuda, with the schemas of the library fasttx: so that a call, and the
// backward that it leaves behind, is one of theirs or of Triton's by its name.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "../cuda/launchers.h"
#include "common.h"

namespace fasttx::bindings {

// 0 float32, 1 bfloat16, 2 float16, as the launchers count; throws for others.
int cuda_dtype(const Tensor& tensor, const char* name);

// Where kernels on the tensor's device are launched while it lives: that device is current, and its current stream taken.
// Throws for a tensor that is not on a CUDA device, unless launches are intercepted.
class CudaPlace {
 public:
  explicit CudaPlace(const Tensor& tensor);
  cuda::Queue queue() const { return queue_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  cuda::Queue queue_{nullptr, 0};
};

// Memory for a result on like's device.
Tensor allocate_beside(const Tensor& like, const Sizes& sizes, const Sizes& strides, ScalarType dtype);
inline Tensor allocate_beside(const Tensor& like, const Sizes& sizes, ScalarType dtype) {
  return allocate_beside(like, sizes, dense_strides(sizes), dtype);
}
inline Tensor allocate_beside(const Tensor& like) { return allocate_beside(like, sizes_of(like), like.scalar_type()); }
inline Tensor nothing_beside(const Tensor& like) { return allocate_beside(like, {0}, like.scalar_type()); }

// The tensor as one block of memory.
Tensor dense_beside(const Tensor& tensor);
OptionalTensor dense_beside(const OptionalTensor& tensor);

// Throws unless `tensor`, where present, is on like's device with its dtype.
void check_beside(const OptionalTensor& tensor, const Tensor& like, const char* name);
// The same, and that it has these sizes.
void check_beside(const OptionalTensor& tensor, const Tensor& like, const char* name, const Sizes& sizes);

// Whether all pointers, null ones too, are multiples of 16 bytes, and `width` values fill whole accesses of 16 bytes.
bool in_vectors(int dtype, int64_t width, std::initializer_list<const void*> pointers);

// A mask, bool, of like's dtype or float32, that broadcasts to four dims of these sizes.
cuda::Mask make_cuda_mask(const OptionalTensor& mask, const Tensor& like, const Sizes& sizes);

// Inactive at probability 0; otherwise a seed, one int64 on the CPU or on like's device, is required.
cuda::Dropout make_cuda_dropout(double probability, const OptionalTensor& seed, const Tensor& like);

// Throws the driver's words for an error that is not 0.
void check_launch(int error, const char* kernel);

// The sums over the lines of `matrices` (1 or 2) partial sums, (matrices, lines, width) float32, as tensors like `like`.
void sum_partials(const Tensor& partials, int matrices, const Tensor& first, const Tensor& second, cuda::Queue queue);

// Registers functions for the operators of these names, and their overloads `raw`, on CUDA tensors; and on CPU tensors,
// whose calls throw unless launches are intercepted.
#define FASTTX_CUDA_LIBRARY(name, ...)                                                              \
  static void register_##name(torch::stable::detail::StableLibrary& m) { __VA_ARGS__ }              \
  STABLE_TORCH_LIBRARY_IMPL(fasttx_cuda, CUDA, m) { register_##name(m); }                           \
  STABLE_TORCH_LIBRARY_IMPL(fasttx_cuda, CPU, m) { register_##name(m); }

}  // namespace fasttx::bindings
