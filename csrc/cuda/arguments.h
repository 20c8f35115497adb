// What each CUDA kernel is given: plain data, the same for the compiler of the host and that of the device.
//
// A kernel has one parameter, one of these structs. Tensors are dense unless strides say otherwise; a pointer that may
// be null says so. `vector`: whether every pointer and every row begins at a multiple of 16 bytes, so that they can be
// read 16 bytes at once.
#pragma once

#include <stdint.h>

namespace fasttx::cuda {

// Which elements dropout keeps: those whose word is at least the threshold (csrc/cuda/philox.cuh).
struct Dropout {
  const int64_t* seed_at;  // where the seed lies on the device; null: it is `seed`
  uint64_t seed;
  uint32_t threshold;
  float keep_scale;  // what is kept is multiplied by it
  bool active;
};

// y = gelu(x + bias) of (rows, width).
struct GeluFwd {
  const void* x;
  const void* bias;  // (width,) or null
  void* y;
  int64_t size;  // rows * width
  uint32_t width;
  bool vector;
};

// dx = dy gelu'(x + bias). dbias: one line of sums for each program along y, (programs, width), or null.
struct GeluBwd {
  const void* dy;
  const void* x;
  const void* bias;  // (width,) or null
  void* dx;
  float* dbias;
  int64_t size;
  uint32_t width;
  bool vector;
};

// out = the sums over the rows of x, (matrices, rows, width) float32; out[i] (width,) of the dtype of the kernel's name.
struct SumPartials {
  const float* x;
  void* out[2];
  uint32_t rows, width;
};

}  // namespace fasttx::cuda
