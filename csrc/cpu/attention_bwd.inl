// Attention backward, tile by tile: the probabilities come again from the scores and the forward's two numbers a row.
//
// With P = exp(S - largest) / sum, S = scale Q K^T + bias, and delta = rowsum(dO O):
//   dV = P^T dO    dP = dO V^T    dS = P (dP - delta)    dQ = scale dS K    dK = scale dS^T Q
// and dropout multiplies P in dV, and dP, by its factors. A gradient of the weights themselves joins dP, and its part of
// delta comes as one of lse (attention_weights.inl). Every sum runs over the queries or keys in order; dQ's is the
// sum of those over chunks of keys, for threads to share a sequence. Queries that no gradient reaches take no part.

// Chunks of a sequence, and the keys of each but the last: of its own length alone.
constexpr int64_t kMostChunks = 4, kLeastKeys = 2 * kKeys;
static inline int64_t chunk_keys(int64_t keys) {
  return max_of(kLeastKeys, round_up(ceil_div(keys, kMostChunks), kKeys));
}
static inline int64_t key_chunks(int64_t keys) { return max_of(1, ceil_div(keys, chunk_keys(keys))); }
// The most chunks of any sequence that has so many keys or fewer: a shorter one may have more chunks.
static inline int64_t most_chunks(int64_t keys) { return max_of(1, min_of(kMostChunks, ceil_div(keys, kLeastKeys))); }

// dQ in the accumulate type, of the queries that take part: (heads of the group * head_rows, stride), one for all
// operands of T.
template <class T>
struct QueryGradient {
  using P = typename Packed<T>::type;
  int64_t head_rows, stride, size;
  explicit QueryGradient(const AttentionShape& g)
      : head_rows(round_up(g.queries, kProductRows<P>)),
        stride(round_up(g.width, kTileCols<P>)),
        size(g.heads / max_of(1, g.kv_heads) * head_rows * stride) {}
};
// A pair's part of dq_partial: its chunks' shares of dQ, and the queries that they are of, their number first.
template <class T>
struct QueryShares {
  accum_t<T>* shares;
  int64_t* live;
  QueryShares(const AttentionShape& g, ScratchPieces pieces)
      : shares(pieces.take<accum_t<T>>(most_chunks(g.keys) * QueryGradient<T>(g).size)),
        live(pieces.take<int64_t>(1 + g.queries)),
        bytes(pieces.used) {}
  QueryShares(const AttentionShape& g, void* dq_partial, int64_t pair)
      : QueryShares(g, ScratchPieces{static_cast<char*>(dq_partial) +
                                     pair * QueryShares(g, ScratchPieces{nullptr}).bytes}) {}
  size_t bytes;
};
template <class T>
static size_t attention_dq_bytes(const AttentionShape& g) {
  return most_chunks(g.keys) == 1 ? 0 : QueryShares<T>(g, ScratchPieces{nullptr}).bytes;
}

// Items are (sequence, kv head); with dq_partial, (sequence, kv head, chunk of keys).
template <class T, class P>
struct AttentionBwdOn {
  using A = accum_t<T>;
  using V = Vec<A>;

  struct Scratch {
    ScratchPieces pieces;
    KeyTile<P> tile;
    QueryGradient<T> gradient;
    T* buffer;      // rows that are not side by side
    int64_t* live;  // (queries): places of those that take part
    A* delta;       // (heads of the group, queries)
    A *dq, *part;   // QueryGradient: over all chunks, and over one of those after the first
    Scratch(const AttentionBwd& g, void* base)
        : pieces{static_cast<char*>(base)}, tile(g.shape, pieces), gradient(g.shape), dq(nullptr), part(nullptr) {
      buffer = KeyTile<P>::template take_buffer<T>(g.shape, pieces);
      live = pieces.take<int64_t>(g.shape.queries);
      delta = pieces.take<A>(g.shape.heads / g.shape.kv_heads * g.shape.queries);
      if (g.dq_partial != nullptr) return;
      dq = pieces.take<A>(gradient.size);
      if (most_chunks(g.shape.keys) > 1) part = pieces.take<A>(gradient.size);
    }
  };

