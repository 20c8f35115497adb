// Vec for AVX2 with FMA and F16C: 8 floats or 4 doubles.
// No include guard and no namespace: the isa_*.cpp file includes types.h and <immintrin.h>, opens
// fasttx::FASTTX_ISA and then includes this once, so that instruction sets share no function.

template <class A>
struct Vec;

inline constexpr int kNearestEven = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

// Round to nearest even by integer arithmetic; NaN stays a quiet NaN.
FASTTX_INLINE __m128i narrow_bf16(__m256 v) {
  const __m256i u = _mm256_castps_si256(v);
  const __m256i high = _mm256_srli_epi32(u, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(u, bias), 16);
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x0040));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i bits = _mm256_blendv_epi8(rounded, quiet, nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
}

FASTTX_INLINE __m256 widen_bf16(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

FASTTX_INLINE __m128i narrow_fp16(__m256 v) {
  return _mm256_cvtps_ph(v, kNearestEven);
}

// n 16-bit lanes, the rest zero: AVX2 masks only lanes of 32 and 64 bits.
template <class T>
FASTTX_INLINE __m128i load_halves(const T* p, int n) {
  alignas(16) uint16_t lanes[8] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i].bits;
  return _mm_load_si128(reinterpret_cast<const __m128i*>(lanes));
}
template <class T>
FASTTX_INLINE void store_halves(T* p, int n, __m128i bits) {
  alignas(16) uint16_t lanes[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(lanes), bits);
  for (int i = 0; i < n; ++i) p[i].bits = lanes[i];
}

FASTTX_INLINE __m256i float_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FASTTX_INLINE __m256i double_lanes(int n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}

template <>
struct Vec<float> {
  using Mask = __m256;
  static constexpr int kWidth = 8;
  __m256 v;

  static FASTTX_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
  static FASTTX_INLINE Vec set1(float x) { return {_mm256_set1_ps(x)}; }
  static FASTTX_INLINE Vec iota() { return {_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7)}; }
  static FASTTX_INLINE Mask first_lanes(int n) { return _mm256_castsi256_ps(float_lanes(n)); }

  static FASTTX_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static FASTTX_INLINE Vec load(const bf16* p) {
    return {widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  static FASTTX_INLINE Vec load(const fp16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  // The first n lanes, 0 <= n <= kWidth, the rest zero: nothing beyond p + n is touched.
  static FASTTX_INLINE Vec load(const float* p, int n) {
    return {_mm256_maskload_ps(p, float_lanes(n))};
  }
  static FASTTX_INLINE Vec load(const bf16* p, int n) { return {widen_bf16(load_halves(p, n))}; }
  static FASTTX_INLINE Vec load(const fp16* p, int n) {
    return {_mm256_cvtph_ps(load_halves(p, n))};
  }

  FASTTX_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  FASTTX_INLINE void store(bf16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(v));
  }
  FASTTX_INLINE void store(fp16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_fp16(v));
  }
  FASTTX_INLINE void store(float* p, int n) const { _mm256_maskstore_ps(p, float_lanes(n), v); }
  FASTTX_INLINE void store(bf16* p, int n) const { store_halves(p, n, narrow_bf16(v)); }
  FASTTX_INLINE void store(fp16* p, int n) const { store_halves(p, n, narrow_fp16(v)); }

  // To memory, past the caches; p is aligned to the vector.
  FASTTX_INLINE void stream(float* p) const { _mm256_stream_ps(p, v); }
  FASTTX_INLINE void stream(bf16* p) const { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(v)); }
  FASTTX_INLINE void stream(fp16* p) const { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow_fp16(v)); }

  // Where the unsigned words at p are at least `threshold`.
  static FASTTX_INLINE Mask at_least(const uint32_t* p, uint32_t threshold) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_max_epu32(words, _mm256_set1_epi32(int(threshold))), words));
  }
  // Where the bytes at p are not zero.
  static FASTTX_INLINE Mask nonzero(const uint8_t* p) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_cvtepu8_epi32(bytes), _mm256_setzero_si256()));
  }
};

