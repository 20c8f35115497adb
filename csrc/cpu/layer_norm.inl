// Layer norm, alone or after residual + dropout(x): Ba, Kiros and Hinton (2016), https://arxiv.org/abs/1607.06450.

// Rows that one item takes, so that an item is worth a thread's while.
static inline int64_t layer_norm_grain(int64_t width) { return max_of(1, 16384 / max_of(width, 1)); }

// A row in the type that it is computed in: where it lies if it has that type, else widened to `room`. In place of a null
// row, one that holds `absent` everywhere.
template <class A>
static inline const A* in_room(int64_t width, A absent, A* room) {
  using V = Vec<A>;
  for_vectors<V>(width, [&](int64_t i, int lanes) { store_lanes(room + i, V::set1(absent), lanes); });
  return room;
}
template <class A>
static inline const A* widened(const A* row, int64_t width, A absent, A* room) {
  return row == nullptr ? in_room(width, absent, room) : row;
}
template <class A, class T>
static inline const A* widened(const T* row, int64_t width, A absent, A* room) {
  if (row == nullptr) return in_room(width, absent, room);
  using V = Vec<A>;
  for_vectors<V>(width, [&](int64_t i, int lanes) { store_lanes(room + i, load_lanes<V>(row + i, lanes), lanes); });
  return room;
}

// To where a result lies: past the caches, whole vectors, or into them.
template <bool kStreamed, class T, class V>
static FASTTX_INLINE void put(T* p, V value, int lanes) {
  if constexpr (kStreamed) {
    value.stream(p);
  } else {
    store_lanes(p, value, lanes);
  }
}

// Row `row` of a (rows, width) matrix; null of a null one.
template <class T>
static FASTTX_INLINE const T* row_of(const void* matrix, int64_t row, int64_t width) {
  return matrix == nullptr ? nullptr : static_cast<const T*>(matrix) + row * width;
}
template <class T>
static FASTTX_INLINE T* row_of(void* matrix, int64_t row, int64_t width) {
  return matrix == nullptr ? nullptr : static_cast<T*>(matrix) + row * width;
}

template <class A>
struct Moments {
  A mean, rstd;
};

static FASTTX_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
static FASTTX_INLINE double square_root(double x) { return __builtin_sqrt(x); }

// Of a row x whose sum is known.
template <class A>
static inline Moments<A> moments(const A* x, A sum, int64_t width, double eps) {
  using V = Vec<A>;
  const A mean = sum / static_cast<A>(width);
  const V center = V::set1(mean);
  // Two passes: the sum of squares minus the squared sum would cancel.
  const A variance = sum_vectors<V>(width, [&](int64_t i, int lanes) {
                       const V d = load_lanes<V>(x + i, lanes) - center;
                       const V square = d * d;
                       return lanes == V::kWidth ? square : select(first_lanes<V>(lanes), square, V::zero());
                     }) / static_cast<A>(width);
  return {mean, A(1) / square_root(variance + static_cast<A>(eps))};
}

// Items are rows. One loop writes a row and reads the next one: memory and the adders never wait for each other.
template <class T>
struct LayerNormFwdKernel {
  using A = accum_t<T>;
  using V = Vec<A>;

  static int64_t line(const LayerNormFwd& g) { return round_up(g.width, V::kWidth); }

  static Plan plan(const LayerNormFwd& g) {
    // The scratch holds, widened, two rows, the weight and the bias; and the words of a row's dropout.
    return {g.rows, layer_norm_grain(g.width), 4 * sizeof(A) * line(g) + dropout_words_bytes(g.width), false};
  }

  enum class Source { alone, added, dropped };

  static void run(const LayerNormFwd& g, void* scratch, int64_t begin, int64_t end) {
    if (begin >= end) return;
    g.streamed ? rows<true>(g, scratch, begin, end) : rows<false>(g, scratch, begin, end);
  }

  template <bool kStreamed>
  static void rows(const LayerNormFwd& g, void* scratch, int64_t begin, int64_t end) {
    if (g.residual == nullptr) return rows<Source::alone, kStreamed>(g, scratch, begin, end);
    if (!g.dropout.active) return rows<Source::added, kStreamed>(g, scratch, begin, end);
    rows<Source::dropped, kStreamed>(g, scratch, begin, end);
  }