  static Plan plan(const AttentionBwd& g) {
    const AttentionShape& shape = g.shape;
    if (shape.kv_heads == 0 || shape.heads == 0) return {0, 1, 0, false};
    const int64_t rows = shape.queries * (shape.heads / shape.kv_heads);
    const int64_t chunks = g.dq_partial != nullptr ? most_chunks(shape.keys) : 1;
    const int64_t work = (rows + 1) * (shape.keys / chunks + 1) * (shape.width + shape.value_width + 1);
    return {pair_count(shape) * chunks, max_of(1, (int64_t{1} << 17) / work), Scratch(g, nullptr).pieces.used, true};
  }

#if defined(FASTTX_SPLITS)
  static bool splits(const AttentionBwd& g, int64_t item) {
    const int64_t pair = item / (g.dq_partial != nullptr ? most_chunks(g.shape.keys) : 1) + g.shape.first_pair;
    return splits_gradients(g, sequence_of(g.shape, pair / g.shape.kv_heads), pair % g.shape.kv_heads);
  }
  // Whether this head's gradients are of products in parts: as the forward's scores, where dK's and dP's parts are
  // not lost either.
  static bool splits_gradients(const AttentionBwd& g, const Sequence& sequence, int64_t kv_head) {
    const AttentionShape& shape = g.shape;
    const int64_t group = shape.heads / shape.kv_heads;
    if (!splits_pair<T>(g, sequence, kv_head)) return false;
    const Places all = {sequence.queries, nullptr};
    Magnitude queries = {}, slopes = {};
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      queries.join(magnitude_of(queries_of<T>(shape, g.q, g.q_strides, sequence, head), all, 0, all.count,
                                shape.width));
      if (g.dout == nullptr) continue;
      slopes.join(magnitude_of(queries_of<T>(shape, g.dout, g.dout_strides, sequence, head), all, 0, all.count,
                               shape.value_width));
    }
    return !queries.is_tiny() && slopes.splits();
  }
