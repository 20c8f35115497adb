// Attention forward, tile by tile with a running maximum and sum: Milakov and Gimelshein (2018),
// https://arxiv.org/abs/1805.02867; Dao et al. (2022), https://arxiv.org/abs/2205.14135.
//
// A query's result depends on its own scores alone, bit for bit: its keys are always taken in the same tiles, counted
// from the first of the sequence's keys that take part (attention_rows.inl), and tiles or lanes that it doesn't see
// add exact zeros. Only a sequence's own sizes choose between packed keys and attention_decode.inl, whose sums run in
// another order.

// A tile of queries on its way over the keys.
template <class P>
struct QueryTile {
  using A = accum_t<P>;
  using V = Vec<A>;
  static constexpr int64_t kRows = kQueryTile<P>;
  int64_t q_stride, out_stride;
  ScoreScale<A> scale;
  ProductUnit<P>* unit = nullptr;  // set while the kernel runs
  P* q;        // (kRows, q_stride)
  A* scores;   // (kRows, kKeyTile<P>)
  P* split;    // (kRows, kKeyTile<P>): the probabilities in parts, or null: they take the scores' place
  A* ahead;    // (kRows, kKeyTile<P>): scores of the next tile of keys, or null
  A* out;      // (kRows, out_stride)
  A* largest;  // (kRows): of the scores so far, or a little less
  A* shift;    // (kRows): the same, 0 in place of -inf, as powers take it
  A* decay;    // (kRows): what the sums so far are worth under the new maximum
  A* sums;     // (kRows, kWidth)
  A* bias;     // (kKeyTile<P>)
  A* keep;     // (kKeyTile<P>)
  bool raised = false;  // some row's decay is not 1
#if defined(FASTTX_SPLITS)
  SplitTurns turns_ahead = {};
#endif

  QueryTile(const AttentionShape& g, ScratchPieces& pieces)
      : q_stride(round_up(g.width, Packed<P>::kLeftStep)), out_stride(value_panels<P>(g) * kTileCols<P>), scale(g) {
    q = pieces.take<P>(kRows * q_stride);
    scores = pieces.take<A>(kRows * kKeyTile<P>);
    split = kInParts<P> ? pieces.take<P>(kRows * kKeyTile<P>) : nullptr;
    ahead = kInParts<P> ? pieces.take<A>(kRows * kKeyTile<P>) : nullptr;
    out = pieces.take<A>(kRows * out_stride);
    largest = pieces.take<A>(kRows);
    shift = pieces.take<A>(kRows);
    decay = pieces.take<A>(kRows);
    sums = pieces.take<A>(kRows * V::kWidth);
    bias = pieces.take<A>(kKeyTile<P>);
    keep = pieces.take<A>(kKeyTile<P>);
  }

  void start() {
    for (int64_t i = 0; i < kRows; ++i) largest[i] = -kInfinity<A>;
    memset(sums, 0, sizeof(A) * kRows * V::kWidth);
  }

  void score(const AttentionShape& g, int64_t rows, const P* keys, int64_t n) {
    multiply<P>(*unit, {q, q_stride, Packed<P>::kLeftStep, keys, key_panel_size<P>(g), q_stride, scores, kKeyTile<P>,
                        false, nullptr},
                rows, n);
  }

  // The r-th part, of as many as there are rows, of the scores of n keys, into `ahead`: among the exponentials of
  // another tile, products on tiles take less time than all at once (a ninth of the whole kernel's).
  void score_ahead([[maybe_unused]] const AttentionShape& g, [[maybe_unused]] int64_t rows,
                   [[maybe_unused]] const P* keys, [[maybe_unused]] int64_t n, [[maybe_unused]] int64_t r) {
#if defined(FASTTX_SPLITS)
    if constexpr (kInParts<P>) {
      constexpr int64_t kBlock = kTileCols<P>;
      const int64_t turns = SplitProduct<true>::kTurns * q_stride / kAmxK, all = ceil_div(n, kBlock) * turns;
      for (int64_t i = all * r / rows; i < all * (r + 1) / rows; ++i) {
        if (i % turns == 0) {
          const P* panel = keys + i / turns * key_panel_size<P>(g);
          turns_ahead = {{reinterpret_cast<const bf16*>(q), reinterpret_cast<const bf16*>(panel), kRows},
                         q_stride / kAmxK};
        }
        turns_ahead.take();
        if (i % turns == turns - 1) turns_ahead.product.finish(ahead + i / turns * kBlock, kKeyTile<P>);
      }
    }
#endif
  }

