// Layer norm, alone or after residual + dropout(x): Ba, Kiros and Hinton (2016), https://arxiv.org/abs/1607.06450.

// Rows that one item takes, so that an item is worth a thread's while.
static inline int64_t layer_norm_grain(int64_t width) { return max_of(1, 16384 / max_of(width, 1)); }

// A row in the type that it is computed in: where it lies if it has that type, else widened to `room`. Null stays null.
template <class A>
static inline const A* widened(const A* row, int64_t, A*) {
  return row;
}
template <class A, class T>
static inline const A* widened(const T* row, int64_t width, A* room) {
  if (row == nullptr) return nullptr;
  using V = Vec<A>;
  for_vectors<V>(width, [&](int64_t i, int lanes) { store_lanes(room + i, load_lanes<V>(row + i, lanes), lanes); });
  return room;
}

template <class A>
struct Moments {
  A mean, rstd;
};

static FASTTX_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
static FASTTX_INLINE double square_root(double x) { return __builtin_sqrt(x); }

template <class A>
static inline Moments<A> moments(const A* x, int64_t width, double eps) {
  using V = Vec<A>;
  const A mean = sum_vectors<V>(width, [&](int64_t i, int lanes) { return load_lanes<V>(x + i, lanes); }) /
                 static_cast<A>(width);
  const V center = V::set1(mean);
  // Two passes: the sum of squares minus the squared sum would cancel.
  const A variance = sum_vectors<V>(width, [&](int64_t i, int lanes) {
                       const V d = load_lanes<V>(x + i, lanes) - center;
                       const V square = d * d;
                       return lanes == V::kWidth ? square : select(first_lanes<V>(lanes), square, V::zero());
                     }) / static_cast<A>(width);
  return {mean, A(1) / square_root(variance + static_cast<A>(eps))};
}

// Items are rows.
template <class T>
struct LayerNormFwdKernel {
  using A = accum_t<T>;
  using V = Vec<A>;

  static int64_t line(const LayerNormFwd& g) { return round_up(g.width, V::kWidth); }

  static Plan plan(const LayerNormFwd& g) {
    // The scratch holds, widened, a row, the weight and the bias; and the factors of a row's dropout.
    return {g.rows, layer_norm_grain(g.width), 4 * sizeof(A) * line(g), false};
  }

  static void run(const LayerNormFwd& g, void* scratch, int64_t begin, int64_t end) {
    A* room = static_cast<A*>(scratch);
    A* keep = room + line(g);
    const A* weight = widened(static_cast<const T*>(g.weight), g.width, keep + line(g));
    const A* bias = widened(static_cast<const T*>(g.bias), g.width, keep + 2 * line(g));
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(g.x) + row * g.width;
      T* y = static_cast<T*>(g.y) + row * g.width;
      if (g.residual != nullptr) {
        add(g, row, x, room, keep);
        normalize(g, x, room, weight, bias, y);
      } else {
        normalize(g, x, widened(x, g.width, room), weight, bias, y);
      }
    }
  }

  // sum = residual + dropout(x), kept unrounded: the row is normalised as it was before it was stored.
  static void add(const LayerNormFwd& g, int64_t row, const T* x, A* sum, A* keep) {
    const T* residual = static_cast<const T*>(g.residual) + row * g.width;
    T* stored = g.sum == nullptr ? nullptr : static_cast<T*>(g.sum) + row * g.width;
    if (g.dropout.active)
      dropout_keep(keep, g.width, g.dropout.seed, 0, 0, row, 0, g.dropout.threshold, static_cast<A>(g.dropout.scale));
    for_vectors<V>(g.width, [&](int64_t i, int lanes) {
      V value = load_lanes<V>(x + i, lanes);
      if (g.dropout.active) value = drop(value, load_lanes<V>(keep + i, lanes));
      value = value + load_lanes<V>(residual + i, lanes);
      store_lanes(sum + i, value, lanes);
      if (stored != nullptr) store_lanes(stored + i, value, lanes);
    });
  }

  // x: the row as it is computed in; `from` is where the row, and the next one, come from.
  static void normalize(const LayerNormFwd& g, const T* from, const A* x, const A* weight, const A* bias, T* y) {
    const Moments<A> m = moments(x, g.width, g.eps);
    const V center = V::set1(m.mean), factor = V::set1(m.rstd);
    for_vectors<V>(g.width, [&](int64_t i, int lanes) {
      prefetch(from + g.width + i);
      V value = (load_lanes<V>(x + i, lanes) - center) * factor;
      if (weight != nullptr) value = value * load_lanes<V>(weight + i, lanes);
      if (bias != nullptr) value = value + load_lanes<V>(bias + i, lanes);
      store_lanes(y + i, value, lanes);
    });
  }
};

// Items are the chunks of rows whose weight gradients are summed together.
template <class T>
struct LayerNormBwdKernel {
  using A = accum_t<T>;
  using V = Vec<A>;

