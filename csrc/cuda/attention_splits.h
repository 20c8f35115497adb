// How attention's keys are split where queries are few, for the compiler of the device and that of the host alike.
#pragma once

namespace fasttx::cuda {

constexpr int kSplit = 256;    // keys of a block
constexpr int kMostRows = 8;   // queries of a group of heads

// X(T, head width, rows): a call takes the next of either.
#define FASTTX_DECODE_KERNELS(X, T) \
  X(T, 32, 1)                       \
  X(T, 32, 2)                       \
  X(T, 32, 4)                       \
  X(T, 32, 8)                       \
  X(T, 64, 1)                       \
  X(T, 64, 2)                       \
  X(T, 64, 4)                       \
  X(T, 64, 8)                       \
  X(T, 128, 1)                      \
  X(T, 128, 2)                      \
  X(T, 128, 4)                      \
  X(T, 128, 8)

}  // namespace fasttx::cuda
