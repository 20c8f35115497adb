// Attention backward, tile by tile: the probabilities come again from the scores and the forward's two numbers a row.
//
// With P = exp(S - largest) / sum, S = scale Q K^T + bias, and delta = rowsum(dO O):
//   dV = P^T dO    dP = dO V^T    dS = P (dP - delta)    dQ = scale dS K    dK = scale dS^T Q
// and dropout multiplies P in dV, and dP, by its factors. Every sum runs over the queries or keys in order.

// A tile of keys on its way over the queries, and the sequence's queries as operands.
template <class P>
struct KeyTile {
  using A = accum_t<P>;
  using V = Vec<A>;
  static constexpr int kStep = Packed<P>::kStep, kCols = kTileCols<P>;

  // A matrix of rows as both operands of a product: `left`, and `right` in panels of `pitch` rows.
  struct Rows {
    P *left, *right;
    int64_t left_stride, pitch, width;
    bool one_copy;

    Rows(ScratchPieces& pieces, int64_t rows, int64_t columns) : pitch(rows), width(columns) {
      one_copy = kStep == 1 && columns <= kCols;
      left_stride = one_copy ? kCols : round_up(columns, kStep);
      right = pieces.take<P>(rows * round_up(columns, kCols));
      left = one_copy ? right : pieces.take<P>(rows * left_stride);
    }
    // Packs n rows to the ones from `to` on, a multiple of kStep.
    template <class T>
    void pack(const T* from, int64_t row_stride, int64_t n, int64_t to) {
      pack_rows(from, row_stride, n, width, right + to * kCols, pitch * kCols);
      if (!one_copy) pack_left(from, row_stride, n, width, left + to * left_stride, left_stride);
    }
  };

  int64_t head_rows;  // rows that one head takes below
  Rows q, dout;       // (heads of the group * head_rows)
  Rows k;             // (kKeyTile)
  P *keys, *values;   // K and V of the tile, transposed, as right operands
  A* dq;              // (heads of the group * head_rows, dq_stride)
  A *dk, *dv;         // (kKeyTile, dq_stride), (kKeyTile, dv_stride)
  int64_t dq_stride, dv_stride;
  A *stats, *delta;   // (heads of the group * head_rows, 2) and (the same rows)
  A *p, *ds;          // (kQueryTile, kKeyTile): scores, then probabilities; dP, then dS
  P *p_left, *ds_left, *ds_right;  // what the products read of them: P^T, dS^T, dS
  A *bias, *keep;     // (kKeyTile)
  A* panels;          // (2, value_width, kTileCols<A>): for delta

  KeyTile(const AttentionShape& g, ScratchPieces& pieces)
      : head_rows(round_up(g.queries, kStep)),
        q(pieces, g.heads / g.kv_heads * head_rows, g.width),
        dout(pieces, g.heads / g.kv_heads * head_rows, g.value_width),
        k(pieces, kKeyTile, g.width) {
    const int64_t rows = g.heads / g.kv_heads * head_rows;
    dq_stride = round_up(g.width, kCols);
    dv_stride = round_up(g.value_width, kCols);
    keys = pieces.take<P>(kKeyTile * round_up(g.width, kStep));
    values = pieces.take<P>(kKeyTile * round_up(g.value_width, kStep));
    dq = pieces.take<A>(rows * dq_stride);
    dk = pieces.take<A>(kKeyTile * dq_stride);
    dv = pieces.take<A>(kKeyTile * dv_stride);
    stats = pieces.take<A>(2 * rows);
    delta = pieces.take<A>(rows);
    p = pieces.take<A>(kQueryTile * kKeyTile);
    ds = pieces.take<A>(kQueryTile * kKeyTile);
    bias = pieces.take<A>(kKeyTile);
    keep = pieces.take<A>(kKeyTile);
    panels = pieces.take<A>(2 * kTileCols<A> * g.value_width);
    if constexpr (kStep == 1) {
      p_left = p;
      ds_left = ds_right = ds;
    } else {
      p_left = pieces.take<P>(kQueryTile * kKeyTile);
      ds_left = pieces.take<P>(kQueryTile * kKeyTile);
      ds_right = pieces.take<P>(kQueryTile * kKeyTile);
    }
  }

  void multiply_scores(const AttentionShape& g, int64_t row, int64_t rows, int64_t n) {
    const int64_t steps = round_up(g.width, kStep);
    multiply<P>({q.left + row * q.left_stride, q.left_stride, kStep, keys, steps * kCols, steps, p, kKeyTile, false,
                 nullptr, static_cast<A>(g.scale)},
                rows, n);
  }

