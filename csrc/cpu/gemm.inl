// The packed register-tile matrix product that the feed-forward and both products of attention are made of.
//
// A tile of kTileRows x kTileCols sums stays in registers while k runs. B is packed in panels [panel][k][kTileCols], so that its loads
// are consecutive; A is read in place by broadcast. Every sum runs over k in order, whatever the tile's place or height:
// a row's result does not depend on the rows beside it.

// A packed operand of storage T holds P = Packed<T>::type in steps of kStep values along k.
template <class T>
struct Packed {
  using type = accum_t<T>;
  static constexpr int kStep = 1;
};
#if defined(__AVX512BF16__)
// vdpbf16ps multiplies pairs that lie together along k.
template <>
struct Packed<bf16> {
  using type = bf16;
  static constexpr int kStep = 2;
};
#endif

constexpr int kTileRows = 6;
#if defined(__AVX512F__)
constexpr int kTileVecs = 4;  // 24 sums, 4 columns of B and one broadcast: 29 of 32 registers
#else
constexpr int kTileVecs = 2;  // 12 sums, 2 columns of B and one broadcast: 15 of 16 registers
#endif

template <class T>
constexpr int kTileCols = kTileVecs * Vec<accum_t<T>>::kWidth;

// Values of k that all the rows pass through before the next: that block of B (64 KiB in float32) stays in L2.
constexpr int64_t kBlockK = 256;
// Values of k that are summed in registers, before that sum is added to those before it: the rounding error of a sum grows
// with the length of its chain, and PyTorch's products have short ones.
constexpr int64_t kChainK = 32;
// Rows of A that share one block of B.
constexpr int64_t kBlockRows = 192;

static inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
static inline int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }
static inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// One step of the tile: a's `kStep` values broadcast, times kStep rows of one vector of columns.
template <class P>
struct Step {
  using V = Vec<P>;
  using Reg = V;
  static Reg broadcast(const P* a) { return V::set1(*a); }
  static Reg columns(const P* b) { return V::load(b); }
  static V fma_step(Reg a, Reg b, V sum) { return fma(a, b, sum); }
};
#if defined(__AVX512BF16__)
template <>
struct Step<bf16> {
  using V = Vec<float>;
  using Reg = __m512i;
  static Reg broadcast(const bf16* a) {
    int pair;
    memcpy(&pair, a, sizeof(pair));
    return _mm512_set1_epi32(pair);
  }
  static Reg columns(const bf16* b) { return _mm512_loadu_si512(b); }
  static V fma_step(Reg a, Reg b, V sum) {
    return V{_mm512_dpbf16_ps(sum.v, (__m512bh)a, (__m512bh)b)};
  }
};
#endif

// sum[i][j] += a[i][0:k] . b[0:k][j], for kRows rows of A and the first kVecs vectors of one panel of B. Row i of A starts at
// a + i * a_stride, and its next step lies `a_step` further on. `a` may be short of the last step by the padding of an
// odd k, when its steps lie together.
template <class T, int kRows, int kVecs, class P = typename Packed<T>::type>
static inline void multiply_tile(const P* a, int64_t a_stride, const P* b, int64_t k,
                                 Vec<accum_t<T>> (&sum)[kRows][kVecs], int64_t a_step = Packed<T>::kStep) {
  using S = Step<P>;
  constexpr int kStep = Packed<T>::kStep;
  constexpr int kWidth = Vec<accum_t<T>>::kWidth;
  const auto step = [&](const P* a_at, int64_t stride) __attribute__((always_inline)) {
    typename S::Reg columns[kVecs];
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) columns[j] = S::columns(b + j * kWidth * kStep);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const typename S::Reg row = S::broadcast(a_at + i * stride);
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) sum[i][j] = S::fma_step(row, columns[j], sum[i][j]);
    }
    b += kTileVecs * kWidth * kStep;
  };
  const int64_t whole = k / kStep * kStep;
  for (int64_t kk = 0; kk < whole; kk += kStep, a += a_step) step(a, a_stride);
  if (whole < k) {  // half a pair: the other half is zero on both sides
    P tail[kRows * kStep] = {};
    for (int i = 0; i < kRows; ++i) tail[i * kStep] = a[i * a_stride];
    step(tail, kStep);
  }
}

// Calls f.template operator()<kRows>() for 1 <= rows <= kTileRows.
template <class F>
static inline void with_rows(int64_t rows, const F& f) {
  static_assert(kTileRows == 6);
  switch (rows) {
    case 6: return f.template operator()<6>();
    case 5: return f.template operator()<5>();
    case 4: return f.template operator()<4>();
    case 3: return f.template operator()<3>();
    case 2: return f.template operator()<2>();
    case 1: return f.template operator()<1>();
    default: return;
  }
}