  static int64_t line(const LayerNormBwd& g) { return round_up(g.width, V::kWidth); }

  static Plan plan(const LayerNormBwd& g) {
    // The scratch holds, widened, a row of x, one of dy and the weight; and the factors of a row's dropout.
    return {sum_chunks(g.rows), max_of(1, layer_norm_grain(g.width) / sum_chunk_rows(g.rows)), 4 * sizeof(A) * line(g),
            false};
  }

  static void run(const LayerNormBwd& g, void* scratch, int64_t begin, int64_t end) {
    A* room = static_cast<A*>(scratch);
    A* keep = room + 3 * line(g);
    const A* weight = widened(static_cast<const T*>(g.weight), g.width, room + 2 * line(g));
    const int64_t chunk_rows = sum_chunk_rows(g.rows);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      A* dweight = partial_row(g, g.dweight_partial, chunk);
      A* dbias = partial_row(g, g.dbias_partial, chunk);
      const int64_t last = min_of(g.rows, (chunk + 1) * chunk_rows);
      for (int64_t row = chunk * chunk_rows; row < last; ++row) {
        const A* x = widened(static_cast<const T*>(g.x) + row * g.width, g.width, room);
        const A* dy = widened(static_cast<const T*>(g.dy) + row * g.width, g.width, room + line(g));
        gradients(g, row, x, dy, weight, dweight, dbias, keep);
      }
    }
  }

  static A* partial_row(const LayerNormBwd& g, void* partial, int64_t chunk) {
    if (partial == nullptr) return nullptr;
    A* row = static_cast<A*>(partial) + chunk * g.partial_stride;
    memset(row, 0, sizeof(A) * g.width);
    return row;
  }

  // dx = rstd (g - mean(g) - normalized mean(g normalized)) + dsum, where g = dy * weight. The moments are taken anew: the
  // row has to come from memory in any case.
  static void gradients(const LayerNormBwd& g, int64_t row, const A* x, const A* dy, const A* weight, A* dweight,
                        A* dbias, A* keep) {
    const Moments<A> m = moments(x, g.width, g.eps);
    const V mean = V::set1(m.mean), rstd = V::set1(m.rstd);
    const auto normalized = [&](int64_t i, int lanes) { return (load_lanes<V>(x + i, lanes) - mean) * rstd; };
    const auto weighted = [&](V grad, int64_t i, int lanes) {
      return weight == nullptr ? grad : grad * load_lanes<V>(weight + i, lanes);
    };
    const auto sums = sum_vectors<VecPair<V>>(g.width, [&](int64_t i, int lanes) -> VecPair<V> {
      const V grad = load_lanes<V>(dy + i, lanes), norm = normalized(i, lanes);
      if (dweight != nullptr) store_lanes(dweight + i, fma(grad, norm, load_lanes<V>(dweight + i, lanes)), lanes);
      if (dbias != nullptr) store_lanes(dbias + i, load_lanes<V>(dbias + i, lanes) + grad, lanes);
      const V inner = weighted(grad, i, lanes), product = inner * norm;
      // The lanes past the end hold zero in `inner`, but -mean * rstd in `norm`, which may be infinite.
      return {inner, lanes == V::kWidth ? product : select(first_lanes<V>(lanes), product, V::zero())};
    });
    if (g.dx == nullptr && g.dinput == nullptr) return;

    const A width = static_cast<A>(g.width);
    const V mean_g = V::set1(sums.first / width), mean_gx = V::set1(sums.second / width);
    const T* dsum = g.dsum == nullptr ? nullptr : static_cast<const T*>(g.dsum) + row * g.width;
    T* dx = g.dx == nullptr ? nullptr : static_cast<T*>(g.dx) + row * g.width;
    T* dinput = g.dinput == nullptr ? nullptr : static_cast<T*>(g.dinput) + row * g.width;
    if (dinput != nullptr && g.dropout.active)
      dropout_keep(keep, g.width, g.dropout.seed, 0, 0, row, 0, g.dropout.threshold, static_cast<A>(g.dropout.scale));
    const T* from = static_cast<const T*>(g.x) + (row + 1) * g.width;
    const T* dy_from = static_cast<const T*>(g.dy) + (row + 1) * g.width;
    for_vectors<V>(g.width, [&](int64_t i, int lanes) {
      prefetch(from + i);
      prefetch(dy_from + i);
      const V inner = weighted(load_lanes<V>(dy + i, lanes), i, lanes);
      V grad = (inner - mean_g - normalized(i, lanes) * mean_gx) * rstd;
      if (dsum != nullptr) grad = grad + load_lanes<V>(dsum + i, lanes);
      if (dx != nullptr) store_lanes(dx + i, grad, lanes);
      if (dinput != nullptr)
        store_lanes(dinput + i, g.dropout.active ? drop(grad, load_lanes<V>(keep + i, lanes)) : grad, lanes);
    });
  }
};
