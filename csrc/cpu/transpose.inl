// Packing of row-major matrices into the tile's operands, a block of registers at a time.

#if defined(__AVX512F__)
// block[i] lane j <-> block[j] lane i, in 64 shuffles.
FASTTX_INLINE void transpose(Vec<float> (&block)[16]) {
  __m512 pairs[16], fours[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(block[i].v, block[i + 1].v);
    pairs[i + 1] = _mm512_unpackhi_ps(block[i].v, block[i + 1].v);
  }
  // fours[4 g + c], quarter q: column 4 q + c of rows 4 g to 4 g + 3.
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
      const __m512d a = _mm512_castps_pd(pairs[i + c]), b = _mm512_castps_pd(pairs[i + c + 2]);
      fours[i + 2 * c] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      fours[i + 2 * c + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 even01 = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0x88);
    const __m512 odd01 = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0xdd);
    const __m512 even23 = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0x88);
    const __m512 odd23 = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0xdd);
    block[c].v = _mm512_shuffle_f32x4(even01, even23, 0x88);
    block[4 + c].v = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
    block[8 + c].v = _mm512_shuffle_f32x4(even01, even23, 0xdd);
    block[12 + c].v = _mm512_shuffle_f32x4(odd01, odd23, 0xdd);
  }
}
#elif defined(__AVX2__)
FASTTX_INLINE void transpose(Vec<float> (&block)[8]) {
  __m256 pairs[8], fours[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(block[i].v, block[i + 1].v);
    pairs[i + 1] = _mm256_unpackhi_ps(block[i].v, block[i + 1].v);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
      const __m256d a = _mm256_castps_pd(pairs[i + c]), b = _mm256_castps_pd(pairs[i + c + 2]);
      fours[i + 2 * c] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
      fours[i + 2 * c + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    block[c].v = _mm256_permute2f128_ps(fours[c], fours[4 + c], 0x20);
    block[4 + c].v = _mm256_permute2f128_ps(fours[c], fours[4 + c], 0x31);
  }
}
#endif

#if defined(__AVX512BF16__)
// low 0, high 0, low 1, high 1, ...
FASTTX_INLINE __m512i interleave(__m256i low, __m256i high) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}
#endif

// One vector of the packed operand: kWidth steps of a row, of which `left` values exist.
template <class P>
struct StepVector {
  using V = Vec<P>;
  template <class T>
  static FASTTX_INLINE V load(const T* p, int64_t left) {
    return left >= V::kWidth ? V::load(p) : V::load(p, static_cast<int>(left));
  }
  static FASTTX_INLINE void store(V value, P* to) { value.store(to); }
};
#if defined(__AVX512BF16__)
template <>
struct StepVector<bf16> {
  using V = Vec<float>;
  static FASTTX_INLINE V load(const bf16* p, int64_t left) {
    const __mmask32 lanes = left >= 32 ? ~0u : (1u << left) - 1u;
    return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(lanes, p))};
  }
  static FASTTX_INLINE void store(V value, bf16* to) { _mm512_storeu_si512(to, _mm512_castps_si512(value.v)); }
};
#endif

// panel = from^T for `rows` <= kCols rows of `width` values, as the tile's right operand. Zero up to the next whole
// vector of columns, and beyond `width` up to a whole step of the left operand.
template <class P, int kCols = kTileCols<P>, class T>
static void pack_transposed(const T* from, int64_t row_stride, int64_t rows, int64_t width, P* panel) {
  using V = Vec<accum_t<P>>;
  constexpr int kStep = Packed<P>::kStep, kWidth = V::kWidth;
  const int64_t steps = ceil_div(width, kStep), padded = round_up(width, Packed<P>::kLeftStep) / kStep;
  memset(panel + steps * kCols * kStep, 0, sizeof(P) * (padded - steps) * kCols * kStep);
  if constexpr (kWidth == 1 || sizeof(accum_t<P>) == 8) {
    const int64_t columns = round_up(rows, kWidth);
    for (int64_t k = 0; k < width; ++k)
      for (int64_t row = 0; row < columns; ++row)
        panel[k * kCols + row] = row < rows ? convert_one<P>(from[row * row_stride + k]) : P{};
  } else {
    for (int64_t row = 0; row < rows; row += kWidth) {
      const int64_t height = min_of(kWidth, rows - row);
      for (int64_t step = 0; step < steps; step += kWidth) {
        const T* corner = from + row * row_stride + step * kStep;
        const int64_t left = width - step * kStep;
        V block[kWidth];
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i)
          block[i] = i < height ? StepVector<P>::load(corner + i * row_stride, left) : V::zero();
        transpose(block);
        P* to = panel + (step * kCols + row) * kStep;
        if (steps - step >= kWidth) {
#pragma GCC unroll 16
          for (int i = 0; i < kWidth; ++i) StepVector<P>::store(block[i], to + i * kCols * kStep);
        } else {
          V stored[kWidth];
          for (int i = 0; i < kWidth; ++i) stored[i] = block[i];
          for (int i = 0; i < steps - step; ++i) StepVector<P>::store(stored[i], to + i * kCols * kStep);
        }
      }
    }
  }
}

