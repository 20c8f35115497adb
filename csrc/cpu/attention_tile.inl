// What attention's forward and backward share: sequences, the tile product, and what decides which key a query sees.

// Rows and keys of one tile of scores.
constexpr int64_t kQueryTile = 48;
constexpr int64_t kKeyTile = 128;

// Every term rounds twice where nothing is fused: sums of so many make up for it.
constexpr int64_t kUnfusedBlock = 16;

template <class A>
constexpr A kInfinity = __builtin_inf();

// out = scale * a panel; or, where `add`, out = decay * out + a panel, the product being summed up first: long sums are
// made of short ones. Row i of `a` starts at a + i * a_stride, its steps a_step apart: swapping the two multiplies
// by the transpose.
template <class P>
struct Product {
  using A = accum_t<P>;
  const P* a;
  int64_t a_stride, a_step;
  const P* panel;
  int64_t panel_pitch;  // from one panel to the next
  int64_t k;
  A* out;
  int64_t out_stride;
  bool add;
  const A* decay;  // one for each row, or null
  A scale;
};

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
  if (g.add) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const V factor = V::set1(decay == nullptr ? A(1) : decay[row + i]);
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) {
        A* to = out + i * stride + j * V::kWidth;
        fma(V::load(to), factor, sum[i][j]).store(to);
      }
    }
  } else {
    const V scale = V::set1(g.scale);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) (sum[i][j] * scale).store(out + i * stride + j * V::kWidth);
  }
}

template <class P, int kVecs>
static void multiply_columns(const Product<P>& g, const P* panel, int64_t rows, int64_t column) {
  int64_t row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) multiply_rows<P, kTileRows, kVecs>(g, panel, row, column);
  with_rows(rows - row, [&]<int kRows>() { multiply_rows<P, kRows, kVecs>(g, panel, row, column); });
}

// The whole product; `out` has room for whole vectors of columns.
template <class P>
__attribute__((noinline)) static void multiply(const Product<P>& g, int64_t rows, int64_t columns) {
  const P* panel = g.panel;
  for (int64_t column = 0; column < columns; column += kTileCols<P>, panel += g.panel_pitch) {
    switch (min_of(kTileVecs, ceil_div(columns - column, Vec<accum_t<P>>::kWidth))) {
      case 1: multiply_columns<P, 1>(g, panel, rows, column); break;
      case 2: multiply_columns<P, 2>(g, panel, rows, column); break;
#if defined(__AVX512F__)
      case 3: multiply_columns<P, 3>(g, panel, rows, column); break;
      case 4: multiply_columns<P, 4>(g, panel, rows, column); break;
#endif
    }
  }
}

// One sequence of the batch: its length, where its rows lie on the token axis, and where its lse is.
struct Sequence {
  int64_t batch, queries, keys, first_query, first_key;
};
static inline Sequence sequence_of(const AttentionShape& g, int64_t b) {
  if (g.cu_queries != nullptr) {
    return {b, g.cu_queries[b + 1] - g.cu_queries[b], g.cu_keys[b + 1] - g.cu_keys[b], g.cu_queries[b], g.cu_keys[b]};
  }
  return {b, g.queries, g.key_lengths == nullptr ? g.keys : g.key_lengths[b], 0, 0};
}
template <class T>
static inline const T* first_row(const void* data, const Strides& strides, const AttentionShape& g, int64_t batch,
                                 int64_t head, int64_t row) {
  return static_cast<const T*>(data) + (g.cu_queries == nullptr ? batch * strides.b : 0) + head * strides.h +
         row * strides.t;
}
template <class T>
static inline T* first_row(void* data, const Strides& strides, const AttentionShape& g, int64_t batch, int64_t head,
                           int64_t row) {
  return const_cast<T*>(first_row<T>(static_cast<const void*>(data), strides, g, batch, head, row));
}
// Index of a row's lse: (batch, heads, queries), or packed (heads, total queries).
static inline int64_t lse_index(const AttentionShape& g, const Sequence& sequence, int64_t head, int64_t query) {
  if (g.cu_queries != nullptr) return head * g.cu_queries[g.batch] + sequence.first_query + query;
  return (sequence.batch * g.heads + head) * g.queries + query;
}

// A query, and the keys [first, last) that its position and the sequence's length allow; last < first where none.
struct TileRow {
  int64_t head, query, first, last;
};
static inline TileRow tile_row(const AttentionShape& g, int64_t head, int64_t query, int64_t keys) {
  const int64_t position = query + g.query_offset;
  TileRow row = {head, query, 0, keys};
  if (g.window_left >= 0) row.first = max_of(0, position - g.window_left);
  if (g.is_causal) row.last = min_of(row.last, position + 1);
  if (g.window_right >= 0) row.last = min_of(row.last, position + g.window_right + 1);
  if (row.last <= row.first) row = {head, query, keys, 0};
  return row;
}

