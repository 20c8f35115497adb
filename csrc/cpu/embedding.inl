// What a transformer's first layer reads: the sum of a token's, a position's and a segment's entry, its layer norm and
// dropout; and back.

constexpr int kListVectors = 4;

// Reads rows of sums: token_scale * token + position + segment, in A.
template <class T>
class EntrySums {
  using A = accum_t<T>;
  using V = Vec<A>;

 public:
  explicit EntrySums(const Embedding& g) : g_(g) {}

  // Writes one to `room`, whole vectors, and returns the sum of its values.
  A read(int64_t row, A* room) const {
    const T* token = row_of<T>(g_.token_weight, g_.token_ids[row], g_.width);
    const T* position = row_of<T>(g_.position_weight, position_of(row), g_.width);
    const T* segment = row_of<T>(g_.segment_weight, g_.segment_ids == nullptr ? 0 : g_.segment_ids[row], g_.width);
    const T* next = row + 1 < g_.rows ? row_of<T>(g_.token_weight, g_.token_ids[row + 1], g_.width) : token;
    const V scale = V::set1(static_cast<A>(g_.token_scale));
    return sum_vectors<V>(g_.width, [=](int64_t i, int lanes) __attribute__((always_inline)) {
      prefetch(next + i);
      V value = load_lanes<V>(token + i, lanes) * scale;
      if (position != nullptr) value = value + load_lanes<V>(position + i, lanes);
      if (segment != nullptr) value = value + load_lanes<V>(segment + i, lanes);
      value.store(room + i);
      return value;
    });
  }

 private:
  int64_t position_of(int64_t row) const {
    return g_.position_ids == nullptr ? g_.offset + row % g_.length : g_.position_ids[row];
  }
  const Embedding g_;
};

template <class A>
static int64_t embedding_line(const Embedding& g) {
  return round_up(g.width, Vec<A>::kWidth);
}

template <class T>
struct EmbeddingFwdKernel {
  using A = accum_t<T>;
  using V = Vec<A>;

  static Plan plan(const EmbeddingFwd& g) {
    // The scratch holds, widened, a row, the weight and the bias; and the words of a row's dropout.
    return {g.rows, layer_norm_grain(g.width), 3 * sizeof(A) * embedding_line<A>(g) + dropout_words_bytes(g.width),
            false};
  }

  static void run(const EmbeddingFwd& g, void* scratch, int64_t begin, int64_t end) {
    A* const room = static_cast<A*>(scratch);
    const int64_t line = embedding_line<A>(g);
    const bool norms = g.norm_weight != nullptr, drops = g.dropout.active;
    const A* weight = widened(static_cast<const T*>(g.norm_weight), g.width, A(1), room + line);
    const A* bias = widened(static_cast<const T*>(g.norm_bias), g.width, A(0), room + 2 * line);
    uint32_t* const words = reinterpret_cast<uint32_t*>(room + 3 * line);
    const EntrySums<T> sums(g);
    const V scale = V::set1(static_cast<A>(g.dropout.scale));
    const uint32_t threshold = g.dropout.threshold;
    for (int64_t row = begin; row < end; ++row) {
      const A sum = sums.read(row, room);
      Moments<A> m{A(0), A(1)};
      if (norms) m = moments(static_cast<const A*>(room), sum, g.width, g.eps);
      const V center = V::set1(m.mean), factor = V::set1(m.rstd);
      if (drops) dropout_words(words, g.width, g.dropout.seed, row);
      T* y = row_of<T>(g.y, row, g.width);
      for_vectors<V>(g.width, [=](int64_t i, int lanes) __attribute__((always_inline)) {
        V value = V::load(room + i);
        if (norms) {
          value = fma((value - center) * factor, load_lanes<V>(weight + i, lanes), load_lanes<V>(bias + i, lanes));
        }
        if (drops) value = drop(value, V::at_least(words + i, threshold), scale);
        store_lanes(y + i, value, lanes);
      });
    }
  }
};

// Items are the chunks of rows whose weight gradients are summed together. The sums are read anew, not kept.
template <class T>
struct EmbeddingBwdKernel {
  using A = accum_t<T>;
  using V = Vec<A>;

  static Plan plan(const EmbeddingBwd& g) {
    // The scratch holds, widened, a row of sums, one of slopes, and the weight; and the words of a row's dropout.
    return {sum_chunks(g.rows), max_of(1, layer_norm_grain(g.width) / sum_chunk_rows(g.rows)),
            3 * sizeof(A) * embedding_line<A>(g) + dropout_words_bytes(g.width), false};
  }

