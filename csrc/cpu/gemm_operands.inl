// The operands of linear layers as their products take them, a stretch of k at a time.

// Values of k that are summed in registers, before that sum is added to those before it: the rounding error of a sum
// grows with the length of its chain, and PyTorch's products have short ones.
constexpr int64_t kChainK = Vec<float>::kWidth == 1 ? 16 : 32;  // shorter where every term rounds twice

// How the result is cut: rows and panels of an item, rows of one tile, panels of one wave. Nothing of it shows in the
// result.
template <class T, bool kParts>
struct GemmBlocks {
  // Whether products run beside the vector unit.
  static constexpr bool kBeside = kUsesAmx<T> || kParts;

  int64_t rows, tile_rows, panels, group, wave;
  bool keeps_left;  // packed for the whole of k, not anew for every wave
  explicit GemmBlocks(const Gemm& g) : panels(ceil_div(g.n, kGemmCols<T>)), keeps_left(g.k <= kMostKeptK) {
    // Blocks and tiles of about one height: a low last one would take nearly as long as a whole one.
    const int64_t even = ceil_div(g.m, max_of(1, ceil_div(g.m, kMostRows)));
    tile_rows = kBeside ? kLeftRows<T> : ceil_div(even, max_of(1, ceil_div(even, int64_t{kTileRows})));
    rows = round_up(even, max_of(1, tile_rows));
    // The more panels an item has, the less often its rows are packed; but the threads are to end together.
    const int64_t blocks = ceil_div(g.m, max_of(1, rows)), threads = max_of(1, g.threads);
    for (group = max_of(1, panels); group > 1; --group) {
      const int64_t items = blocks * ceil_div(panels, group);
      const int64_t even_work = ceil_div(items, threads) * threads * group;
      if (items >= kLeastItems * threads && even_work * 15 <= blocks * panels * 16) break;
    }
    wave = ceil_div(group, ceil_div(group, kMostWave));
  }
  int64_t groups() const { return ceil_div(panels, group); }
  // The sums of a wave are at most 288 KiB in float32, 512 KiB to 1 MiB on AMX.
  static constexpr int64_t kMostRows = kUsesAmx<T> ? 512 : kBeside ? 256 : 32 * kTileRows;
  static constexpr int64_t kMostWave = (kBeside ? 512 : 384) / kGemmCols<T>;
  static constexpr int64_t kMostKeptK = 4096;
  // Of each thread: one that is held up by something else leaves the last ones to the others. Not where items have much
  // to pack.
  static constexpr int64_t kLeastItems = kUsesAmx<T> ? 4 : 1;
};

// The stretch of a panel that is multiplied next, packed or not: a share of its lines is fetched into L2 for every tile.
struct Ahead {
  const char* run;       // the lines that are consecutive in memory
  int64_t stride, runs;  // from one run to the next; how many are left
  int64_t run_bytes, share;
  int64_t at = 0;
  FASTTX_INLINE void fetch(int64_t lines) {
    while (lines > 0 && runs > 0) {
      const char* const line = run + at;
      const int64_t count = min_of(lines, ceil_div(run_bytes - at, 64));
      for (int64_t i = 0; i < count; ++i) __builtin_prefetch(line + 64 * i, 0, 2);
      lines -= count;
      at += 64 * count;
      if (at < run_bytes) continue;
      at = 0;
      run += stride;
      --runs;
    }
  }
  void share_among(int64_t tiles) { share = ceil_div(runs * ceil_div(run_bytes, 64), tiles); }
};

// The left operand packed or, where that needs no conversion and its rows lie along k, in place; the panels of the right
// one packed.
template <class T>
class PackedOperands {
  using Blocks = GemmBlocks<T, false>;
  using P = typename Packed<T>::type;
  using A = accum_t<T>;
  using V = Vec<A>;
  static constexpr int64_t kCols = kGemmCols<T>, kItem = sizeof(T);

