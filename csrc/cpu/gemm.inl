// Linear layers: c = epilogue(a b), a block of rows and a few panels of columns at a time.

// Values of k that all of an item passes through before the next: a panel of so many stays in cache while the rows pass.
template <class T>
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

// Items are (block of rows, group of panels), the groups the faster.
template <class T>
struct GemmKernel {
  using P = typename Packed<T>::type;
  using A = accum_t<T>;
  using V = Vec<A>;
  static constexpr int64_t kCols = kTileCols<T>;

  struct Blocks {
    int64_t rows, panels, group;  // rows of a block; panels in all, and of one item
    explicit Blocks(const Gemm& g) : rows(gemm_block_rows<T>(g.m)), panels(ceil_div(g.n, kCols)) {
      // A large block re-reads less of both operands; but there must be enough of them to share.
      group = max_of(1, min_of(8, panels * ceil_div(g.m, max_of(1, rows)) / 16));
    }
    int64_t groups() const { return ceil_div(panels, group); }
    int64_t sums_stride() const { return group * kCols; }
  };

  static Plan plan(const Gemm& g) {
    if (g.m == 0) return {0, 1, 0, false};
    const Blocks blocks(g);
    const int64_t work = max_of(1, blocks.rows * blocks.group * kCols * g.k);
    return {blocks.groups() * ceil_div(g.m, blocks.rows), max_of(1, 65536 / work),
            sizeof(A) * blocks.rows * blocks.sums_stride(), false};
  }

  static void run(const Gemm& g, void* scratch, int64_t begin, int64_t end) {
    const Blocks blocks(g);
    const int64_t stride = blocks.sums_stride();
    A* sums = static_cast<A*>(scratch);
    ProductUnit<T> unit;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t panel0 = item % blocks.groups() * blocks.group, row0 = item / blocks.groups() * blocks.rows;
      const int64_t panels = min_of(blocks.group, blocks.panels - panel0), rows = min_of(blocks.rows, g.m - row0);
      multiply(unit, g, row0, rows, blocks.rows, panel0, panels, sums, stride);
      with_activation(g.activation, [&]<Activation kActivation>() {
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < panels; ++j)
            finish_row<T, kActivation>(g, row0 + i, (panel0 + j) * kCols, sums + i * stride + j * kCols);
      });
    }
  }

  // sums (rows, panels * kCols) = the product of a block of A's rows and a group of panels.
  static void multiply(ProductUnit<T>& unit, const Gemm& g, int64_t row0, int64_t rows, int64_t block_rows, int64_t panel0,
                       int64_t panels, A* sums, int64_t stride) {
    constexpr int64_t kStep = Packed<T>::kLeftStep;
    const int64_t depth = packed_k<T>(g.k);
    if (depth == 0) memset(sums, 0, sizeof(A) * rows * stride);
    const P* a = static_cast<const P*>(g.a) + row0 * (g.a_in_blocks ? depth : g.a_stride);
    const P* b = static_cast<const P*>(g.b) + panel0 * depth * kCols;
    const int64_t a_stride = g.a_in_blocks ? kStep : g.a_stride, a_step = g.a_in_blocks ? block_rows * kStep : kStep;
    for (int64_t k = 0; k < depth; k += kBlockK<T>) {
      const int64_t n = min_of(depth - k, kBlockK<T>);
      for (int64_t j = 0; j < panels; ++j)
        multiply_block(unit, a + k / kStep * a_step, a_stride, a_step, b + (j * depth + k) * kCols, n, rows,
                       k > 0, sums + j * kCols, stride);
    }
  }

  // sums = a panel, or sums + a panel, over a block of rows and of k.
  static void multiply_block([[maybe_unused]] ProductUnit<T>& unit, const P* a, int64_t a_stride, int64_t a_step, const P* panel, int64_t k,
                             int64_t rows, bool add, A* sums, int64_t stride) {
#if defined(__AMX_BF16__)
    if constexpr (kUsesAmx<T>) {
      amx_product(unit, a, a_stride, a_step, panel, k, rows, kCols, add, sums, stride);
      return;
    }
#endif
    for (int64_t r = 0; r < rows; r += kTileRows) {
      with_rows(min_of(rows - r, kTileRows), [&]<int kRows>() {
        for (int64_t kk = 0; kk < k; kk += kChainK)
          add_chain<kRows>(a + r * a_stride + kk / Packed<T>::kLeftStep * a_step, a_stride, a_step, panel + kk * kCols,
                           min_of(k - kk, kChainK), add || kk > 0, sums + r * stride, stride);
      });
    }
  }

  template <int kRows>
  static FASTTX_INLINE void add_chain(const P* a, int64_t a_stride, int64_t a_step, const P* b, int64_t k, bool add,
                                      A* sums, int64_t stride) {
    V sum[kRows][kTileVecs];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < kTileVecs; ++j) sum[i][j] = V::zero();
    multiply_tile<T, kRows>(a, a_stride, b, k, sum, a_step);
    if (add) {
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < kTileVecs; ++j) sum[i][j] = V::load(sums + i * stride + j * V::kWidth) + sum[i][j];
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < kTileVecs; ++j) sum[i][j].store(sums + i * stride + j * V::kWidth);
  }
};
