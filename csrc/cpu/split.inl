// Products of float32 on AMX: every value is the sum of three bf16 values, exactly, and of the nine products of parts the
// six largest are taken; what the others would add is below the rounding of float32. Where nothing else uses the core, the
// matrix unit is so much faster than the vector unit that six of its products take less time than one of the other's.
// (Henry, Tang and Heinecke, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision
// computations", ARITH 2019.)
//
// Parts of values that are not finite or nearly too large, and products below 2^-126, give sums that are not finite or
// tiny; such sums are taken again on the vector unit.
#if defined(FASTTX_SPLITS)

constexpr int kSplitParts = 3;
// One step of an operand: all three parts of 32 values of k of a tile's rows, or of a panel's columns, each as two tiles.
constexpr int64_t kSplitTile = kAmxK * kAmxCols, kSplitPanelPart = 2 * kSplitTile;
constexpr int64_t kSplitPanelStep = kSplitParts * kSplitPanelPart;

// The parts of sixteen values of x and of y, in pairs: lane i of a part holds that of x's value i and that of y's. The
// first part is rounded to the nearest, so that what is left has either sign and the products left out cancel.
struct SplitPairs {
  __m512i part[kSplitParts];
  FASTTX_INLINE SplitPairs(__m512 x, __m512 y) {
    const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(int(0xffff0000));
    alignas(64) static constexpr uint16_t kUpperHalves[32] = {1,  33, 3,  35, 5,  37, 7,  39, 9,  41, 11,
                                                              43, 13, 45, 15, 47, 17, 49, 19, 51, 21, 53,
                                                              23, 55, 25, 57, 27, 59, 29, 61, 31, 63};
    const __m512i upper_halves = _mm512_load_si512(kUpperHalves);
    const auto bits = [](__m512 v) { return _mm512_castps_si512(v); };
    const auto pairs = [&](__m512i a, __m512i b) { return _mm512_permutex2var_epi16(a, upper_halves, b); };
    const auto rest = [&](__m512 v, __m512i rounded) {
      return _mm512_sub_ps(v, _mm512_castsi512_ps(_mm512_and_si512(rounded, upper)));
    };
    const __m512i near_x = _mm512_add_epi32(bits(x), half), near_y = _mm512_add_epi32(bits(y), half);
    part[0] = pairs(near_x, near_y);
    x = rest(x, near_x);
    y = rest(y, near_y);
    part[1] = pairs(bits(x), bits(y));
    part[2] = pairs(bits(rest(x, bits(x))), bits(rest(y, bits(y))));
  }
};

// Stores the parts, `pitch` values apart.
static FASTTX_INLINE void store_pairs(const SplitPairs& pairs, bf16* to, int64_t pitch) {
  for (int part = 0; part < kSplitParts; ++part) _mm512_store_si512(to + part * pitch, pairs.part[part]);
}

// One step of `rows` <= 32 rows as [part][pitch rows][32], of which `present` values of k exist. Pairs are of values 16
// apart.
template <class T>
static FASTTX_INLINE void split_rows(const T* from, int64_t row_stride, int64_t k_stride, int64_t rows, int64_t present,
                                     int64_t pitch, bf16* to) {
  using V = Vec<float>;
  const auto store = [&](int64_t row, int part, __m512i pairs) {
    _mm512_store_si512(to + (part * pitch + row) * kAmxK, pairs);
  };
  if (row_stride == 1 && k_stride != 1) {
    for (int64_t row = 0; row < rows; row += V::kWidth) {
      const int height = static_cast<int>(min_of(V::kWidth, rows - row));
      V block[kSplitParts][V::kWidth];
      for (int i = 0; i < V::kWidth; ++i) {
        const auto values = [&](int64_t k) {
          return k < present ? load_lanes<V>(from + k * k_stride + row, height) : V::zero();
        };
        const SplitPairs pairs(values(i).v, values(i + kAmxK / 2).v);
        for (int part = 0; part < kSplitParts; ++part) block[part][i].v = _mm512_castsi512_ps(pairs.part[part]);
      }
      for (int part = 0; part < kSplitParts; ++part) {
        transpose(block[part]);
        for (int i = 0; i < height; ++i) store(row + i, part, _mm512_castps_si512(block[part][i].v));
      }
    }
    return;
  }
  for (int64_t row = 0; row < rows; ++row, from += row_stride) {
    T gathered[kAmxK];
    const T* values = from;
    if (k_stride != 1) {
      for (int64_t k = 0; k < present; ++k) gathered[k] = from[k * k_stride];
      values = gathered;
    }
    const int upper = static_cast<int>(max_of(0, min_of(V::kWidth, present - V::kWidth)));
    const SplitPairs pairs(load_lanes<V>(values, static_cast<int>(min_of(V::kWidth, present))).v,
                           load_lanes<V>(values + V::kWidth, upper).v);
    for (int part = 0; part < kSplitParts; ++part) store(row, part, pairs.part[part]);
  }
}

