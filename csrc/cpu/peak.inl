// What the machine can do at most, for benchmarks to be held against: multiply-adds that stay in registers, and reads.

// Independent sums: more than any unit's latency times the units, and few enough for 16 registers with two operands.
constexpr int kPeakSums = 12;

// Multiply-adds as products of T are made of, all in registers. A sum is returned, so that nothing can be left out.
template <class T>
struct PeakLoop {
  using A = accum_t<T>;
  static constexpr double kStepFlops = 2.0 * kPeakSums * Vec<A>::kWidth;

  static A run(int64_t steps) {
    using V = Vec<A>;
    const V a = V::set1(A(0.5)), b = V::set1(A(1));
    V sum[kPeakSums];
#pragma GCC unroll 12
    for (int j = 0; j < kPeakSums; ++j) sum[j] = V::set1(A(j));
    for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 12
      for (int j = 0; j < kPeakSums; ++j) sum[j] = fma(sum[j], a, b);
    }
    for (int j = 1; j < kPeakSums; ++j) sum[0] = sum[0] + sum[j];
    return reduce_add(sum[0]);
  }
};

#if defined(__AMX_BF16__)
template <>
struct PeakLoop<bf16> {
  static constexpr double kStepFlops = 4 * 2.0 * kAmxRows * kAmxCols * kAmxK;

  static float run(int64_t steps) {
    AmxTiles tiles;  // all zero
    for (int64_t i = 0; i < steps; ++i) {
      amx_multiply<0, 4, 6>();
      amx_multiply<1, 4, 7>();
      amx_multiply<2, 5, 6>();
      amx_multiply<3, 5, 7>();
    }
    float sums[kAmxRows * kAmxCols];
    amx_store<0>(sums, kAmxCols * sizeof(float));
    return sums[0];
  }
};
#elif defined(__AVX512BF16__)
template <>
struct PeakLoop<bf16> {
  static constexpr double kStepFlops = 2.0 * kPeakSums * 32;

  static float run(int64_t steps) {
    const __m512bh a = (__m512bh)_mm512_set1_epi16(0x3f80), b = (__m512bh)_mm512_set1_epi16(0x3000);  // 1 and 2^-31
    __m512 sum[kPeakSums];
#pragma GCC unroll 12
    for (int j = 0; j < kPeakSums; ++j) sum[j] = _mm512_set1_ps(float(j));
    for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 12
      for (int j = 0; j < kPeakSums; ++j) sum[j] = _mm512_dpbf16_ps(sum[j], a, b);
    }
    for (int j = 1; j < kPeakSums; ++j) sum[0] = _mm512_add_ps(sum[0], sum[j]);
    return reduce_add(Vec<float>{sum[0]});
  }
};
#endif

template <class T>
struct PeakKernel {
  static Plan plan(const Peak& p) { return {p.items, 1, 0, false}; }

  static void run(const Peak& p, void*, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) static_cast<accum_t<T>*>(p.out)[i] = PeakLoop<T>::run(p.steps);
  }
};

// Sums of chunks, each read once by several streams of loads.
template <class T>
struct ReadKernel {
  using V = Vec<accum_t<T>>;
  static constexpr int64_t kStreams = 8;

  static Plan plan(const Read& r) { return {r.count / kReadChunk, 4, 0, false}; }

  static void run(const Read& r, void*, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* x = static_cast<const T*>(r.x) + i * kReadChunk;
      V sum[kStreams];
#pragma GCC unroll 8
      for (int j = 0; j < kStreams; ++j) sum[j] = V::zero();
      for (int64_t at = 0; at < kReadChunk; at += kStreams * V::kWidth) {
#pragma GCC unroll 8
        for (int j = 0; j < kStreams; ++j) sum[j] = sum[j] + V::load(x + at + j * V::kWidth);
      }
#pragma GCC unroll 8
      for (int j = 1; j < kStreams; ++j) sum[0] = sum[0] + sum[j];
      static_cast<accum_t<T>*>(r.sums)[i] = reduce_add(sum[0]);
    }
  }
};