// out (rows, kTileCols) = [out +] a (rows, k) . panel; the plain product, for any number of rows.
template <class T, class P = typename Packed<T>::type, class A = accum_t<T>>
static inline void multiply_panel(const P* a, int64_t a_stride, int64_t rows, const P* panel, int64_t k,
                                  A* out, int64_t out_stride, bool accumulate) {
  using V = Vec<A>;
  for (int64_t row = 0; row < rows; row += kTileRows) {
    with_rows(min_of(rows - row, kTileRows), [&]<int kRows>() {
      V sum[kRows][kTileVecs];
      A* tile = out + row * out_stride;
      for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kTileVecs; ++j)
          sum[i][j] = accumulate ? V::load(tile + i * out_stride + j * V::kWidth) : V::zero();
      multiply_tile<T, kRows>(a + row * a_stride, a_stride, panel, k, sum);
      for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kTileVecs; ++j) sum[i][j].store(tile + i * out_stride + j * V::kWidth);
    });
  }
}

template <class T>
constexpr bool a_is_packed = sizeof(T) == sizeof(typename Packed<T>::type);

template <class T>
static int64_t packed_k(int64_t k) {
  return round_up(k, Packed<T>::kStep);
}

template <class T>
static size_t packed_a_bytes(int64_t m, int64_t k) {
  return sizeof(typename Packed<T>::type) * m * packed_k<T>(k);
}

template <class T>
static size_t packed_b_bytes(int64_t k, int64_t n) {
  return sizeof(typename Packed<T>::type) * packed_k<T>(k) * round_up(n, kTileCols<T>);
}

// Copies one vector's worth of T to P: widened, or as it is where the packed operand keeps T.
template <class T, class P>
static inline void copy_as(const T* from, P* to, int64_t n) {
  if constexpr (sizeof(T) == sizeof(P)) {
    memcpy(to, from, n * sizeof(T));
  } else {
    using V = Vec<P>;
    int64_t i = 0;
    for (; i + V::kWidth <= n; i += V::kWidth) V::load(from + i).store(to + i);
    if (i < n) V::load(from + i, n - i).store(to + i, n - i);
  }
}

template <class P, class T>
static inline P convert_one(T value) {
  P out;
  copy_as(&value, &out, 1);
  return out;
}

// Items are blocks of rows.
template <class T>
struct PackAKernel {
  static constexpr int64_t kRows = 16;
  static Plan plan(const PackA& g) {
    return {ceil_div(g.m, kRows), max_of(1, 32768 / (kRows * max_of(g.k, 1))), 0, false};
  }
  static void run(const PackA& g, void*, int64_t begin, int64_t end) {
    using P = typename Packed<T>::type;
    const int64_t k_padded = packed_k<T>(g.k);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row0 = block * kRows, rows = min_of(kRows, g.m - row0);
      const T* from = static_cast<const T*>(g.a) + row0 * g.row_stride;
      P* to = static_cast<P*>(g.packed) + row0 * k_padded;
      if (g.k_stride == 1) {
        for (int64_t i = 0; i < rows; ++i) copy_as(from + i * g.row_stride, to + i * k_padded, g.k);
      } else {
        // Transposed: the reads run along the rows, which lie together.
        for (int64_t kk = 0; kk < g.k; ++kk)
          for (int64_t i = 0; i < rows; ++i)
            to[i * k_padded + kk] = convert_one<P>(from[i * g.row_stride + kk * g.k_stride]);
      }
      for (int64_t kk = g.k; kk < k_padded; ++kk)
        for (int64_t i = 0; i < rows; ++i) to[i * k_padded + kk] = P{};
    }
  }
};