  void multiply_values(const AttentionShape& g, int64_t row, int64_t rows, int64_t n) {
    const int64_t steps = round_up(g.value_width, kStep);
    multiply<P>({dout.left + row * dout.left_stride, dout.left_stride, kStep, values, steps * kCols, steps, ds,
                 kKeyTile, false, nullptr, A(1)},
                rows, n);
  }

  // Scores and dP become the (dropped) probabilities and dS.
  __attribute__((noinline)) void differentiate(const AttentionShape& g, int64_t batch, const TileRows& rows,
                                               int64_t row0, int64_t key, int64_t n) {
    for (int64_t r = 0; r < rows.count; ++r) {
      A* p_row = p + r * kKeyTile;
      A* ds_row = ds + r * kKeyTile;
      const A* row_stats = stats + 2 * (row0 + r);
      const V largest = V::set1(row_stats[0]), factor = V::set1(row_stats[1]), row_delta = V::set1(delta[row0 + r]);
      if (g.dropout.active)
        dropout_keep(keep, n, g.dropout.seed, static_cast<uint32_t>(batch), static_cast<uint32_t>(rows.rows[r].head),
                     rows.rows[r].query, key, g.dropout.threshold, static_cast<A>(g.dropout.scale));
      for (int64_t i = 0; i < n; i += V::kWidth) {
        const V probability = exp(V::load(p_row + i) - largest) * factor;
        const V kept = g.dropout.active ? V::load(keep + i) : V::set1(1);
        const V dp = V::load(ds_row + i) * kept;
        (probability * kept).store(p_row + i);
        (probability * (dp - row_delta)).store(ds_row + i);
      }
    }
    if constexpr (kStep == 2) convert(rows.count, n);
  }

#if defined(__AVX512BF16__)
  void convert(int64_t rows, int64_t n) {
    for (int64_t r = 0; r < rows; r += 2) {
      const bool paired = r + 1 < rows;
      const A *p_row = p + r * kKeyTile, *ds_row = ds + r * kKeyTile;
      for (int64_t i = 0; i < n; i += V::kWidth) {
        const V ds_even = V::load(ds_row + i), ds_odd = paired ? V::load(ds_row + kKeyTile + i) : V::zero();
        const V p_odd = paired ? V::load(p_row + kKeyTile + i) : V::zero();
        store_operand_pair(V::load(p_row + i), p_odd, p_left + r * kKeyTile + 2 * i);
        store_operand_pair(ds_even, ds_odd, ds_left + r * kKeyTile + 2 * i);
        store_operand(ds_even, ds_right + r * kKeyTile + i);
        if (paired) store_operand(ds_odd, ds_right + (r + 1) * kKeyTile + i);
      }
    }
  }
#else
  void convert(int64_t, int64_t) {}
#endif

  void multiply_outputs(const AttentionShape& g, int64_t row, int64_t rows, int64_t n) {
    const int64_t row_steps = round_up(rows, kStep);
    multiply<P>({p_left, kStep, kKeyTile * kStep, dout.right + row * kCols, dout.pitch * kCols, row_steps, dv,
                 dv_stride, true, nullptr, A(1)},
                n, g.value_width);
    multiply<P>({ds_left, kStep, kKeyTile * kStep, q.right + row * kCols, q.pitch * kCols, row_steps, dk, dq_stride,
                 true, nullptr, A(1)},
                n, g.width);
    multiply<P>({ds_right, kKeyTile, kStep, k.right, k.pitch * kCols, round_up(n, kStep), dq + row * dq_stride,
                 dq_stride, true, nullptr, A(1)},
                rows, g.width);
  }
};

// Items are (sequence, kv head).
template <class T>
struct AttentionBwdKernel {
  using A = accum_t<T>;
  using V = Vec<A>;
  using P = typename Packed<T>::type;

  static Plan plan(const AttentionBwd& g) {
    const AttentionShape& shape = g.shape;
    if (shape.kv_heads == 0 || shape.heads == 0) return {0, 1, 0, false};
    const int64_t rows = shape.queries * (shape.heads / shape.kv_heads);
    const int64_t work = (rows + 1) * (shape.keys + 1) * (shape.width + shape.value_width + 1);
    ScratchPieces pieces{nullptr};
    const KeyTile<P> tile(shape, pieces);
    return {shape.batch * shape.kv_heads, max_of(1, (int64_t{1} << 17) / work), pieces.used, true};
  }