  // g by value: what is stored cannot change it, so that it need not be read again.
  template <Source kSource, bool kStreamed>
  static void rows(const LayerNormFwd g, void* scratch, int64_t begin, int64_t end) {
    A* const room = static_cast<A*>(scratch);
    const A* weight = widened(static_cast<const T*>(g.weight), g.width, A(1), room + 2 * line(g));
    const A* bias = widened(static_cast<const T*>(g.bias), g.width, A(0), room + 3 * line(g));
    uint32_t* const words = reinterpret_cast<uint32_t*>(room + 4 * line(g));

    // Reads a row: x, or residual + dropout(x), unrounded, as it is normalised; what is not in memory so is kept in one
    // of two rooms.
    constexpr bool kInPlace = kSource == Source::alone && sizeof(T) == sizeof(A);
    const auto reader = [&](int64_t row) {
      const T* x = row_of<T>(g.x, row, g.width);
      const T* residual = row_of<T>(g.residual, row, g.width);
      T* stored = row_of<T>(g.sum, row, g.width);
      A* kept = room + (row & 1) * line(g);
      if constexpr (kSource == Source::dropped) dropout_words(words, g.width, g.dropout.seed, row);
      const V scale = V::set1(static_cast<A>(g.dropout.scale));
      const uint32_t threshold = g.dropout.threshold;
      const int64_t width = g.width;  // to ask for the next row
      return [=](int64_t i, int lanes) __attribute__((always_inline)) {
        prefetch(x + width + i);
        V value = load_lanes<V>(x + i, lanes);
        if constexpr (kSource == Source::dropped) value = drop(value, V::at_least(words + i, threshold), scale);
        if constexpr (kSource != Source::alone) {
          prefetch(residual + width + i);
          value = value + load_lanes<V>(residual + i, lanes);
          if (stored != nullptr) put<kStreamed>(stored + i, value, lanes);
        }
        if constexpr (!kInPlace) value.store(kept + i);  // whole vectors: the rooms are padded
        return value;
      };
    };

    A sum = sum_vectors<V>(g.width, reader(begin));
    for (int64_t row = begin; row < end; ++row) {
      const A* x = room + (row & 1) * line(g);
      if constexpr (kInPlace) x = row_of<A>(g.x, row, g.width);
      const Moments<A> m = moments(x, sum, g.width, g.eps);
      const V center = V::set1(m.mean), factor = V::set1(m.rstd);
      T* y = row_of<T>(g.y, row, g.width);
      const auto write = [=](int64_t i, int lanes) __attribute__((always_inline)) {
        const V norm = (load_lanes<V>(x + i, lanes) - center) * factor;
        const V value = fma(norm, load_lanes<V>(weight + i, lanes), load_lanes<V>(bias + i, lanes));
        if constexpr (!kStreamed) prefetch_to_write(y + g.width + i);
        put<kStreamed>(y + i, value, lanes);
      };
      if (row + 1 == end) {
        for_vectors<V>(g.width, write);
      } else {
        const auto read = reader(row + 1);
        sum = sum_vectors<V>(g.width, [&](int64_t i, int lanes) __attribute__((always_inline)) {
          write(i, lanes);
          return read(i, lanes);
        });
      }
    }
    if constexpr (kStreamed) finish_streams();
  }
};

// Items are the chunks of rows whose weight gradients are summed together.
template <class T>
struct LayerNormBwdKernel {
  using A = accum_t<T>;
  using V = Vec<A>;

  static int64_t line(const LayerNormBwd& g) { return round_up(g.width, V::kWidth); }

  static Plan plan(const LayerNormBwd& g) {
    // The scratch holds, widened, a row of x and the weight; and the words of a row's dropout.
    return {sum_chunks(g.rows), max_of(1, layer_norm_grain(g.width) / sum_chunk_rows(g.rows)),
            2 * sizeof(A) * line(g) + dropout_words_bytes(g.width), false};
  }

  static void run(const LayerNormBwd& g, void* scratch, int64_t begin, int64_t end) {
    g.streamed ? chunks<true>(g, scratch, begin, end) : chunks<false>(g, scratch, begin, end);
  }

