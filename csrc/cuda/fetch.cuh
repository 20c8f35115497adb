// Reads that are under way together, and that a thread may leave out without leaving its warp.
#pragma once

#include "values.cuh"

namespace fasttx::cuda {

// n values as they lie in memory: 16 bytes or less of them. Until they are looked at, nothing waits for them.
template <class T, int n>
struct Raw {
  static constexpr int kBytes = n * int(sizeof(T));
  static_assert(kBytes <= 16);
  uint32_t words[(kBytes + 3) / 4];
};

// n values from memory that no kernel writes meanwhile, aligned to their size; zeros where not `wanted`, and then
// nothing is read. No branch, so that a warp stays together.
template <class T, int n>
__device__ __forceinline__ void fetch(Raw<T, n>& raw, const T* from, bool wanted = true) {
  uint32_t(&to)[sizeof(raw.words) / 4] = raw.words;
  if constexpr (raw.kBytes == 16) {
    asm("{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
        "@p ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];\n}"
        : "=&r"(to[0]), "=&r"(to[1]), "=&r"(to[2]), "=&r"(to[3])
        : "l"(from), "r"(int(wanted)));
  } else if constexpr (raw.kBytes == 8) {
    asm("{\n.reg .pred p;\nsetp.ne.b32 p, %3, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\n"
        "@p ld.global.nc.v2.b32 {%0, %1}, [%2];\n}"
        : "=&r"(to[0]), "=&r"(to[1])
        : "l"(from), "r"(int(wanted)));
  } else if constexpr (raw.kBytes == 4) {
    asm("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\nmov.b32 %0, 0;\n@p ld.global.nc.b32 %0, [%1];\n}"
        : "=&r"(to[0])
        : "l"(from), "r"(int(wanted)));
  } else if constexpr (raw.kBytes == 2) {
    asm("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\nmov.b32 %0, 0;\n@p ld.global.nc.u16 %0, [%1];\n}"
        : "=&r"(to[0])
        : "l"(from), "r"(int(wanted)));
  } else {
    asm("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\nmov.b32 %0, 0;\n@p ld.global.nc.u8 %0, [%1];\n}"
        : "=&r"(to[0])
        : "l"(from), "r"(int(wanted)));
  }
}

template <class T, int n>
__device__ __forceinline__ void widen(float (&x)[n], const Raw<T, n>& raw) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = __uint_as_float(raw.words[i]);
  } else if constexpr (n == 1) {
    x[0] = widen(T{uint16_t(raw.words[0])});
  } else {
#pragma unroll
    for (int i = 0; i < n; i += 2) unpack<T>(x[i], x[i + 1], raw.words[i / 2]);
  }
}

}  // namespace fasttx::cuda