  // Scores to probabilities, not yet divided by their sum; n is a multiple of kKeyStep. Calls between(r) at each row.
  template <class F>
  FASTTX_INLINE void softmax(const AttentionShape& g, const Sequence& sequence, const TileRows& rows, int64_t key,
                             int64_t n, const F& between) {
    if (n == kKeyTile<P>) {  // known while compiling
      softmax_of(g, sequence, rows, key, std::integral_constant<int64_t, kKeyTile<P>>(), between);
    } else {
      softmax_of(g, sequence, rows, key, n, between);
    }
  }
  template <class N, class F>
  FASTTX_INLINE void softmax_of(const AttentionShape& g, const Sequence& sequence, const TileRows& rows, int64_t key,
                                N n, const F& between) {
    // Copies, as a member would be loaded again after every store of a vector.
    A *const scores = this->scores, *const shift = this->shift, *const keep = this->keep, *const sums = this->sums;
    P* const split = this->split;
    const A* const decay = this->decay;
    const int64_t count = rows.count;
    const bool drops = g.dropout.active;
    for (int64_t first = 0; first < count; first += V::kWidth) {
      V tops[V::kWidth];
      for (int64_t i = 0; i < V::kWidth; ++i) {
        const A* row = scores + (first + i) * kKeyTile<P>;
        V top[2] = {V::set1(-kInfinity<A>), V::set1(-kInfinity<A>)};
        for (int64_t k = 0; k < (first + i < count ? n : 0); k += 2 * V::kWidth) {
          top[0] = max(top[0], V::load(row + k));
          if (k + V::kWidth < n) top[1] = max(top[1], V::load(row + k + V::kWidth));
        }
        tops[i] = max(top[0], top[1]);
      }
      reduce_max_rows(tops).store(shift + first);
    }
    const Powers<P> power(scale.exponent);
    raise(count, power);
    for (int64_t r = 0; r < count; ++r) {
      between(r);
      A* row = scores + r * kKeyTile<P>;
      bf16* parts = reinterpret_cast<bf16*>(split) + r * kAmxK;
      V sum;
      if (drops) {
        keep_keys(g, sequence, rows.rows[r], key, n, keep);
        sum = row_powers<true>(power, V::set1(shift[r]), row, parts, keep, n);
      } else {
        sum = row_powers<false>(power, V::set1(shift[r]), row, parts, keep, n);
      }
      fma(V::load(sums + r * V::kWidth), V::set1(decay[r]), sum).store(sums + r * V::kWidth);
    }
  }

  // Takes the largest scores of a tile, in `shift`, for the rows' own where they are much greater: a power may be as
  // large as 2^kSlack, so that few tiles change what all sums before them are worth.
  void raise(int64_t count, const Powers<P>& power) {
    constexpr A kSlack = 4;
    const V lowest = V::set1(-kInfinity<A>);
    raised = false;
    for (int64_t r = 0; r < count; r += V::kWidth) {
      const V before = V::load(largest + r), top = V::load(shift + r);
      const auto grown = gt((top - before) * power.exponent, V::set1(kSlack));
      const V now = select(grown, top, before), base = select(eq(now, lowest), V::zero(), now);
      now.store(largest + r);
      power.shift(base).store(shift + r);
      select(grown, exp2((before - base) * power.exponent), V::set1(1)).store(decay + r);
      raised |= any(grown);
    }
  }