// The rows of one tile, and the keys that any of them sees.
struct TileRows {
  TileRow rows[kQueryTile];
  int64_t count = 0, first = INT64_MAX, last = 0;
  void add(const TileRow& row) {
    rows[count++] = row;
    first = min_of(first, row.first);
    last = max_of(last, row.last);
  }
  // Whether every row sees all of [key, key + n), in whole vectors.
  template <class A>
  bool all_see(int64_t key, int64_t n) const {
    if (n % Vec<A>::kWidth != 0) return false;
    for (int64_t i = 0; i < count; ++i)
      if (rows[i].first > key || rows[i].last < key + n) return false;
    return true;
  }
};

// Widens n values of a mask, `stride` apart; a boolean becomes 0 where it allows and -inf where it does not.
template <class S, class A>
static inline A mask_value(S value, A*) {
  if constexpr (sizeof(S) == 1) {
    return value != 0 ? A(0) : -kInfinity<A>;
  } else {
    return convert_one<A>(value);
  }
}
template <class S, class A>
static void widen_mask(const S* from, int64_t stride, int64_t n, A* out) {
  if (stride == 0) {
    const A value = n > 0 ? mask_value(*from, out) : A(0);
    for (int64_t i = 0; i < n; ++i) out[i] = value;
  } else if (stride != 1) {
    for (int64_t i = 0; i < n; ++i) out[i] = mask_value(from[i * stride], out);
  } else if constexpr (sizeof(S) == 1) {
    for (int64_t i = 0; i < n; ++i) out[i] = mask_value(from[i], out);
  } else {
    copy_as(from, out, n);
  }
}

// The mask and the positional bias of one tile: which scores stay, and what is added to them.
template <class T>
struct TileMask {
  using A = accum_t<T>;
  using V = Vec<A>;
  const AttentionShape& g;
  const TileRows& rows;
  int64_t batch, key;
  int64_t n;      // keys up to the last that a shared row of the mask allows
  A* bias;        // of one row
  bool has_bias;  // there is something to add
  bool shared;    // one row of bias serves every row
  bool full;      // every row sees all n keys, as far as positions go

  TileMask(const AttentionShape& shape, const TileRows& tile, int64_t b, int64_t first_key, int64_t keys, A* buffer)
      : g(shape), rows(tile), batch(b), key(first_key), n(keys), bias(buffer) {
    const bool one_head = rows.rows[0].head == rows.rows[rows.count - 1].head;
    has_bias = g.mask.kind != MaskKind::none;
    shared = has_bias && g.mask.stride_q == 0 && (g.mask.stride_h == 0 || one_head);
    if (shared) {
      fill(rows.rows[0]);
      bool adds = false;
      while (n > 0 && bias[n - 1] == -kInfinity<A>) --n;
      for (int64_t i = 0; i < n; ++i) adds |= bias[i] != 0;
      has_bias = adds;
    }
    full = rows.template all_see<A>(key, n);
  }

  void fill(const TileRow& row) {
    const Mask& mask = g.mask;
    const int64_t at =
        batch * mask.stride_b + row.head * mask.stride_h + row.query * mask.stride_q + key * mask.stride_k;
    if (mask.kind == MaskKind::boolean) {
      widen_mask(static_cast<const uint8_t*>(mask.data) + at, mask.stride_k, n, bias);
    } else if (mask.wide) {
      widen_mask(static_cast<const A*>(mask.data) + at, mask.stride_k, n, bias);
    } else {
      widen_mask(static_cast<const T*>(mask.data) + at, mask.stride_k, n, bias);
    }
  }

  // Applies all of it to the scores, rows `stride` apart.
  void apply(A* scores, int64_t stride) {
    if (full && !has_bias && g.alibi_slopes == nullptr) return;
    for (int64_t i = 0; i < rows.count; ++i) {
      if (has_bias && !shared) fill(rows.rows[i]);
      apply_row(rows.rows[i], scores + i * stride);
    }
  }

  void apply_row(const TileRow& row, A* scores) {
    const V lowest = V::set1(-kInfinity<A>);
    // Counted from the tile's first key, and clamped, they are exact in A.
    const V first = V::set1(static_cast<A>(max_of(0, min_of(n, row.first - key))));
    const V last = V::set1(static_cast<A>(max_of(0, min_of(n, row.last - key))));
    const V slope = V::set1(g.alibi_slopes == nullptr ? A(0) : static_cast<const A*>(g.alibi_slopes)[row.head]);
    const V distance = V::set1(static_cast<A>(key - row.query - g.query_offset));
    for (int64_t i = 0; i < n; i += V::kWidth) {
      const V index = V::iota() + V::set1(static_cast<A>(i));
      V score = V::load(scores + i);
      auto seen = mask_and(ge(index, first), lt(index, last));
      if (has_bias) {
        const V added = V::load(bias + i);
        seen = mask_and(seen, mask_not(eq(added, lowest)));
        score = score + added;
      }
      if (g.alibi_slopes != nullptr) score = fnma(slope, abs(distance + index), score);
      select(seen, score, lowest).store(scores + i);
    }
  }
};