  static void run(const EmbeddingBwd& g, void* scratch, int64_t begin, int64_t end) {
    A* room = static_cast<A*>(scratch);
    const int64_t line = embedding_line<A>(g);
    const A* weight = widened(static_cast<const T*>(g.norm_weight), g.width, A(1), room + 2 * line);
    uint32_t* words = reinterpret_cast<uint32_t*>(room + 3 * line);
    const EntrySums<T> sums(g);
    const int64_t chunk_rows = sum_chunk_rows(g.rows);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      A* dweight = partial_row(g, g.dweight_partial, chunk);
      A* dbias = partial_row(g, g.dbias_partial, chunk);
      const int64_t last = min_of(g.rows, (chunk + 1) * chunk_rows);
      for (int64_t row = chunk * chunk_rows; row < last; ++row) {
        slopes(g, row, room + line, words);
        if (g.norm_weight == nullptr) {
          memcpy(static_cast<A*>(g.dx) + row * g.width, room + line, sizeof(A) * g.width);
        } else {
          const A sum = sums.read(row, room);
          gradients(g, row, room, sum, room + line, weight, dweight, dbias);
        }
      }
    }
  }

  static A* partial_row(const EmbeddingBwd& g, void* partial, int64_t chunk) {
    if (partial == nullptr) return nullptr;
    A* row = static_cast<A*>(partial) + chunk * g.partial_stride;
    memset(row, 0, sizeof(A) * g.width);
    return row;
  }

  // What reaches the layer norm: dy through the dropout. Zero up to a whole vector.
  static void slopes(const EmbeddingBwd& g, int64_t row, A* out, uint32_t* words) {
    const T* dy = row_of<T>(g.dy, row, g.width);
    const bool drops = g.dropout.active;
    if (drops) dropout_words(words, g.width, g.dropout.seed, row);
    const V scale = V::set1(static_cast<A>(g.dropout.scale));
    for_vectors<V>(g.width, [&](int64_t i, int lanes) __attribute__((always_inline)) {
      V value = load_lanes<V>(dy + i, lanes);
      if (drops) value = drop(value, V::at_least(words + i, g.dropout.threshold), scale);
      value.store(out + i);
    });
  }

  // dx = rstd (g - mean(g) - normalized mean(g normalized)), where g = slope * weight.
  static void gradients(const EmbeddingBwd g, int64_t row, const A* x, A sum, const A* slope, const A* weight, A* dweight,
                        A* dbias) {
    const Moments<A> m = moments(x, sum, g.width, g.eps);
    const V mean = V::set1(m.mean), rstd = V::set1(m.rstd);
    const auto normalized = [=](int64_t i) __attribute__((always_inline)) { return (V::load(x + i) - mean) * rstd; };
    const auto sums = sum_vectors<VecPair<V>>(g.width, [=](int64_t i, int lanes) __attribute__((always_inline)) {
      const V grad = V::load(slope + i), norm = normalized(i);
      if (dweight != nullptr) store_lanes(dweight + i, fma(grad, norm, load_lanes<V>(dweight + i, lanes)), lanes);
      if (dbias != nullptr) store_lanes(dbias + i, load_lanes<V>(dbias + i, lanes) + grad, lanes);
      const V inner = grad * load_lanes<V>(weight + i, lanes), product = inner * norm;
      // The lanes past the end hold zero in `inner`, but -mean * rstd in `norm`, which may be infinite.
      return VecPair<V>{inner, lanes == V::kWidth ? product : select(first_lanes<V>(lanes), product, V::zero())};
    });
    const A width = static_cast<A>(g.width);
    const V mean_g = V::set1(sums.first / width), mean_gx = V::set1(sums.second / width);
    A* dx = static_cast<A*>(g.dx) + row * g.width;
    for_vectors<V>(g.width, [=](int64_t i, int lanes) __attribute__((always_inline)) {
      const V inner = V::load(slope + i) * load_lanes<V>(weight + i, lanes);
      store_lanes(dx + i, fnma(normalized(i), mean_gx, inner - mean_g) * rstd, lanes);
    });
  }
};

template <class T>
struct ListSumKernel {
  using A = accum_t<T>;
  using V = Vec<A>;
  static constexpr int64_t kColumns = kListVectors * V::kWidth;

  static Plan plan(const ListSum& g) {
    return {g.lists * ceil_div(g.width, kColumns), max_of(1, 1024 / kColumns), 0, true};
  }

  static void run(const ListSum& g, void*, int64_t begin, int64_t end) {
    const int64_t groups = ceil_div(g.width, kColumns);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t list = item / groups, column = item % groups * kColumns;
      const int64_t* rows = g.order + g.starts[list];
      const int64_t count = g.starts[list + 1] - g.starts[list];
      const A* x = static_cast<const A*>(g.x) + column;
      T* out = static_cast<T*>(g.out) + g.entries[list] * g.width + column;
      const int64_t columns = min_of(kColumns, g.width - column);
      V total[kListVectors];
      for (int j = 0; j < kListVectors; ++j) total[j] = V::zero();
      for (int64_t row = 0; row < count; row += kSumBlock) {
        V sum[kListVectors];
        for (int j = 0; j < kListVectors; ++j) sum[j] = V::zero();
        for (int64_t i = row; i < min_of(count, row + kSumBlock); ++i)
          for (int j = 0; j < kListVectors; ++j) sum[j] = sum[j] + part(x + rows[i] * g.width, j, columns);
        for (int j = 0; j < kListVectors; ++j) total[j] = total[j] + sum[j];
      }
      const V scale = V::set1(static_cast<A>(g.scale));
      for (int j = 0; j < kListVectors; ++j)
        if (lanes_of(j, columns) > 0) store_lanes(out + j * V::kWidth, total[j] * scale, lanes_of(j, columns));
    }
  }

  // The lanes of the group's vector j, of so many columns.
  static FASTTX_INLINE int lanes_of(int j, int64_t columns) {
    return static_cast<int>(max_of(0, min_of(V::kWidth, columns - j * V::kWidth)));
  }
  static FASTTX_INLINE V part(const A* x, int j, int64_t columns) {
    return columns == kColumns ? V::load(x + j * V::kWidth) : V::load(x + j * V::kWidth, lanes_of(j, columns));
  }
};
