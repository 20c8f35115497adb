// dQ from the chunks' shares, in their order. Items are (sequence, head, block of queries).
template <class T>
struct AttentionDqKernel {
  using A = accum_t<T>;
  using V = Vec<A>;
  static constexpr int64_t kBlock = 64;

  static Plan plan(const AttentionBwd& g) {
    if (g.shape.kv_heads == 0) return {0, 1, 0, false};
    const int64_t heads = pair_count(g.shape) * (g.shape.heads / g.shape.kv_heads);
    return {heads * ceil_div(g.shape.queries, kBlock), 1, 0, false};
  }

  static void run(const AttentionBwd& g, void*, int64_t begin, int64_t end) {
    const AttentionShape& shape = g.shape;
    const QueryGradient<T> gradient(shape);
    const int64_t blocks = ceil_div(shape.queries, kBlock), group = shape.heads / shape.kv_heads;
    const V scale = V::set1(static_cast<A>(shape.scale));
    for (int64_t item = begin; item < end; ++item) {
      const int64_t pair = item / blocks / group, head = item / blocks % group;
      const Sequence sequence = sequence_of(shape, (pair + shape.first_pair) / shape.kv_heads);
      const int64_t chunks = key_chunks(sequence.keys.count);
      const QueryShares<T> partial(shape, g.dq_partial, pair);
      const Places live = {partial.live[0], partial.live + 1};
      T* dq = first_row<T>(g.dq, g.dq_strides, shape, sequence.batch,
                           (pair + shape.first_pair) % shape.kv_heads * group + head, sequence.first_query);
      const int64_t first = item % blocks * kBlock;
      if (first == 0) clear_others(dq, g.dq_strides.t, live, sequence.queries, shape.width);
      for (int64_t query = first; query < min_of(live.count, first + kBlock); ++query) {
        const A* shares = partial.shares + (head * gradient.head_rows + query) * gradient.stride;
        for_vectors<V>(shape.width, [&](int64_t i, int lanes) {
          V sum = V::load(shares + i);
          for (int64_t chunk = 1; chunk < chunks; ++chunk) sum = sum + V::load(shares + i + chunk * gradient.size);
          store_lanes(dq + live[query] * g.dq_strides.t + i, sum * scale, lanes);
        });
      }
    }
  }
};
