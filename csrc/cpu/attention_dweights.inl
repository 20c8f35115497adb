// The gradient of the weights that attention applied (attention_weights.inl), as its backward reads it.

template <class T>
struct WeightGradients {
  using A = accum_t<T>;
  using V = Vec<A>;

  // A query's, in one head or in the mean over them: one for each key.
  static const T* row(const AttentionBwd& g, const Sequence& sequence, int64_t head, int64_t query) {
    const int64_t outer = g.averages ? sequence.batch : sequence.batch * g.shape.heads + head;
    return static_cast<const T*>(g.dweights) + (outer * g.shape.queries + query) * g.shape.keys;
  }

  // Whether a query has one at a key that takes part.
  static bool reach(const AttentionBwd& g, const Sequence& sequence, int64_t head, int64_t query) {
    const T* from = row(g, sequence, head, query);
    const Places& keys = sequence.keys;
    if (keys.count > 0 && keys.adjoin(0, keys.count)) return !is_zero(from + keys[0], keys.count);
    for (int64_t i = 0; i < keys.count; ++i)
      if (!is_zero(from + keys[i], 1)) return true;
    return false;
  }

  // Adds those of n keys to dP, rows `stride` apart; without dO, they are all of it. `buffer` has room for n.
  static void add(const AttentionBwd& g, const Sequence& sequence, const TileRows& rows, int64_t key, int64_t n,
                  T* buffer, A* dp, int64_t stride) {
    const V share = V::set1(g.averages ? A(1) / static_cast<A>(g.shape.heads) : A(1));
    const bool adjoin = sequence.keys.adjoin(key, n);
    for (int64_t r = 0; r < rows.count; ++r) {
      const T* from = row(g, sequence, rows.rows[r].head, rows.rows[r].query);
      for (int64_t i = 0; i < n && !adjoin; ++i) buffer[i] = from[sequence.keys[key + i]];
      from = adjoin ? from + sequence.keys[key] : buffer;
      A* to = dp + r * stride;
      for_vectors<V>(n, [&](int64_t i, int lanes) {
        const V added = load_lanes<V>(from + i, lanes) * share;
        (g.dout == nullptr ? added : V::load(to + i) + added).store(to + i);
      });
    }
  }
};