 public:
  PackedOperands(const Gemm& g, const Blocks& blocks, ScratchPieces& pieces) : g_(g), blocks_(blocks) {
    const int64_t k = packed_k<T>(g.k), depth = min_of(k, kBlockK<T>);
    left_buffer_ = pieces.take<P>(blocks.rows * (blocks.keeps_left ? k : depth));
    panel_buffer_ = g.packed_b != nullptr ? nullptr : pieces.take<P>(depth * kCols);
  }

  // The rows of an item from k on, `depth` values deep; packed already unless `first`.
  void begin_stretch(int64_t row0, int64_t rows, int64_t k, int64_t depth, bool first) {
    k_ = k;
    depth_ = depth;
    rows_ = rows;
    const T* from = static_cast<const T*>(g_.a) + row0 * g_.a_row_stride + k * g_.a_k_stride;
    if constexpr (sizeof(T) == sizeof(P)) {
      if (g_.a_k_stride == 1 && g_.a_row_stride != 0 && depth == packed_k<T>(depth)) {
        left_ = reinterpret_cast<const P*>(from);
        left_stride_ = g_.a_row_stride;
        return;
      }
    }
    P* buffer = left_buffer_ + (blocks_.keeps_left ? blocks_.rows * k : 0);
    if (first || !blocks_.keeps_left) {
      for (int64_t r = 0; r < rows; r += blocks_.tile_rows)
        PackLeft<T>::run(from + r * g_.a_row_stride, g_.a_row_stride, g_.a_k_stride, min_of(blocks_.tile_rows, rows - r),
                         depth, buffer + r * packed_k<T>(depth));
    }
    left_ = buffer;
    left_stride_ = 0;
  }

  // The stretch's part of a panel. The one to come next, the part from next_k on of next_panel, is fetched meanwhile.
  void begin_panel(int64_t panel, int64_t next_panel, int64_t next_k) {
    const int64_t column = panel * kCols;
    if (g_.packed_b != nullptr) {
      panel_ = static_cast<const P*>(g_.packed_b) + panel_offset<T, false>(blocks_.panels, panel, k_, depth_);
    } else {
      pack_panel(static_cast<const T*>(g_.b) + k_ * g_.b_k_stride + column * g_.b_n_stride, g_.b_k_stride, g_.b_n_stride,
                 depth_, min_of(kCols, g_.n - column), panel_buffer_);
      panel_ = panel_buffer_;
    }
    ahead_ = ahead_of(next_panel, next_k);
  }

  // sums = left panel, or sums + left panel, for one tile of `rows` rows from r on; on AMX meanwhile() is called again
  // and again.
  template <class F>
  void multiply([[maybe_unused]] ProductUnit<T>& unit, int64_t r, int64_t rows, bool add, A* sums,
                [[maybe_unused]] const F& meanwhile) {
    const int64_t depth = packed_k<T>(depth_);
    const bool packed = left_stride_ == 0;
    const P* left = left_ + r * (packed ? depth : left_stride_);
#if defined(__AMX_BF16__)
    if constexpr (kUsesAmx<T>) {
      const int64_t lines = ceil_div(ahead_.share, max_of(1, depth / kAmxK));
      const auto also_fetch = [&] {
        ahead_.fetch(lines);
        meanwhile();
      };
      amx_product<kCols>(unit, left, packed ? kAmxK : left_stride_, packed ? rows * kAmxK : kAmxK, panel_, depth, rows,
                         kCols, add, sums, kCols, also_fetch);
      return;
    }
#endif
    constexpr int kStep = Packed<T>::kStep;
    const int64_t row_stride = packed ? kStep : left_stride_;
    // The only tile of its rows waits for its panel: every step fetches what takes its place.
    const bool alone = g_.packed_b != nullptr && ahead_.runs > 0 && blocks_.rows <= blocks_.tile_rows;
    with_rows(rows, [&]<int kRows>() {
      if (alone) {
        add_product<kRows, true>(left, row_stride, packed ? kRows : 1, depth, add, sums);
      } else {
        add_product<kRows, false>(left, row_stride, packed ? kRows : 1, depth, add, sums);
      }
    });
  }

