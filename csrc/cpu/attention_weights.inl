// The weights that attention applies, and what their gradient is to its backward.
//
// With P and dropout's factors D as in attention_bwd.inl, W = D P, or its mean over the heads. P comes again from the
// scores and the forward's two numbers a row, so that the matrix of a head is never kept where only the mean is wanted.

// Calls of a block of queries against one tile of keys.
template <class T, class P>
struct WeightBlock {
  using A = accum_t<T>;
  using V = Vec<A>;
  using Backward = AttentionBwdOn<T, P>;
  using Tile = KeyTile<P>;
  static constexpr int64_t kBlock = 4 * Tile::kRows;  // queries: each tile of keys is packed once for so many

  ScratchPieces pieces;
  Tile tile;
  T* buffer;        // rows that are not side by side
  int64_t* places;  // (kBlock): of the block's queries

  WeightBlock(const AttentionShape& g, void* base) : pieces{static_cast<char*>(base)}, tile(g, pieces) {
    buffer = Tile::template take_buffer<T>(g, pieces);
    places = pieces.take<int64_t>(kBlock);
  }

  // Calls f(query, i, W, dW) for whole vectors of the keys from key + i on, for each query of [first, last); dW, where
  // there is one, is that of this head.
  template <class F>
  void for_weights(const AttentionBwd& g, const Sequence& sequence, int64_t head, int64_t first, int64_t last,
                   int64_t key, const F& f) {
    const int64_t kv_head = head / (g.shape.heads / g.shape.kv_heads);
    Backward::load_keys(g, sequence, kv_head, key, min_of(kKeys, sequence.keys.count - key), tile, buffer);
    for (int64_t i = first; i < last; ++i) places[i - first] = i;
    const Places queries = {last - first, places};
    const A* stats = static_cast<const A*>(g.stats) + 2 * lse_index(g.shape, sequence, head, 0);
    const Powers<P> power(tile.scale.exponent);
    for (int64_t from = 0; from < queries.count; from += Tile::kRows) {
      TileRows rows;
      const int64_t n = Backward::score_tile(g, sequence, queries, head, from, key, tile, buffer, rows);
      if (n == 0) continue;
      for (int64_t r = 0; r < rows.count; ++r) {
        const int64_t query = rows.rows[r].query;
        const V shift = power.shift(V::set1(stats[2 * query])), factor = V::set1(stats[2 * query + 1]);
        if (g.shape.dropout.active)
          keep_keys(g.shape, sequence, rows.rows[r], key, round_up(n, kKeyStep<P>), tile.keep);
        for (int64_t i = 0; i < n; i += V::kWidth) {
          V weight = power(V::load(tile.p + r * kKeys + i), shift) * factor;
          if (g.shape.dropout.active) weight = weight * V::load(tile.keep + i);
          f(query, i, weight, V::load(tile.ds + r * kKeys + i));
        }
      }
    }
  }
};

// An item owns a block of the result: the heads are added in their order.
template <class T, class P>
struct AttentionWeightsFwdOn {
  using A = accum_t<T>;
  using V = Vec<A>;
  using Block = WeightBlock<T, P>;
  using Backward = AttentionBwdOn<T, P>;

  struct Scratch : Block {
    A* sum;  // (kBlock, kKeys)
    Scratch(const AttentionWeightsFwd& g, void* base)
        : Block(g.shape, base), sum(this->pieces.template take<A>(Block::kBlock * kKeys)) {}
  };

  static int64_t query_blocks(const AttentionShape& g) { return ceil_div(g.queries, Block::kBlock); }
  static int64_t key_blocks(const AttentionShape& g) { return ceil_div(g.keys, kKeys); }

  static Plan plan(const AttentionWeightsFwd& g) {
    const AttentionShape& shape = g.shape;
    const int64_t together = g.averages ? shape.heads : 1;
    const int64_t items = shape.batch * shape.heads / max_of(1, together) * query_blocks(shape) * key_blocks(shape);
    const int64_t work = together * (min_of(shape.queries, Block::kBlock) + 1) * kKeys * (shape.width + 1);
    return {items, max_of(1, (int64_t{1} << 17) / max_of(1, work)), Scratch(g, nullptr).pieces.used, true};
  }

#if defined(__AMX_BF16__)
  static bool splits(const AttentionWeightsFwd& g, int64_t item) {
    const AttentionShape& shape = g.shape;
    const int64_t outer = item / key_blocks(shape) / query_blocks(shape), group = shape.heads / shape.kv_heads;
    const Sequence sequence = sequence_of(shape, g.averages ? outer : outer / shape.heads);
    const int64_t first = g.averages ? 0 : outer % shape.heads / group, last = g.averages ? shape.kv_heads : first + 1;
    for (int64_t kv_head = first; kv_head < last; ++kv_head)
      if (!splits_pair<T>(g, sequence, kv_head)) return false;
    return true;
  }
#endif