// One step of a panel of 32 columns, of which `columns` exist, as [part][tile][pair][column][2], from `present` rows of k,
// `k_stride` apart.
template <class T>
static FASTTX_INLINE void split_columns(const T* from, int64_t k_stride, int64_t present, int64_t columns, bf16* to) {
  using V = Vec<float>;
  constexpr int64_t kFetchAhead = 1024;  // bytes: the panel is read once, from beyond L2 as a rule
  for (int64_t i = 0; i < kAmxK / 2; ++i) {
    for (int64_t column = 0; column < 2 * kAmxCols; column += V::kWidth) {
      const int lanes = static_cast<int>(max_of(0, min_of(V::kWidth, columns - column)));
      const auto values = [&](int64_t k) {
        const T* at = from + k * k_stride + column;
        __builtin_prefetch(reinterpret_cast<const char*>(at) + kFetchAhead);
        return k < present && lanes > 0 ? load_lanes<V>(at, lanes) : V::zero();
      };
      const SplitPairs pairs(values(i).v, values(i + kAmxK / 2).v);
      for (int part = 0; part < kSplitParts; ++part)
        _mm512_storeu_si512(to + part * kSplitPanelPart + column * kAmxK + i * 2 * kAmxCols, pairs.part[part]);
    }
  }
}

// One step of a panel of 32 columns as above, from `columns` rows of `present` values of k.
template <class T>
static FASTTX_INLINE void split_transposed(const T* from, int64_t row_stride, int64_t columns, int64_t present,
                                           bf16* to) {
  using V = Vec<float>;
  const int low = static_cast<int>(min_of(V::kWidth, present)), high = static_cast<int>(max_of(0, present - V::kWidth));
  for (int64_t column = 0; column < 2 * kAmxCols; column += V::kWidth) {
    V block[kSplitParts][V::kWidth];
    for (int i = 0; i < V::kWidth; ++i) {
      const T* row = from + (column + i) * row_stride;
      const bool there = column + i < columns;
      const SplitPairs pairs(there ? load_lanes<V>(row, low).v : V::zero().v,
                             there && high > 0 ? load_lanes<V>(row + V::kWidth, high).v : V::zero().v);
      for (int part = 0; part < kSplitParts; ++part) block[part][i].v = _mm512_castsi512_ps(pairs.part[part]);
    }
    for (int part = 0; part < kSplitParts; ++part) {
      transpose(block[part]);
      for (int i = 0; i < V::kWidth; ++i)
        _mm512_storeu_si512(to + part * kSplitPanelPart + column * kAmxK + i * 2 * kAmxCols,
                           _mm512_castps_si512(block[part][i].v));
    }
  }
}

// sums (rows, 32), rows `sums_stride` apart, = left panel over `steps` steps, in 6 turns a step: the tile registers keep it
// from one to the next. The left operand's parts lie `pitch` rows apart. Rows below the 16th are there with kLower. Every
// product rounds the sum that it is added to: the small ones come first, while that is small too.
template <bool kLower>
struct SplitProduct {
  static constexpr int kTurns = 6;
  const bf16 *left, *panel;
  int64_t pitch;