  static void run(const AttentionBwd& g, void* base, int64_t begin, int64_t end) {
    ScratchPieces pieces{static_cast<char*>(base)};
    KeyTile<P> tile(g.shape, pieces);
    for (int64_t item = begin; item < end; ++item)
      run_item(g, sequence_of(g.shape, item / g.shape.kv_heads), item % g.shape.kv_heads, tile);
  }

  static void run_item(const AttentionBwd& g, const Sequence& sequence, int64_t kv_head, KeyTile<P>& tile) {
    const AttentionShape& shape = g.shape;
    const int64_t group = shape.heads / shape.kv_heads;
    const A scale = static_cast<A>(shape.scale);
    for (int64_t i = 0; i < group; ++i) load_queries(g, sequence, kv_head * group + i, i * tile.head_rows, tile);
    for (int64_t key = 0; key < sequence.keys; key += kKeyTile) {
      const int64_t n = min_of(kKeyTile, sequence.keys - key);
      load_keys(g, sequence, kv_head, key, n, tile);
      for (int64_t i = 0; i < group; ++i)
        for (int64_t query = 0; query < sequence.queries; query += kQueryTile)
          run_tile(g, sequence, kv_head * group + i, query, i * tile.head_rows + query, key, tile);
      store(first_row<T>(g.dk, g.dk_strides, shape, sequence.batch, kv_head, sequence.first_key + key), g.dk_strides.t,
            tile.dk, tile.dq_stride, n, shape.width, scale);
      store(first_row<T>(g.dv, g.dv_strides, shape, sequence.batch, kv_head, sequence.first_key + key), g.dv_strides.t,
            tile.dv, tile.dv_stride, n, shape.value_width, A(1));
    }
    for (int64_t i = 0; i < group; ++i)
      store(first_row<T>(g.dq, g.dq_strides, shape, sequence.batch, kv_head * group + i, sequence.first_query),
            g.dq_strides.t, tile.dq + i * tile.head_rows * tile.dq_stride, tile.dq_stride, sequence.queries,
            shape.width, scale);
    if (shape.cu_keys == nullptr) clear_padding(g, sequence, kv_head);
  }

  static void load_queries(const AttentionBwd& g, const Sequence& sequence, int64_t head, int64_t to,
                           KeyTile<P>& tile) {
    const AttentionShape& shape = g.shape;
    const T* q = first_row<T>(g.q, g.q_strides, shape, sequence.batch, head, sequence.first_query);
    const T* dout = first_row<T>(g.dout, g.dout_strides, shape, sequence.batch, head, sequence.first_query);
    const T* out = first_row<T>(g.out, g.out_strides, shape, sequence.batch, head, sequence.first_query);
    tile.q.pack(q, g.q_strides.t, sequence.queries, to);
    tile.dout.pack(dout, g.dout_strides.t, sequence.queries, to);
    memset(tile.dq + to * tile.dq_stride, 0, sizeof(A) * sequence.queries * tile.dq_stride);
    sum_products(dout, g.dout_strides.t, out, g.out_strides.t, sequence.queries, shape.value_width, tile.panels,
                 tile.delta + to);
    for (int64_t query = 0; query < sequence.queries; ++query) {
      const int64_t at = lse_index(shape, sequence, head, query);
      memcpy(tile.stats + 2 * (to + query), static_cast<const A*>(g.stats) + 2 * at, 2 * sizeof(A));
      // The gradient of lse is P, so what reaches lse by another way joins delta.
      if (g.dlse != nullptr) tile.delta[to + query] -= static_cast<const A*>(g.dlse)[at];
    }
  }

  // delta, summed in the order of dP's product: a row that sees one key has dP = delta, and dS is exactly zero.
  static void sum_products(const T* dout, int64_t dout_stride, const T* out, int64_t out_stride, int64_t rows,
                           int64_t width, A* panels, A* delta) {
    constexpr int64_t kCols = kTileCols<A>;
    constexpr int64_t kBlock = V::kWidth == 1 ? kUnfusedBlock : INT64_MAX;
    A* out_panel = panels + kCols * width;
    for (int64_t row = 0; row < rows; row += kCols) {
      const int64_t columns = min_of(kCols, rows - row);
      pack_transposed(dout + row * dout_stride, dout_stride, columns, width, panels);
      pack_transposed(out + row * out_stride, out_stride, columns, width, out_panel);
      for (int64_t i = 0; i < columns; i += V::kWidth) {
        V total = V::zero(), part = V::zero();
        for (int64_t k = 0; k < width; ++k) {
          part = fma(V::load(panels + k * kCols + i), V::load(out_panel + k * kCols + i), part);
          if ((k + 1) % kBlock == 0) {
            total = total + part;
            part = V::zero();
          }
        }
        store_lanes(delta + row + i, total + part, static_cast<int>(min_of(V::kWidth, columns - i)));
      }
    }
  }

