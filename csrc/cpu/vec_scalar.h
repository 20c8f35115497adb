// Vec in plain C++ for any architecture: one lane.
// No include guard and no namespace: the isa_*.cpp file includes types.h, opens fasttx::FASTTX_ISA
// and then includes this once, so that instruction sets share no function.

FASTTX_INLINE float widen(float x) { return x; }
FASTTX_INLINE double widen(double x) { return x; }
FASTTX_INLINE float widen(bf16 x) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); }
FASTTX_INLINE float widen(fp16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  uint32_t bits;
  if (magnitude >= 0x7c00) {  // infinity, or NaN made quiet
    bits = 0x7f800000 | (magnitude & 0x3ff) << 13 | (magnitude > 0x7c00 ? 0x00400000 : 0);
  } else if (magnitude >= 0x0400) {
    bits = (magnitude << 13) + (112u << 23);  // exponent bias 127 instead of 15
  } else {
    bits = __builtin_bit_cast(uint32_t, float(magnitude) * 0x1p-24f);  // subnormal
  }
  return __builtin_bit_cast(float, sign | bits);
}

// Round to nearest even; NaN stays NaN.
FASTTX_INLINE void narrow(float x, float& out) { out = x; }
FASTTX_INLINE void narrow(double x, double& out) { out = x; }
FASTTX_INLINE void narrow(float x, bf16& out) {
  const uint32_t u = __builtin_bit_cast(uint32_t, x);
  const uint32_t high = u >> 16;
  out.bits = uint16_t(x != x ? high | 0x0040 : (u + 0x7fff + (high & 1)) >> 16);
}
FASTTX_INLINE void narrow(float x, fp16& out) {
  const uint32_t u = __builtin_bit_cast(uint32_t, x);
  const uint32_t magnitude = u & 0x7fffffff;
  uint32_t bits;
  if (magnitude > 0x7f800000) {
    bits = 0x7e00 | ((magnitude >> 13) & 0x3ff);
  } else if (magnitude >= 0x477ff000) {  // 65520 and beyond round to infinity
    bits = 0x7c00;
  } else if (magnitude >= 0x38800000) {
    bits = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  } else {  // subnormal: adding 0.5, whose last bit weighs 2^-24, rounds to the right place
    const float shifted = __builtin_bit_cast(float, magnitude) + 0.5f;
    bits = __builtin_bit_cast(uint32_t, shifted) - 0x3f000000;
  }
  out.bits = uint16_t((u >> 16 & 0x8000) | bits);
}

template <class A>
struct Vec {
  using Mask = bool;
  static constexpr int kWidth = 1;
  A v;

  static FASTTX_INLINE Vec zero() { return {A(0)}; }
  static FASTTX_INLINE Vec set1(A x) { return {x}; }
  static FASTTX_INLINE Vec iota() { return {A(0)}; }

  template <class T>
  static FASTTX_INLINE Vec load(const T* p) {
    return {A(widen(*p))};
  }
  // The first n lanes, 0 <= n <= kWidth, the rest zero.
  template <class T>
  static FASTTX_INLINE Vec load(const T* p, int n) {
    return n > 0 ? load(p) : zero();
  }
  template <class T>
  FASTTX_INLINE void store(T* p) const {
    narrow(v, *p);
  }
  template <class T>
  FASTTX_INLINE void store(T* p, int n) const {
    if (n > 0) narrow(v, *p);
  }
  template <class T>
  FASTTX_INLINE void stream(T* p) const {
    store(p);
  }

  static FASTTX_INLINE Mask at_least(const uint32_t* p, uint32_t threshold) { return *p >= threshold; }
  static FASTTX_INLINE Mask nonzero(const uint8_t* p) { return *p != 0; }

  friend FASTTX_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
  friend FASTTX_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
  friend FASTTX_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
  friend FASTTX_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
  friend FASTTX_INLINE Vec operator-(Vec a) { return {-a.v}; }
};

FASTTX_INLINE void finish_streams() {}