// Orders streams before what the thread writes later.
FASTTX_INLINE void finish_streams() { _mm_sfence(); }

template <>
struct Vec<double> {
  using Mask = __m256d;
  static constexpr int kWidth = 4;
  __m256d v;

  static FASTTX_INLINE Vec zero() { return {_mm256_setzero_pd()}; }
  static FASTTX_INLINE Vec set1(double x) { return {_mm256_set1_pd(x)}; }
  static FASTTX_INLINE Vec iota() { return {_mm256_setr_pd(0, 1, 2, 3)}; }
  static FASTTX_INLINE Mask first_lanes(int n) { return _mm256_castsi256_pd(double_lanes(n)); }

  static FASTTX_INLINE Vec load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static FASTTX_INLINE Vec load(const float* p) { return {_mm256_cvtps_pd(_mm_loadu_ps(p))}; }
  static FASTTX_INLINE Vec load(const double* p, int n) {
    return {_mm256_maskload_pd(p, double_lanes(n))};
  }
  static FASTTX_INLINE Vec load(const float* p, int n) {
    return {_mm256_cvtps_pd(_mm_maskload_ps(p, _mm256_castsi256_si128(float_lanes(n))))};
  }
  FASTTX_INLINE void store(double* p) const { _mm256_storeu_pd(p, v); }
  FASTTX_INLINE void store(double* p, int n) const { _mm256_maskstore_pd(p, double_lanes(n), v); }
  FASTTX_INLINE void stream(double* p) const { _mm256_stream_pd(p, v); }

  static FASTTX_INLINE Mask at_least(const uint32_t* p, uint32_t threshold) {
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m128i kept = _mm_cmpeq_epi32(_mm_max_epu32(words, _mm_set1_epi32(int(threshold))), words);
    return _mm256_castsi256_pd(_mm256_cvtepi32_epi64(kept));
  }
  static FASTTX_INLINE Mask nonzero(const uint8_t* p) {
    const __m128i bytes = _mm_loadu_si32(p);
    return _mm256_castsi256_pd(_mm256_cmpgt_epi64(_mm256_cvtepu8_epi64(bytes), _mm256_setzero_si256()));
  }
};