// panels[p] = columns [p kCols, (p + 1) kCols) of `from`, as the tile's right operand, each panel `pitch`
// values after the one before. Zero up to the next whole vector of columns, and in rows up to a whole step of the left
// operand.
template <class P, int kCols = kTileCols<P>, class T>
static void pack_rows(const T* from, int64_t row_stride, int64_t rows, int64_t width, P* panels, int64_t pitch) {
  using V = Vec<accum_t<P>>;
  constexpr int kWidth = V::kWidth;
  for (int64_t column = 0; column < width; column += kWidth) {
    const int lanes = static_cast<int>(min_of(kWidth, width - column));
    P* to = panels + column / kCols * pitch + column % kCols * Packed<P>::kStep;
    if constexpr (Packed<P>::kStep == 1) {
      for (int64_t row = 0; row < rows; ++row)
        load_lanes<V>(from + row * row_stride + column, lanes).store(to + row * kCols);
    } else {
#if defined(__AVX512BF16__)
      const __mmask16 mask = first_lanes<V>(lanes);
      for (int64_t row = 0; row < rows; row += 2) {
        const bf16* even = from + row * row_stride + column;
        const bool paired = row + 1 < rows;
        const __m256i low = _mm256_maskz_loadu_epi16(mask, even);
        const __m256i high = _mm256_maskz_loadu_epi16(paired ? mask : 0, paired ? even + row_stride : even);
        _mm512_storeu_si512(to + row * kCols, interleave(low, high));
      }
      for (int64_t row = round_up(rows, 2); row < round_up(rows, Packed<P>::kLeftStep); row += 2)
        _mm512_storeu_si512(to + row * kCols, _mm512_setzero_si512());
#endif
    }
  }
}

// Rows of the tile's left operand from row0 on, `pitch` values apart, zero up to a whole step.
template <class P, class T>
static void pack_left(const T* from, int64_t row_stride, int64_t rows, int64_t width, P* to, int64_t pitch,
                      int64_t row0 = 0) {
  to += row0 * pitch;
  for (int64_t row = 0; row < rows; ++row) {
    copy_as(from + row * row_stride, to + row * pitch, width);
    for (int64_t k = width; k < round_up(width, Packed<P>::kLeftStep); ++k) to[row * pitch + k] = P{};
  }
}

// Stores sums as values of a left operand. Denormals may become zero: the bf16 product takes them for zero anyway.
template <class A>
FASTTX_INLINE void store_operand(Vec<A> value, A* to) {
  value.store(to);
}
#if defined(__AVX512BF16__)
FASTTX_INLINE void store_operand(Vec<float> value, bf16* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(value.v));
}
FASTTX_INLINE void store_operands(Vec<float> first, Vec<float> second, bf16* to) {
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(second.v, first.v));
}
// Two rows side by side, as steps of the transposed operand.
FASTTX_INLINE void store_operand_pair(Vec<float> even, Vec<float> odd, bf16* to) {
  _mm512_storeu_si512(to, interleave((__m256i)_mm512_cvtneps_pbh(even.v), (__m256i)_mm512_cvtneps_pbh(odd.v)));
}
#endif