  // One row's powers, where its scores were or in parts; returns their sums.
  template <bool kDropout, class N>
  static FASTTX_INLINE V row_powers(const Powers<P>& power, V base, A* row, [[maybe_unused]] bf16* parts,
                                    const A* keep, N n) {
    V sum[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    for (int64_t first = 0; first < n; first += 4 * V::kWidth) {
      V kept[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const int64_t i = first + j * V::kWidth;
        if (i >= n) break;
        const V p = power(V::load(row + i), base);
        sum[j] = sum[j] + p;
        kept[j] = kDropout ? p * V::load(keep + i) : p;
        if constexpr (kInParts<P>) {
          if (j % 2 == 1)
            store_pairs(SplitPairs(kept[j - 1].v, kept[j].v),
                        parts + (i - V::kWidth) * kRows * (sizeof(P) / sizeof(bf16)), kRows * kAmxK);
        } else if constexpr (kUsesAmx<P>) {
          if (j % 2 == 1) store_operands(kept[j - 1], kept[j], reinterpret_cast<P*>(row) + i - V::kWidth);
        } else {
          store_operand(kept[j], reinterpret_cast<P*>(row) + i);
        }
      }
    }
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }

#if defined(__AMX_BF16__)
  // All that is done with one tile of keys where both products run on tiles. Rows in whole tiles, whatever their number:
  // configuring others would take longer.
  template <class Mask>
  __attribute__((noinline)) void attend(const AttentionShape& g, const Sequence& sequence, const TileRows& rows,
                                        Mask& mask, const P* keys, const P* values, int64_t pitch, bool first) {
    const bool lower = rows.count > kAmxRows;
    P* const q = this->q;
    A *const scores = this->scores, *const out = this->out;
    const int64_t q_stride = this->q_stride, out_stride = this->out_stride, value_width = g.value_width, n = mask.n;
    const auto product = [&](const P* a, int64_t a_stride, const P* panel, int64_t k, bool add, A* to,
                             int64_t to_stride) {
      if (lower) {
        amx_block<kTileCols<P>, true, true>(a, a_stride, kAmxK, panel, k, add, to, to_stride, [] {});
      } else {
        amx_block<kTileCols<P>, false, true>(a, a_stride, kAmxK, panel, k, add, to, to_stride, [] {});
      }
    };
    constexpr int64_t kBlock = 2 * kAmxCols;
    for (int64_t column = 0; column < n; column += kBlock)
      product(q, q_stride, keys + column * Packed<P>::kStep, q_stride, false, scores + column, kKeyTile<P>);
    mask.apply(scores, kKeyTile<P>);
    softmax(g, sequence, rows, mask.key, round_up(n, kKeyStep<P>), [](int64_t r) {
      if (r % kAmxRows == 0) amx_keep_awake();
    });
    if (raised && !first) decay_outputs(rows.count);
    for (int64_t column = 0; column < value_width; column += kBlock) {
      const P* panel = values + column / kTileCols<P> * kTileCols<P> * pitch +
                       column % kTileCols<P> * Packed<P>::kStep;
      product(reinterpret_cast<const P*>(scores), kKeyTile<P> * sizeof(A) / sizeof(P), panel,
              round_up(n, Packed<P>::kLeftStep), !first, out + column, out_stride);
    }
  }

  __attribute__((noinline)) void decay_outputs(int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      if (decay[r] == 1) continue;
      for (int64_t i = 0; i < out_stride; i += V::kWidth) {
        A* to = out + r * out_stride + i;
        (V::load(to) * V::set1(decay[r])).store(to);
      }
    }
  }
#endif

  void add_values(const AttentionShape& g, int64_t rows, const P* values, int64_t pitch, int64_t n, bool first) {
    constexpr int64_t stride = kInParts<P> ? kKeyTile<P> : kKeyTile<P> * sizeof(A) / sizeof(P);
    const P* probabilities = kInParts<P> ? split : reinterpret_cast<const P*>(scores);
    multiply<P>(*unit, {probabilities, stride, Packed<P>::kLeftStep, values, pitch * kTileCols<P>,
                        round_up(n, Packed<P>::kLeftStep), out, out_stride, !first, raised ? decay : nullptr},
                rows, g.value_width);
  }
};

