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

// y = the layer norm of residual + dropout(x) over rows of (rows, width); sum: that sum before it is rounded.
struct LayerNormFwd {
  const void* x;
  const void* residual;  // or null
  const void* weight;    // (width,) or null
  const void* bias;      // (width,) or null
  void* y;
  void* sum;  // or null
  Dropout dropout;
  uint32_t rows, width;
  float eps;
  bool vector;
};

// The slopes of layer_norm(x) by x, that of x itself added, and by what x is the sum of. dweight, dbias: one line of sums
// for each program, (programs, width).
struct LayerNormBwd {
  const void* dy;
  const void* dsum;  // or null
  const void* x;
  const void* weight;  // (width,) or null
  void* dx;            // dsum + the slope by x, or null
  void* dropped;       // dropout(dx), or null
  float* dweight;      // or null
  float* dbias;        // or null
  float* stats;        // of rows too wide for registers: (rows, 2), each one's mean and 1 / standard deviation
  Dropout dropout;
  uint32_t rows, width;
  float eps;
  bool vector;
};

// out = the sums over the rows of x, (matrices, rows, width) float32; out[i] (width,) of the dtype of the kernel's name.
struct SumPartials {
  const float* x;
  void* out[2];
  uint32_t rows, width;
};

}  // namespace fasttx::cuda
