#include "layers.h"

namespace fasttx::bindings {
namespace {

int64_t count(const Sizes& sizes) {
  int64_t values = 1;
  for (const int64_t size : sizes) values *= size;
  return values;
}

Sizes dense_strides(const Sizes& sizes) {
  Sizes strides(sizes.size(), 1);
  for (size_t dim = sizes.size(); dim-- > 1;) strides[dim - 1] = strides[dim] * std::max<int64_t>(sizes[dim], 1);
  return strides;
}

}  // namespace

Tensor view_of(void* data, const Sizes& sizes, const Sizes& strides, const Tensor& like) {
  return torch::stable::from_blob(data, sizes, strides, torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  like.scalar_type());
}

Intermediate::Intermediate(const Sizes& sizes, const Tensor& like, bool kept)
    : kept_(kept),
      workspace_(kept ? 0 : count(sizes) * like.element_size()),
      tensor_(kept ? allocate(sizes, like.scalar_type())
                   : view_of(workspace_.data(), sizes, dense_strides(sizes), like)) {}

}  // namespace fasttx::bindings
