// Packing of whole matrices: the operands of Gemm.

template <class T>
static int64_t packed_k(int64_t k) {
  return round_up(k, Packed<T>::kLeftStep);
}

// Whether rows of T with unit stride along k are a left operand as they are.
template <class T>
static bool a_is_packed(int64_t k) {
  return sizeof(T) == sizeof(typename Packed<T>::type) && k == packed_k<T>(k);
}

// Rows of A that pass over a panel of B together.
template <class T>
static inline int64_t gemm_block_rows(int64_t m) {
  constexpr int64_t kUnit = kUsesAmx<T> ? 32 : kTileRows, kMost = kUsesAmx<T> ? 256 : 192;
  return round_up(ceil_div(m, max_of(1, ceil_div(m, kMost))), kUnit);
}

template <class T>
static size_t packed_a_bytes(int64_t m, int64_t k) {
  return sizeof(typename Packed<T>::type) * round_up(m, max_of(1, gemm_block_rows<T>(m))) * packed_k<T>(k);
}

template <class T>
static size_t packed_b_bytes(int64_t k, int64_t n) {
  return sizeof(typename Packed<T>::type) * packed_k<T>(k) * round_up(n, kTileCols<T>);
}

// Items are blocks of rows.
template <class T>
struct PackAKernel {
  using P = typename Packed<T>::type;
  static constexpr int64_t kStep = Packed<T>::kLeftStep;

  static int64_t block_rows(const PackA& g) { return max_of(1, gemm_block_rows<T>(g.m)); }
  static Plan plan(const PackA& g) {
    return {ceil_div(g.m, block_rows(g)), max_of(1, 32768 / (block_rows(g) * max_of(g.k, 1))), 0, false};
  }
  static void run(const PackA& g, void*, int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t pitch = block_rows(g), row0 = block * pitch, rows = min_of(pitch, g.m - row0);
      const T* from = static_cast<const T*>(g.a) + row0 * g.row_stride;
      P* to = static_cast<P*>(g.packed) + row0 * packed_k<T>(g.k);
      if (g.k_stride == 1) {
        pack_block(g, from, rows, to);
      } else {
        for (int64_t k = 0; k < g.k; k += kStep, to += pitch * kStep)
          pack_step(g, from + k * g.k_stride, rows, min_of(kStep, g.k - k), to);
      }
    }
  }
  static void pack_block(const PackA& g, const T* from, int64_t rows, P* to) {
    const int64_t pitch = packed_k<T>(g.k);
    for (int64_t row = 0; row < rows; ++row, from += g.row_stride, to += pitch) {
      copy_as(from, to, g.k);
      memset(to + g.k, 0, sizeof(P) * (pitch - g.k));
    }
  }
  // The first `present` values of one step of k, of every row; the rest are zero.
  static void pack_step(const PackA& g, const T* from, int64_t rows, int64_t present, P* to) {
    if (kStep == 1 && g.row_stride == 1) {
      copy_as(from, to, rows);
      return;
    }
#if defined(__AMX_BF16__)
    if constexpr (kUsesAmx<T>) {
      if (g.row_stride == 1) {
        pack_columns(from, g.k_stride, rows, present, to);
        return;
      }
    }
#endif
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t j = 0; j < kStep; ++j)
        to[row * kStep + j] = j < present ? convert_one<P>(from[row * g.row_stride + j * g.k_stride]) : P{};
  }
#if defined(__AMX_BF16__)
  // The same for rows that lie side by side: pairs of values of k, transposed sixteen by sixteen.
  static void pack_columns(const bf16* from, int64_t k_stride, int64_t rows, int64_t present, bf16* to) {
    using V = Vec<float>;
    for (int64_t row = 0; row < rows; row += V::kWidth) {
      const int64_t height = min_of(V::kWidth, rows - row);
      const __mmask16 lanes = V::first_lanes(static_cast<int>(height));
      V block[V::kWidth];
      for (int64_t pair = 0; pair < V::kWidth; ++pair) {
        const bf16* even = from + 2 * pair * k_stride + row;
        const __m256i low = _mm256_maskz_loadu_epi16(2 * pair < present ? lanes : 0, even);
        const __m256i high = _mm256_maskz_loadu_epi16(2 * pair + 1 < present ? lanes : 0, even + k_stride);
        block[pair] = {_mm512_castsi512_ps(interleave(low, high))};
      }
      transpose(block);
      for (int64_t i = 0; i < height; ++i) block[i].store(reinterpret_cast<float*>(to + (row + i) * kStep));
    }
  }
#endif
};

// Packs `columns` <= kTileCols columns of b as one panel.
template <class T, class P = typename Packed<T>::type>
static inline void pack_panel(const T* b, int64_t k_stride, int64_t n_stride, int64_t k, int64_t columns, P* panel) {
  constexpr int kStep = Packed<T>::kStep, kCols = kTileCols<T>;
  if (columns < kCols || k < packed_k<T>(k)) memset(panel, 0, sizeof(P) * packed_k<T>(k) * kCols);
  if (k_stride == 1) {
    pack_transposed(b, n_stride, columns, k, panel);
  } else if (n_stride == 1) {
    pack_rows(b, k_stride, k, columns, panel, 0);
  } else {
    for (int64_t column = 0; column < columns; ++column)
      for (int64_t kk = 0; kk < k; ++kk)
        panel[(kk / kStep * kCols + column) * kStep + kk % kStep] = convert_one<P>(b[column * n_stride + kk * k_stride]);
  }
}

// Items are panels.
template <class T>
struct PackBKernel {
  static Plan plan(const PackB& g) {
    return {ceil_div(g.n, kTileCols<T>), max_of(1, 32768 / (kTileCols<T> * max_of(g.k, 1))), 0, false};
  }
  static void run(const PackB& g, void*, int64_t begin, int64_t end) {
    using P = typename Packed<T>::type;
    const int64_t panel_size = packed_k<T>(g.k) * kTileCols<T>;
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t column = panel * kTileCols<T>;
      pack_panel(static_cast<const T*>(g.b) + column * g.n_stride, g.k_stride, g.n_stride, g.k,
                 min_of(kTileCols<T>, g.n - column), static_cast<P*>(g.packed) + panel * panel_size);
    }
  }
};