  template <bool kStreamed>
  static void chunks(const LayerNormBwd& g, void* scratch, int64_t begin, int64_t end) {
    A* room = static_cast<A*>(scratch);
    const A* weight = widened(static_cast<const T*>(g.weight), g.width, A(1), room + line(g));
    uint32_t* words = reinterpret_cast<uint32_t*>(room + 2 * line(g));
    const int64_t chunk_rows = sum_chunk_rows(g.rows);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      A* dweight = partial_row(g, g.dweight_partial, chunk);
      A* dbias = partial_row(g, g.dbias_partial, chunk);
      const int64_t last = min_of(g.rows, (chunk + 1) * chunk_rows);
      for (int64_t row = chunk * chunk_rows; row < last; ++row)
        gradients<kStreamed>(g, row, room, weight, dweight, dbias, words);
    }
    if constexpr (kStreamed) finish_streams();
  }

  static A* partial_row(const LayerNormBwd& g, void* partial, int64_t chunk) {
    if (partial == nullptr) return nullptr;
    A* row = static_cast<A*>(partial) + chunk * g.partial_stride;
    memset(row, 0, sizeof(A) * g.width);
    return row;
  }

  // dx = rstd (g - mean(g) - normalized mean(g normalized)) + dsum, where g = dy * weight. The moments are taken anew: the
  // row has to come from memory in any case.
  template <bool kStreamed>
  static void gradients(const LayerNormBwd g, int64_t row, A* room, const A* weight, A* dweight, A* dbias,
                        uint32_t* words) {
    const T* from = row_of<T>(g.x, row, g.width);
    const T* dy = row_of<T>(g.dy, row, g.width);
    constexpr bool kInPlace = sizeof(T) == sizeof(A);
    const A sum = sum_vectors<V>(g.width, [=](int64_t i, int lanes) __attribute__((always_inline)) {
      const V value = load_lanes<V>(from + i, lanes);
      if constexpr (!kInPlace) value.store(room + i);  // whole vectors: the room is padded
      return value;
    });
    const A* x = room;
    if constexpr (kInPlace) x = from;
    const Moments<A> m = moments(x, sum, g.width, g.eps);
    const V mean = V::set1(m.mean), rstd = V::set1(m.rstd);
    const auto normalized = [=](int64_t i, int lanes) __attribute__((always_inline)) {
      return (load_lanes<V>(x + i, lanes) - mean) * rstd;
    };
    const int64_t next = g.width;  // the next row is on its way while words are drawn
    const auto sums = sum_vectors<VecPair<V>>(g.width, [=](int64_t i, int lanes) __attribute__((always_inline)) {
      prefetch(from + next + i);
      prefetch(dy + next + i);
      const V grad = load_lanes<V>(dy + i, lanes), norm = normalized(i, lanes);
      if (dweight != nullptr) store_lanes(dweight + i, fma(grad, norm, load_lanes<V>(dweight + i, lanes)), lanes);
      if (dbias != nullptr) store_lanes(dbias + i, load_lanes<V>(dbias + i, lanes) + grad, lanes);
      const V inner = grad * load_lanes<V>(weight + i, lanes), product = inner * norm;
      // The lanes past the end hold zero in `inner`, but -mean * rstd in `norm`, which may be infinite.
      return VecPair<V>{inner, lanes == V::kWidth ? product : select(first_lanes<V>(lanes), product, V::zero())};
    });
    if (g.dx == nullptr && g.dinput == nullptr) return;

    const A width = static_cast<A>(g.width);
    const V mean_g = V::set1(sums.first / width), mean_gx = V::set1(sums.second / width);
    const T* dsum = row_of<T>(g.dsum, row, g.width);
    T* dx = row_of<T>(g.dx, row, g.width);
    T* dinput = row_of<T>(g.dinput, row, g.width);
    const bool dropped = dinput != nullptr && g.dropout.active;
    if (dropped) dropout_words(words, g.width, g.dropout.seed, row);
    const uint32_t threshold = g.dropout.threshold;
    const V scale = V::set1(static_cast<A>(g.dropout.scale));
    for_vectors<V>(g.width, [=](int64_t i, int lanes) __attribute__((always_inline)) {
      const V inner = load_lanes<V>(dy + i, lanes) * load_lanes<V>(weight + i, lanes);
      V grad = fnma(normalized(i, lanes), mean_gx, inner - mean_g) * rstd;
      if (dsum != nullptr) grad = grad + load_lanes<V>(dsum + i, lanes);
      if (dx != nullptr) {
        if constexpr (!kStreamed) prefetch_to_write(dx + next + i);
        put<kStreamed>(dx + i, grad, lanes);
      }
      if (dropped) grad = drop(grad, V::at_least(words + i, threshold), scale);
      if (dinput != nullptr) {
        if constexpr (!kStreamed) prefetch_to_write(dinput + next + i);
        put<kStreamed>(dinput + i, grad, lanes);
      }
    });
  }
};
