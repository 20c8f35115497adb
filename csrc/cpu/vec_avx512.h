// Vec for AVX-512 (F, BW, DQ, VL): 16 floats or 8 doubles.
// No include guard and no namespace: the isa_*.cpp file includes types.h and <immintrin.h>, opens
// fasttx::FASTTX_ISA and then includes this once, so that instruction sets share no function.

template <class A>
struct Vec;

inline constexpr int kNearestEven = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

// Round to nearest even. vcvtneps2bf16 does, but takes denormals for zero: where there are any, and where there is no such
// instruction, integer arithmetic does the same. The upper halves are taken by one permutation, which is cheaper than a shift
// and vpmovdw.
FASTTX_INLINE __m256i narrow_bf16(__m512 v) {
#ifdef __AVX512BF16__
  constexpr int kDenormal = 0x20;
  if (__builtin_expect(_mm512_fpclass_ps_mask(v, kDenormal) == 0, 1))
    return __builtin_bit_cast(__m256i, _mm512_cvtneps_pbh(v));
#endif
  const __m512i u = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i bits = _mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(0x00400000));  // stays a quiet NaN
  alignas(64) static constexpr uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                      23, 25, 27, 29, 31};
  return _mm512_castsi512_si256(_mm512_permutexvar_epi16(_mm512_load_si512(kUpper), bits));
}

// One permutation that puts each into an upper half, instead of a zero extension and a shift.
FASTTX_INLINE __m512 widen_bf16(__m256i bits) {
  alignas(64) static constexpr uint16_t kSpread[32] = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                                                       0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
  const __m512i from = _mm512_castsi256_si512(bits);
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, _mm512_load_si512(kSpread), from));
}

FASTTX_INLINE __m256i narrow_fp16(__m512 v) {
  return _mm512_cvtps_ph(v, kNearestEven);
}

template <>
struct Vec<float> {
  using Mask = __mmask16;
  static constexpr int kWidth = 16;
  __m512 v;

  static FASTTX_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
  static FASTTX_INLINE Vec set1(float x) { return {_mm512_set1_ps(x)}; }
  static FASTTX_INLINE Vec iota() {
    return {_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
  }
  static FASTTX_INLINE Mask first_lanes(int n) { return Mask((1u << n) - 1u); }

  static FASTTX_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static FASTTX_INLINE Vec load(const bf16* p) {
    return {widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static FASTTX_INLINE Vec load(const fp16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  // The first n lanes, 0 <= n <= kWidth, the rest zero: masked loads touch nothing beyond p + n.
  static FASTTX_INLINE Vec load(const float* p, int n) {
    return {_mm512_maskz_loadu_ps(first_lanes(n), p)};
  }
  static FASTTX_INLINE Vec load(const bf16* p, int n) {
    return {widen_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p))};
  }
  static FASTTX_INLINE Vec load(const fp16* p, int n) {
    return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p))};
  }

  FASTTX_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  FASTTX_INLINE void store(bf16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(v));
  }
  FASTTX_INLINE void store(fp16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_fp16(v));
  }
  FASTTX_INLINE void store(float* p, int n) const { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
  FASTTX_INLINE void store(bf16* p, int n) const {
    _mm256_mask_storeu_epi16(p, first_lanes(n), narrow_bf16(v));
  }
  FASTTX_INLINE void store(fp16* p, int n) const {
    _mm256_mask_storeu_epi16(p, first_lanes(n), narrow_fp16(v));
  }

  // To memory, past the caches; p is aligned to the vector.
  FASTTX_INLINE void stream(float* p) const { _mm512_stream_ps(p, v); }
  FASTTX_INLINE void stream(bf16* p) const { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(v)); }
  FASTTX_INLINE void stream(fp16* p) const { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_fp16(v)); }

  // Where the unsigned words at p are at least `threshold`.
  static FASTTX_INLINE Mask at_least(const uint32_t* p, uint32_t threshold) {
    return _mm512_cmpge_epu32_mask(_mm512_loadu_si512(p), _mm512_set1_epi32(int(threshold)));
  }
  // Where the bytes at p are not zero.
  static FASTTX_INLINE Mask nonzero(const uint8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm_test_epi8_mask(bytes, bytes);
  }
};