// Items are (sequence, kv head, tile of queries) where the keys come packed, else (sequence, kv head).
template <class T, class P>
struct AttentionFwdOn {
  using A = accum_t<T>;
  using V = Vec<A>;
  // Keys that come packed are packed as another kernel takes them (OnOperands).
  static constexpr bool kPacksAnew = kSplits<T> && !kInParts<P>;

#if defined(FASTTX_SPLITS)
  static bool splits(const AttentionFwd& g, int64_t item) {
    const AttentionShape& shape = g.shape;
    const bool packed = g.k_packed != nullptr;
    const int64_t pair = item / (packed ? query_tiles(shape, shape.queries) : 1) + shape.first_pair;
    const Sequence sequence = sequence_of(shape, pair / shape.kv_heads);
    if (!packed) return splits_pair<T>(g, sequence, pair % shape.kv_heads);
    if (!worth_splitting(shape, sequence)) return false;
    Magnitude most[2] = {};
    const Split* tail = packed_of<Split>(shape, g.k_packed, g.v_packed, pair).keys - kPanelTail<Split>;
    for (int64_t key = 0; key < sequence.keys.count; key += kTileCols<Split>) {
      Magnitude panel[2];
      tail += key_panel_size<Split>(shape);
      memcpy(panel, tail, sizeof(panel));
      for (int i = 0; i < 2; ++i) most[i].join(panel[i]);
    }
    return most[0].splits() && most[1].splits();
  }
#endif

  // Several heads of one kv head share a tile where they have few queries.
  static int64_t heads_in_tile(const AttentionShape& g, int64_t queries) {
    return max_of(1, min_of(g.heads / g.kv_heads, kQueryTile<P> / max_of(1, queries)));
  }
  static int64_t query_tiles(const AttentionShape& g, int64_t queries) {
    return ceil_div(g.heads / g.kv_heads, heads_in_tile(g, queries)) * ceil_div(queries, kQueryTile<P>);
  }

  struct Scratch {
    ScratchPieces pieces;
    QueryTile<P> tile;
    T* buffer;             // (kKeyTile<P>) keys or values, or null
    PackedKeys<P> packed;  // of one tile of keys, or of a whole sequence where several tiles of queries read it
    Scratch(const AttentionFwd& g, void* base)
        : pieces{static_cast<char*>(base)},
          tile(g.shape, pieces),
          buffer(take_buffer<T>(g.shape, pieces, kKeyTile<P>)),
          packed{} {
      if (g.k_packed != nullptr && !kPacksAnew) return;
      const bool whole = g.k_packed == nullptr && query_tiles(g.shape, g.shape.queries) > 1;
      packed.pitch = max_of(kKeyTile<P>, whole ? round_up(g.shape.keys, kTileCols<P>) : 0);
      packed.keys = pieces.take<P>(packed.pitch / kTileCols<P> * key_panel_size<P>(g.shape));
      packed.values = pieces.take<P>(packed.pitch * value_panels<P>(g.shape) * kTileCols<P>);
    }
  };

  static Plan plan(const AttentionFwd& g) {
    const AttentionShape& shape = g.shape;
    if (shape.kv_heads == 0) return {0, 1, 0, false};
    const int64_t tiles = query_tiles(shape, shape.queries), pairs = pair_count(shape);
    const int64_t rows = g.k_packed != nullptr ? kQueryTile<P> : shape.queries * (shape.heads / shape.kv_heads);
    const int64_t work = (rows + 1) * (shape.keys + 1) * (shape.width + shape.value_width + 1);
    // Where there are many, several together: each has the next one's rows fetched while it is in work.
    const int64_t together = g.k_packed != nullptr ? 1 : min_of(4, pairs / 32);
    return {g.k_packed != nullptr ? pairs * tiles : pairs, max_of(max_of(1, together), (int64_t{1} << 18) / work),
            Scratch(g, nullptr).pieces.used, true};
  }

