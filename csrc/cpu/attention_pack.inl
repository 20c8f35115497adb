// Packing of attention's keys and values, once for all tiles of queries, and which of them are in parts.

// Keys and values of one (sequence, kv head) as right operands: K as [panel of keys][width][kTileCols], V as [panel of
// values][key][kTileCols], `pitch` keys a panel.
template <class P>
struct PackedKeys {
  P *keys, *values;
  int64_t pitch;
};
// What a panel of keys in parts ends with, as other items of the launch ask for it: the magnitudes of its keys and values.
template <class P>
constexpr int64_t kPanelTail = 0;
template <>
constexpr int64_t kPanelTail<Split> = 32;  // a whole number of lines
template <class P>
static inline int64_t key_panel_size(const AttentionShape& g) {
  return round_up(g.width, Packed<P>::kLeftStep) * kTileCols<P> + kPanelTail<P>;
}
template <class P>
static inline int64_t value_panels(const AttentionShape& g) {
  return ceil_div(g.value_width, kTileCols<P>);
}

// Panels before those of a (sequence, kv head) pair, counted from the launch's first; packed sequences each waste less
// than one.
template <class P>
static inline int64_t panels_before(const AttentionShape& g, int64_t pair) {
  const auto before_sequence = [&](int64_t b) {
    return g.cu_keys != nullptr ? g.cu_keys[b] / kTileCols<P> + b : b * ceil_div(g.keys, kTileCols<P>);
  };
  const auto before = [&](int64_t i) {
    const int64_t b = i / g.kv_heads, rest = i % g.kv_heads, panels = before_sequence(b);
    return panels * g.kv_heads + (rest == 0 ? 0 : rest * (before_sequence(b + 1) - panels));
  };
  return before(pair) - before(g.first_pair);
}

template <class T>
static size_t attention_packed_bytes(const AttentionShape& g, int64_t width) {
  using P = Operand<T>;
  return sizeof(P) * panels_before<P>(g, g.first_pair + pair_count(g)) *
         (kTileCols<P> * round_up(width, kTileCols<P>) + kPanelTail<P>);
}

template <class P>
static inline PackedKeys<P> packed_of(const AttentionShape& g, void* keys, void* values, int64_t pair) {
  const int64_t before = panels_before<P>(g, pair);
  const int64_t pitch = (panels_before<P>(g, pair + 1) - before) * kTileCols<P>;
  return {static_cast<P*>(keys) + before * key_panel_size<P>(g),
          static_cast<P*>(values) + before * value_panels<P>(g) * kTileCols<P> * kTileCols<P>, pitch};
}

// Packs keys [key, key + n) of the sequence to the rows from `to` on, a multiple of kTileCols; `buffer` has room for
// kTileCols rows.
template <class T, class P = Operand<T>>
static void pack_keys(const AttentionShape& g, const MatrixRows<T>& keys, const MatrixRows<T>& values,
                      const Places& places, int64_t key, int64_t n, const PackedKeys<P>& packed, int64_t to,
                      T* buffer) {
  for (int64_t i = 0; i < n; i += kTileCols<P>) {
    const int64_t count = min_of(kTileCols<P>, n - i);
    const auto k = rows_at(keys, places, key + i, count, g.width, buffer);
    pack_transposed(k.first, k.stride, count, g.width,
                    packed.keys + (to + i) / kTileCols<P> * key_panel_size<P>(g));
    const auto v = rows_at(values, places, key + i, count, g.value_width, buffer);
    pack_rows(v.first, v.stride, count, g.value_width, packed.values + (to + i) * kTileCols<P>,
              packed.pitch * kTileCols<P>);
  }
}

// Room to copy `count` keys or values to where they are side by side.
template <class T>
static inline T* take_buffer(const AttentionShape& g, ScratchPieces& pieces, int64_t count) {
  return g.key_places == nullptr ? nullptr : pieces.take<T>(count * max_of(g.width, g.value_width));
}

// Items are (sequence, kv head, panel of keys).
template <class T>
struct AttentionPackKernel {
  using P = Operand<T>;
  static int64_t panels(const AttentionPack& g) { return ceil_div(g.shape.keys, kTileCols<P>); }

  static Plan plan(const AttentionPack& g) {
    const int64_t work = kTileCols<P> * (g.shape.width + g.shape.value_width);
    ScratchPieces pieces{nullptr};
    take_buffer<T>(g.shape, pieces, kTileCols<P>);
    return {pair_count(g.shape) * panels(g), max_of(1, 32768 / max_of(1, work)), pieces.used, false};
  }

  static void run(const AttentionPack& g, void* scratch, int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t key = item % panels(g) * kTileCols<P>, pair = item / panels(g) + g.shape.first_pair;
      const int64_t kv_head = pair % g.shape.kv_heads;
      const Sequence sequence = sequence_of(g.shape, pair / g.shape.kv_heads);
      if (key >= sequence.keys.count) continue;
#if defined(FASTTX_SPLITS)
      if constexpr (kSplits<T>) note_magnitude(g, sequence, pair, kv_head, key / kTileCols<P>);
#endif
      pack_keys(g.shape, keys_of<T>(g.shape, g.k, g.k_strides, sequence, kv_head),
                keys_of<T>(g.shape, g.v, g.v_strides, sequence, kv_head), sequence.keys, key,
                min_of(kTileCols<P>, sequence.keys.count - key), packed_of<P>(g.shape, g.k_packed, g.v_packed, pair),
                key, static_cast<T*>(scratch));
    }
  }

#if defined(FASTTX_SPLITS)
  static void note_magnitude(const AttentionPack& g, const Sequence& sequence, int64_t pair, int64_t kv_head,
                             int64_t panel) {
    const AttentionShape& shape = g.shape;
    const int64_t key = panel * kTileCols<P>, last = min_of(sequence.keys.count, key + kTileCols<P>);
    const Magnitude most[2] = {
        magnitude_of(keys_of<T>(shape, g.k, g.k_strides, sequence, kv_head), sequence.keys, key, last, shape.width),
        magnitude_of(keys_of<T>(shape, g.v, g.v_strides, sequence, kv_head), sequence.keys, key, last,
                     shape.value_width)};
    memcpy(packed_of<P>(shape, g.k_packed, g.v_packed, pair).keys + (panel + 1) * key_panel_size<P>(shape) -
               kPanelTail<P>,
           most, sizeof(most));
  }
#endif
};

#if defined(FASTTX_SPLITS)
static inline bool worth_splitting(const AttentionShape& g, const Sequence& sequence) {
  return sequence.keys.count > kSplitKeys && g.width > kSplitWidth &&
         !reads_keys_directly(g, sequence.queries, sequence.keys.count);
}
// Whether a (sequence, kv head) pair is multiplied in parts. Its queries have no say: those too large give scores that
// are not finite in any way, those too small give scores of almost zero.
template <class T, class Args>
static bool splits_pair(const Args& g, const Sequence& sequence, int64_t kv_head) {
  const AttentionShape& shape = g.shape;
  if (!worth_splitting(shape, sequence)) return false;
  if (!magnitude_of(keys_of<T>(shape, g.k, g.k_strides, sequence, kv_head), sequence.keys, 0, sequence.keys.count,
                    shape.width).splits())
    return false;
  // The weights alone need no values.
  if (g.v != nullptr && !magnitude_of(keys_of<T>(shape, g.v, g.v_strides, sequence, kv_head), sequence.keys, 0,
                                      sequence.keys.count, shape.value_width).splits())
    return false;
  return true;
}
#endif
