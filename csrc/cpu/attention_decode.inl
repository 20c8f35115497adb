// Attention of a few queries over many keys: packing keys that are read once would take longer than reading them.

// Rows of one kv head that are worth it, and keys from which on. A sequence's own sizes decide, not the batch's; within
// self-attention over short sequences, it never happens.
constexpr int64_t kDirectRows = 4, kDirectKeys = 128;
static inline bool reads_keys_directly(const AttentionShape& g, int64_t queries, int64_t keys) {
  return Vec<float>::kWidth > 1 && queries * (g.heads / g.kv_heads) <= kDirectRows && keys > kDirectKeys;
}

// out[i] = the sum of block[i]'s lanes.
template <class V, class A>
static FASTTX_INLINE void store_lane_sums(V (&block)[V::kWidth], A* out) {
  if constexpr (V::kWidth > 1 && sizeof(A) == 4) {
    transpose(block);
    V sum = block[0];
#pragma GCC unroll 16
    for (int i = 1; i < V::kWidth; ++i) sum = sum + block[i];
    sum.store(out);
  } else {
    for (int i = 0; i < V::kWidth; ++i) out[i] = reduce_add(block[i]);
  }
}

// scores[j] = query . key j, for n keys, and zero up to a whole vector.
template <class P, class T>
static void score_directly(const P* query, const T* keys, int64_t stride, int64_t n, int64_t width,
                           accum_t<T>* scores) {
  using V = Vec<accum_t<T>>;
  for (int64_t key = 0; key < n; key += V::kWidth) {
    V block[V::kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < V::kWidth; ++i) block[i] = V::zero();
    const int64_t count = min_of(V::kWidth, n - key);
    const T* rows = keys + key * stride;
    for (int64_t k = 0; k < width; k += V::kWidth) {
      const int lanes = static_cast<int>(min_of(V::kWidth, width - k));
      const V q = load_lanes<V>(query + k, lanes);
      if (count == V::kWidth && lanes == V::kWidth) {
#pragma GCC unroll 16
        for (int i = 0; i < V::kWidth; ++i) {
          __builtin_prefetch(rows + (V::kWidth + i) * stride + k);
          block[i] = fma(q, V::load(rows + i * stride + k), block[i]);
        }
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < V::kWidth; ++i)
          if (i < count) block[i] = fma(q, V::load(rows + i * stride + k, lanes), block[i]);
      }
    }
    store_lane_sums(block, scores + key);
  }
}

// out = decay * out + sum over j of probabilities[j] * value j; where `first`, the sum alone.
template <class T>
static void add_values_directly(const accum_t<T>* probabilities, const T* values, int64_t stride, int64_t n,
                                int64_t width, bool first, accum_t<T> decay, accum_t<T>* out) {
  using A = accum_t<T>;
  using V = Vec<A>;
  for (int64_t column = 0; column < width; column += 4 * V::kWidth) {
    const bool whole = width - column >= 4 * V::kWidth;
    int lanes[4];
    V sum[4];
    for (int j = 0; j < 4; ++j) {
      lanes[j] = static_cast<int>(max_of(0, min_of(V::kWidth, width - column - j * V::kWidth)));
      sum[j] = V::zero();
    }
    const T* from = values + column;
    for (int64_t key = 0; key < n; ++key, from += stride) {
      const V p = V::set1(probabilities[key]);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        if (whole) {
          sum[j] = fma(p, V::load(from + j * V::kWidth), sum[j]);
        } else if (lanes[j] > 0) {
          sum[j] = fma(p, V::load(from + j * V::kWidth, lanes[j]), sum[j]);
        }
      }
    }
    for (int j = 0; j < 4; ++j) {
      A* to = out + column + j * V::kWidth;
      if (lanes[j] > 0) (first ? sum[j] : fma(V::load(to), V::set1(decay), sum[j])).store(to);
    }
  }
}
