// Dropout's random words: Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3",
// SC 2011), the same mask as in every other backend.
#pragma once

#include "arguments.h"

namespace fasttx::cuda {

// Both halves of a product: in one multiplication, which some kernels have fewer registers with, or in two, which takes fewer
// instructions.
template <bool kAtOnce>
__device__ __forceinline__ void multiply_whole(uint32_t& high, uint32_t& low, uint32_t a, uint32_t b) {
  if constexpr (kAtOnce) {
    const uint64_t product = uint64_t(a) * b;
    high = uint32_t(product >> 32), low = uint32_t(product);
  } else {
    high = __umulhi(a, b), low = a * b;
  }
}

// The four words of columns 4 quad to 4 quad + 3 of a row: those of the counter (quad, row, head, batch).
template <bool kAtOnce = true>
__device__ __forceinline__ void philox(uint32_t (&words)[4], uint64_t seed, uint32_t batch, uint32_t head, uint32_t row,
                                       uint32_t quad) {
  uint32_t c0 = quad, c1 = row, c2 = head, c3 = batch, key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    uint32_t high0, low0, high1, low1;
    multiply_whole<kAtOnce>(high0, low0, c0, 0xD2511F53u);
    multiply_whole<kAtOnce>(high1, low1, c2, 0xCD9E8D57u);
    c0 = high1 ^ c1 ^ key0;
    c2 = high0 ^ c3 ^ key1;
    c1 = low1;
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

__device__ __forceinline__ uint64_t seed_of(const Dropout& dropout) {
  return dropout.seed_at == nullptr ? dropout.seed : uint64_t(*dropout.seed_at);
}

// x[i] is column `column + i` of the row: what is dropped becomes 0, the rest is scaled. `column` is a multiple of 4, or
// n is 1.
template <int n>
__device__ __forceinline__ void drop(float (&x)[n], const Dropout& dropout, uint64_t seed, uint32_t batch, uint32_t head,
                                     uint32_t row, uint32_t column) {
#pragma unroll
  for (int i = 0; i < n; i += 4) {
    uint32_t words[4];
    philox(words, seed, batch, head, row, (column + i) / 4);
#pragma unroll
    for (int k = 0; k < 4 && i + k < n; ++k) {
      uint32_t word = words[k];
      if constexpr (n == 1) {
        const uint32_t place = column % 4;
        word = place < 2 ? (place == 0 ? words[0] : words[1]) : (place == 2 ? words[2] : words[3]);
      }
      x[i + k] = word >= dropout.threshold ? x[i + k] * dropout.keep_scale : 0.f;
    }
  }
}

// Bit i: whether column `column + i` of the row is kept. `column` and n are multiples of 4, n at most 32.
template <int n>
__device__ __forceinline__ uint32_t kept(const Dropout& dropout, uint64_t seed, uint32_t batch, uint32_t head, uint32_t row,
                                         uint32_t column) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < n; i += 4) {
    uint32_t words[4];
    philox(words, seed, batch, head, row, (column + i) / 4);
#pragma unroll
    for (int k = 0; k < 4; ++k) bits |= uint32_t(words[k] >= dropout.threshold) << (i + k);
  }
  return bits;
}

// What is not kept becomes 0, the rest is scaled.
template <int n>
__device__ __forceinline__ void drop(float (&x)[n], const Dropout& dropout, uint32_t kept) {
#pragma unroll
  for (int i = 0; i < n; ++i) x[i] = kept >> i & 1 ? x[i] * dropout.keep_scale : 0.f;
}

}  // namespace fasttx::cuda
