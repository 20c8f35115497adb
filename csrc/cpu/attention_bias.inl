// The gradient of attention's additive mask: dS of attention_bwd.inl, rounded once, after it is summed over the axes
// that the mask has once for all.
//
// An item owns a block of the gradient, and meets all that is added to it itself, in order: sequences, heads, keys,
// queries. So many values are added one by one that their rounding errors are carried along: the sum is as if it were
// rounded once, and what adds zeros, such as padding, changes no bit of it.

// Adds x; what rounding leaves out of the sum goes to the error: Knuth's TwoSum (The Art of Computer Programming,
// volume 2, 4.2.2).
template <class X>
static FASTTX_INLINE void add_exactly(X x, X& sum, X& error) {
  const X total = sum + x, added = total - sum;
  error = error + ((sum - (total - added)) + (x - added));
  sum = total;
}
// A vector of such sums.
template <class A>
static FASTTX_INLINE void add_exactly(Vec<A> x, A* sums, A* errors) {
  Vec<A> sum = Vec<A>::load(sums), error = Vec<A>::load(errors);
  add_exactly(x, sum, error);
  sum.store(sums);
  error.store(errors);
}
// The sum of `count` such sums.
template <class A>
static A total_of(const A* sum, const A* error, int64_t count) {
  A total = 0, rest = 0;
  for (int64_t i = 0; i < count; ++i) {
    add_exactly(sum[i], total, rest);
    rest += error[i];
  }
  return total + rest;
}

// Calls f(query, i, dS) for vectors of the n keys from key + i on, of one tile whose scores and dP are there.
template <class T, class P, class F>
static FASTTX_INLINE void for_slopes(const AttentionBwd& g, const Sequence& sequence, const TileRows& rows,
                                     const KeyTile<P>& tile, const accum_t<T>* deltas,
                                     int64_t key, int64_t n, const F& f) {
  using A = accum_t<T>;
  using V = Vec<A>;
  const Powers<P> power(tile.scale.exponent);
  const A* stats = static_cast<const A*>(g.stats) + 2 * lse_index(g.shape, sequence, rows.rows[0].head, 0);
  for (int64_t r = 0; r < rows.count; ++r) {
    const int64_t query = rows.rows[r].query;
    const V shift = power.shift(V::set1(stats[2 * query])), factor = V::set1(stats[2 * query + 1]);
    const V delta = V::set1(deltas[query]);
    if (g.shape.dropout.active)
      keep_keys(g.shape, sequence, rows.rows[r], key, round_up(n, kKeyStep<P>), tile.keep);
    for (int64_t i = 0; i < n; i += V::kWidth) {
      const V probability = power(V::load(tile.p + r * kKeys + i), shift) * factor;
      V dp = V::load(tile.ds + r * kKeys + i);
      if (g.shape.dropout.active) dp = dp * V::load(tile.keep + i);
      f(query, i, probability * (dp - delta));
    }
  }
}

template <class T, class P>
struct AttentionBiasBwdOn {
  using A = accum_t<T>;
  using V = Vec<A>;
  using Backward = AttentionBwdOn<T, P>;
  using Tile = KeyTile<P>;
  // Queries of one block: each tile of keys is packed once for so many.
  static constexpr int64_t kBlock = 4 * Tile::kRows;

  // Where the items lie, and what one of them sums: a row of sums serves all queries of a mask that has one, and
  // a row's one vector all keys.
  struct Blocks {
    int64_t queries, keys;  // blocks along each axis
    int64_t rows, columns;  // sums of one block
    explicit Blocks(const AttentionBiasBwd& g)
        : queries(g.mask_queries == 1 ? 1 : ceil_div(g.mask_queries, kBlock)),
          keys(g.mask_keys == 1 ? 1 : ceil_div(g.mask_keys, kKeys)),
          rows(min_of(g.mask_queries, kBlock)),
          columns(g.mask_keys == 1 ? V::kWidth : kKeys) {}
  };

  struct Scratch {
    ScratchPieces pieces;
    Tile tile;
    T* buffer;       // rows that are not side by side
    int64_t* live;   // (queries): places of those that take part
    A* delta;        // (queries)
    A *sum, *error;  // (rows, columns) of Blocks: what was added, and what rounding left out of it
    Scratch(const AttentionBiasBwd& g, void* base) : pieces{static_cast<char*>(base)}, tile(g.shape, pieces) {
      const Blocks blocks(g);
      buffer = Tile::template take_buffer<T>(g.shape, pieces);
      live = pieces.take<int64_t>(g.shape.queries);
      delta = pieces.take<A>(g.shape.queries);
      sum = pieces.take<A>(blocks.rows * blocks.columns);
      error = pieces.take<A>(blocks.rows * blocks.columns);
    }
  };