// a * b + c and c - a * b, rounded twice, unlike the vector units: without hardware a fused one is
// a slow library call.
template <class A>
FASTTX_INLINE Vec<A> fma(Vec<A> a, Vec<A> b, Vec<A> c) {
  return {a.v * b.v + c.v};
}
template <class A>
FASTTX_INLINE Vec<A> fnma(Vec<A> a, Vec<A> b, Vec<A> c) {
  return {c.v - a.v * b.v};
}
// What rounding added to `product`, which is a * b rounded; exact.
FASTTX_INLINE Vec<float> product_error(Vec<float> a, Vec<float> b, Vec<float> product) {
  return {float(product.v - double(a.v) * b.v)};
}
FASTTX_INLINE Vec<double> product_error(Vec<double> a, Vec<double> b, Vec<double> product) {
  return {-__builtin_fma(a.v, b.v, -product.v)};
}
// Both return b when either is NaN.
template <class A>
FASTTX_INLINE Vec<A> max(Vec<A> a, Vec<A> b) {
  return {a.v > b.v ? a.v : b.v};
}
template <class A>
FASTTX_INLINE Vec<A> min(Vec<A> a, Vec<A> b) {
  return {a.v < b.v ? a.v : b.v};
}
FASTTX_INLINE Vec<float> abs(Vec<float> a) { return {__builtin_fabsf(a.v)}; }
FASTTX_INLINE Vec<double> abs(Vec<double> a) { return {__builtin_fabs(a.v)}; }
FASTTX_INLINE Vec<float> sqrt(Vec<float> a) { return {__builtin_sqrtf(a.v)}; }
FASTTX_INLINE Vec<double> sqrt(Vec<double> a) { return {__builtin_sqrt(a.v)}; }
// Adding 1.5 * 2^(mantissa bits) rounds to nearest even; what is larger is an integer already.
FASTTX_INLINE Vec<float> round(Vec<float> a) {
  const float rounded = (a.v + 0x1.8p23f) - 0x1.8p23f;
  return {__builtin_fabsf(a.v) < 0x1p22f ? __builtin_copysignf(rounded, a.v) : a.v};
}
FASTTX_INLINE Vec<double> round(Vec<double> a) {
  const double rounded = (a.v + 0x1.8p52) - 0x1.8p52;
  return {__builtin_fabs(a.v) < 0x1p51 ? __builtin_copysign(rounded, a.v) : a.v};
}
template <class A>
FASTTX_INLINE Vec<A> reciprocal(Vec<A> a) {
  return {A(1) / a.v};
}

// x * 2^n for integral n and |x| in 2^-100 to 2^100, in two factors so that underflow is gradual.
FASTTX_INLINE Vec<float> scalef(Vec<float> x, Vec<float> n) {
  const int exponent = int(min(max(n, Vec<float>{-252.0f}), Vec<float>{254.0f}).v);
  const int half = exponent >> 1;
  const float first = __builtin_bit_cast(float, uint32_t(127 + half) << 23);
  const float second = __builtin_bit_cast(float, uint32_t(127 + exponent - half) << 23);
  return {x.v * first * second};
}
FASTTX_INLINE Vec<double> scalef(Vec<double> x, Vec<double> n) {
  const int exponent = int(min(max(n, Vec<double>{-2044.0}), Vec<double>{2046.0}).v);
  const int half = exponent >> 1;
  const double first = __builtin_bit_cast(double, uint64_t(1023 + half) << 52);
  const double second = __builtin_bit_cast(double, uint64_t(1023 + exponent - half) << 52);
  return {x.v * first * second};
}

// Comparisons are false where either side is NaN.
template <class A>
FASTTX_INLINE bool lt(Vec<A> a, Vec<A> b) {
  return a.v < b.v;
}
template <class A>
FASTTX_INLINE bool le(Vec<A> a, Vec<A> b) {
  return a.v <= b.v;
}
template <class A>
FASTTX_INLINE bool eq(Vec<A> a, Vec<A> b) {
  return a.v == b.v;
}
template <class A>
FASTTX_INLINE bool gt(Vec<A> a, Vec<A> b) {
  return a.v > b.v;
}
template <class A>
FASTTX_INLINE bool ge(Vec<A> a, Vec<A> b) {
  return a.v >= b.v;
}
template <class V>
FASTTX_INLINE bool first_lanes(int n) {
  return n > 0;
}
FASTTX_INLINE bool mask_and(bool a, bool b) { return a && b; }
FASTTX_INLINE bool mask_or(bool a, bool b) { return a || b; }
FASTTX_INLINE bool mask_not(bool a) { return !a; }
FASTTX_INLINE bool any(bool a) { return a; }
FASTTX_INLINE bool all(bool a) { return a; }
template <class A>
FASTTX_INLINE Vec<A> select(bool m, Vec<A> if_true, Vec<A> if_false) {
  return {m ? if_true.v : if_false.v};
}

template <class A>
FASTTX_INLINE A reduce_add(Vec<A> a) {
  return a.v;
}
template <class A>
FASTTX_INLINE A reduce_max(Vec<A> a) {
  return a.v;
}

// A 32-bit word in a 64-bit lane whose upper half is arbitrary: what Philox multiplies.
struct Words {
  static constexpr int kWidth = 1;
  uint64_t v;
  static FASTTX_INLINE Words set1(uint32_t x) { return {x}; }
  static FASTTX_INLINE Words count(uint32_t first) { return {first}; }
};
FASTTX_INLINE Words product(Words a, Words b) { return {uint64_t(uint32_t(a.v)) * uint32_t(b.v)}; }
FASTTX_INLINE Words upper_half(Words a) { return {a.v >> 32}; }
FASTTX_INLINE Words xor3(Words a, Words b, Words c) { return {a.v ^ b.v ^ c.v}; }
FASTTX_INLINE void store_words(uint32_t* p, Words a, Words b, Words c, Words d) {
  p[0] = uint32_t(a.v), p[1] = uint32_t(b.v), p[2] = uint32_t(c.v), p[3] = uint32_t(d.v);
}
