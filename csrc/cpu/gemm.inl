// Linear layers: c = epilogue(a b), a block of rows and a group of panels at a time.
//
// An item takes its operands a stretch of k after the other: it packs that part of its rows, which stay in L2 while the
// panels pass, and each panel's part, where it does not come packed, stays in L1 while the rows pass.

// Values of k that are summed in registers, before that sum is added to those before it: the rounding error of a sum
// grows with the length of its chain, and PyTorch's products have short ones.
constexpr int64_t kChainK = Vec<float>::kWidth == 1 ? 16 : 64;  // shorter where every term rounds twice

// Finishes a tile: `sums`, rows `stride` apart, holds the dot products of `rows` rows from `row` on with a panel's columns.
template <class T, Activation kActivation>
static FASTTX_INLINE void finish_tile(const Gemm& g, int64_t row, int64_t rows, int64_t column, const accum_t<T>* sums,
                                      int64_t stride) {
  using A = accum_t<T>;
  using V = Vec<A>;
  const int64_t columns = min_of(kGemmCols<T>, g.n - column);
  A keep[kGemmCols<T>];
  for (int64_t i = 0; i < rows; ++i, sums += stride) {
    const int64_t at = (row + i) * g.c_stride + column;
    if (g.dropout.active)
      dropout_keep(keep, columns, g.dropout.seed, 0, 0, row + i + g.row_offset, column, g.dropout.threshold,
                   static_cast<A>(g.dropout.scale));
    for_vectors<V>(columns, [&](int64_t j, int lanes) __attribute__((always_inline)) {
      const auto load = [&](const void* base, int64_t offset) __attribute__((always_inline)) {
        return load_lanes<V>(static_cast<const T*>(base) + offset + j, lanes);
      };
      const auto store = [&](void* base, V value) __attribute__((always_inline)) {
        store_lanes(static_cast<T*>(base) + at + j, value, lanes);
      };
      const auto dropped = [&](V value) { return g.dropout.active ? drop(value, V::load(keep + j, lanes)) : value; };
      V value = V::load(sums + j);
      if (g.bias != nullptr) value = value + load(g.bias, column);
      if (g.preact != nullptr) store(g.preact, value);
      if (g.grad_preact != nullptr) {
        const V preact = load(g.grad_preact, at);
        value = dropped(value * gelu_grad<kActivation>(preact));
        if (g.recomputed != nullptr) store(g.recomputed, dropped(gelu<kActivation>(preact)));
      } else {
        value = dropped(gelu<kActivation>(value));
      }
      if (g.residual != nullptr) value = value + load(g.residual, at);
      store(g.c, value);
    });
  }
}

// Items are (block of rows, group of panels), the groups the faster.
template <class T>
struct GemmKernel {
  using P = typename Packed<T>::type;
  using A = accum_t<T>;
  using V = Vec<A>;
  static constexpr int64_t kCols = kGemmCols<T>;

  // How the result is cut: rows and panels of an item, and rows of one tile. Nothing of it shows in the result.
  struct Blocks {
    int64_t rows, tile_rows, panels, group;
    explicit Blocks(const Gemm& g) : panels(ceil_div(g.n, kCols)) {
      // Blocks and tiles of about one height: a low last one would take nearly as long as a whole one.
      const int64_t even = ceil_div(g.m, max_of(1, ceil_div(g.m, kMostRows)));
      tile_rows = kUsesAmx<T> ? kLeftRows<T> : ceil_div(even, max_of(1, ceil_div(even, kLeftRows<T>)));
      rows = round_up(even, max_of(1, tile_rows));
      // The more panels an item has, the less often its rows are packed; but the threads are to end together.
      const int64_t blocks = ceil_div(g.m, max_of(1, rows)), threads = max_of(1, g.threads);
      for (group = max_of(1, min_of(kMostPanels, panels)); group > 1; --group) {
        const int64_t items = blocks * ceil_div(panels, group);
        if (ceil_div(items, threads) * threads * group * 15 <= blocks * panels * 16) break;
      }
    }
    int64_t groups() const { return ceil_div(panels, group); }
    int64_t sums_stride() const { return group * kCols; }
    // Each is 200 to 600 KiB in float32: rows packed, and their sums.
    static constexpr int64_t kMostRows = kUsesAmx<T> ? 256 : 14 * kGemmRows, kMostPanels = kUsesAmx<T> ? 16 : 24;
  };

  struct Scratch {
    ScratchPieces pieces;
    A* sums;   // (rows, sums_stride)
    P* left;   // [tile][step][row][kLeftStep]
    P* panel;  // of a b that does not come packed
    Scratch(const Gemm& g, const Blocks& blocks, void* base) : pieces{static_cast<char*>(base)}, panel(nullptr) {
      const int64_t depth = min_of(packed_k<T>(g.k), kBlockK<T>);
      sums = pieces.take<A>(blocks.rows * blocks.sums_stride());
      left = pieces.take<P>(blocks.rows * depth);
      if (!g.b_is_packed) panel = pieces.take<P>(depth * kCols);
    }
  };

  static Plan plan(const Gemm& g) {
    if (g.m == 0 || g.n == 0) return {0, 1, 0, false};
    const Blocks blocks(g);
    const int64_t work = max_of(1, blocks.rows * blocks.group * kCols * g.k);
    return {blocks.groups() * ceil_div(g.m, blocks.rows), max_of(1, 65536 / work),
            Scratch(g, blocks, nullptr).pieces.used, true};
  }