  // sums[panel][row] = left panel, or sums + left panel, for the stretch's kRows rows and kPanels packed panels from
  // `panel` on, each read as a stream of its own. Chains are those of `multiply`.
  template <int kRows, int kPanels>
  void multiply_side_by_side(int64_t panel, bool add, A* sums) const {
    using S = Step<P>;
    constexpr int kStep = Packed<T>::kStep, kVecs = kGemmVecs<T>;
    const int64_t depth = packed_k<T>(depth_), panel_values = depth * kCols;
    const bool packed = left_stride_ == 0;
    const int64_t row_stride = packed ? kStep : left_stride_, left_step = packed ? kRows * kStep : kStep;
    const P* left = left_;
    const P* b = static_cast<const P*>(g_.packed_b) + panel_offset<T, false>(blocks_.panels, panel, k_, depth_);
    int64_t k = 0;
    do {
      V sum[kPanels][kRows][kVecs];
#pragma GCC unroll 8
      for (int p = 0; p < kPanels; ++p)
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
          for (int j = 0; j < kVecs; ++j) sum[p][i][j] = V::zero();
      for (const int64_t past = min_of(k + kChainK, depth); k < past; k += kStep, left += left_step, b += kCols * kStep) {
        typename S::Reg row[kRows];
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) row[i] = S::broadcast(left + i * row_stride);
#pragma GCC unroll 8
        for (int p = 0; p < kPanels; ++p)
#pragma GCC unroll 8
          for (int j = 0; j < kVecs; ++j) {
            const typename S::Reg columns = S::columns(b + p * panel_values + j * V::kWidth * kStep);
#pragma GCC unroll 8
            for (int i = 0; i < kRows; ++i) sum[p][i][j] = S::fma_step(row[i], columns, sum[p][i][j]);
          }
      }
#pragma GCC unroll 8
      for (int p = 0; p < kPanels; ++p)
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
          for (int j = 0; j < kVecs; ++j) {
            A* at = sums + (p * kRows + i) * kCols + j * V::kWidth;
            (add ? V::load(at) + sum[p][i][j] : sum[p][i][j]).store(at);
          }
      add = true;
    } while (k < depth);
  }

  // Sums need no mending.
  void mend(int64_t, int64_t, int64_t, A*) const {}

 private:
  Ahead ahead_of(int64_t panel, int64_t k) const {
    if (panel == blocks_.panels) return {};
    const int64_t depth = min_of(g_.k - k, kBlockK<T>);
    const int64_t column = panel * kCols, columns = min_of(kCols, g_.n - column);
    const T* b = static_cast<const T*>(g_.b) + k * g_.b_k_stride + column * g_.b_n_stride;
    Ahead ahead = g_.b_k_stride == 1 ? Ahead{bytes_at(b), g_.b_n_stride * kItem, columns, depth * kItem}
                                    : Ahead{bytes_at(b), g_.b_k_stride * kItem, depth, columns * kItem};
    if (g_.packed_b != nullptr) {
      ahead = {bytes_at(static_cast<const P*>(g_.packed_b) + panel_offset<T, false>(blocks_.panels, panel, k, depth)), 0, 1,
               packed_k<T>(depth) * kCols * static_cast<int64_t>(sizeof(P))};
    }
    ahead.share_among(ceil_div(rows_, blocks_.tile_rows));
    return ahead;
  }
  static const char* bytes_at(const void* p) { return static_cast<const char*>(p); }

  // Row i of the left operand begins at left + i * row_stride; its values lie k_stride apart, in whole steps.
  template <int kRows, bool kAlone>
  FASTTX_INLINE void add_product(const P* left, int64_t row_stride, int64_t k_stride, int64_t depth, bool add,
                                 A* sums) {
    const int64_t lines = ceil_div(ahead_.share, max_of(1, ceil_div(depth, kChainK)));
    int64_t k = 0;
    do {
      if constexpr (!kAlone) ahead_.fetch(lines);
      V sum[kRows][kGemmVecs<T>];
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < kGemmVecs<T>; ++j) sum[i][j] = V::zero();
      multiply_tile<T, kRows, kGemmVecs<T>, kAlone>(
          left + k * k_stride, row_stride, panel_ + k * kCols, min_of(depth - k, kChainK), sum,
          k_stride * Packed<T>::kStep, ahead_.run + k * kCols * static_cast<int64_t>(sizeof(P)));
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < kGemmVecs<T>; ++j) {
          A* at = sums + i * kCols + j * V::kWidth;
          (add ? V::load(at) + sum[i][j] : sum[i][j]).store(at);
        }
      add = true;
      k += kChainK;
    } while (k < depth);
  }

  const Gemm& g_;
  const Blocks& blocks_;
  P *left_buffer_, *panel_buffer_;  // left: [stretch of k][tile][step][row][kLeftStep]
  int64_t k_ = 0, depth_ = 0, rows_ = 0;
  const P* left_ = nullptr;
  int64_t left_stride_ = 0;  // 0 where packed
  const P* panel_ = nullptr;
  Ahead ahead_{};
};

