// Launching kernels through the CUDA driver, which is looked for when the first kernel is launched: the binary needs no
// CUDA library to load.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <atomic>

#include "tensor_map.h"

struct CUstream_st;
using cudaStream_t = CUstream_st*;  // as CUDA's own headers have it

namespace fasttx::cuda {

// One source file's kernels, for all architectures of the build, as fatbinary packs them.
struct Image {
  const char* name;
  const unsigned char* data;
};
// Written by setup.py into the build; the last one has no name, and is all there is in a build without nvcc.
extern const Image kImages[];
// "sm_80 sm_90 compute_80": what each of them is compiled for; compute_80 is PTX, for all that come later.
extern const char* const kArchitectures;

// A kernel by its image and its name in it; the driver's handle once it has been launched.
struct Kernel {
  const char* image;
  const char* name;
  std::atomic<void*> function{nullptr};
  std::atomic<uint64_t> prepared{0};  // devices, a bit each, on which its shared memory was asked for
};

struct Grid {
  uint32_t x, y = 1, z = 1;
};

// Where to launch: a stream of a device, by CUDA's number.
struct Queue {
  cudaStream_t stream;
  int device;
};

// Launches a kernel whose one parameter is `args`; nothing where the grid is empty. shared: bytes of dynamic shared memory.
// 0, or an error for error_text.
int launch(Kernel& kernel, Grid grid, uint32_t threads, uint32_t shared, const void* args, size_t bytes, Queue queue);
template <class Args>
int launch(Kernel& kernel, Grid grid, uint32_t threads, uint32_t shared, const Args& args, Queue queue) {
  return launch(kernel, grid, threads, shared, &args, sizeof(Args), queue);
}
const char* error_text(int error);

// Whether the build has an image of this name, and what the device is: 90 for 9.0, 0 where that cannot be told.
bool has_image(const char* name);
int capability(Queue queue);
// The map of a tensor of 16-bit values, fp16 or bf16, by its sizes and, but for the first, its strides in bytes, innermost
// first; box: what one copy takes of each dimension, in rows that are permuted within 128 bytes.
struct MappedTensor {
  const void* data;
  bool is_bf16;
  uint64_t sizes[4], strides[3];
  uint32_t box[4];
};
int encode(TensorMap& map, const MappedTensor& tensor);

// Takes the driver's place, for tests without a GPU: it is told of results' memory, and of launches, which it is to
// carry out, and writes tensors' maps. capability: of the device that it plays.
struct Interceptor {
  void (*allocated)(const void* at, size_t bytes);
  void (*launched)(const Kernel& kernel, Grid grid, uint32_t threads, uint32_t shared, const void* args, size_t bytes);
  void (*encoded)(TensorMap& map, const MappedTensor& tensor);
  int capability;
};
// From now on; null gives the driver its place back.
void intercept(const Interceptor* interceptor);
const Interceptor* interceptor();

}  // namespace fasttx::cuda