  static void run(const AttentionWeightsFwd& g, void* base, int64_t begin, int64_t end) {
    const AttentionShape& shape = g.shape;
    Scratch scratch(g, base);
    const FlushesSubnormals<P> flushes;
    ProductUnit<P> unit;
    scratch.tile.unit = &unit;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t key = item % key_blocks(shape) * kKeys, outer = item / key_blocks(shape) / query_blocks(shape);
      const int64_t first = item / key_blocks(shape) % query_blocks(shape) * Block::kBlock;
      const int64_t last = min_of(shape.queries, first + Block::kBlock);
      const Sequence sequence = sequence_of(shape, g.averages ? outer : outer / shape.heads);
      const int64_t head = g.averages ? 0 : outer % shape.heads;
      memset(scratch.sum, 0, sizeof(A) * (last - first) * kKeys);
      for (int64_t h = head; h < (g.averages ? shape.heads : head + 1) && key < sequence.keys.count; ++h)
        scratch.for_weights(g, sequence, h, first, last, key, [&](int64_t query, int64_t i, V weight, V) {
          A* to = scratch.sum + (query - first) * kKeys + i;
          (V::load(to) + weight).store(to);
        });
      for (int64_t query = first; query < last; ++query)
        store(g, sequence.keys, key, scratch.sum + (query - first) * kKeys,
              static_cast<T*>(g.weights) + (outer * shape.queries + query) * shape.keys);
    }
  }

  // A row's weights of the block of keys, and zeros at the keys before and between them that take no part: those after
  // are the next block's.
  static void store(const AttentionWeightsFwd& g, const Places& keys, int64_t key, const A* sum, T* to) {
    const V share = V::set1(g.averages ? A(1) / static_cast<A>(g.shape.heads) : A(1));
    const int64_t n = max_of(0, min_of(kKeys, keys.count - key));
    if (n == 0 && key > 0) return;
    const int64_t begin = key == 0 ? 0 : keys[key], end = key + n < keys.count ? keys[key + n] : g.shape.keys;
    if (end - begin > n) memset(to + begin, 0, sizeof(T) * (end - begin));
    if (n == 0) return;
    if (keys.adjoin(key, n)) {
      for_vectors<V>(n, [&](int64_t i, int lanes) {
        store_lanes(to + keys[key] + i, V::load(sum + i) * share, lanes);
      });
    } else {
      for (int64_t i = 0; i < n; ++i) (V::set1(sum[i]) * share).store(to + keys[key + i], 1);
    }
  }
};

// Items are (sequence, head, block of queries).
template <class T, class P>
struct AttentionWeightsBwdOn {
  using A = accum_t<T>;
  using V = Vec<A>;
  using Block = WeightBlock<T, P>;
  using Backward = AttentionBwdOn<T, P>;

  struct Scratch : Block {
    A* sum;  // (kBlock, kWidth)
    Scratch(const AttentionWeightsBwd& g, void* base)
        : Block(g.shape, base), sum(this->pieces.template take<A>(Block::kBlock * V::kWidth)) {}
  };

  static int64_t query_blocks(const AttentionShape& g) { return ceil_div(g.queries, Block::kBlock); }

  static Plan plan(const AttentionWeightsBwd& g) {
    const AttentionShape& shape = g.shape;
    const int64_t work = (min_of(shape.queries, Block::kBlock) + 1) * (shape.keys + 1) * (shape.width + 1);
    return {shape.batch * shape.heads * query_blocks(shape), max_of(1, (int64_t{1} << 17) / work),
            Scratch(g, nullptr).pieces.used, true};
  }

#if defined(__AMX_BF16__)
  static bool splits(const AttentionWeightsBwd& g, int64_t item) {
    const AttentionShape& shape = g.shape;
    const int64_t pair = item / query_blocks(shape);
    return Backward::splits_gradients(g, sequence_of(shape, pair / shape.heads),
                                      pair % shape.heads / (shape.heads / shape.kv_heads));
  }
#endif

  static void run(const AttentionWeightsBwd& g, void* base, int64_t begin, int64_t end) {
    const AttentionShape& shape = g.shape;
    Scratch scratch(g, base);
    const FlushesSubnormals<P> flushes;
    ProductUnit<P> unit;
    scratch.tile.unit = &unit;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % query_blocks(shape) * Block::kBlock, pair = item / query_blocks(shape);
      const int64_t last = min_of(shape.queries, first + Block::kBlock), head = pair % shape.heads;
      const Sequence sequence = sequence_of(shape, pair / shape.heads);
      memset(scratch.sum, 0, sizeof(A) * (last - first) * V::kWidth);
      for (int64_t key = 0; key < sequence.keys.count; key += kKeys)
        scratch.for_weights(g, sequence, head, first, last, key, [&](int64_t query, int64_t, V weight, V slope) {
          A* to = scratch.sum + (query - first) * V::kWidth;
          fma(weight, slope, V::load(to)).store(to);
        });
      const int64_t at = lse_index(shape, sequence, head, 0);
      A* total = static_cast<A*>(g.dlse_total) + at;
      for (int64_t query = first; query < last; ++query) {
        const A sum = reduce_add(V::load(scratch.sum + (query - first) * V::kWidth));
        total[query] = (g.dlse == nullptr ? A(0) : static_cast<const A*>(g.dlse)[at + query]) - sum;
      }
    }
  }
};
template <class T>
using AttentionWeightsFwdKernel = OnOperands<AttentionWeightsFwdOn, T>;
template <class T>
using AttentionWeightsBwdKernel = OnOperands<AttentionWeightsBwdOn, T>;
