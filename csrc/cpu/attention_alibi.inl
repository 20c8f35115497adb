// The gradient of attention's ALiBi slopes: the sum of dS (attention_bwd.inl) times minus the distance between query and
// key. So many values are added one by one that their rounding errors are carried along, as in attention_bias.inl.

// Items are (sequence, head).
template <class T, class P>
struct AttentionAlibiBwdOn {
  using A = accum_t<T>;
  using V = Vec<A>;
  using Backward = AttentionBwdOn<T, P>;
  using Tile = KeyTile<P>;

  struct Scratch {
    ScratchPieces pieces;
    Tile tile;
    T* buffer;       // rows that are not side by side
    int64_t* live;   // (queries): places of those that take part
    A* delta;        // (queries)
    A *sum, *error;  // (kKeys): what was added, and what rounding left out of it
    Scratch(const AttentionAlibiBwd& g, void* base) : pieces{static_cast<char*>(base)}, tile(g.shape, pieces) {
      buffer = Tile::template take_buffer<T>(g.shape, pieces);
      live = pieces.take<int64_t>(g.shape.queries);
      delta = pieces.take<A>(g.shape.queries);
      sum = pieces.take<A>(kKeys);
      error = pieces.take<A>(kKeys);
    }
  };

  static Plan plan(const AttentionAlibiBwd& g) {
    const AttentionShape& shape = g.shape;
    const int64_t work = (shape.queries + 1) * (shape.keys + 1) * (shape.width + shape.value_width + 1);
    return {shape.batch * shape.heads, max_of(1, (int64_t{1} << 17) / work), Scratch(g, nullptr).pieces.used, true};
  }

#if defined(__AMX_BF16__)
  static bool splits(const AttentionAlibiBwd& g, int64_t item) {
    return Backward::splits_gradients(g, sequence_of(g.shape, item / g.shape.heads),
                                      item % g.shape.heads / (g.shape.heads / g.shape.kv_heads));
  }
#endif

  static void run(const AttentionAlibiBwd& g, void* base, int64_t begin, int64_t end) {
    const AttentionShape& shape = g.shape;
    Scratch scratch(g, base);
    const FlushesSubnormals<P> flushes;
    ProductUnit<P> unit;
    scratch.tile.unit = &unit;
    for (int64_t item = begin; item < end; ++item) {
      memset(scratch.sum, 0, sizeof(A) * kKeys);
      memset(scratch.error, 0, sizeof(A) * kKeys);
      add_head(g, sequence_of(shape, item / shape.heads), item % shape.heads, scratch);
      static_cast<A*>(g.dslopes_partial)[item] = total_of(scratch.sum, scratch.error, kKeys);
    }
  }

  static void add_head(const AttentionAlibiBwd& g, const Sequence& sequence, int64_t head, Scratch& scratch) {
    const int64_t kv_head = head / (g.shape.heads / g.shape.kv_heads), keys = sequence.keys.count;
    const Places live = {Backward::find_live(g, sequence, kv_head, 0, sequence.queries, scratch.live), scratch.live};
    if (live.count == 0) return;
    Backward::find_delta(g, sequence, head, 0, sequence.queries, scratch.tile.panels, scratch.delta);
    for (int64_t key = 0; key < keys; key += kKeys) {
      Backward::load_keys(g, sequence, kv_head, key, min_of(kKeys, keys - key), scratch.tile, scratch.buffer);
      for (int64_t i = 0; i < live.count; i += Tile::kRows) {
        TileRows rows;
        const int64_t n = Backward::score_tile(g, sequence, live, head, i, key, scratch.tile, scratch.buffer, rows);
        if (n > 0) add_tile(g, sequence, rows, key, n, scratch);
      }
    }
  }

  // Adds one tile, whose scores and dP are there.
  __attribute__((noinline)) static void add_tile(const AttentionAlibiBwd& g, const Sequence& sequence,
                                                 const TileRows& rows, int64_t key, int64_t n, Scratch& scratch) {
    for_slopes<T>(g, sequence, rows, scratch.tile, scratch.delta, key, n, [&](int64_t query, int64_t i, V slope) {
      const V first = V::set1(static_cast<A>(sequence.keys[key] - query - g.shape.query_offset));
      const V distance = abs(first + steps_from<V>(sequence.keys, key, n, i));
      add_exactly(V::zero() - slope * distance, scratch.sum + i, scratch.error + i);
    });
  }
};
template <class T>
using AttentionAlibiBwdKernel = OnOperands<AttentionAlibiBwdOn, T>;
