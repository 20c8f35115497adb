// Linear layers: c = epilogue(a b), a block of rows and a group of panels at a time.
//
// An item packs its rows once, and goes through its panels in waves whose sums stay in L2, a stretch of k after the other:
// the stretch of a panel stays in L1 while the rows pass, and the next one is fetched meanwhile.

// Finishes a tile: `sums` holds the dot products of `rows` rows from `row` on with a panel's columns.
template <class T, Activation kActivation>
static FASTTX_INLINE void finish_tile(const Gemm& g, int64_t row, int64_t rows, int64_t column, const accum_t<T>* sums) {
  using A = accum_t<T>;
  using V = Vec<A>;
  const int64_t columns = min_of(kGemmCols<T>, g.n - column);
  A keep[kGemmCols<T>];
  for (int64_t i = 0; i < rows; ++i, sums += kGemmCols<T>) {
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
        if (g.recomputed != nullptr) {
          const auto both = gelu_and_grad<kActivation>(preact);
          value = dropped(value * both.gradient);
          store(g.recomputed, dropped(both.value));
        } else {
          value = dropped(value * gelu_grad<kActivation>(preact));
        }
      } else {
        value = dropped(gelu<kActivation>(value));
      }
      if (g.residual != nullptr) {
        value = value + (g.residual_is_wide ? load_lanes<V>(static_cast<const A*>(g.residual) + at + j, lanes)
                                            : load(g.residual, at));
      }
      if (g.c_is_wide) {
        store_lanes(static_cast<A*>(g.c) + at + j, value, lanes);
      } else {
        store(g.c, value);
      }
    });
  }
}

// Items are (block of rows, group of panels), the groups the faster.
template <class T>
struct GemmKernel {
  using A = accum_t<T>;
  using Blocks = GemmBlocks<T>;
  using Operands = typename GemmTypes<T>::Operands;
  using Unit = typename GemmTypes<T>::Unit;
  static constexpr int64_t kCols = kGemmCols<T>;

  struct Scratch {
    ScratchPieces pieces;
    A* sums;  // (panels of a wave, rows, kCols)
    Operands operands;
    Scratch(const Gemm& g, const Blocks& blocks, void* base)
        : pieces{static_cast<char*>(base)},
          sums(pieces.take<A>(blocks.wave * blocks.rows * kCols)),
          operands(g, blocks, pieces) {}
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
    Scratch scratch(g, blocks, base);
    Unit unit;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % blocks.groups() * blocks.group, row0 = item / blocks.groups() * blocks.rows;
      const int64_t past = min_of(first + blocks.group, blocks.panels), rows = min_of(blocks.rows, g.m - row0);
      for (int64_t panel = first; panel < past; panel += blocks.wave)
        run_wave(g, blocks, scratch, unit, row0, rows, panel, min_of(panel + blocks.wave, past), panel == first);
    }
  }

  // `rows` rows from row0 on times the panels from panel0 up to `past`.
  static void run_wave(const Gemm& g, const Blocks& blocks, Scratch& scratch, Unit& unit,
                       int64_t row0, int64_t rows, int64_t panel0, int64_t past, bool first) {
    Operands& operands = scratch.operands;
    Unfinished unfinished{};
    int64_t k = 0;
    do {
      const int64_t depth = min_of(g.k - k, kBlockK<T>), next_k = k + depth;
      const bool last = next_k == g.k;
      operands.begin_stretch(row0, rows, k, depth, first);
      for (int64_t panel = panel0; panel < past; ++panel) {
        if (panel + 1 < past) {
          operands.begin_panel(panel, panel + 1, k);
        } else {
          operands.begin_panel(panel, last ? past : panel0, last ? 0 : next_k);
        }
        A* sums = scratch.sums + (panel - panel0) * blocks.rows * kCols;
        for (int64_t r = 0; r < rows; r += blocks.tile_rows) {
          const int64_t height = min_of(blocks.tile_rows, rows - r);
          if (last) fetch_result(g, row0 + r, height, panel * kCols);
          // The epilogue of one tile is done while the next is computed, where another unit computes it.
          const int64_t share = kOnMatrixUnit<T> ? ceil_div(unfinished.rows * kAmxK, max_of(1, depth)) : unfinished.rows;
          const auto meanwhile = [&] { finish(g, operands, unfinished, share); };
          if constexpr (!kOnMatrixUnit<T>) meanwhile();
          operands.multiply(unit, r, height, k > 0, sums + r * kCols, meanwhile);
          finish(g, operands, unfinished, unfinished.rows);
          if (last) unfinished = {row0 + r, height, panel * kCols, sums + r * kCols};
        }
      }
      k = next_k;
    } while (k < g.k);
    finish(g, operands, unfinished, unfinished.rows);
  }

  // A tile's lines of the result, so that its stores need not wait for them.
  static void fetch_result(const Gemm& g, int64_t row, int64_t rows, int64_t column) {
    const T* at = static_cast<const T*>(g.c) + row * g.c_stride + column;
    for (int64_t i = 0; i < rows; ++i, at += g.c_stride)
      for (int64_t line = 0; line < min_of(kCols, g.n - column); line += 64 / sizeof(T)) __builtin_prefetch(at + line, 1);
  }

  // Rows of a tile whose epilogue is still to be done.
  struct Unfinished {
    int64_t row, rows, column;
    A* sums;
  };
  static void finish(const Gemm& g, Operands& operands, Unfinished& tile, int64_t most_rows) {
    const int64_t rows = min_of(most_rows, tile.rows);
    if (rows == 0) return;
    operands.mend(tile.row, rows, tile.column, tile.sums);
    with_activation(g.activation, [&]<Activation kActivation>() {
      finish_tile<T, kActivation>(g, tile.row, rows, tile.column, tile.sums);
    });
    tile = {tile.row + rows, tile.rows - rows, tile.column, tile.sums + rows * kCols};
  }
};
