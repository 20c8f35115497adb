// Which keys any query of a sequence sees through a boolean mask: the others are padding, of which nothing is read.
#include "arguments.h"

namespace fasttx::cuda {
namespace {

constexpr int kThreads = 256, kLines = 8;

}  // namespace

// A block takes 32 keys of one sequence: thread (line, lane) every kLines-th row of the mask.
extern "C" __global__ void __launch_bounds__(kThreads) keys_seen(const __grid_constant__ KeysSeen args) {
  __shared__ bool shared[kLines][32];
  const int lane = threadIdx.x % 32, line = threadIdx.x / 32, key = blockIdx.x * 32 + lane;
  const auto* mask = static_cast<const uint8_t*>(args.mask.data) + blockIdx.y * args.mask.stride_b;
  bool any = false;
  if (key < args.keys) {
    for (int head = 0; head < args.heads; ++head)
#pragma unroll 8
      for (int row = line; row < args.queries; row += kLines)
        any |= mask[head * args.mask.stride_h + row * args.mask.stride_q + key * args.mask.stride_k] != 0;
  }
  shared[line][lane] = any;
  __syncthreads();
  if (line != 0 || key >= args.keys) return;
#pragma unroll
  for (int other = 1; other < kLines; ++other) any |= shared[other][lane];
  args.seen[int64_t(blockIdx.y) * args.keys + key] = any;
}

}  // namespace fasttx::cuda
