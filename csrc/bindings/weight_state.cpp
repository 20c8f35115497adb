#include "weight_state.h"

#include <algorithm>
#include <cstring>

#include "torch_module.h"

namespace fasttx::bindings {
namespace {

// A hash of up to 16 words spread evenly over the memory there, and of the bytes past its last whole word: cheap evidence
// that it has not changed.
uint64_t hash_of_sample(const char* base, size_t bytes) {
  constexpr size_t kSamples = 16;
  uint64_t hash = 0xcbf29ce484222325u;
  const auto add = [&](const char* at, size_t size) {
    uint64_t word = 0;
    memcpy(&word, at, size);
    hash = (hash ^ word) * 0x100000001b3u;
    hash ^= hash >> 32;  // else the highest bits of two words, the signs of float64, would cancel
  };
  const size_t words = bytes / sizeof(uint64_t), samples = std::min(words, kSamples);
  for (size_t i = 0; i < samples; ++i) {
    add(base + (samples == words ? i : i * (words - 1) / (kSamples - 1)) * sizeof(uint64_t), sizeof(uint64_t));
  }
  add(base + words * sizeof(uint64_t), bytes % sizeof(uint64_t));
  return hash;
}

}  // namespace

WeightState::WeightState(PyObject* tensor) {
  const Torch& torch = torch_module();
  version = torch.version(tensor).cast<Py_ssize_t>();
  address = torch.data_ptr(tensor).cast<Py_ssize_t>();
  sample = hash_of_sample(reinterpret_cast<const char*>(address), torch.bytes(tensor).cast<size_t>());
  dtype = torch.dtype(tensor);
  shape = torch.shape(tensor);
  stride = torch.stride(tensor);
}

}  // namespace fasttx::bindings
