// Values in memory and as they are computed with: float32 whatever the storage, 16 bytes an access where it can be.
#pragma once

#include <stdint.h>

namespace fasttx::cuda {

// Storage formats: bits only.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// Values of a 16-byte access.
template <class T>
constexpr int kLanes = 16 / int(sizeof(T));

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float widen(fp16 x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}

// Two neighbours in a register, the lower one in the lower half; rounded to nearest even.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<bf16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
template <>
__device__ __forceinline__ uint32_t pack<fp16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <class T>
__device__ __forceinline__ T narrow(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else {
    return T{uint16_t(pack<T>(x, 0.f))};
  }
}

// The two values of a register.
template <class T>
__device__ __forceinline__ void unpack(float& low, float& high, uint32_t packed) {
  low = widen(T{uint16_t(packed)});
  high = widen(T{uint16_t(packed >> 16)});
}
template <>
__device__ __forceinline__ void unpack<bf16>(float& low, float& high, uint32_t packed) {
  low = __uint_as_float(packed << 16);
  high = __uint_as_float(packed & 0xffff0000u);
}

// kLanes values of T as they lie in memory.
template <class T>
struct Packed {
  uint4 words;
};

template <class T>
__device__ __forceinline__ void widen(float (&x)[kLanes<T>], const Packed<T>& packed) {
  const uint32_t each[4] = {packed.words.x, packed.words.y, packed.words.z, packed.words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      x[i] = __uint_as_float(each[i]);
    } else {
      unpack<T>(x[2 * i], x[2 * i + 1], each[i]);
    }
  }
}

template <class T>
__device__ __forceinline__ Packed<T> packed(const float (&x)[kLanes<T>]) {
  uint32_t each[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      each[i] = __float_as_uint(x[i]);
    } else {
      each[i] = pack<T>(x[2 * i], x[2 * i + 1]);
    }
  }
  return {make_uint4(each[0], each[1], each[2], each[3])};
}

// From memory that no kernel writes meanwhile: 16 bytes at once, aligned.
template <class T>
__device__ __forceinline__ Packed<T> fetch(const T* from) {
  return {__ldg(reinterpret_cast<const uint4*>(from))};
}
// The first `count` of them, wherever they lie; zeros for the rest.
template <class T>
__device__ __forceinline__ Packed<T> fetch_some(const T* from, uint32_t count) {
  uint32_t each[4] = {};
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) {
    if (i >= count) continue;
    if constexpr (sizeof(T) == 4) {
      each[i] = __float_as_uint(from[i]);
    } else {
      each[i / 2] |= uint32_t(from[i].bits) << (16 * (i % 2));
    }
  }
  return {make_uint4(each[0], each[1], each[2], each[3])};
}

// n values from memory that no kernel writes meanwhile: 16 bytes of them, aligned, or one.
template <class T, int n>
__device__ __forceinline__ void load(float (&x)[n], const T* from) {
  if constexpr (n == 1) {
    x[0] = widen(*from);
  } else {
    static_assert(n == kLanes<T>);
    widen<T>(x, fetch(from));
  }
}

template <class T, int n>
__device__ __forceinline__ void store(T* to, const float (&x)[n]) {
  if constexpr (n == 1) {
    *to = narrow<T>(x[0]);
  } else {
    static_assert(n == kLanes<T>);
    *reinterpret_cast<uint4*>(to) = packed<T>(x).words;
  }
}
// The first `count` of them, one by one.
template <class T>
__device__ __forceinline__ void store_some(T* to, const float (&x)[kLanes<T>], uint32_t count) {
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) {
    if (i < count) to[i] = narrow<T>(x[i]);
  }
}

}  // namespace fasttx::cuda