#endif

  static void run(const AttentionBwd& g, void* base, int64_t begin, int64_t end) {
    Scratch scratch(g, base);
    const FlushesSubnormals<P> flushes;
    ProductUnit<P> unit;
    scratch.tile.unit = &unit;
    const AttentionShape& shape = g.shape;
    const int64_t most = g.dq_partial != nullptr ? most_chunks(shape.keys) : 1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t pair = item / most + shape.first_pair, kv_head = pair % shape.kv_heads;
      const Sequence sequence = sequence_of(shape, pair / shape.kv_heads);
      const int64_t chunks = key_chunks(sequence.keys.count), group = shape.heads / shape.kv_heads;
      if (item % most >= chunks) continue;
      const int64_t found = find_live(g, sequence, kv_head, 0, sequence.queries, scratch.live);
      const Places live = {found, found == sequence.queries ? nullptr : scratch.live};
      for (int64_t i = 0; i < group; ++i)
        find_delta(g, sequence, kv_head * group + i, 0, sequence.queries, scratch.tile.panels,
                   scratch.delta + i * shape.queries);
      if (g.dq_partial != nullptr) {
        const QueryShares<T> partial(shape, g.dq_partial, item / most);
        run_chunk(g, sequence, live, kv_head, item % most, scratch,
                  partial.shares + item % most * scratch.gradient.size);
        if (item % most == 0) {
          partial.live[0] = live.count;
          for (int64_t i = 0; i < live.count; ++i) partial.live[1 + i] = live[i];
        }
      } else {
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          A* dq = chunk == 0 ? scratch.dq : scratch.part;
          run_chunk(g, sequence, live, kv_head, chunk, scratch, dq);
          if (chunk == 0) continue;
          for (int64_t i = 0; i < scratch.gradient.size; i += V::kWidth)
            (V::load(scratch.dq + i) + V::load(dq + i)).store(scratch.dq + i);
        }
        for (int64_t i = 0; i < group; ++i) {
          T* dq = first_row<T>(g.dq, g.dq_strides, shape, sequence.batch, kv_head * group + i, sequence.first_query);
          clear_others(dq, g.dq_strides.t, live, sequence.queries, shape.width);
          store(dq, g.dq_strides.t, live, 0, live.count,
                scratch.dq + i * scratch.gradient.head_rows * scratch.gradient.stride, scratch.gradient.stride,
                shape.width, static_cast<A>(shape.scale));
        }
      }
      if (item % most == 0 && shape.cu_keys == nullptr) {
        clear_others(first_row<T>(g.dk, g.dk_strides, shape, sequence.batch, kv_head, 0), g.dk_strides.t, sequence.keys,
                     shape.keys, shape.width);
        clear_others(first_row<T>(g.dv, g.dv_strides, shape, sequence.batch, kv_head, 0), g.dv_strides.t, sequence.keys,
                     shape.keys, shape.value_width);
      }
    }
  }

  // The queries of [first, last) that a gradient reaches in any head of the group, and their number.
  static int64_t find_live(const AttentionBwd& g, const Sequence& sequence, int64_t kv_head, int64_t first,
                           int64_t last, int64_t* places) {
    const int64_t group = g.shape.heads / g.shape.kv_heads;
    int64_t count = 0;
    for (int64_t query = first; query < last; ++query) {
      bool live = false;
      for (int64_t head = kv_head * group; head < (kv_head + 1) * group && !live; ++head) {
        live = !is_zero(queries_of<T>(g.shape, g.dout, g.dout_strides, sequence, head)[query], g.shape.value_width);
        if (g.dlse != nullptr)
          live |= !is_zero(static_cast<const A*>(g.dlse) + lse_index(g.shape, sequence, head, query), 1);
        if (g.dweights != nullptr) live |= WeightGradients<T>::reach(g, sequence, head, query);
      }
      if (live) places[count++] = query;
    }
    return count;
  }

  // dK and dV of one chunk of keys, and its share of dQ.
  static void run_chunk(const AttentionBwd& g, const Sequence& sequence, const Places& live, int64_t kv_head,
                        int64_t chunk, Scratch& scratch, A* dq) {
    const AttentionShape& shape = g.shape;
    KeyTile<P>& tile = scratch.tile;
    const int64_t group = shape.heads / shape.kv_heads, keys = sequence.keys.count, first = chunk * chunk_keys(keys);
    const int64_t last = min_of(keys, first + chunk_keys(keys));
    memset(dq, 0, sizeof(A) * scratch.gradient.size);
    for (int64_t key = first; key < last; key += kKeys) {
      const int64_t n = min_of(kKeys, last - key);
      load_keys(g, sequence, kv_head, key, n, tile, scratch.buffer);
      memset(tile.dk, 0, sizeof(A) * kKeys * tile.dk_stride);
      memset(tile.dv, 0, sizeof(A) * kKeys * tile.dv_stride);
      for (int64_t i = 0; i < group; ++i)
        for (int64_t query = 0; query < live.count; query += KeyTile<P>::kRows)
          run_tile(g, sequence, live, kv_head * group + i, query, key, scratch, scratch.delta + i * shape.queries,
                   dq + (i * scratch.gradient.head_rows + query) * scratch.gradient.stride);
      const A *dk = tile.by_keys(tile.dk, tile.dk_stride), *dv = tile.by_keys(tile.dv, tile.dv_stride);
      store(first_row<T>(g.dk, g.dk_strides, shape, sequence.batch, kv_head, sequence.first_key), g.dk_strides.t,
            sequence.keys, key, n, dk, tile.dk_stride, shape.width, static_cast<A>(shape.scale));
      store(first_row<T>(g.dv, g.dv_strides, shape, sequence.batch, kv_head, sequence.first_key), g.dv_strides.t,
            sequence.keys, key, n, dv, tile.dv_stride, shape.value_width, A(1));
    }
  }

  // delta of a head's queries [first, last).
  static void find_delta(const AttentionBwd& g, const Sequence& sequence, int64_t head, int64_t first, int64_t last,
                         A* panels, A* delta) {
    const auto out = queries_of<T>(g.shape, g.out, g.out_strides, sequence, head);
    const auto dout = queries_of<T>(g.shape, g.dout, g.dout_strides, sequence, head);
    const int64_t width = g.shape.value_width;
    if constexpr (kInParts<P>) {
      sum_split_products(dout[first], dout.stride, out[first], out.stride, last - first, width,
                         reinterpret_cast<Split*>(panels), delta + first);
    } else {
      sum_products(dout[first], dout.stride, out[first], out.stride, last - first, width, panels, delta + first);
    }
    // The gradient of lse is P, so what reaches lse by another way joins delta.
    if (g.dlse == nullptr) return;
    const A* dlse = static_cast<const A*>(g.dlse) + lse_index(g.shape, sequence, head, 0);
    for (int64_t query = first; query < last; ++query) delta[query] -= dlse[query];
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

#if defined(FASTTX_SPLITS)
  // The same, of the product in parts: the diagonal of dO O^T.
  static void sum_split_products(const T* dout, int64_t dout_stride, const T* out, int64_t out_stride, int64_t rows,
                                 int64_t width, Split* parts, A* delta) {
    constexpr int64_t kBlock = kTileCols<Split>;
    const int64_t depth = round_up(width, kAmxK);
    Split* panel = parts + kBlock * depth;
    float* sums = reinterpret_cast<float*>(panel + kBlock * depth);
    for (int64_t row = 0; row < rows; row += kBlock) {
      const int64_t count = min_of(kBlock, rows - row);
      pack_left(dout + row * dout_stride, dout_stride, count, width, parts, depth);
      pack_transposed(out + row * out_stride, out_stride, count, width, panel);
      multiply_split(parts, count, panel, depth, sums, kBlock, [] {});
      for (int64_t i = 0; i < count; ++i) delta[row + i] = sums[i * kBlock + i];
    }
  }
#endif

  static void load_keys(const AttentionBwd& g, const Sequence& sequence, int64_t kv_head, int64_t key, int64_t n,
                        KeyTile<P>& tile, T* buffer) {
    const AttentionShape& shape = g.shape;
    const auto pack = [&](const MatrixRows<T>& rows, int64_t width, P* panels) {
      for (int64_t i = 0; i < n; i += kTileCols<P>)
        pack_transposed(rows[i], rows.stride, min_of(kTileCols<P>, n - i), width,
                        panels + i * round_up(width, Packed<P>::kLeftStep));
    };
    if (g.dout != nullptr)
      pack(rows_at(keys_of<T>(shape, g.v, g.v_strides, sequence, kv_head), sequence.keys, key, n, shape.value_width,
                   buffer),
           shape.value_width, tile.values);
    const auto k = rows_at(keys_of<T>(shape, g.k, g.k_strides, sequence, kv_head), sequence.keys, key, n, shape.width,
                           buffer);
    pack(k, shape.width, tile.keys);
    if (g.dout == nullptr) return;
    pack_rows(k.first, k.stride, n, shape.width, tile.k.right, tile.k.pitch * kTileCols<P>);
  }

  // Live queries from `query` on against the tile of keys from `key` on.
  static void run_tile(const AttentionBwd& g, const Sequence& sequence, const Places& live, int64_t head, int64_t query,
                       int64_t key, Scratch& scratch, const A* delta, A* dq) {
    const AttentionShape& shape = g.shape;
    KeyTile<P>& tile = scratch.tile;
    TileRows rows;
    const int64_t n = score_tile(g, sequence, live, head, query, key, tile, scratch.buffer, rows);
    if (n == 0) return;
    const int64_t padded = round_up(n, kKeyStep<P>);
    for (int64_t i = round_up(n, V::kWidth); i < padded; i += V::kWidth)
      for (int64_t r = 0; r < rows.count; ++r) V::zero().store(tile.ds + r * kKeys + i);
    tile.differentiate(shape, sequence, rows,
                       static_cast<const A*>(g.stats) + 2 * lse_index(shape, sequence, head, 0), delta, key, padded);
    tile.multiply_outputs(shape, rows.count, n, dq, scratch.gradient.stride);
  }

  // Packs a tile's queries, and finds its masked scores and dP. Returns how many of its keys may be seen.
  static int64_t score_tile(const AttentionBwd& g, const Sequence& sequence, const Places& live, int64_t head,
                            int64_t query, int64_t key, KeyTile<P>& tile, T* buffer, TileRows& rows) {
    const AttentionShape& shape = g.shape;
    for (int64_t i = query; i < min_of(live.count, query + KeyTile<P>::kRows); ++i)
      rows.add(tile_row(shape, sequence.keys, head, live[i]));
    if (rows.last <= key || rows.first >= key + kKeys) return 0;
    TileMask<T, P> mask(shape, rows, sequence, key, min_of(kKeys, rows.last - key), tile.bias);
    const int64_t n = mask.n;
    if (n == 0) return 0;
    const auto pack = [&](const void* data, const Strides& strides, int64_t width, typename KeyTile<P>::Rows& packed) {
      const auto from = rows_at(queries_of<T>(shape, data, strides, sequence, head), live, query, rows.count, width,
                                buffer);
      packed.pack(from.first, from.stride, rows.count);
    };
    pack(g.q, g.q_strides, shape.width, tile.q);
    if (g.dout != nullptr) pack(g.dout, g.dout_strides, shape.value_width, tile.dout);
    sign_queries(shape, tile.q.left, tile.q.left_stride, rows.count);
    if (!kInParts<P> && reads_keys_directly(shape, sequence.queries, sequence.keys.count)) {
      if constexpr (!kInParts<P>) {
        // As in the forward, to the bit: its numbers fit no other scores.
        const int64_t kv_head = head / (shape.heads / shape.kv_heads);
        const auto keys = rows_at(keys_of<T>(shape, g.k, g.k_strides, sequence, kv_head), sequence.keys, key, n,
                                  shape.width, buffer);
        for (int64_t i = 0; i < rows.count; ++i)
          score_directly(tile.q.left + i * tile.q.left_stride, keys.first, keys.stride, n, shape.width,
                         tile.p + i * kKeys);
      }
    } else {
      tile.multiply_keys(tile.q, tile.keys, rows.count, n, tile.p);
    }
    if (g.dout != nullptr) tile.multiply_keys(tile.dout, tile.values, rows.count, n, tile.ds);
    if (g.dweights != nullptr) WeightGradients<T>::add(g, sequence, rows, key, n, buffer, tile.ds, kKeys);
    mask.apply(tile.p, kKeys);
    return n;
  }

  // Rows [first, first + n) of those at `places`.
  static void store(T* to, int64_t stride, const Places& places, int64_t first, int64_t n, const A* from,
                    int64_t from_stride, int64_t width, A scale) {
    for (int64_t row = 0; row < n; ++row) {
      T* line = to + places[first + row] * stride;
      for_vectors<V>(width, [&](int64_t i, int lanes) {
        store_lanes(line + i, V::load(from + row * from_stride + i) * V::set1(scale), lanes);
      });
    }
  }
};
template <class T>
using AttentionBwdKernel = OnOperands<AttentionBwdOn, T>;