  static void run(const AttentionFwd& g, void* base, int64_t begin, int64_t end) {
    const AttentionShape& shape = g.shape;
    Scratch scratch(g, base);
    const FlushesSubnormals<P> flushes;
    ProductUnit<P> unit;
    scratch.tile.unit = &unit;
    const int64_t most = g.k_packed != nullptr ? query_tiles(shape, shape.queries) : 1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t pair = item / most + shape.first_pair, kv_head = pair % shape.kv_heads;
      const Sequence sequence = sequence_of(shape, pair / shape.kv_heads);
      const int64_t tiles = query_tiles(shape, sequence.queries);
      if (g.k_packed != nullptr) {
        // The last tiles first: under a causal mask they take the longest.
        const int64_t index = most - 1 - item % most;
        if (index < tiles)
          run_tile(g, sequence, kv_head, index, scratch,
                   kPacksAnew ? scratch.packed : packed_of<P>(shape, g.k_packed, g.v_packed, pair), kPacksAnew);
        continue;
      }
      if (item + 1 < end) fetch(g, pair + 1);
      if (tiles > 1) pack(g, sequence, kv_head, 0, sequence.keys.count, scratch.packed, scratch.buffer);
      for (int64_t index = 0; index < tiles; ++index)
        run_tile(g, sequence, kv_head, index, scratch, scratch.packed, tiles == 1);
    }
  }

  // Starts to bring a pair's rows to the second-level cache, as far as half of it.
  static void fetch(const AttentionFwd& g, int64_t pair) {
    const AttentionShape& shape = g.shape;
    const int64_t kv_head = pair % shape.kv_heads, group = shape.heads / shape.kv_heads;
    const Sequence sequence = sequence_of(shape, pair / shape.kv_heads);
    constexpr int64_t kLine = 64, kMostBytes = int64_t{1} << 18;
    const auto fetch_rows = [](const MatrixRows<T>& rows, int64_t count, int64_t width) {
      const int64_t bytes = width * sizeof(T);
      for (int64_t row = 0; row < min_of(count, kMostBytes / max_of(1, bytes)); ++row)
        for (int64_t i = 0; i < bytes; i += kLine)
          __builtin_prefetch(reinterpret_cast<const char*>(rows[row]) + i, 0, 2);
    };
    const int64_t keys = sequence.keys.count == 0 ? 0 : sequence.keys[sequence.keys.count - 1] + 1;
    fetch_rows(keys_of<T>(shape, g.k, g.k_strides, sequence, kv_head), keys, shape.width);
    fetch_rows(keys_of<T>(shape, g.v, g.v_strides, sequence, kv_head), keys, shape.value_width);
    fetch_rows(queries_of<T>(shape, g.q, g.q_strides, sequence, kv_head * group), sequence.queries, shape.width);
  }

  static void pack(const AttentionFwd& g, const Sequence& sequence, int64_t kv_head, int64_t key, int64_t n,
                   const PackedKeys<P>& packed, T* buffer) {
    pack_keys(g.shape, keys_of<T>(g.shape, g.k, g.k_strides, sequence, kv_head),
              keys_of<T>(g.shape, g.v, g.v_strides, sequence, kv_head), sequence.keys, key, n, packed, 0, buffer);
  }

  static void run_tile(const AttentionFwd& g, const Sequence& sequence, int64_t kv_head, int64_t index,
                       Scratch& scratch, const PackedKeys<P>& packed, bool pack_each) {
    const AttentionShape& shape = g.shape;
    QueryTile<P>& tile = scratch.tile;
    TileRows rows;
    load_queries(g, sequence, kv_head, index, tile, rows);
    tile.start();
    // Never where operands are in parts (worth_splitting).
    const bool direct = !kInParts<P> && reads_keys_directly(shape, sequence.queries, sequence.keys.count);
    bool first = true;
    int64_t ready = -1;  // the key whose tile's scores are there already
    for (int64_t key = rows.first / kKeyTile<P> * kKeyTile<P>; key < rows.last; key += kKeyTile<P>) {
      TileMask<T, P> mask(shape, rows, sequence, key, min_of(kKeyTile<P>, rows.last - key), tile.bias);
      const int64_t n = mask.n;
      if (n == 0) continue;
      const int64_t at = pack_each ? 0 : key;
      if (direct) {
        if constexpr (!kInParts<P>) {
          const auto keys = rows_at(keys_of<T>(shape, g.k, g.k_strides, sequence, kv_head), sequence.keys, key, n,
                                    shape.width, scratch.buffer);
          for (int64_t r = 0; r < rows.count; ++r)
            score_directly(tile.q + r * tile.q_stride, keys.first, keys.stride, n, shape.width,
                           tile.scores + r * kKeyTile<P>);
        }
      } else {
        if (pack_each) pack(g, sequence, kv_head, key, n, packed, scratch.buffer);
#if defined(__AMX_BF16__)
        if constexpr (kUsesAmx<P>) {
          tile.attend(shape, sequence, rows, mask, packed.keys + at / kTileCols<P> * key_panel_size<P>(shape),
                      packed.values + at * kTileCols<P>, packed.pitch, first);
          first = false;
          continue;
        }
#endif
        if (key == ready) {
          A* scores = tile.ahead;
          tile.ahead = tile.scores;
          tile.scores = scores;
        } else {
          tile.score(shape, rows.count, packed.keys + at / kTileCols<P> * key_panel_size<P>(shape), n);
        }
      }
      mask.apply(tile.scores, kKeyTile<P>);
      const int64_t next = key + kKeyTile<P>, coming = min_of(kKeyTile<P>, rows.last - next);
      const bool ahead = tile.ahead != nullptr && !direct && !pack_each && coming > 0;
      if (ahead) ready = next;
      tile.softmax(shape, sequence, rows, key, round_up(n, kKeyStep<P>), [&](int64_t r) {
        if (ahead)
          tile.score_ahead(shape, rows.count, packed.keys + next / kTileCols<P> * key_panel_size<P>(shape), coming, r);
      });
      if (direct) {
        if constexpr (!kInParts<P>) {
          const auto values = rows_at(keys_of<T>(shape, g.v, g.v_strides, sequence, kv_head), sequence.keys, key, n,
                                      shape.value_width, scratch.buffer);
          for (int64_t r = 0; r < rows.count; ++r) {
            copy_as(reinterpret_cast<const P*>(tile.scores + r * kKeyTile<P>), tile.keep, n);
            add_values_directly(tile.keep, values.first, values.stride, n, shape.value_width, first, tile.decay[r],
                                tile.out + r * tile.out_stride);
          }
        }
      } else {
        tile.add_values(shape, rows.count, packed.values + at * kTileCols<P>, packed.pitch, n, first);
      }
      first = false;
    }
    store(g, sequence, tile, rows);
  }

  static void load_queries(const AttentionFwd& g, const Sequence& sequence, int64_t kv_head, int64_t index,
                           QueryTile<P>& tile, TileRows& rows) {
    const int64_t group = g.shape.heads / g.shape.kv_heads, together = heads_in_tile(g.shape, sequence.queries);
    const int64_t slices = ceil_div(sequence.queries, kQueryTile<P>);  // 1 where heads share a tile
    const int64_t head0 = index / slices * together, query0 = index % slices * kQueryTile<P>;
    const int64_t queries = min_of(kQueryTile<P>, sequence.queries - query0);
    for (int64_t i = head0; i < min_of(group, head0 + together); ++i) {
      const int64_t head = kv_head * group + i;
      pack_left(first_row<T>(g.q, g.q_strides, g.shape, sequence.batch, head, sequence.first_query + query0),
                g.q_strides.t, queries, g.shape.width, tile.q, tile.q_stride, rows.count);
      for (int64_t query = query0; query < query0 + queries; ++query)
        rows.add(tile_row(g.shape, sequence.keys, head, query));
    }
    sign_queries(g.shape, tile.q, tile.q_stride, rows.count);
  }

  static void store(const AttentionFwd& g, const Sequence& sequence, const QueryTile<P>& tile, const TileRows& rows) {
    for (int64_t r = 0; r < rows.count; ++r) {
      const TileRow& row = rows.rows[r];
      const A sum = reduce_add(V::load(tile.sums + r * V::kWidth));
      const bool none = sum == 0;
      const A factor = none ? A(0) : A(1) / sum;
      const int64_t at = lse_index(g.shape, sequence, row.head, row.query);
      if (g.lse != nullptr) {
        static_cast<A*>(g.lse)[at] = none ? -kInfinity<A> : tile.scale.natural(tile.largest[r]) + log(sum);
        static_cast<A*>(g.stats)[2 * at] = none ? A(0) : tile.largest[r];
        static_cast<A*>(g.stats)[2 * at + 1] = factor;
      }
      T* out = first_row<T>(g.out, g.out_strides, g.shape, sequence.batch, row.head, sequence.first_query + row.query);
      const A* from = tile.out + r * tile.out_stride;
      for_vectors<V>(g.shape.value_width, [&](int64_t i, int lanes) {
        store_lanes(out + i, none ? V::zero() : V::load(from + i) * V::set1(factor), lanes);
      });
    }
  }
};
template <class T>
using AttentionFwdKernel = OnOperands<AttentionFwdOn, T>;
