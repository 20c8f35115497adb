// Linear layers: c = epilogue(a b), a block of rows and a group of panels at a time.
//
// An item packs its rows once, unless it reads them in place, and goes through its panels in waves whose sums stay in
// L2, a stretch of k after the other: the stretch of a panel stays in L1 while the rows pass, and the next one is
// fetched meanwhile.

// Finishes rows of a whole tile that want a bias, an activation or its gradient, and what goes with them: without a
// question for every vector.
template <class T, Activation kActivation, bool kStoresPreact, bool kGradient>
static FASTTX_INLINE void finish_plain(const Gemm& g, int64_t row, int64_t rows, int64_t column, const accum_t<T>* sums) {
  using V = Vec<accum_t<T>>;
  V bias[kGemmVecs<T>];
  for (int j = 0; j < kGemmVecs<T>; ++j)
    bias[j] = g.bias == nullptr ? V::zero() : V::load(static_cast<const T*>(g.bias) + column + j * V::kWidth);
  int64_t at = row * g.c_stride + column;
  for (int64_t i = 0; i < rows; ++i, sums += kGemmCols<T>, at += g.c_stride) {
#pragma GCC unroll 2
    for (int j = 0; j < kGemmVecs<T>; ++j) {
      const int64_t here = at + j * V::kWidth;
      const V value = V::load(sums + j * V::kWidth) + bias[j];
      T* c = static_cast<T*>(g.c) + here;
      if constexpr (kGradient) {
        const auto both = gelu_and_grad<kActivation, T>(V::load(static_cast<const T*>(g.grad_preact) + here));
        (value * both.gradient).store(c);
        if (g.recomputed != nullptr) both.value.store(static_cast<T*>(g.recomputed) + here);
      } else {
        if constexpr (kStoresPreact) value.store(static_cast<T*>(g.preact) + here);
        gelu<kActivation, T>(value).store(c);
      }
    }
  }
}

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
          const auto both = gelu_and_grad<kActivation, T>(preact);
          value = dropped(value * both.gradient);
          store(g.recomputed, dropped(both.value));
        } else {
          value = dropped(value * gelu_grad<kActivation, T>(preact));
        }
      } else {
        value = dropped(gelu<kActivation, T>(value));
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

// Items are (block of rows, group of panels), the groups the faster. kParts: operands are taken in parts.
template <class T, bool kParts>
struct GemmKernelOn {
  using A = accum_t<T>;
  using Blocks = GemmBlocks<T, kParts>;
  using Operands = typename GemmTypes<T, kParts>::Operands;
  using Unit = typename GemmTypes<T, kParts>::Unit;
  static constexpr int64_t kCols = kGemmCols<T>, kDepth = kBlockK<T>;

  struct Scratch {
    ScratchPieces pieces;
    A *tiles[2], *sums;  // sums: (panels of a wave, rows, kCols), where k is longer than a stretch
    Operands operands;
    Scratch(const Gemm& g, const Blocks& blocks, void* base)
        : pieces{static_cast<char*>(base)},
          tiles{pieces.take<A>(blocks.tile_rows * kCols), pieces.take<A>(blocks.tile_rows * kCols)},
          sums(g.k > kDepth ? pieces.take<A>(blocks.wave * blocks.rows * kCols) : nullptr),
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
      if constexpr (!Blocks::kBeside) {
        if (g.packed_b != nullptr && rows <= kFewRows) {
          with_count<kFewRows>(rows, [&]<int kRows>() { run_few<kRows>(g, scratch, row0, first, past); });
          continue;
        }
      }
      for (int64_t panel = first; panel < past; panel += blocks.wave)
        run_wave(g, blocks, scratch, unit, row0, rows, panel, min_of(panel + blocks.wave, past), panel == first);
    }
  }

  // kRows rows from row0 on times the panels from `panel` up to `past`. So few rows wait for their panels, and memory gives
  // four streams a seventh to a fourth faster than one (a loop of its own on a Sapphire Rapids core, from L3 and DRAM).
  static constexpr int kFewRows = 2;
  template <int kRows>
  static void run_few(const Gemm& g, Scratch& scratch, int64_t row0, int64_t panel, int64_t past) {
    constexpr int kMost = 4 / kRows;
    for (bool first = true; panel < past; first = false) {
      with_count<kMost>(min_of(kMost, past - panel), [&]<int kPanels>() {
        alignas(64) A sums[kPanels * kRows * kCols];
        int64_t k = 0;
        do {
          const int64_t depth = min_of(g.k - k, kDepth);
          scratch.operands.begin_stretch(row0, kRows, k, depth, first);
          scratch.operands.template multiply_side_by_side<kRows, kPanels>(panel, k > 0, sums);
          k += depth;
        } while (k < g.k);
        for (int p = 0; p < kPanels; ++p, ++panel) end(g, row0, kRows, panel * kCols, sums + p * kRows * kCols);
      });
    }
  }

  // `rows` rows from row0 on times the panels from panel0 up to `past`.
  static void run_wave(const Gemm& g, const Blocks& blocks, Scratch& scratch, Unit& unit,
                       int64_t row0, int64_t rows, int64_t panel0, int64_t past, bool first) {
    Operands& operands = scratch.operands;
    Unfinished unfinished{};
    int64_t k = 0;
    do {
      const int64_t depth = min_of(g.k - k, kDepth), next_k = k + depth;
      const bool last = next_k == g.k;
      // Sums that no later stretch adds to, and parts' sums of one stretch, are kept until the next tile is done: in two
      // places in turn, which stay in L1.
      const bool adds_later = kParts && k > 0, is_kept = !adds_later && g.k > kDepth;
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
          A* kept = sums + r * kCols;
          if (!is_kept) std::swap(scratch.tiles[0], scratch.tiles[1]);
          A* place = is_kept ? kept : scratch.tiles[0];
          Lines lines{row0 + r, last ? height : 0, panel * kCols};
          // One tile is finished while the next is computed, where another unit computes it.
          const int64_t share = Blocks::kBeside ? ceil_div(unfinished.rows * kAmxK, max_of(1, depth)) : unfinished.rows;
          const int64_t fetched = Blocks::kBeside ? ceil_div(lines.rows * kAmxK, max_of(1, depth)) : lines.rows;
          const auto meanwhile = [&] {
            finish(g, operands, unfinished, share);
            fetch(g, lines, fetched);
          };
          if constexpr (!Blocks::kBeside) meanwhile();
          if constexpr (kParts) {
            operands.multiply(unit, r, height, place, meanwhile);
          } else {
            operands.multiply(unit, r, height, k > 0, place, meanwhile);
          }
          finish(g, operands, unfinished, unfinished.rows);
          if (last || adds_later)
            unfinished = {row0 + r, height, panel * kCols, place, adds_later ? kept : nullptr, last};
        }
      }
      k = next_k;
    } while (k < g.k);
    finish(g, operands, unfinished, unfinished.rows);
  }

  // Rows of a tile whose lines in the matrices beside the sums are still to be fetched, so that its epilogue need not wait
  // for them.
  struct Lines {
    int64_t row, rows, column;
  };
  template <int kWritten>
  static void fetch_line(const void* matrix, int64_t byte) {
    if (matrix != nullptr) __builtin_prefetch(static_cast<const char*>(matrix) + byte, kWritten);
  }
  static void fetch(const Gemm& g, Lines& lines, int64_t most_rows) {
    const int64_t rows = min_of(most_rows, lines.rows), bytes = min_of(kCols, g.n - lines.column) * sizeof(T);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = ((lines.row + i) * g.c_stride + lines.column) * sizeof(T);
      for (int64_t line = at; line < at + bytes; line += 64) {
        fetch_line<0>(g.grad_preact, line);
        fetch_line<0>(g.residual, line);
        fetch_line<1>(g.c, line);
        fetch_line<1>(g.preact, line);
        fetch_line<1>(g.recomputed, line);
      }
    }
    lines = {lines.row + rows, lines.rows - rows, lines.column};
  }

  // Rows of a tile whose sums are still to be added to those of the stretches before, if there are any, and whose
  // epilogue, after the last stretch, is still to be done.
  struct Unfinished {
    int64_t row, rows, column;
    A *sums, *before;
    bool last;
  };
  static void finish(const Gemm& g, Operands& operands, Unfinished& tile, int64_t most_rows) {
    const int64_t rows = min_of(most_rows, tile.rows);
    if (rows == 0) return;
    if constexpr (kParts) {
      if (tile.before != nullptr) add_rows(tile.sums, tile.before, rows, tile.last ? tile.sums : tile.before);
    }
    if (tile.last) {
      operands.mend(tile.row, rows, tile.column, tile.sums);
      end(g, tile.row, rows, tile.column, tile.sums);
    }
    const int64_t values = rows * kCols;
    tile = {tile.row + rows,      tile.rows - rows, tile.column,
            tile.sums + values, tile.before == nullptr ? nullptr : tile.before + values, tile.last};
  }
  static void add_rows(const A* sums, const A* before, int64_t rows, A* to) {
    using V = Vec<A>;
    for (int64_t i = 0; i < rows * kCols; i += V::kWidth) (V::load(before + i) + V::load(sums + i)).store(to + i);
  }
  static void end(const Gemm& g, int64_t row, int64_t rows, int64_t column, const A* sums) {
    const bool is_plain = column + kCols <= g.n && g.residual == nullptr && !g.dropout.active && !g.c_is_wide;
    with_activation(g.activation, [&]<Activation kActivation>() {
      if (!is_plain) {
        finish_tile<T, kActivation>(g, row, rows, column, sums);
      } else if (g.grad_preact != nullptr) {
        finish_plain<T, kActivation, false, true>(g, row, rows, column, sums);
      } else if (g.preact != nullptr) {
        finish_plain<T, kActivation, true, false>(g, row, rows, column, sums);
      } else {
        finish_plain<T, kActivation, false, false>(g, row, rows, column, sums);
      }
    });
  }
};

template <class T>
struct GemmKernel {
  static Plan plan(const Gemm& g) {
    return with_parts<T>(g.on_vectors, [&]<bool kParts>() { return GemmKernelOn<T, kParts>::plan(g); });
  }
  static void run(const Gemm& g, void* base, int64_t begin, int64_t end) {
    with_parts<T>(g.on_vectors, [&]<bool kParts>() { GemmKernelOn<T, kParts>::run(g, base, begin, end); });
  }
};
