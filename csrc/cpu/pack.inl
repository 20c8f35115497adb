// Packing of whole matrices: the operands of Gemm.

template <class T>
constexpr bool a_is_packed = sizeof(T) == sizeof(typename Packed<T>::type);

template <class T>
static int64_t packed_k(int64_t k) {
  return round_up(k, Packed<T>::kStep);
}

// Rows of A that pass over a panel of B together: half a MiB of them in float32, to stay in L2 for all the panels.
static inline int64_t gemm_block_rows(int64_t m, int64_t k) {
  const int64_t most = max_of(8, min_of(32, 131072 / (kTileRows * max_of(k, 1)))) * kTileRows;
  return round_up(ceil_div(m, max_of(1, ceil_div(m, most))), kTileRows);
}

template <class T>
static size_t packed_a_bytes(int64_t m, int64_t k) {
  return sizeof(typename Packed<T>::type) * round_up(m, max_of(1, gemm_block_rows(m, k))) * packed_k<T>(k);
}

template <class T>
static size_t packed_b_bytes(int64_t k, int64_t n) {
  return sizeof(typename Packed<T>::type) * packed_k<T>(k) * round_up(n, kTileCols<T>);
}

// Items are blocks of rows.
template <class T>
struct PackAKernel {
  using P = typename Packed<T>::type;
  static constexpr int64_t kStep = Packed<T>::kStep;

  static int64_t block_rows(const PackA& g) { return max_of(1, gemm_block_rows(g.m, g.k)); }
  static Plan plan(const PackA& g) {
    return {ceil_div(g.m, block_rows(g)), max_of(1, 32768 / (block_rows(g) * max_of(g.k, 1))), 0, false};
  }
  static void run(const PackA& g, void*, int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t pitch = block_rows(g), row0 = block * pitch, rows = min_of(pitch, g.m - row0);
      const T* from = static_cast<const T*>(g.a) + row0 * g.row_stride;
      P* to = static_cast<P*>(g.packed) + row0 * packed_k<T>(g.k);
      if (g.k_stride == 1) {
        pack_left(from, g.row_stride, rows, g.k, to, packed_k<T>(g.k));
      } else {
        for (int64_t k = 0; k < g.k; k += kStep, to += pitch * kStep)
          pack_step(g, from + k * g.k_stride, rows, min_of(kStep, g.k - k), to);
      }
    }
  }
  // The first `present` values of one step of k, of every row; the rest are zero.
  static void pack_step(const PackA& g, const T* from, int64_t rows, int64_t present, P* to) {
    if (kStep == 1 && g.row_stride == 1) {
      copy_as(from, to, rows);
      return;
    }
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t j = 0; j < kStep; ++j)
        to[row * kStep + j] = j < present ? convert_one<P>(from[row * g.row_stride + j * g.k_stride]) : P{};
  }
};

// Packs `columns` <= kTileCols columns of b as one panel.
template <class T, class P = typename Packed<T>::type>
static inline void pack_panel(const T* b, int64_t k_stride, int64_t n_stride, int64_t k, int64_t columns, P* panel) {
  constexpr int kStep = Packed<T>::kStep, kCols = kTileCols<T>;
  if (columns < kCols || k % kStep != 0) memset(panel, 0, sizeof(P) * packed_k<T>(k) * kCols);
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
