// Layer norm, alone or after residual + dropout(x): Ba, Kiros and Hinton (2016), https://arxiv.org/abs/1607.06450.

// Rows that one item takes, so that an item is worth a thread's while.
static inline int64_t layer_norm_grain(int64_t width) { return max_of(1, 16384 / max_of(width, 1)); }

// Items are rows.
template <class T>
struct LayerNormFwdKernel {
  using A = accum_t<T>;
  using V = Vec<A>;

  static Plan plan(const LayerNormFwd& g) {
    // The scratch holds residual + dropout(x), before and after it is rounded to T, and the dropout's factors.
    return {g.rows, layer_norm_grain(g.width), g.residual != nullptr ? 2 * sizeof(A) * g.width : 0, false};
  }

  static void run(const LayerNormFwd& g, void* scratch, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(g.x) + row * g.width;
      if (g.residual != nullptr) {
        A* sum = static_cast<A*>(scratch);
        add(g, row, x, sum, sum + g.width);
        normalize(g, row, static_cast<const A*>(sum));
      } else {
        normalize(g, row, x);
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

  struct Statistics {
    A mean, rstd;
  };

  template <class S>
  static Statistics statistics(const LayerNormFwd& g, const S* x) {
    const A width = static_cast<A>(g.width);
    const A mean = sum_vectors<V>(g.width, [&](int64_t i, int lanes) { return load_lanes<V>(x + i, lanes); }) / width;
    const V center = V::set1(mean);
    // Two passes: the sum of squares minus the squared sum would cancel.
    const A variance = sum_vectors<V>(g.width, [&](int64_t i, int lanes) {
                         const V d = load_lanes<V>(x + i, lanes) - center;
                         const V square = d * d;
                         return lanes == V::kWidth ? square : select(first_lanes<V>(lanes), square, V::zero());
                       }) / width;
    return {mean, A(1) / square_root(variance + static_cast<A>(g.eps))};
  }

  template <class S>
  static void normalize(const LayerNormFwd& g, int64_t row, const S* x) {
    const Statistics s = statistics(g, x);
    // The backward reads the sum as it was rounded, and needs that row's own statistics.
    const bool rounded = g.sum != nullptr && sizeof(T) != sizeof(A);
    const Statistics kept = rounded ? statistics(g, static_cast<const T*>(g.sum) + row * g.width) : s;
    if (g.mean != nullptr) static_cast<A*>(g.mean)[row] = kept.mean;
    if (g.rstd != nullptr) static_cast<A*>(g.rstd)[row] = kept.rstd;

    const T* weight = static_cast<const T*>(g.weight);
    const T* bias = static_cast<const T*>(g.bias);
    T* y = static_cast<T*>(g.y) + row * g.width;
    const V center = V::set1(s.mean), factor = V::set1(s.rstd);
    for_vectors<V>(g.width, [&](int64_t i, int lanes) {
      V value = (load_lanes<V>(x + i, lanes) - center) * factor;
      if (weight != nullptr) value = value * load_lanes<V>(weight + i, lanes);
      if (bias != nullptr) value = value + load_lanes<V>(bias + i, lanes);
      store_lanes(y + i, value, lanes);
    });
  }

  static float square_root(float x) { return __builtin_sqrtf(x); }
  static double square_root(double x) { return __builtin_sqrt(x); }
};

// Items are the chunks of rows whose weight gradients are summed together.
template <class T>
struct LayerNormBwdKernel {
  using A = accum_t<T>;
  using V = Vec<A>;

  static Plan plan(const LayerNormBwd& g) {
    return {sum_chunks(g.rows), max_of(1, layer_norm_grain(g.width) / sum_chunk_rows(g.rows)), sizeof(A) * g.width,
            false};
  }

  static void run(const LayerNormBwd& g, void* scratch, int64_t begin, int64_t end) {
    const int64_t chunk_rows = sum_chunk_rows(g.rows);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      A* dweight = partial_row(g.dweight_partial, chunk, g.width);
      A* dbias = partial_row(g.dbias_partial, chunk, g.width);
      const int64_t last = min_of(g.rows, (chunk + 1) * chunk_rows);
      for (int64_t row = chunk * chunk_rows; row < last; ++row) {
        if (dweight != nullptr || dbias != nullptr) add_parameter_gradients(g, row, dweight, dbias);
        if (g.dx != nullptr || g.dinput != nullptr) input_gradient(g, row, static_cast<A*>(scratch));
      }
    }
  }

  static A* partial_row(void* partial, int64_t chunk, int64_t width) {
    if (partial == nullptr) return nullptr;
    A* row = static_cast<A*>(partial) + chunk * width;
    memset(row, 0, sizeof(A) * width);
    return row;
  }

  static void add_parameter_gradients(const LayerNormBwd& g, int64_t row, A* dweight, A* dbias) {
    const T* dy = static_cast<const T*>(g.dy) + row * g.width;
    const T* x = static_cast<const T*>(g.x) + row * g.width;
    const V mean = V::set1(static_cast<const A*>(g.mean)[row]);
    const V rstd = V::set1(static_cast<const A*>(g.rstd)[row]);
    for_vectors<V>(g.width, [&](int64_t i, int lanes) {
      const V grad = load_lanes<V>(dy + i, lanes);
      if (dweight != nullptr) {
        const V normalized = (load_lanes<V>(x + i, lanes) - mean) * rstd;
        store_lanes(dweight + i, fma(grad, normalized, load_lanes<V>(dweight + i, lanes)), lanes);
      }
      if (dbias != nullptr) store_lanes(dbias + i, load_lanes<V>(dbias + i, lanes) + grad, lanes);
    });
  }

  // dx = rstd (g - mean(g) - normalized mean(g normalized)) + dsum, where g = dy * weight.
  static void input_gradient(const LayerNormBwd& g, int64_t row, A* keep) {
    const T* dy = static_cast<const T*>(g.dy) + row * g.width;
    const T* x = static_cast<const T*>(g.x) + row * g.width;
    const T* weight = static_cast<const T*>(g.weight);
    const V mean = V::set1(static_cast<const A*>(g.mean)[row]);
    const V rstd = V::set1(static_cast<const A*>(g.rstd)[row]);
    const auto weighted = [&](int64_t i, int lanes) {
      const V grad = load_lanes<V>(dy + i, lanes);
      return weight == nullptr ? grad : grad * load_lanes<V>(weight + i, lanes);
    };
    const auto normalized = [&](int64_t i, int lanes) { return (load_lanes<V>(x + i, lanes) - mean) * rstd; };
    const A width = static_cast<A>(g.width);
    const V mean_g = V::set1(sum_vectors<V>(g.width, weighted) / width);
    // The lanes past the end hold zero in `weighted`, but -mean * rstd in `normalized`, which may be infinite.
    const V mean_gx = V::set1(sum_vectors<V>(g.width, [&](int64_t i, int lanes) {
                                const V product = weighted(i, lanes) * normalized(i, lanes);
                                return lanes == V::kWidth ? product : select(first_lanes<V>(lanes), product, V::zero());
                              }) / width);

    const T* dsum = g.dsum == nullptr ? nullptr : static_cast<const T*>(g.dsum) + row * g.width;
    T* dx = g.dx == nullptr ? nullptr : static_cast<T*>(g.dx) + row * g.width;
    T* dinput = g.dinput == nullptr ? nullptr : static_cast<T*>(g.dinput) + row * g.width;
    if (dinput != nullptr && g.dropout.active)
      dropout_keep(keep, g.width, g.dropout.seed, 0, 0, row, 0, g.dropout.threshold, static_cast<A>(g.dropout.scale));
    for_vectors<V>(g.width, [&](int64_t i, int lanes) {
      V grad = (weighted(i, lanes) - mean_g - normalized(i, lanes) * mean_gx) * rstd;
      if (dsum != nullptr) grad = grad + load_lanes<V>(dsum + i, lanes);
      if (dx != nullptr) store_lanes(dx + i, grad, lanes);
      if (dinput != nullptr)
        store_lanes(dinput + i, g.dropout.active ? drop(grad, load_lanes<V>(keep + i, lanes)) : grad, lanes);
    });
  }
};
