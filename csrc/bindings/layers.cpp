#include "layers.h"

namespace fasttx::bindings {
namespace {

int64_t count(const Sizes& sizes) {
  int64_t values = 1;
  for (const int64_t size : sizes) values *= size;
  return values;
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
