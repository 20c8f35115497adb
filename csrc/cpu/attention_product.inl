// The matrix product of attention's tiles: rows of a left operand by panels, with what is to become of earlier sums.

// Every term rounds twice where nothing is fused: sums of so many make up for it.
constexpr int64_t kUnfusedBlock = 16;

// out = a panel; or, where `add`, out = decay * out + a panel. Row i of `a` starts at a + i * a_stride, its steps
// a_step apart: on vectors, swapping the two multiplies by the transpose.
template <class P>
struct Product {
  using A = accum_t<P>;
  const P* a;
  int64_t a_stride, a_step;
  const P* panel;
  int64_t panel_pitch;  // from one panel to the next
  int64_t k;            // a whole number of the left operand's steps
  A* out;
  int64_t out_stride;
  bool add;
  const A* decay;  // one for each row, or null
};

// The product is summed up before it is added: long sums are made of short ones.
template <class P, int kRows, int kVecs>
static void multiply_rows(const Product<P>& g, const P* panel, int64_t row, int64_t column) {
  using A = accum_t<P>;
  using V = Vec<A>;
  const int64_t stride = g.out_stride;
  A* out = g.out + row * stride + column;
  const A* decay = g.decay;
  V sum[kRows][kVecs];
  // Unrolled, the sums are registers from the first line to the last.
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) sum[i][j] = V::zero();
  const P* a = g.a + row * g.a_stride;
  if constexpr (V::kWidth == 1) {
    for (int64_t k = 0; k < g.k; k += kUnfusedBlock) {
      V part[kRows][kVecs] = {};
      multiply_tile<P, kRows>(a + k * g.a_step, g.a_stride, panel + k * kTileCols<P>, min_of(kUnfusedBlock, g.k - k),
                              part, g.a_step);
      for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kVecs; ++j) sum[i][j] = sum[i][j] + part[i][j];
    }
  } else {
    multiply_tile<P, kRows>(a, g.a_stride, panel, g.k, sum, g.a_step);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    const V factor = V::set1(!g.add || decay == nullptr ? A(1) : decay[row + i]);
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) {
      A* to = out + i * stride + j * V::kWidth;
      (g.add ? fma(V::load(to), factor, sum[i][j]) : sum[i][j]).store(to);
    }
  }
}

template <class P, int kVecs>
static void multiply_columns(const Product<P>& g, const P* panel, int64_t rows, int64_t column) {
  int64_t row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) multiply_rows<P, kTileRows, kVecs>(g, panel, row, column);
  with_rows(rows - row, [&]<int kRows>() { multiply_rows<P, kRows, kVecs>(g, panel, row, column); });
}

template <class P>
static void multiply_panel(NoUnit&, const Product<P>& g, const P* panel, int64_t rows, int64_t column,
                           int64_t columns) {
  switch (min_of(kTileVecs, ceil_div(columns, Vec<accum_t<P>>::kWidth))) {
    case 1: return multiply_columns<P, 1>(g, panel, rows, column);
    case 2: return multiply_columns<P, 2>(g, panel, rows, column);
#if defined(__AVX512F__)
    case 3: return multiply_columns<P, 3>(g, panel, rows, column);
    case 4: return multiply_columns<P, 4>(g, panel, rows, column);
#endif
  }
}

#if defined(__AMX_BF16__)
// Whole tiles, whatever the rows: configuring others would take longer. Earlier sums are scaled by the caller, if at all
// (QueryTile::attend).
static void multiply_panel(AmxTiles& tiles, const Product<bf16>& g, const bf16* panel, int64_t rows, int64_t column,
                           int64_t columns) {
  amx_product<kTileCols<bf16>>(tiles, g.a, g.a_stride, g.a_step, panel, g.k, round_up(rows, kAmxRows),
                               min_of(columns, kTileCols<bf16>), g.add, g.out + column, g.out_stride);
}
#endif

// Rows of sums that a product may write at once.
template <class P>
constexpr int64_t kProductRows = Packed<P>::kLeftStep == kAmxK ? kAmxRows : 1;

// The whole product. `out` has room for whole vectors of columns, and `a` and `out` for rows in multiples of
// kProductRows, whose values beyond `rows` may be anything.
template <class P>
__attribute__((noinline)) static void multiply(ProductUnit<P>& unit, const Product<P>& g, int64_t rows,
                                               int64_t columns) {
  if constexpr (kInParts<P>) {
    multiply_parts(unit, g, rows, columns);
  } else {
    const P* panel = g.panel;
    for (int64_t column = 0; column < columns; column += kTileCols<P>, panel += g.panel_pitch)
      multiply_panel(unit, g, panel, rows, column, columns - column);
  }
}