  static void run(const Gemm& g, void* base, int64_t begin, int64_t end) {
    const Blocks blocks(g);
    const Scratch scratch(g, blocks, base);
    const int64_t stride = blocks.sums_stride();
    ProductUnit<T> unit;
    Unfinished unfinished{};
    for (int64_t item = begin; item < end; ++item) {
      const int64_t panel0 = item % blocks.groups() * blocks.group, row0 = item / blocks.groups() * blocks.rows;
      const int64_t panels = min_of(blocks.group, blocks.panels - panel0), rows = min_of(blocks.rows, g.m - row0);
      int64_t k = 0;
      do {
        const int64_t depth = min_of(g.k - k, kBlockK<T>);
        const bool last = k + depth == g.k;
        const Left left = left_of(g, row0, rows, k, depth, blocks.tile_rows, scratch.left);
        for (int64_t j = 0; j < panels; ++j) {
          const P* panel = panel_of(g, blocks, panel0 + j, k, depth, scratch.panel);
          A* sums = scratch.sums + j * kCols;
          for (int64_t r = 0; r < rows; r += blocks.tile_rows) {
            const int64_t height = min_of(blocks.tile_rows, rows - r);
            multiply(unit, left, r, height, panel, packed_k<T>(depth), k > 0, sums + r * stride, stride, g, unfinished);
            if (last) unfinished = {row0 + r, height, (panel0 + j) * kCols, sums + r * stride};
          }
        }
        k += depth;
      } while (k < g.k);
      finish(g, unfinished, blocks.rows, stride);
    }
  }

  // Rows of a tile whose epilogue is still to be done: while the next tile is computed, on AMX, else at once.
  struct Unfinished {
    int64_t row, rows, column;
    const A* sums;
  };
  static void finish(const Gemm& g, Unfinished& tile, int64_t most_rows, int64_t stride) {
    const int64_t rows = min_of(most_rows, tile.rows);
    if (rows == 0) return;
    with_activation(g.activation, [&]<Activation kActivation>() {
      finish_tile<T, kActivation>(g, tile.row, rows, tile.column, tile.sums, stride);
    });
    tile = {tile.row + rows, tile.rows - rows, tile.column, tile.sums + rows * stride};
  }

  // A stretch of k of an item's rows: packed in tiles one after the other, or where they are, `stride` apart.
  struct Left {
    const P* data;
    int64_t stride;  // 0 where packed
  };
  static Left left_of(const Gemm& g, int64_t row0, int64_t rows, int64_t k, int64_t depth, int64_t tile_rows,
                      P* buffer) {
    const T* from = static_cast<const T*>(g.a) + row0 * g.a_row_stride + k * g.a_k_stride;
    // AMX reads rows by their stride at no loss.
    if constexpr (kUsesAmx<T>)
      if (g.a_k_stride == 1 && depth == packed_k<T>(depth)) return {from, g.a_row_stride};
    for (int64_t r = 0; r < rows; r += tile_rows)
      PackLeft<T>::run(from + r * g.a_row_stride, g.a_row_stride, g.a_k_stride, min_of(tile_rows, rows - r), depth,
                       buffer + r * packed_k<T>(depth));
    return {buffer, 0};
  }

  // A stretch of k of a panel.
  static const P* panel_of(const Gemm& g, const Blocks& blocks, int64_t panel, int64_t k, int64_t depth, P* buffer) {
    if (g.b_is_packed) return static_cast<const P*>(g.b) + panel_offset<T>(blocks.panels, panel, k, depth);
    const int64_t column = panel * kCols;
    pack_panel(static_cast<const T*>(g.b) + k * g.b_k_stride + column * g.b_n_stride, g.b_k_stride, g.b_n_stride, depth,
               min_of(kCols, g.n - column), buffer);
    return buffer;
  }

  // sums = left panel, or sums + left panel, for one tile of `rows` rows from r on.
  static void multiply([[maybe_unused]] ProductUnit<T>& unit, const Left& left, int64_t r, int64_t rows, const P* panel,
                       int64_t depth, bool add, A* sums, int64_t stride, const Gemm& g, Unfinished& before) {
#if defined(__AMX_BF16__)
    if constexpr (kUsesAmx<T>) {
      const bool packed = left.stride == 0;
      amx_product<kCols>(unit, left.data + r * (packed ? depth : left.stride), packed ? kAmxK : left.stride,
                         packed ? rows * kAmxK : kAmxK, panel, depth, rows, kCols, add, sums, stride,
                         [&, share = ceil_div(before.rows * kAmxK, max_of(1, depth))] {
                           finish(g, before, share, stride);
                         });
      finish(g, before, before.rows, stride);
      return;
    }
#endif
    finish(g, before, before.rows, stride);
    with_count<kGemmRows>(rows, [&]<int kRows>() {
      const P* tile = left.data + r * depth;
      int64_t k = 0;
      do {
        add_chain<kRows>(tile + k * kRows, panel + k * kCols, min_of(depth - k, kChainK), add || k > 0, sums, stride);
        k += kChainK;
      } while (k < depth);
    });
  }

  template <int kRows>
  static FASTTX_INLINE void add_chain(const P* left, const P* panel, int64_t k, bool add, A* sums, int64_t stride) {
    constexpr int kStep = Packed<T>::kStep;
    V sum[kRows][kGemmVecs];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < kGemmVecs; ++j) sum[i][j] = V::zero();
    multiply_tile<T, kRows, kGemmVecs>(left, kStep, panel, k, sum, kRows * kStep);
    if (add) {
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < kGemmVecs; ++j) sum[i][j] = V::load(sums + i * stride + j * V::kWidth) + sum[i][j];
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < kGemmVecs; ++j) sum[i][j].store(sums + i * stride + j * V::kWidth);
  }
};
