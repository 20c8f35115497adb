// Types that the bindings, the dispatcher and every instruction-set translation unit share.
#pragma once

#include <stdint.h>

#define FASTTX_INLINE inline __attribute__((always_inline))

namespace fasttx {

// Storage formats: bits only, arithmetic happens after widening to float.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// A float32 value of an operand in three bf16 parts, as which it takes so much room: the parts of many lie together.
struct Split {
  bf16 parts[3];
};

enum class DType { f32, bf16, f16, f64 };

// The type that values of storage T are computed and accumulated in.
template <class T>
struct Accum;
template <>
struct Accum<float> {
  using type = float;
};
template <>
struct Accum<bf16> {
  using type = float;
};
template <>
struct Accum<fp16> {
  using type = float;
};
template <>
struct Accum<double> {
  using type = double;
};
template <>
struct Accum<Split> {
  using type = float;
};
template <class T>
using accum_t = typename Accum<T>::type;

}  // namespace fasttx