#if defined(FASTTX_SPLITS)
// Both operands in three bf16 parts (split.inl): the left one of the whole item; the panels packed, or split one ahead of
// their use.
template <class T>
class SplitOperands {
  using Blocks = GemmBlocks<T, true>;
  static constexpr int64_t kCols = kGemmCols<T>, kDepth = kBlockK<T>;

 public:
  SplitOperands(const Gemm& g, const Blocks& blocks, ScratchPieces& pieces) : g_(g), blocks_(blocks) {
    const int64_t depth = min_of(g.k, kDepth);
    left_buffer_ = pieces.take<bf16>(blocks.rows * left_size(blocks.keeps_left ? g.k : depth));
    if (g.packed_b != nullptr) return;
    for (bf16*& parts : parts_) parts = pieces.take<bf16>(ceil_div(depth, kAmxK) * kSplitPanelStep);
  }

  void begin_stretch(int64_t row0, int64_t rows, int64_t k, int64_t depth, bool first) {
    k_ = k;
    depth_ = depth;
    rows_ = rows;
    left_ = left_buffer_ + (blocks_.keeps_left ? blocks_.rows * left_size(k) : 0);
    if (!first && blocks_.keeps_left) return;
    for (int64_t r = 0; r < rows; r += kLeftRows<T>) {
      const T* from = static_cast<const T*>(g_.a) + (row0 + r) * g_.a_row_stride + k * g_.a_k_stride;
      const int64_t height = min_of(kLeftRows<T>, rows - r);
      for (int64_t kk = 0; kk < depth; kk += kAmxK)
        split_rows(from + kk * g_.a_k_stride, g_.a_row_stride, g_.a_k_stride, height, min_of(kAmxK, depth - kk), height,
                   left_ + r * left_size(depth) + height * left_size(kk));
    }
  }

  void begin_panel(int64_t panel, int64_t next_panel, int64_t next_k) {
    const int64_t depth = next_panel == blocks_.panels ? 0 : min_of(g_.k - next_k, kDepth);
    const int64_t tiles = ceil_div(rows_, kLeftRows<T>), steps = ceil_div(depth, kAmxK);
    if (g_.packed_b != nullptr) {
      const auto at = [&](int64_t of, int64_t k, int64_t deep) {
        return static_cast<const bf16*>(g_.packed_b) + panel_offset<T, true>(blocks_.panels, of, k, deep);
      };
      panel_ = at(panel, k_, depth_);
      ahead_ = {};
      if (depth > 0) {
        ahead_ = {reinterpret_cast<const char*>(at(next_panel, next_k, depth)), 0, 1,
                  steps * kSplitPanelStep * static_cast<int64_t>(sizeof(bf16)), 0};
        ahead_.share_among(tiles);
      }
      return;
    }
    if (next_.panel != panel || next_.k != k_) next_ = {panel, k_, min_of(g_.k - k_, kDepth), 0};
    while (next_.done < next_.depth) split_next();
    current_ = 1 - current_;
    panel_ = parts_[current_];
    next_ = {next_panel, next_k, depth, 0};
    steps_a_tile_ = ceil_div(steps, tiles);
  }