// Orders streams before what the thread writes later.
FASTTX_INLINE void finish_streams() { _mm_sfence(); }

template <>
struct Vec<double> {
  using Mask = __mmask8;
  static constexpr int kWidth = 8;
  __m512d v;

  static FASTTX_INLINE Vec zero() { return {_mm512_setzero_pd()}; }
  static FASTTX_INLINE Vec set1(double x) { return {_mm512_set1_pd(x)}; }
  static FASTTX_INLINE Vec iota() { return {_mm512_setr_pd(0, 1, 2, 3, 4, 5, 6, 7)}; }
  static FASTTX_INLINE Mask first_lanes(int n) { return Mask((1u << n) - 1u); }

  static FASTTX_INLINE Vec load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static FASTTX_INLINE Vec load(const float* p) { return {_mm512_cvtps_pd(_mm256_loadu_ps(p))}; }
  static FASTTX_INLINE Vec load(const double* p, int n) {
    return {_mm512_maskz_loadu_pd(first_lanes(n), p)};
  }
  static FASTTX_INLINE Vec load(const float* p, int n) {
    return {_mm512_cvtps_pd(_mm256_maskz_loadu_ps(first_lanes(n), p))};
  }
  FASTTX_INLINE void store(double* p) const { _mm512_storeu_pd(p, v); }
  FASTTX_INLINE void store(double* p, int n) const { _mm512_mask_storeu_pd(p, first_lanes(n), v); }
  FASTTX_INLINE void stream(double* p) const { _mm512_stream_pd(p, v); }

  static FASTTX_INLINE Mask at_least(const uint32_t* p, uint32_t threshold) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm256_cmpge_epu32_mask(words, _mm256_set1_epi32(int(threshold)));
  }
  static FASTTX_INLINE Mask nonzero(const uint8_t* p) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return Mask(_mm_test_epi8_mask(bytes, bytes));
  }
};

