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

// Vectors or rows whose sum is taken by itself, before it is added to the rest: shorter chains round less.
constexpr int64_t kSumBlock = 16;

// Sum of f(offset, lanes) over a row, by blocks, in chains so that additions do not wait for each other. f gives zero
// in the lanes past the end. Zeros that follow a row do not change a bit of its sum: blocks end at fixed places.
template <class V, class F>
static inline auto sum_vectors(int64_t width, const F& f) {
  constexpr int kChains = V::kWidth < 4 ? 16 : 4;  // 16 partial sums at least
  constexpr int64_t kStep = kChains * V::kWidth;
  V total[kChains], sum[kChains];
  for (int j = 0; j < kChains; ++j) total[j] = sum[j] = V::zero();
  int64_t i = 0;
  while (i + kStep <= width) {
    for (int j = 0; j < kChains; ++j) sum[j] = sum[j] + f(i + j * V::kWidth, V::kWidth);
    i += kStep;
    if (i % (kSumBlock * kStep) != 0) continue;
    for (int j = 0; j < kChains; ++j) {
      total[j] = total[j] + sum[j];
      sum[j] = V::zero();
    }
  }
  for (int j = 0; j < kChains && i < width; ++j, i += V::kWidth)
    sum[j] = sum[j] + f(i, static_cast<int>(min_of(V::kWidth, width - i)));
  for (int j = 0; j < kChains; ++j) total[j] = total[j] + sum[j];
  for (int half = kChains / 2; half > 0; half /= 2)
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

// Items are vectors of columns.
template <class T>
struct ReduceRowsKernel {
  using A = accum_t<T>;
  using V = Vec<A>;
  static Plan plan(const ReduceRows& g) {
    return {ceil_div(g.width, V::kWidth), max_of(1, 4096 / max_of(g.rows, 1)), 0, false};
  }
  static void run(const ReduceRows& g, void*, int64_t begin, int64_t end) {
    const A* partial = static_cast<const A*>(g.partial);
    for (int64_t i = begin * V::kWidth; i < min_of(end * V::kWidth, g.width); i += V::kWidth) {
      const int lanes = static_cast<int>(min_of(V::kWidth, g.width - i));
      const V sum = sum_rows<V>(g.rows, [&](int64_t row) { return load_lanes<V>(partial + row * g.width + i, lanes); });
      store_lanes(static_cast<T*>(g.out) + i, sum, lanes);
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
