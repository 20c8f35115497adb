// Sums over rows in a fixed order: column sums by chunk, and the sum of the chunks.

// Calls f(offset, lanes) over a row of `width`: whole vectors first, then what is left.
template <class V, class F>
static inline void for_vectors(int64_t width, const F& f) {
  int64_t i = 0;
  for (; i + V::kWidth <= width; i += V::kWidth) f(i, V::kWidth);
  if (i < width) f(i, static_cast<int>(width - i));
}

template <class V, class T>
static inline V load_lanes(const T* p, int lanes) {
  return lanes == V::kWidth ? V::load(p) : V::load(p, lanes);
}
template <class V, class T>
static inline void store_lanes(T* p, V value, int lanes) {
  lanes == V::kWidth ? value.store(p) : value.store(p, lanes);
}

// The largest value of each of as many rows as a vector has lanes.
template <class V>
FASTTX_INLINE V reduce_max_rows(const V (&rows)[V::kWidth]) {
  decltype(reduce_max(rows[0])) lanes[V::kWidth];
  for (int i = 0; i < V::kWidth; ++i) lanes[i] = reduce_max(rows[i]);
  return V::load(lanes);
}

// Asks for the line at p, to be read or written soon; p need not be mapped. It comes from memory while something else is
// computed: the processor's own prefetcher stops at the end of a page.
static FASTTX_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0); }
static FASTTX_INLINE void prefetch_to_write(void* p) { __builtin_prefetch(p, 1); }

// Two vectors that are summed side by side.
template <class V>
struct VecPair {
  static constexpr int kWidth = V::kWidth;
  V first, second;
  static FASTTX_INLINE VecPair zero() { return {V::zero(), V::zero()}; }
};
template <class V>
FASTTX_INLINE VecPair<V> operator+(VecPair<V> a, VecPair<V> b) {
  return {a.first + b.first, a.second + b.second};
}
template <class A>
struct Pair {
  A first, second;
};
template <class A>
FASTTX_INLINE Pair<A> reduce_add(VecPair<Vec<A>> a) {
  return {reduce_add(a.first), reduce_add(a.second)};
}

// Sum of f(offset, lanes) over a row, by blocks, in chains so that additions do not wait for each other. f gives zero
// in the lanes past the end. Zeros that follow a row do not change a bit of its sum: blocks end at fixed places.
template <class V, class F>
static inline auto sum_vectors(int64_t width, const F& f) {
  constexpr int kChains = V::kWidth < 4 ? 16 : 8;
  constexpr int64_t kStep = kChains * V::kWidth;
  V total[kChains], sum[kChains];
  // Unrolled, so that the chains are registers.
#pragma GCC unroll 16
  for (int j = 0; j < kChains; ++j) total[j] = sum[j] = V::zero();
  int64_t i = 0;
  while (i + kStep <= width) {
#pragma GCC unroll 16
    for (int j = 0; j < kChains; ++j) sum[j] = sum[j] + f(i + j * V::kWidth, V::kWidth);
    i += kStep;
    if (i % (kSumBlock * kStep) != 0) continue;
#pragma GCC unroll 16
    for (int j = 0; j < kChains; ++j) {
      total[j] = total[j] + sum[j];
      sum[j] = V::zero();
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < kChains; ++j, i += V::kWidth)
    if (i < width) sum[j] = sum[j] + f(i, static_cast<int>(min_of(V::kWidth, width - i)));
#pragma GCC unroll 16
  for (int j = 0; j < kChains; ++j) total[j] = total[j] + sum[j];
#pragma GCC unroll 4
  for (int half = kChains / 2; half > 0; half /= 2)
#pragma GCC unroll 16
    for (int j = 0; j < half; ++j) total[j] = total[j] + total[j + half];
  return reduce_add(total[0]);
}

// f(0) + ... + f(rows - 1) in order, by blocks.
template <class V, class F>
static inline V sum_rows(int64_t rows, const F& f) {
  V sum = V::zero();
  for (int64_t row = 0; row < rows;) {
    const int64_t end = min_of(rows, row + kSumBlock);
    V block = f(row++);
    for (; row < end; ++row) block = block + f(row);
    sum = sum + block;
  }
  return sum;
}

// Items are vectors of columns: first those of `out`, then those of `tail`.
template <class T>
struct ReduceRowsKernel {
  using A = accum_t<T>;
  using V = Vec<A>;
  static int64_t head(const ReduceRows& g) { return g.tail == nullptr ? g.width : g.split; }
  static Plan plan(const ReduceRows& g) {
    return {ceil_div(head(g), V::kWidth) + ceil_div(g.width - head(g), V::kWidth), max_of(1, 4096 / max_of(g.rows, 1)),
            0, false};
  }
  static void run(const ReduceRows& g, void*, int64_t begin, int64_t end) {
    const int64_t vectors = ceil_div(head(g), V::kWidth);
    columns(g, 0, head(g), static_cast<T*>(g.out), begin, min_of(end, vectors));
    columns(g, head(g), g.width, static_cast<T*>(g.tail), max_of(begin - vectors, 0), end - vectors);
  }
  // The vectors `begin` to `end` of the columns from `first` on, which end at `last`.
  static void columns(const ReduceRows& g, int64_t first, int64_t last, T* out, int64_t begin, int64_t end) {
    for (int64_t vector = begin; vector < end; ++vector) {
      const int64_t i = vector * V::kWidth;
      const int lanes = static_cast<int>(min_of(V::kWidth, last - first - i));
      const A* column = static_cast<const A*>(g.partial) + first + i;
      const V sum = sum_rows<V>(g.rows, [&](int64_t row) { return load_lanes<V>(column + row * g.row_stride, lanes); });
      store_lanes(out + i, sum, lanes);
    }
  }
};

// Items are chunks of rows.
template <class T>
struct ColumnSumKernel {
  using A = accum_t<T>;
  using V = Vec<A>;
  static Plan plan(const ColumnSum& g) {
    return {sum_chunks(g.rows), max_of(1, 32768 / max_of(1, sum_chunk_rows(g.rows) * g.width)), 0, false};
  }
  static void run(const ColumnSum& g, void*, int64_t begin, int64_t end) {
    const int64_t chunk_rows = sum_chunk_rows(g.rows);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const T* x = static_cast<const T*>(g.x) + chunk * chunk_rows * g.x_stride;
      const int64_t rows = min_of(chunk_rows, g.rows - chunk * chunk_rows);
      A* partial = static_cast<A*>(g.partial) + chunk * g.width;
      for_vectors<V>(g.width, [&](int64_t i, int lanes) {
        const V sum = sum_rows<V>(rows, [&](int64_t row) { return load_lanes<V>(x + row * g.x_stride + i, lanes); });
        store_lanes(partial + i, sum, lanes);
      });
    }
  }
};