// fma is a * b + c and fnma c - a * b, rounded once; max and min return b when either is NaN;
// comparisons are false where either side is NaN.
#define FASTTX_ARITHMETIC(A, s)                                                                    \
  FASTTX_INLINE Vec<A> operator+(Vec<A> a, Vec<A> b) { return {_mm256_add_##s(a.v, b.v)}; }        \
  FASTTX_INLINE Vec<A> operator-(Vec<A> a, Vec<A> b) { return {_mm256_sub_##s(a.v, b.v)}; }        \
  FASTTX_INLINE Vec<A> operator*(Vec<A> a, Vec<A> b) { return {_mm256_mul_##s(a.v, b.v)}; }        \
  FASTTX_INLINE Vec<A> operator/(Vec<A> a, Vec<A> b) { return {_mm256_div_##s(a.v, b.v)}; }        \
  FASTTX_INLINE Vec<A> max(Vec<A> a, Vec<A> b) { return {_mm256_max_##s(a.v, b.v)}; }              \
  FASTTX_INLINE Vec<A> min(Vec<A> a, Vec<A> b) { return {_mm256_min_##s(a.v, b.v)}; }              \
  FASTTX_INLINE Vec<A> fma(Vec<A> a, Vec<A> b, Vec<A> c) {                                         \
    return {_mm256_fmadd_##s(a.v, b.v, c.v)};                                                      \
  }                                                                                                \
  FASTTX_INLINE Vec<A> fnma(Vec<A> a, Vec<A> b, Vec<A> c) {                                        \
    return {_mm256_fnmadd_##s(a.v, b.v, c.v)};                                                     \
  }                                                                                                \
  FASTTX_INLINE Vec<A> operator-(Vec<A> a) {                                                       \
    return {_mm256_xor_##s(a.v, _mm256_set1_##s(A(-0.0)))};                                        \
  }                                                                                                \
  FASTTX_INLINE Vec<A> abs(Vec<A> a) {                                                             \
    return {_mm256_andnot_##s(_mm256_set1_##s(A(-0.0)), a.v)};                                     \
  }                                                                                                \
  FASTTX_INLINE Vec<A> sqrt(Vec<A> a) { return {_mm256_sqrt_##s(a.v)}; }                           \
  FASTTX_INLINE Vec<A> round(Vec<A> a) { return {_mm256_round_##s(a.v, kNearestEven)}; }           \
  FASTTX_INLINE Vec<A>::Mask lt(Vec<A> a, Vec<A> b) {                                              \
    return _mm256_cmp_##s(a.v, b.v, _CMP_LT_OQ);                                                   \
  }                                                                                                \
  FASTTX_INLINE Vec<A>::Mask le(Vec<A> a, Vec<A> b) {                                              \
    return _mm256_cmp_##s(a.v, b.v, _CMP_LE_OQ);                                                   \
  }                                                                                                \
  FASTTX_INLINE Vec<A>::Mask eq(Vec<A> a, Vec<A> b) {                                              \
    return _mm256_cmp_##s(a.v, b.v, _CMP_EQ_OQ);                                                   \
  }                                                                                                \
  FASTTX_INLINE Vec<A>::Mask gt(Vec<A> a, Vec<A> b) {                                              \
    return _mm256_cmp_##s(a.v, b.v, _CMP_GT_OQ);                                                   \
  }                                                                                                \
  FASTTX_INLINE Vec<A>::Mask ge(Vec<A> a, Vec<A> b) {                                              \
    return _mm256_cmp_##s(a.v, b.v, _CMP_GE_OQ);                                                   \
  }
FASTTX_ARITHMETIC(float, ps)
FASTTX_ARITHMETIC(double, pd)
#undef FASTTX_ARITHMETIC

// What rounding added to `product`, which is a * b rounded; exact.
template <class A>
FASTTX_INLINE Vec<A> product_error(Vec<A> a, Vec<A> b, Vec<A> product) {
  return fnma(a, b, product);
}

// 1 / a to about 1 ulp for a in 2^-100 to 2^100. Divides: a 12-bit estimate needs two Newton steps.
template <class A>
FASTTX_INLINE Vec<A> reciprocal(Vec<A> a) {
  return Vec<A>::set1(1) / a;
}

// x * 2^n for integral n and |x| in 2^-100 to 2^100, in two factors so that underflow is gradual.
FASTTX_INLINE Vec<float> scalef(Vec<float> x, Vec<float> n) {
  const Vec<float> bounded = min(max(n, Vec<float>::set1(-252.0f)), Vec<float>::set1(254.0f));
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(bounded.v), _mm256_set1_epi32(254));
  const __m256i half = _mm256_srli_epi32(exponent, 1);  // each factor's exponent, biased by 127
  const __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(half, 23));
  const __m256i rest = _mm256_sub_epi32(exponent, half);
  const __m256 second = _mm256_castsi256_ps(_mm256_slli_epi32(rest, 23));
  return {_mm256_mul_ps(_mm256_mul_ps(x.v, first), second)};
}
FASTTX_INLINE Vec<double> scalef(Vec<double> x, Vec<double> n) {
  const Vec<double> bounded = min(max(n, Vec<double>::set1(-2044.0)), Vec<double>::set1(2046.0));
  const __m128i exponent = _mm_add_epi32(_mm256_cvtpd_epi32(bounded.v), _mm_set1_epi32(2046));
  const __m128i half = _mm_srli_epi32(exponent, 1);
  const __m128i rest = _mm_sub_epi32(exponent, half);
  const __m256i first = _mm256_slli_epi64(_mm256_cvtepi32_epi64(half), 52);
  const __m256i second = _mm256_slli_epi64(_mm256_cvtepi32_epi64(rest), 52);
  return {_mm256_mul_pd(_mm256_mul_pd(x.v, _mm256_castsi256_pd(first)),
                        _mm256_castsi256_pd(second))};
}

template <class V>
FASTTX_INLINE typename V::Mask first_lanes(int n) {
  return V::first_lanes(n);
}
#define FASTTX_MASK(A, s, M, full)                                                                 \
  FASTTX_INLINE M mask_and(M a, M b) { return _mm256_and_##s(a, b); }                              \
  FASTTX_INLINE M mask_or(M a, M b) { return _mm256_or_##s(a, b); }                                \
  FASTTX_INLINE M mask_not(M a) {                                                                  \
    return _mm256_xor_##s(a, _mm256_castsi256_##s(_mm256_set1_epi32(-1)));                         \
  }                                                                                                \
  FASTTX_INLINE bool any(M a) { return _mm256_movemask_##s(a) != 0; }                              \
  FASTTX_INLINE bool all(M a) { return _mm256_movemask_##s(a) == full; }                           \
  FASTTX_INLINE Vec<A> select(M m, Vec<A> if_true, Vec<A> if_false) {                              \
    return {_mm256_blendv_##s(if_false.v, if_true.v, m)};                                          \
  }
FASTTX_MASK(float, ps, __m256, 0xff)
FASTTX_MASK(double, pd, __m256d, 0xf)
#undef FASTTX_MASK

// Halving trees: lane i meets lane i + 4, then i + 2, i + 1.
#define FASTTX_REDUCE(name, op)                                                                    \
  FASTTX_INLINE float name(Vec<float> a) {                                                         \
    __m128 x = _mm_##op##_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));          \
    x = _mm_##op##_ps(x, _mm_movehl_ps(x, x));                                                     \
    return _mm_cvtss_f32(_mm_##op##_ss(x, _mm_movehdup_ps(x)));                                    \
  }                                                                                                \
  FASTTX_INLINE double name(Vec<double> a) {                                                       \
    __m128d x = _mm_##op##_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));         \
    return _mm_cvtsd_f64(_mm_##op##_sd(x, _mm_unpackhi_pd(x, x)));                                 \
  }
FASTTX_REDUCE(reduce_add, add)
FASTTX_REDUCE(reduce_max, max)
#undef FASTTX_REDUCE

// 32-bit words in 64-bit lanes whose upper halves are arbitrary: what Philox multiplies.
struct Words {
  static constexpr int kWidth = 4;
  __m256i v;
  static FASTTX_INLINE Words set1(uint32_t x) { return {_mm256_set1_epi64x(x)}; }
  // first, first + 1, ... modulo 2^32.
  static FASTTX_INLINE Words count(uint32_t first) {
    return {_mm256_add_epi64(_mm256_set1_epi64x(first), _mm256_setr_epi64x(0, 1, 2, 3))};
  }
};
FASTTX_INLINE Words product(Words a, Words b) { return {_mm256_mul_epu32(a.v, b.v)}; }
FASTTX_INLINE Words upper_half(Words a) { return {_mm256_srli_epi64(a.v, 32)}; }
FASTTX_INLINE Words xor3(Words a, Words b, Words c) {
  return {_mm256_xor_si256(_mm256_xor_si256(a.v, b.v), c.v)};
}
// a0 b0 c0 d0 a1 b1 c1 d1 ...
FASTTX_INLINE void store_words(uint32_t* p, Words a, Words b, Words c, Words d) {
  const __m256i ab = _mm256_blend_epi32(a.v, _mm256_slli_epi64(b.v, 32), 0xaa);
  const __m256i cd = _mm256_blend_epi32(c.v, _mm256_slli_epi64(d.v, 32), 0xaa);
  const __m256i even = _mm256_unpacklo_epi64(ab, cd), odd = _mm256_unpackhi_epi64(ab, cd);
  __m256i* out = reinterpret_cast<__m256i*>(p);
  _mm256_storeu_si256(out, _mm256_permute2x128_si256(even, odd, 0x20));
  _mm256_storeu_si256(out + 1, _mm256_permute2x128_si256(even, odd, 0x31));
}
