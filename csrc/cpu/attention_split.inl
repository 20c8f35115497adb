// Attention of float32 on AMX: what its operands are there, and which sequences' they are.
//
// An operand in parts (split.inl) holds blocks of 32 rows or columns, [block][step of k][part]: its values are counted as
// if they were whole, so that a block of 32 x 32 of them is where it would be.

// What attention keeps its operands of T in.
template <class T, bool splits = kSplits<T>>
struct OperandOf {
  using type = typename Packed<T>::type;
};
#if defined(FASTTX_SPLITS)
template <class T>
struct OperandOf<T, true> {
  using type = Split;
};
#endif
template <class T>
using Operand = typename OperandOf<T>::type;

// The keys from which on parts are worth their packing, and the width; a sequence's own sizes decide, as in
// attention_decode.inl.
constexpr int64_t kSplitKeys = 32, kSplitWidth = 16;

// The largest magnitudes among values, as the bits of a float: those of NaN are larger than any number's.
struct Magnitude {
  uint32_t bits;
  // Whether parts hold every value exactly, and products of parts that matter are not lost below 2^-126: attention's
  // errors are relative to its largest operands.
  bool splits() const {
    constexpr uint32_t kMost = (127u + 40) << 23;  // 2^40
    return bits < kMost && !is_tiny();
  }
  bool is_tiny() const {
    constexpr uint32_t kLeast = (127u - 60) << 23;  // 2^-60
    return bits != 0 && bits < kLeast;
  }
  void join(Magnitude other) { bits = bits > other.bits ? bits : other.bits; }
};

