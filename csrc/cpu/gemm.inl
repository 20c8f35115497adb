// Linear layers: c = epilogue(a b), a block of rows and a group of panels at a time.
//
// An item packs its rows once, and goes through its panels in waves whose sums stay in L2, a stretch of k after the other:
// the stretch of a panel stays in L1 while the rows pass, and the next one is fetched meanwhile.

// Values of k that are summed in registers, before that sum is added to those before it: the rounding error of a sum
// grows with the length of its chain, and PyTorch's products have short ones.
constexpr int64_t kChainK = Vec<float>::kWidth == 1 ? 16 : 96;  // shorter where every term rounds twice

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
  static constexpr int64_t kCols = kGemmCols<T>, kItem = sizeof(T);

  // How the result is cut: rows and panels of an item, rows of one tile, panels of one wave. Nothing of it shows in the
  // result.
  struct Blocks {
    int64_t rows, tile_rows, panels, group, wave;
    bool keeps_left;  // packed for the whole of k, not anew for every wave
    explicit Blocks(const Gemm& g) : panels(ceil_div(g.n, kCols)), keeps_left(g.k <= kMostKeptK) {
      // Blocks and tiles of about one height: a low last one would take nearly as long as a whole one.
      const int64_t even = ceil_div(g.m, max_of(1, ceil_div(g.m, kMostRows)));
      tile_rows = kUsesAmx<T> ? kLeftRows<T> : ceil_div(even, max_of(1, ceil_div(even, kLeftRows<T>)));
      rows = round_up(even, max_of(1, tile_rows));
      // The more panels an item has, the less often its rows are packed; but the threads are to end together.
      const int64_t blocks = ceil_div(g.m, max_of(1, rows)), threads = max_of(1, g.threads);
      for (group = max_of(1, panels); group > 1; --group) {
        const int64_t items = blocks * ceil_div(panels, group);
        if (ceil_div(items, threads) * threads * group * 15 <= blocks * panels * 16) break;
      }
      wave = ceil_div(group, ceil_div(group, kMostWave));
    }
    int64_t groups() const { return ceil_div(panels, group); }
    // The sums of a wave are at most 300 KiB in float32, 512 KiB on AMX.
    static constexpr int64_t kMostRows = kUsesAmx<T> ? 256 : 14 * kGemmRows, kMostWave = kUsesAmx<T> ? 16 : 12;
    static constexpr int64_t kMostKeptK = 4096;
  };

  struct Scratch {
    ScratchPieces pieces;
    A* sums;   // (panels of a wave, rows, kCols)
    P* left;   // [stretch of k][tile][step][row][kLeftStep]
    P* panel;  // of a b that does not come packed
    Scratch(const Gemm& g, const Blocks& blocks, void* base) : pieces{static_cast<char*>(base)}, panel(nullptr) {
      const int64_t k = packed_k<T>(g.k), depth = min_of(k, kBlockK<T>);
      sums = pieces.take<A>(blocks.wave * blocks.rows * kCols);
      left = pieces.take<P>(blocks.rows * (blocks.keeps_left ? k : depth));
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
    ProductUnit<T> unit;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % blocks.groups() * blocks.group, row0 = item / blocks.groups() * blocks.rows;
      const int64_t past = min_of(first + blocks.group, blocks.panels), rows = min_of(blocks.rows, g.m - row0);
      for (int64_t panel = first; panel < past; panel += blocks.wave)
        run_wave(g, blocks, scratch, unit, row0, rows, panel, min_of(panel + blocks.wave, past), panel == first);
    }
  }

  // `rows` rows from row0 on times the panels from panel0 up to `past`.
  static void run_wave(const Gemm& g, const Blocks& blocks, const Scratch& scratch, ProductUnit<T>& unit, int64_t row0,
                       int64_t rows, int64_t panel0, int64_t past, bool first) {
    Unfinished unfinished{};
    int64_t k = 0;
    do {
      const int64_t depth = min_of(g.k - k, kBlockK<T>), next_k = k + depth;
      const bool last = next_k == g.k;
      const Left left = left_of(g, row0, rows, k, depth, blocks, scratch.left, first);
      for (int64_t panel = panel0; panel < past; ++panel) {
        const P* right = panel_of(g, blocks, panel, k, depth, scratch.panel);
        Ahead ahead = panel + 1 < past ? ahead_of(g, blocks, panel + 1, k, rows)
                                       : ahead_of(g, blocks, last ? past : panel0, last ? 0 : next_k, rows);
        A* sums = scratch.sums + (panel - panel0) * blocks.rows * kCols;
        for (int64_t r = 0; r < rows; r += blocks.tile_rows) {
          const int64_t height = min_of(blocks.tile_rows, rows - r);
          ahead.fetch();
          if (last) fetch_result(g, row0 + r, height, panel * kCols);
          multiply(unit, left, r, height, right, packed_k<T>(depth), k > 0, sums + r * kCols, g, unfinished);
          if (last) unfinished = {row0 + r, height, panel * kCols, sums + r * kCols};
        }
      }
      k = next_k;
    } while (k < g.k);
    finish(g, unfinished, blocks.rows);
  }

  // The stretch of a panel that is multiplied next, packed or not: a share of its lines is fetched into L2 for every tile.
  struct Ahead {
    const char* run;       // the lines that are consecutive in memory
    int64_t stride, runs;  // from one run to the next; how many are left
    int64_t run_bytes, share;
    int64_t at = 0;
    void fetch() {
      for (int64_t line = 0; line < share && runs > 0; ++line) {
        __builtin_prefetch(run + at, 0, 2);
        if ((at += 64) < run_bytes) continue;
        at = 0;
        run += stride;
        --runs;
      }
    }
  };
  static Ahead ahead_of(const Gemm& g, const Blocks& blocks, int64_t panel, int64_t k, int64_t rows) {
    if (panel == blocks.panels) return {};
    const int64_t depth = min_of(g.k - k, kBlockK<T>), column = panel * kCols, columns = min_of(kCols, g.n - column);
    const T* b = static_cast<const T*>(g.b) + k * g.b_k_stride + column * g.b_n_stride;
    Ahead ahead = g.b_k_stride == 1 ? Ahead{bytes_at(b), g.b_n_stride * kItem, columns, depth * kItem}
                                    : Ahead{bytes_at(b), g.b_k_stride * kItem, depth, columns * kItem};
    if (g.b_is_packed) {
      ahead = {bytes_at(static_cast<const P*>(g.b) + panel_offset<T>(blocks.panels, panel, k, depth)), 0, 1,
               packed_k<T>(depth) * kCols * static_cast<int64_t>(sizeof(P))};
    }
    ahead.share = ceil_div(ahead.runs * ceil_div(ahead.run_bytes, 64), ceil_div(rows, blocks.tile_rows));
    return ahead;
  }
  static const char* bytes_at(const void* p) { return static_cast<const char*>(p); }
  // A tile's lines of the result, so that its stores need not wait for them.
  static void fetch_result(const Gemm& g, int64_t row, int64_t rows, int64_t column) {
    const T* at = static_cast<const T*>(g.c) + row * g.c_stride + column;
    for (int64_t i = 0; i < rows; ++i, at += g.c_stride)
      for (int64_t line = 0; line < min_of(kCols, g.n - column); line += 64 / sizeof(T)) __builtin_prefetch(at + line, 1);
  }
  // Rows of a tile whose epilogue is still to be done: while the next tile is computed, on AMX, else at once.
  struct Unfinished {
    int64_t row, rows, column;
    const A* sums;
  };
  static void finish(const Gemm& g, Unfinished& tile, int64_t most_rows) {
    const int64_t rows = min_of(most_rows, tile.rows);
    if (rows == 0) return;
    with_activation(g.activation, [&]<Activation kActivation>() {
      finish_tile<T, kActivation>(g, tile.row, rows, tile.column, tile.sums);
    });
    tile = {tile.row + rows, tile.rows - rows, tile.column, tile.sums + rows * kCols};
  }

  // A stretch of k of an item's rows: packed in tiles one after the other, or where they are, `stride` apart.
  struct Left {
    const P* data;
    int64_t stride;  // 0 where packed
  };
  static Left left_of(const Gemm& g, int64_t row0, int64_t rows, int64_t k, int64_t depth, const Blocks& blocks,
                      P* buffer, bool first) {
    const T* from = static_cast<const T*>(g.a) + row0 * g.a_row_stride + k * g.a_k_stride;
    // AMX reads rows by their stride at no loss.
    if constexpr (kUsesAmx<T>)
      if (g.a_k_stride == 1 && depth == packed_k<T>(depth)) return {from, g.a_row_stride};
    if (blocks.keeps_left) buffer += blocks.rows * k;
    if (first || !blocks.keeps_left) {
      for (int64_t r = 0; r < rows; r += blocks.tile_rows)
        PackLeft<T>::run(from + r * g.a_row_stride, g.a_row_stride, g.a_k_stride, min_of(blocks.tile_rows, rows - r),
                         depth, buffer + r * packed_k<T>(depth));
    }
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
                       int64_t depth, bool add, A* sums, const Gemm& g, Unfinished& before) {
#if defined(__AMX_BF16__)
    if constexpr (kUsesAmx<T>) {
      const bool packed = left.stride == 0;
      amx_product<kCols>(unit, left.data + r * (packed ? depth : left.stride), packed ? kAmxK : left.stride,
                         packed ? rows * kAmxK : kAmxK, panel, depth, rows, kCols, add, sums, kCols,
                         [&, share = ceil_div(before.rows * kAmxK, max_of(1, depth))] {
                           finish(g, before, share);
                         });
      finish(g, before, before.rows);
      return;
    }
#endif
    finish(g, before, before.rows);
    with_count<kGemmRows>(rows, [&]<int kRows>() {
      const P* tile = left.data + r * depth;
      int64_t k = 0;
      do {
        add_chain<kRows>(tile + k * kRows, panel + k * kCols, min_of(depth - k, kChainK), add || k > 0, sums);
        k += kChainK;
      } while (k < depth);
    });
  }

  template <int kRows>
  static FASTTX_INLINE void add_chain(const P* left, const P* panel, int64_t k, bool add, A* sums) {
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
        for (int j = 0; j < kGemmVecs; ++j) sum[i][j] = V::load(sums + i * kCols + j * V::kWidth) + sum[i][j];
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < kGemmVecs; ++j) sum[i][j].store(sums + i * kCols + j * V::kWidth);
  }
};
