// What TMA is told of a tensor: bytes that only the driver writes (CUtensorMap).
#pragma once

#include <stdint.h>

namespace fasttx::cuda {

struct alignas(64) TensorMap {
  uint64_t words[16];
};

}  // namespace fasttx::cuda