#if defined(FASTTX_SPLITS)
template <class T>
static Magnitude magnitude_of(const MatrixRows<T>& rows, const Places& places, int64_t first, int64_t last,
                              int64_t width) {
  using V = Vec<float>;
  const __m512i sizes = _mm512_set1_epi32(0x7fffffff);
  __m512i most[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
  for (int64_t row = first; row < last; ++row) {
    const T* values = rows[places[row]];
    for_vectors<V>(width, [&](int64_t i, int lanes) {
      __m512i& m = most[i / V::kWidth % 2];
      m = _mm512_max_epu32(m, _mm512_and_si512(_mm512_castps_si512(load_lanes<V>(values + i, lanes).v), sizes));
    });
  }
  return {_mm512_reduce_max_epu32(_mm512_max_epu32(most[0], most[1]))};
}

// `rows` rows as those from row0 on of a left operand, `pitch` values a row.
template <class T>
static void pack_left(const T* from, int64_t row_stride, int64_t rows, int64_t width, Split* to, int64_t pitch,
                      int64_t row0 = 0) {
  constexpr int64_t kBlock = 2 * kAmxRows;
  for (int64_t row = 0; row < rows;) {
    const int64_t at = row0 + row, count = min_of(kBlock - at % kBlock, rows - row);
    bf16* block = reinterpret_cast<bf16*>(to + at / kBlock * kBlock * pitch) + at % kBlock * kAmxK;
    for (int64_t k = 0; k < width; k += kAmxK)
      split_rows(from + row * row_stride + k, row_stride, 1, count, min_of(kAmxK, width - k), kBlock,
                 block + k * kSplitParts * kBlock);
    row += count;
  }
}

// The transpose of `rows` rows as a left operand: as many rows as they are wide, `pitch` values a row.
template <class T>
static void pack_left_transposed(const T* from, int64_t row_stride, int64_t rows, int64_t width, Split* to,
                                 int64_t pitch) {
  constexpr int64_t kBlock = 2 * kAmxRows;
  for (int64_t column = 0; column < width; column += kBlock) {
    bf16* block = reinterpret_cast<bf16*>(to + column * pitch);
    for (int64_t k = 0; k < rows; k += kAmxK)
      split_rows(from + k * row_stride + column, 1, row_stride, min_of(kBlock, width - column), min_of(kAmxK, rows - k),
                 kBlock, block + k * kSplitParts * kBlock);
  }
}

template <class T>
static void pack_transposed(const T* from, int64_t row_stride, int64_t rows, int64_t width, Split* panel) {
  for (int64_t k = 0; k < width; k += kAmxK)
    split_transposed(from + k, row_stride, rows, min_of(kAmxK, width - k),
                     reinterpret_cast<bf16*>(panel + k * kTileCols<Split>));
}

template <class T>
static void pack_rows(const T* from, int64_t row_stride, int64_t rows, int64_t width, Split* panels, int64_t pitch) {
  constexpr int64_t kCols = kTileCols<Split>;
  for (int64_t column = 0; column < width; column += kCols, panels += pitch)
    for (int64_t k = 0; k < rows; k += kAmxK)
      split_columns(from + k * row_stride + column, row_stride, min_of(kAmxK, rows - k), min_of(kCols, width - column),
                    reinterpret_cast<bf16*>(panels + k * kCols));
}

static void sign_queries(const AttentionShape& g, Split* q, int64_t stride, int64_t rows) {
  if (g.scale >= 0) return;
  uint32_t* pairs = reinterpret_cast<uint32_t*>(q);
  const int64_t bytes = round_up(rows, 2 * kAmxRows) * stride * static_cast<int64_t>(sizeof(Split));
  for (int64_t i = 0; i < bytes / static_cast<int64_t>(sizeof(uint32_t)); ++i) pairs[i] ^= 0x80008000u;
}

// out (rows, 32) = one panel; rows of `out` in whole tiles.
template <class F>
static FASTTX_INLINE void multiply_split(const Split* left, int64_t rows, const Split* panel, int64_t k, float* out,
                                         int64_t out_stride, const F& meanwhile) {
  const bf16 *a = reinterpret_cast<const bf16*>(left), *b = reinterpret_cast<const bf16*>(panel);
  if (rows > kAmxRows) {
    split_block<true>(a, 2 * kAmxRows, b, k / kAmxK, out, out_stride, meanwhile);
  } else {
    split_block<false>(a, 2 * kAmxRows, b, k / kAmxK, out, out_stride, meanwhile);
  }
}

// The whole product. A block's sums are added while the next ones are multiplied.
static void multiply_parts(AmxTiles& tiles, const Product<Split>& g, int64_t rows, int64_t columns) {
  using V = Vec<float>;
  constexpr int64_t kRows = 2 * kAmxRows, kCols = kTileCols<Split>;
  tiles.set_rows(kAmxRows, kAmxRows);
  alignas(64) float buffers[2][kRows * kCols];
  struct {
    int64_t row, count;
    const float *sums, *decay;
    float* out;
  } ready = {};
  const auto add_rows = [&](int64_t count) {
    for (; count > 0 && ready.row < ready.count; --count, ++ready.row) {
      float* out = ready.out + ready.row * g.out_stride;
      const float* sums = ready.sums + ready.row * kCols;
      const V decay = V::set1(ready.decay == nullptr ? 1.0f : ready.decay[ready.row]);
      fma(V::load(out), decay, V::load(sums)).store(out);
      fma(V::load(out + V::kWidth), decay, V::load(sums + V::kWidth)).store(out + V::kWidth);
    }
  };
  const int64_t rows_a_step = ceil_div(kRows * kAmxK, max_of(kAmxK, g.k));
  const Split* panel = g.panel;
  int which = 0;
  for (int64_t column = 0; column < columns; column += kCols, panel += g.panel_pitch) {
    for (int64_t row = 0; row < rows; row += kRows) {
      const int64_t count = min_of(kRows, rows - row);
      float* out = g.out + row * g.out_stride + column;
      if (!g.add) {
        multiply_split(g.a + row * g.a_stride, count, panel, g.k, out, g.out_stride, [] {});
        continue;
      }
      float* sums = buffers[which];
      which = 1 - which;
      multiply_split(g.a + row * g.a_stride, count, panel, g.k, sums, kCols, [&] { add_rows(rows_a_step); });
      add_rows(kRows);
      ready = {0, count, sums, g.decay == nullptr ? nullptr : g.decay + row, out};
    }
  }
  add_rows(kRows);
}

// A product that is taken a few turns at a time.
struct SplitTurns {
  SplitProduct<true> product;
  int64_t steps, step = 0;
  int turn = 0;
  bool large = false;

  FASTTX_INLINE void take() {
    if (large) return product.large_turn(step++);
    if (step == 0 && turn == 0) product.begin();
    product.small_turn(step, turn);
    if (++turn < product.kTurns - 1) return;
    turn = 0;
    if (++step < steps) return;
    step = 0;
    large = true;
  }
};
#endif

// A kernel K<T, P> of attention on the operands that a sequence's own values and sizes call for: K::splits(g, item) says
// whether its parts do, and K<T, float> takes the others. Both have the same items.
template <template <class, class> class K, class T, bool = kSplits<T>>
struct OnOperands : K<T, typename Packed<T>::type> {};
template <template <class, class> class K, class T>
struct OnOperands<K, T, true> {
  using InParts = K<T, Operand<T>>;
  using Whole = K<T, typename Packed<T>::type>;

  template <class Args>
  static Plan plan(const Args& g) {
    Plan plan = InParts::plan(g);
    const Plan whole = Whole::plan(g);
    if (whole.scratch_bytes > plan.scratch_bytes) plan.scratch_bytes = whole.scratch_bytes;
    return plan;
  }

  template <class Args>
  static void run(const Args& g, void* scratch, int64_t begin, int64_t end) {
    while (begin < end) {
      const bool splits = InParts::splits(g, begin);
      int64_t last = begin + 1;
      while (last < end && InParts::splits(g, last) == splits) ++last;
      splits ? InParts::run(g, scratch, begin, last) : Whole::run(g, scratch, begin, last);
      begin = last;
    }
  }
};