  static void load_keys(const AttentionBwd& g, const Sequence& sequence, int64_t kv_head, int64_t key, int64_t n,
                        KeyTile<P>& tile) {
    const AttentionShape& shape = g.shape;
    const T* k = first_row<T>(g.k, g.k_strides, shape, sequence.batch, kv_head, sequence.first_key + key);
    const T* v = first_row<T>(g.v, g.v_strides, shape, sequence.batch, kv_head, sequence.first_key + key);
    constexpr int64_t kStep = Packed<P>::kStep, kCols = kTileCols<P>;
    for (int64_t i = 0; i < n; i += kCols) {
      const int64_t columns = min_of(kCols, n - i);
      pack_transposed(k + i * g.k_strides.t, g.k_strides.t, columns, shape.width,
                      tile.keys + i * round_up(shape.width, kStep));
      pack_transposed(v + i * g.v_strides.t, g.v_strides.t, columns, shape.value_width,
                      tile.values + i * round_up(shape.value_width, kStep));
    }
    pack_rows(k, g.k_strides.t, n, shape.width, tile.k.right, tile.k.pitch * kCols);
    memset(tile.dk, 0, sizeof(A) * n * tile.dq_stride);
    memset(tile.dv, 0, sizeof(A) * n * tile.dv_stride);
  }

  // Queries from `query` on, at `row` of the scratch, against the tile of keys from `key` on.
  static void run_tile(const AttentionBwd& g, const Sequence& sequence, int64_t head, int64_t query, int64_t row,
                       int64_t key, KeyTile<P>& tile) {
    const AttentionShape& shape = g.shape;
    TileRows rows;
    for (int64_t i = query; i < min_of(sequence.queries, query + kQueryTile); ++i)
      rows.add(tile_row(shape, head, i, sequence.keys));
    if (rows.last <= key || rows.first >= key + kKeyTile) return;
    TileMask<T> mask(shape, rows, sequence.batch, key, min_of(kKeyTile, rows.last - key), tile.bias);
    const int64_t n = mask.n;
    if (n == 0) return;
    if (reads_keys_directly(shape, sequence.queries, sequence.keys)) {
      // As in the forward, to the bit: its numbers fit no other scores.
      const int64_t kv_head = head / (shape.heads / shape.kv_heads);
      const T* keys = first_row<T>(g.k, g.k_strides, shape, sequence.batch, kv_head, sequence.first_key + key);
      for (int64_t i = 0; i < rows.count; ++i)
        score_directly(tile.q.left + (row + i) * tile.q.left_stride, keys, g.k_strides.t, n, shape.width,
                       static_cast<A>(shape.scale), tile.p + i * kKeyTile);
    } else {
      tile.multiply_scores(shape, row, rows.count, n);
    }
    tile.multiply_values(shape, row, rows.count, n);
    mask.apply(tile.p, kKeyTile);
    tile.differentiate(shape, sequence.batch, rows, row, key, n);
    tile.multiply_outputs(shape, row, rows.count, n);
  }

  static void store(T* to, int64_t stride, const A* from, int64_t from_stride, int64_t rows, int64_t width,
                    A scale) {
    for (int64_t row = 0; row < rows; ++row) {
      for_vectors<V>(width, [&](int64_t i, int lanes) {
        store_lanes(to + row * stride + i, V::load(from + row * from_stride + i) * V::set1(scale), lanes);
      });
    }
  }

  // Keys beyond the sequence's length take no part.
  static void clear_padding(const AttentionBwd& g, const Sequence& sequence, int64_t kv_head) {
    T* dk = first_row<T>(g.dk, g.dk_strides, g.shape, sequence.batch, kv_head, 0);
    T* dv = first_row<T>(g.dv, g.dv_strides, g.shape, sequence.batch, kv_head, 0);
    for (int64_t key = sequence.keys; key < g.shape.keys; ++key) {
      memset(dk + key * g.dk_strides.t, 0, sizeof(T) * g.shape.width);
      memset(dv + key * g.dv_strides.t, 0, sizeof(T) * g.shape.value_width);
    }
  }
};