// Packs columns [column0, column0 + columns) of b, columns <= kTileCols, as one panel.
template <class T, class P = typename Packed<T>::type>
static inline void pack_panel(const T* b, int64_t k_stride, int64_t n_stride, int64_t k, int64_t columns, P* panel) {
  constexpr int kStep = Packed<T>::kStep, kCols = kTileCols<T>;
  const int64_t k_padded = round_up(k, kStep);
  if (columns < kCols || k < k_padded) memset(panel, 0, sizeof(P) * k_padded * kCols);
  if (n_stride == 1 && kStep == 1) {
    for (int64_t kk = 0; kk < k; ++kk) copy_as(b + kk * k_stride, panel + kk * kCols, columns);
    return;
  }
  // Blocks of k, so that the lines of the panel stay in L1 while the columns of b are walked one after another.
  constexpr int64_t kBlock = 32;
  for (int64_t k0 = 0; k0 < k; k0 += kBlock) {
    const int64_t k1 = min_of(k, k0 + kBlock);
    for (int64_t column = 0; column < columns; ++column) {
      const T* from = b + column * n_stride;
      P* to = panel + column * kStep;
      for (int64_t kk = k0; kk < k1; ++kk)
        to[kk / kStep * kCols * kStep + kk % kStep] = convert_one<P>(from[kk * k_stride]);
    }
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

// Finishes one row of a tile: `sums` holds kTileCols finished dot products of row `row`, from column `column` on.
template <class T>
static inline void gemm_epilogue(const Gemm& g, int64_t row, int64_t column, Vec<accum_t<T>> (&sums)[kTileVecs]) {
  using A = accum_t<T>;
  using V = Vec<A>;
  A keep[kTileCols<T>];
  if (g.dropout.active) {
    dropout_keep(keep, min_of(kTileCols<T>, g.n - column), g.dropout.seed, 0, 0, row + g.row_offset, column,
                 g.dropout.threshold, static_cast<A>(g.dropout.scale));
  }
  const int64_t offset = row * g.c_stride + column;
  for (int j = 0; j < kTileVecs; ++j) {
    const int64_t first = j * V::kWidth;
    const int lanes = static_cast<int>(min_of(V::kWidth, g.n - column - first));
    if (lanes <= 0) break;
    const auto load = [&](const void* p, int64_t at) {
      const T* from = static_cast<const T*>(p) + at;
      return lanes == V::kWidth ? V::load(from) : V::load(from, lanes);
    };
    const auto store = [&](void* p, V value) {
      T* to = static_cast<T*>(p) + offset + first;
      lanes == V::kWidth ? value.store(to) : value.store(to, lanes);
    };
    V value = sums[j];
    if (g.bias != nullptr) value = value + load(g.bias, column + first);
    if (g.preact != nullptr) store(g.preact, value);
    const auto dropped = [&](V kept) { return g.dropout.active ? drop(kept, V::load(keep + first, lanes)) : kept; };
    if (g.grad_preact != nullptr) {
      const V preact = load(g.grad_preact, offset + first);
      value = dropped(value * activation_grad(g.activation, preact));
      if (g.recomputed != nullptr) store(g.recomputed, dropped(activate(g.activation, preact)));
    } else {
      value = dropped(activate(g.activation, value));
    }
    store(g.c, value);
  }
}

// Items are (block of rows, panel), the panels the faster: a block of A is larger than a panel of B, so it is what stays in L2.
template <class T>
struct GemmKernel {
  using P = typename Packed<T>::type;
  using A = accum_t<T>;
  using V = Vec<A>;

  static int64_t row_blocks(const Gemm& g) { return ceil_div(g.m, kBlockRows); }

  static Plan plan(const Gemm& g) {
    const int64_t blocks = row_blocks(g);
    const int64_t rows = blocks == 0 ? 0 : ceil_div(g.m, blocks);
    const int64_t work = max_of(1, rows * kTileCols<T> * g.k);
    return {ceil_div(g.n, kTileCols<T>) * blocks, max_of(1, 65536 / work),
            sizeof(A) * kBlockRows * kTileCols<T>, false};
  }

  static void run(const Gemm& g, void* scratch, int64_t begin, int64_t end) {
    const int64_t blocks = row_blocks(g);
    const int64_t block_rows = round_up(ceil_div(g.m, blocks), kTileRows);
    const int64_t panels = ceil_div(g.n, kTileCols<T>);
    const int64_t k_padded = packed_k<T>(g.k);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t panel = item % panels, row0 = item / panels * block_rows;
      const int64_t rows = min_of(block_rows, g.m - row0);
      if (rows <= 0) continue;
      run_block(g, static_cast<A*>(scratch), row0, rows, panel * kTileCols<T>,
                static_cast<const P*>(g.b) + panel * k_padded * kTileCols<T>);
    }
  }

  static void run_block(const Gemm& g, A* partial, int64_t row0, int64_t rows, int64_t column, const P* panel) {
    int64_t k0 = 0;
    do {  // once even for k = 0: the epilogue still has to run
      const int64_t k1 = min_of(g.k, k0 + kBlockK);
      for (int64_t r = 0; r < rows; r += kTileRows) {
        with_rows(min_of(rows - r, kTileRows), [&]<int kRows>() {
          A* saved = partial + r * kTileCols<T>;
          int64_t k = k0;
          do {
            const int64_t end = min_of(k1, k + kChainK);
            V sum[kRows][kTileVecs];
            for (int i = 0; i < kRows; ++i)
              for (int j = 0; j < kTileVecs; ++j) sum[i][j] = V::zero();
            multiply_tile<T, kRows>(static_cast<const P*>(g.a) + (row0 + r) * g.a_stride + k, g.a_stride,
                                    panel + k * kTileCols<T>, end - k, sum);
            for (int i = 0; i < kRows; ++i) {
              for (int j = 0; j < kTileVecs && k > 0; ++j)
                sum[i][j] = V::load(saved + i * kTileCols<T> + j * V::kWidth) + sum[i][j];
              if (end == g.k) {
                gemm_epilogue<T>(g, row0 + r + i, column, sum[i]);
              } else {
                for (int j = 0; j < kTileVecs; ++j) sum[i][j].store(saved + i * kTileCols<T> + j * V::kWidth);
              }
            }
            k = end;
          } while (k < k1);
        });
      }
      k0 = k1;
    } while (k0 < g.k);
  }
};