  static Plan plan(const AttentionBiasBwd& g) {
    const AttentionShape& shape = g.shape;
    const Blocks blocks(g);
    const int64_t items = g.mask_batch * g.mask_heads * blocks.queries * blocks.keys;
    const int64_t pairs = shape.batch * shape.heads / max_of(1, g.mask_batch * g.mask_heads);
    const int64_t work = (pairs + 1) * (shape.queries / max_of(1, blocks.queries) + 1) *
                         (shape.keys / max_of(1, blocks.keys) + 1) * (shape.width + shape.value_width + 1);
    return {items, max_of(1, (int64_t{1} << 17) / work), Scratch(g, nullptr).pieces.used, true};
  }

#if defined(__AMX_BF16__)
  // Every head that the item sums.
  static bool splits(const AttentionBiasBwd& g, int64_t item) {
    const AttentionShape& shape = g.shape;
    const Blocks blocks(g);
    const int64_t outer = item / blocks.keys / blocks.queries, group = shape.heads / shape.kv_heads;
    const int64_t batch = outer / g.mask_heads, head = outer % g.mask_heads / group;
    const bool every_batch = g.mask_batch == 1, every_head = g.mask_heads == 1;
    for (int64_t b = every_batch ? 0 : batch; b < (every_batch ? shape.batch : batch + 1); ++b)
      for (int64_t h = every_head ? 0 : head; h < (every_head ? shape.kv_heads : head + 1); ++h)
        if (!Backward::splits_gradients(g, sequence_of(shape, b), h)) return false;
    return true;
  }
#endif

  static void run(const AttentionBiasBwd& g, void* base, int64_t begin, int64_t end) {
    const AttentionShape& shape = g.shape;
    const Blocks blocks(g);
    Scratch scratch(g, base);
    const FlushesSubnormals<P> flushes;
    ProductUnit<P> unit;
    scratch.tile.unit = &unit;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t key = item % blocks.keys * kKeys, query = item / blocks.keys % blocks.queries * kBlock;
      const int64_t outer = item / blocks.keys / blocks.queries;
      const int64_t mask_batch = outer / g.mask_heads, mask_head = outer % g.mask_heads;
      memset(scratch.sum, 0, sizeof(A) * blocks.rows * blocks.columns);
      memset(scratch.error, 0, sizeof(A) * blocks.rows * blocks.columns);
      const bool every_batch = g.mask_batch == 1, every_head = g.mask_heads == 1;
      for (int64_t b = every_batch ? 0 : mask_batch; b < (every_batch ? shape.batch : mask_batch + 1); ++b)
        for (int64_t h = every_head ? 0 : mask_head; h < (every_head ? shape.heads : mask_head + 1); ++h)
          add_head(g, sequence_of(shape, b), h, query, key, scratch);
      store(g, outer, query, key, scratch);
    }
  }

  // Adds one head's dS of the block that begins at this query and key.
  static void add_head(const AttentionBiasBwd& g, const Sequence& sequence, int64_t head, int64_t query, int64_t key,
                       Scratch& scratch) {
    const AttentionShape& shape = g.shape;
    const int64_t last_query = g.mask_queries == 1 ? shape.queries : min_of(shape.queries, query + kBlock);
    const int64_t last_key = g.mask_keys == 1 ? sequence.keys.count : min_of(sequence.keys.count, key + kKeys);
    const int64_t kv_head = head / (shape.heads / shape.kv_heads);
    const Places live = {Backward::find_live(g, sequence, kv_head, query, last_query, scratch.live), scratch.live};
    if (live.count == 0) return;
    Backward::find_delta(g, sequence, head, query, last_query, scratch.tile.panels, scratch.delta);
    for (; key < last_key; key += kKeys) {
      Backward::load_keys(g, sequence, kv_head, key, min_of(kKeys, last_key - key), scratch.tile, scratch.buffer);
      for (int64_t i = 0; i < live.count; i += Tile::kRows) {
        TileRows rows;
        const int64_t n =
            Backward::score_tile(g, sequence, live, head, i, key, scratch.tile, scratch.buffer, rows);
        if (n > 0) add_tile(g, sequence, rows, query, key, n, scratch);
      }
    }
  }

  // Adds dS of one tile, whose scores and dP are there.
  __attribute__((noinline)) static void add_tile(const AttentionBiasBwd& g, const Sequence& sequence,
                                                 const TileRows& rows, int64_t first_query, int64_t key, int64_t n,
                                                 Scratch& scratch) {
    const Blocks blocks(g);
    for_slopes<T>(g, sequence, rows, scratch.tile, scratch.delta, key, n, [&](int64_t query, int64_t i, V slope) {
      const int64_t at =
          (g.mask_queries == 1 ? 0 : (query - first_query) * blocks.columns) + (g.mask_keys == 1 ? 0 : i);
      add_exactly(slope, scratch.sum + at, scratch.error + at);
    });
  }

  static void store(const AttentionBiasBwd& g, int64_t outer, int64_t query, int64_t key, Scratch& scratch) {
    if (g.shape.mask.wide) {
      store(static_cast<A*>(g.dmask), g, outer, query, key, scratch);
    } else {
      store(static_cast<T*>(g.dmask), g, outer, query, key, scratch);
    }
  }
  template <class S>
  static void store(S* dmask, const AttentionBiasBwd& g, int64_t outer, int64_t query, int64_t key, Scratch& scratch) {
    const Blocks blocks(g);
    for (int64_t r = 0; r < min_of(blocks.rows, g.mask_queries - query); ++r) {
      S* to = dmask + (outer * g.mask_queries + query + r) * g.mask_keys + key;
      const A *sum = scratch.sum + r * blocks.columns, *error = scratch.error + r * blocks.columns;
      if (g.mask_keys == 1) {
        store_lanes(to, V::set1(total_of(sum, error, V::kWidth)), 1);
      } else {
        for_vectors<V>(min_of(kKeys, g.mask_keys - key), [&](int64_t i, int lanes) {
          store_lanes(to + i, V::load(sum + i) + V::load(error + i), lanes);
        });
      }
    }
  }
};
template <class T>
using AttentionBiasBwdKernel = OnOperands<AttentionBiasBwdOn, T>;