// fma is a * b + c and fnma c - a * b, rounded once; max and min return b when either is NaN;
// comparisons are false where either side is NaN; scalef is x * 2^n for integral n, with gradual
// underflow.
#define FASTTX_ARITHMETIC(A, s)                                                                    \
  FASTTX_INLINE Vec<A> operator+(Vec<A> a, Vec<A> b) { return {_mm512_add_##s(a.v, b.v)}; }        \
  FASTTX_INLINE Vec<A> operator-(Vec<A> a, Vec<A> b) { return {_mm512_sub_##s(a.v, b.v)}; }        \
  FASTTX_INLINE Vec<A> operator*(Vec<A> a, Vec<A> b) { return {_mm512_mul_##s(a.v, b.v)}; }        \
  FASTTX_INLINE Vec<A> operator/(Vec<A> a, Vec<A> b) { return {_mm512_div_##s(a.v, b.v)}; }        \
  FASTTX_INLINE Vec<A> max(Vec<A> a, Vec<A> b) { return {_mm512_max_##s(a.v, b.v)}; }              \
  FASTTX_INLINE Vec<A> min(Vec<A> a, Vec<A> b) { return {_mm512_min_##s(a.v, b.v)}; }              \
  FASTTX_INLINE Vec<A> fma(Vec<A> a, Vec<A> b, Vec<A> c) {                                         \
    return {_mm512_fmadd_##s(a.v, b.v, c.v)};                                                      \
  }                                                                                                \
  FASTTX_INLINE Vec<A> fnma(Vec<A> a, Vec<A> b, Vec<A> c) {                                        \
    return {_mm512_fnmadd_##s(a.v, b.v, c.v)};                                                     \
  }                                                                                                \
  FASTTX_INLINE Vec<A> operator-(Vec<A> a) {                                                       \
    return {_mm512_xor_##s(a.v, _mm512_set1_##s(A(-0.0)))};                                        \
  }                                                                                                \
  FASTTX_INLINE Vec<A> abs(Vec<A> a) {                                                             \
    return {_mm512_andnot_##s(_mm512_set1_##s(A(-0.0)), a.v)};                                     \
  }                                                                                                \
  FASTTX_INLINE Vec<A> sqrt(Vec<A> a) { return {_mm512_sqrt_##s(a.v)}; }                           \
  FASTTX_INLINE Vec<A> round(Vec<A> a) { return {_mm512_roundscale_##s(a.v, kNearestEven)}; }      \
  FASTTX_INLINE Vec<A> scalef(Vec<A> x, Vec<A> n) { return {_mm512_scalef_##s(x.v, n.v)}; }        \
  FASTTX_INLINE Vec<A>::Mask lt(Vec<A> a, Vec<A> b) {                                              \
    return _mm512_cmp_##s##_mask(a.v, b.v, _CMP_LT_OQ);                                            \
  }                                                                                                \
  FASTTX_INLINE Vec<A>::Mask le(Vec<A> a, Vec<A> b) {                                              \
    return _mm512_cmp_##s##_mask(a.v, b.v, _CMP_LE_OQ);                                            \
  }                                                                                                \
  FASTTX_INLINE Vec<A>::Mask eq(Vec<A> a, Vec<A> b) {                                              \
    return _mm512_cmp_##s##_mask(a.v, b.v, _CMP_EQ_OQ);                                            \
  }                                                                                                \
  FASTTX_INLINE Vec<A>::Mask gt(Vec<A> a, Vec<A> b) {                                              \
    return _mm512_cmp_##s##_mask(a.v, b.v, _CMP_GT_OQ);                                            \
  }                                                                                                \
  FASTTX_INLINE Vec<A>::Mask ge(Vec<A> a, Vec<A> b) {                                              \
    return _mm512_cmp_##s##_mask(a.v, b.v, _CMP_GE_OQ);                                            \
  }
FASTTX_ARITHMETIC(float, ps)
FASTTX_ARITHMETIC(double, pd)
#undef FASTTX_ARITHMETIC

// What rounding added to `product`, which is a * b rounded; exact.
template <class A>
FASTTX_INLINE Vec<A> product_error(Vec<A> a, Vec<A> b, Vec<A> product) {
  return fnma(a, b, product);
}

// 1 / a to about 1 ulp for a in 2^-100 to 2^100: a 14-bit estimate and one Newton step.
FASTTX_INLINE Vec<float> reciprocal(Vec<float> a) {
  const __m512 r = _mm512_rcp14_ps(a.v);
  return {_mm512_fmadd_ps(r, _mm512_fnmadd_ps(a.v, r, _mm512_set1_ps(1.0f)), r)};
}
FASTTX_INLINE Vec<double> reciprocal(Vec<double> a) { return Vec<double>::set1(1.0) / a; }

// For each lane of a table's entries the one that the last five bits of the lane of i number.
FASTTX_INLINE Vec<float> lookup(const float (&table)[32], Vec<float> i) {
  return {_mm512_permutex2var_ps(_mm512_load_ps(table), _mm512_castps_si512(i.v), _mm512_load_ps(table + 16))};
}

template <class V>
FASTTX_INLINE typename V::Mask first_lanes(int n) {
  return V::first_lanes(n);
}
#define FASTTX_MASK(A, s, M, full)                                                                 \
  FASTTX_INLINE M mask_and(M a, M b) { return M(a & b); }                                          \
  FASTTX_INLINE M mask_or(M a, M b) { return M(a | b); }                                           \
  FASTTX_INLINE M mask_not(M a) { return M(~a); }                                                  \
  FASTTX_INLINE bool any(M a) { return a != 0; }                                                   \
  FASTTX_INLINE bool all(M a) { return a == full; }                                                \
  FASTTX_INLINE Vec<A> select(M m, Vec<A> if_true, Vec<A> if_false) {                              \
    return {_mm512_mask_blend_##s(m, if_false.v, if_true.v)};                                      \
  }
FASTTX_MASK(float, ps, __mmask16, 0xffff)
FASTTX_MASK(double, pd, __mmask8, 0xff)
#undef FASTTX_MASK

// Halving trees: lane i meets lane i + 8, then i + 4, i + 2, i + 1.
#define FASTTX_REDUCE(name, op)                                                        \
  FASTTX_INLINE float name(Vec<float> a) {                                             \
    const __m256 x = _mm256_##op##_ps(_mm512_castps512_ps256(a.v),                     \
                                      _mm512_extractf32x8_ps(a.v, 1));                 \
    __m128 y = _mm_##op##_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));  \
    y = _mm_##op##_ps(y, _mm_movehl_ps(y, y));                                         \
    return _mm_cvtss_f32(_mm_##op##_ss(y, _mm_movehdup_ps(y)));                        \
  }                                                                                    \
  FASTTX_INLINE double name(Vec<double> a) {                                           \
    const __m256d x = _mm256_##op##_pd(_mm512_castpd512_pd256(a.v),                    \
                                       _mm512_extractf64x4_pd(a.v, 1));                \
    __m128d y = _mm_##op##_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd(x, 1)); \
    return _mm_cvtsd_f64(_mm_##op##_sd(y, _mm_unpackhi_pd(y, y)));                     \
  }
FASTTX_REDUCE(reduce_add, add)
FASTTX_REDUCE(reduce_max, max)
#undef FASTTX_REDUCE

// The largest value of each of 16 rows. All halving trees at once: what is left of two rows shares a register, so that
// 15 steps do for 16 rows what one row takes four for.
FASTTX_INLINE Vec<float> reduce_max_rows(const Vec<float> (&rows)[16]) {
  __m512 x[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512 a = rows[i].v, b = rows[i + 8].v;
    x[i] = _mm512_max_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    x[i] = _mm512_max_ps(_mm512_shuffle_f32x4(x[i], x[i + 4], 0x88), _mm512_shuffle_f32x4(x[i], x[i + 4], 0xdd));
  for (int i = 0; i < 2; ++i)
    x[i] = _mm512_max_ps(_mm512_unpacklo_ps(x[i], x[i + 2]), _mm512_unpackhi_ps(x[i], x[i + 2]));
  x[0] = _mm512_max_ps(_mm512_shuffle_ps(x[0], x[1], 0x44), _mm512_shuffle_ps(x[0], x[1], 0xee));
  // Lanes are of rows 0, 2, 1, 3, from row 0 on, then from 8, 4 and 12 on.
  const __m512i row = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
  return {_mm512_permutexvar_ps(row, x[0])};
}

// 32-bit words in 64-bit lanes whose upper halves are arbitrary: what Philox multiplies.
struct Words {
  static constexpr int kWidth = 8;
  __m512i v;
  static FASTTX_INLINE Words set1(uint32_t x) { return {_mm512_set1_epi64(x)}; }
  // first, first + 1, ... modulo 2^32.
  static FASTTX_INLINE Words count(uint32_t first) {
    return {_mm512_add_epi64(_mm512_set1_epi64(first), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7))};
  }
};
FASTTX_INLINE Words product(Words a, Words b) { return {_mm512_mul_epu32(a.v, b.v)}; }
// A shuffle: the shifter is busy with the products.
FASTTX_INLINE Words upper_half(Words a) { return {_mm512_shuffle_epi32(a.v, _MM_PERM_DDBB)}; }
FASTTX_INLINE Words xor3(Words a, Words b, Words c) {
  return {_mm512_ternarylogic_epi64(a.v, b.v, c.v, 0x96)};
}
// a0 b0 c0 d0 a1 b1 c1 d1 ...
FASTTX_INLINE void store_words(uint32_t* p, Words a, Words b, Words c, Words d) {
  const __m512i ab = _mm512_mask_blend_epi32(0xaaaa, a.v, _mm512_slli_epi64(b.v, 32));
  const __m512i cd = _mm512_mask_blend_epi32(0xaaaa, c.v, _mm512_slli_epi64(d.v, 32));
  const __m512i low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  const __m512i high = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  _mm512_storeu_si512(p, _mm512_permutex2var_epi64(ab, low, cd));
  _mm512_storeu_si512(p + 16, _mm512_permutex2var_epi64(ab, high, cd));
}