  FASTTX_INLINE void load_left(int64_t step, int64_t part) const {
    constexpr int64_t kRowBytes = kAmxK * sizeof(bf16);
    const bf16* at = left + (step * kSplitParts + part) * pitch * kAmxK;
    amx_load<4>(at, kRowBytes);
    if constexpr (kLower) amx_load<5>(at + kAmxRows * kAmxK, kRowBytes);
  }
  FASTTX_INLINE void load_panel(int64_t step, int64_t part) const {
    constexpr int64_t kPairBytes = 2 * kAmxCols * sizeof(bf16);
    const bf16* at = panel + (step * kSplitParts + part) * kSplitPanelPart;
    amx_load<6>(at, kPairBytes);
    amx_load<7>(at + kSplitTile, kPairBytes);
  }
  FASTTX_INLINE void begin() const {
    amx_zero<0>();
    amx_zero<1>();
    if constexpr (kLower) amx_zero<2>();
    if constexpr (kLower) amx_zero<3>();
  }
  // The turns are taken in order: from one to the next mostly one operand changes.
  FASTTX_INLINE void small_turn(int64_t step, int turn) const {
    switch (turn) {
      case 0: load_left(step, 2), load_panel(step, 0); break;
      case 1: load_left(step, 1); break;
      case 2: load_panel(step, 1); break;
      case 3: load_left(step, 0); break;
      case 4: load_panel(step, 2); break;
    }
    multiply();
  }
  FASTTX_INLINE void large_turn(int64_t step) const {
    load_left(step, 0);
    load_panel(step, 0);
    multiply();
  }
  FASTTX_INLINE void finish(float* sums, int64_t sums_stride) const {
    const int64_t bytes = sums_stride * static_cast<int64_t>(sizeof(float));
    float* lower = sums + kAmxRows * sums_stride;
    amx_store<0>(sums, bytes);
    amx_store<1>(sums + kAmxCols, bytes);
    if constexpr (kLower) amx_store<2>(lower, bytes);
    if constexpr (kLower) amx_store<3>(lower + kAmxCols, bytes);
  }

 private:
  static FASTTX_INLINE void multiply() {
    amx_multiply<0, 4, 6>();
    amx_multiply<1, 4, 7>();
    if constexpr (kLower) amx_multiply<2, 5, 6>();
    if constexpr (kLower) amx_multiply<3, 5, 7>();
  }
};

// The whole product; meanwhile() is called once a step.
template <bool kLower, class F>
static FASTTX_INLINE void split_block(const bf16* left, int64_t pitch, const bf16* panel, int64_t steps, float* sums,
                                      int64_t sums_stride, const F& meanwhile) {
  const SplitProduct<kLower> product = {left, panel, pitch};
  product.begin();
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 5
    for (int turn = 0; turn < product.kTurns - 1; ++turn) product.small_turn(step, turn);
    meanwhile();
  }
  for (int64_t step = 0; step < steps; ++step) product.large_turn(step);
  product.finish(sums, sums_stride);
}

// Where a sum is not finite, or neither zero nor as large as it takes for what was lost below 2^-126 not to count.
static FASTTX_INLINE __mmask16 split_sums_to_mend(__m512 sums) {
  const __m512i size = _mm512_castps_si512(_mm512_abs_ps(sums));
  constexpr int kSmallest = (127 - 80) << 23, kInfinity = 255 << 23;  // 2^-80
  const __mmask16 whole = _mm512_cmplt_epu32_mask(_mm512_sub_epi32(size, _mm512_set1_epi32(kSmallest)),
                                                  _mm512_set1_epi32(kInfinity - kSmallest));
  return _knot_mask16(_kor_mask16(whole, _mm512_testn_epi32_mask(size, size)));
}
#endif