  // sums = left panel, for one tile of `rows` rows from r on, whatever they were: the caller adds up stretches.
  template <class F>
  void multiply(AmxTiles& unit, int64_t r, int64_t rows, float* sums, const F& meanwhile) {
    const int64_t steps = ceil_div(depth_, kAmxK), lines = ceil_div(ahead_.share, max_of(1, steps));
    int64_t to_split = steps_a_tile_;
    const auto also_prepare = [&] {
      meanwhile();
      ahead_.fetch(lines);
      if (to_split-- > 0 && next_.done < next_.depth) split_next();
    };
    const bf16* left = left_ + r * left_size(depth_);
    if (rows > kAmxRows) {
      unit.set_rows(kAmxRows, static_cast<int>(rows - kAmxRows));
      split_block<true>(left, rows, panel_, steps, sums, kCols, also_prepare);
    } else {
      unit.set_rows(static_cast<int>(rows), kAmxRows);
      split_block<false>(left, rows, panel_, steps, sums, kCols, also_prepare);
    }
  }

  // Takes sums that are not finite, or so small that parts of them may have been lost, again.
  void mend(int64_t row, int64_t rows, int64_t column, float* sums) {
    for (int64_t i = 0; i < rows; ++i, sums += kCols)
      for (int64_t j = 0; j < kCols; j += Vec<float>::kWidth) {
        const __mmask16 lanes = split_sums_to_mend(Vec<float>::load(sums + j).v);
        if (__builtin_expect(lanes != 0, 0)) _mm512_mask_storeu_ps(sums + j, lanes, plain_sum(row + i, column + j).v);
      }
  }

 private:
  // Of one row of the left operand, a whole number of steps or all of k.
  static int64_t left_size(int64_t k) { return kSplitParts * round_up(k, kAmxK); }

  const T* b_at(int64_t k, int64_t column) const {
    return static_cast<const T*>(g_.b) + k * g_.b_k_stride + column * g_.b_n_stride;
  }

  // One more step of the panel that is multiplied next.
  void split_next() {
    const int64_t k = next_.k + next_.done, present = min_of(kAmxK, next_.depth - next_.done);
    const int64_t column = next_.panel * kCols;
    split_panel(b_at(k, column), g_.b_k_stride, g_.b_n_stride, present, min_of(kCols, g_.n - column),
                parts_[1 - current_] + next_.done / kAmxK * kSplitPanelStep);
    next_.done += present;
  }

  // The sums of a row with up to sixteen columns from `column` on, on the vector unit.
  __attribute__((noinline)) Vec<float> plain_sum(int64_t row, int64_t column) {
    using V = Vec<float>;
    const T* a = static_cast<const T*>(g_.a) + row * g_.a_row_stride;
    const int64_t columns = min_of(V::kWidth, g_.n - column);
    float values[V::kWidth] = {};
    V sum = V::zero();
    for (int64_t k = 0; k < g_.k; k += kAmxK) {
      V chain = V::zero();
      for (int64_t i = k; i < min_of(g_.k, k + kAmxK); ++i) {
        for (int64_t j = 0; j < columns; ++j) values[j] = convert_one<float>(*b_at(i, column + j));
        chain = fma(V::set1(convert_one<float>(a[i * g_.a_k_stride])), V::load(values), chain);
      }
      sum = sum + chain;
    }
    return sum;
  }

  struct Next {
    int64_t panel, k, depth, done;
  };
  const Gemm& g_;
  const Blocks& blocks_;
  bf16 *left_buffer_, *parts_[2] = {};  // left: [stretch of k][tile][step][part][row][32]
  int64_t k_ = 0, depth_ = 0, rows_ = 0;
  bf16* left_ = nullptr;
  const bf16* panel_ = nullptr;
  Ahead ahead_{};  // of packed panels
  int current_ = 0;
  Next next_{-1, 0, 0, 0};
  int64_t steps_a_tile_ = 0;
};
#endif

template <class T, bool kParts>
struct GemmTypes {
  using Operands = PackedOperands<T>;
  using Unit = ProductUnit<T>;
};
#if defined(FASTTX_SPLITS)
template <class T>
struct GemmTypes<T, true> {
  using Operands = SplitOperands<T>;
  using Unit = AmxTiles;
};
#endif
