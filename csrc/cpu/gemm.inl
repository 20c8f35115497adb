// Linear layers: c = epilogue(a b), a block of rows and a panel of columns at a time.

// Values of k that all the rows pass through before the next: that block of B (64 KiB in float32) stays in L2.
constexpr int64_t kBlockK = 256;
// Values of k that are summed in registers, before that sum is added to those before it: the rounding error of a sum
// grows with the length of its chain, and PyTorch's products have short ones.
constexpr int64_t kChainK = 32;
// Finishes one row: `sums` holds its dot products from column `column` on, kTileCols of them or what is left of n.
template <class T, Activation kActivation>
static inline void finish_row(const Gemm& g, int64_t row, int64_t column, const accum_t<T>* sums) {
  using A = accum_t<T>;
  using V = Vec<A>;
  const int64_t columns = min_of(kTileCols<T>, g.n - column), at = row * g.c_stride + column;
  A keep[kTileCols<T>];
  if (g.dropout.active)
    dropout_keep(keep, columns, g.dropout.seed, 0, 0, row + g.row_offset, column, g.dropout.threshold,
                 static_cast<A>(g.dropout.scale));
  for_vectors<V>(columns, [&](int64_t i, int lanes) {
    const auto load = [&](const void* base, int64_t offset) {
      return load_lanes<V>(static_cast<const T*>(base) + offset + i, lanes);
    };
    const auto store = [&](void* base, V value) { store_lanes(static_cast<T*>(base) + at + i, value, lanes); };
    const auto dropped = [&](V value) { return g.dropout.active ? drop(value, V::load(keep + i, lanes)) : value; };
    V value = V::load(sums + i);
    if (g.bias != nullptr) value = value + load(g.bias, column);
    if (g.preact != nullptr) store(g.preact, value);
    if (g.grad_preact != nullptr) {
      const V preact = load(g.grad_preact, at);
      value = dropped(value * gelu_grad<kActivation>(preact));
      if (g.recomputed != nullptr) store(g.recomputed, dropped(gelu<kActivation>(preact)));
    } else {
      value = dropped(gelu<kActivation>(value));
    }
    store(g.c, value);
  });
}

// Items are (block of rows, panel), the panels the faster: a block of A is larger than a panel of B, so it is what stays
// in L2.
template <class T>
struct GemmKernel {
  using P = typename Packed<T>::type;
  using A = accum_t<T>;
  using V = Vec<A>;
  static constexpr int64_t kCols = kTileCols<T>;

  static Plan plan(const Gemm& g) {
    if (g.m == 0) return {0, 1, 0, false};
    const int64_t rows = gemm_block_rows(g.m, g.k), work = max_of(1, rows * kCols * g.k);
    return {ceil_div(g.n, kCols) * ceil_div(g.m, rows), max_of(1, 65536 / work), sizeof(A) * rows * kCols, false};
  }

  static void run(const Gemm& g, void* scratch, int64_t begin, int64_t end) {
    const int64_t block_rows = gemm_block_rows(g.m, g.k), panels = ceil_div(g.n, kCols);
    A* sums = static_cast<A*>(scratch);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t panel = item % panels, row0 = item / panels * block_rows;
      const int64_t rows = min_of(block_rows, g.m - row0);
      multiply(g, row0, rows, block_rows, static_cast<const P*>(g.b) + panel * packed_k<T>(g.k) * kCols, sums);
      with_activation(g.activation, [&]<Activation kActivation>() {
        for (int64_t i = 0; i < rows; ++i) finish_row<T, kActivation>(g, row0 + i, panel * kCols, sums + i * kCols);
      });
    }
  }

  // sums (rows, kCols) = the product of a block of A's rows and one panel.
  static void multiply(const Gemm& g, int64_t row0, int64_t rows, int64_t block_rows, const P* panel, A* sums) {
    constexpr int64_t kStep = Packed<T>::kStep;
    if (g.k == 0) memset(sums, 0, sizeof(A) * rows * kCols);
    const P* a = static_cast<const P*>(g.a) + row0 * (g.a_in_blocks ? packed_k<T>(g.k) : g.a_stride);
    const int64_t stride = g.a_in_blocks ? kStep : g.a_stride, step = g.a_in_blocks ? block_rows * kStep : kStep;
    for (int64_t k0 = 0; k0 < g.k; k0 += kBlockK) {
      const int64_t k1 = min_of(g.k, k0 + kBlockK);
      for (int64_t r = 0; r < rows; r += kTileRows) {
        with_rows(min_of(rows - r, kTileRows), [&]<int kRows>() {
          for (int64_t k = k0; k < k1; k += kChainK)
            add_chain<kRows>(a + r * stride + k / kStep * step, stride, step, panel + k * kCols,
                             min_of(k1 - k, kChainK), k == 0, sums + r * kCols);
        });
      }
    }
  }

  template <int kRows>
  static FASTTX_INLINE void add_chain(const P* a, int64_t a_stride, int64_t a_step, const P* b, int64_t k, bool first,
                                      A* sums) {
    V sum[kRows][kTileVecs];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < kTileVecs; ++j) sum[i][j] = V::zero();
    multiply_tile<T, kRows>(a, a_stride, b, k, sum, a_step);
    if (!first) {
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < kTileVecs; ++j) sum[i][j] = V::load(sums + i * kCols + j * V::kWidth) + sum[i][j];
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < kTileVecs; ++j) sum[i][j].store(sums + i * kCols + j * V::kWidth);
  }
};
