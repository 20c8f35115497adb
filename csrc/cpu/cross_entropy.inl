// Cross-entropy of logits that are never there as a whole: sums kept relative to the largest so far, a stretch of classes
// after the other (Milakov and Gimelshein, "Online normalizer calculation for softmax", https://arxiv.org/abs/1805.02867).

// Elements that are worth waking a thread for.
constexpr int64_t kCrossEntropyGrain = 16384;

// Where no logit is finite, subtracting 0 lets exp give 0 for -inf and NaN for NaN.
template <class A>
static FASTTX_INLINE A base_of(A largest) {
  return largest == -__builtin_inff() ? A(0) : largest;
}

template <class T>
struct CrossEntropyFwdKernel {
  using A = accum_t<T>;
  using V = Vec<A>;

  static Plan plan(const CrossEntropyFwd& g) {
    return {g.rows, max_of(1, kCrossEntropyGrain / max_of(1, g.columns)), 0, false};
  }

  static void run(const CrossEntropyFwd& g, void*, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t place = g.places[row];
      take(g, static_cast<const A*>(g.logits) + row * g.logits_stride, g.target[place],
           static_cast<A*>(g.stats) + 2 * place, static_cast<A*>(g.loss) + place);
    }
  }

  static void take(const CrossEntropyFwd& g, const A* logits, int64_t target, A* stats, A* loss) {
    const bool first = g.first_class == 0, last = g.first_class + g.columns == g.classes;
    const A before = first ? -__builtin_inff() : stats[0];
    const V lowest = V::set1(-__builtin_inff());
    const A here = max_vectors<V>(g.columns, [&](int64_t i, int lanes) __attribute__((always_inline)) {
      const V value = load_lanes<V>(logits + i, lanes);
      return lanes == V::kWidth ? value : select(first_lanes<V>(lanes), value, lowest);
    });
    const A largest = here > before ? here : before;
    const V base = V::set1(base_of(largest));
    A total = sum_vectors<V>(g.columns, [&](int64_t i, int lanes) __attribute__((always_inline)) {
      const V value = exp(load_lanes<V>(logits + i, lanes) - base);
      return lanes == V::kWidth ? value : select(first_lanes<V>(lanes), value, V::zero());
    });
    if (!first) total = total + stats[1] * reduce_max(exp(V::set1(before) - base));
    stats[0] = largest;
    stats[1] = total;

    A mean = first ? A(0) : *loss;
    const A spread = static_cast<A>(g.label_smoothing);
    // Not zero times a logit that is infinite.
    if (spread > 0) {
      const A sum = sum_vectors<V>(g.columns, [&](int64_t i, int lanes) __attribute__((always_inline)) {
        return load_lanes<V>(logits + i, lanes);
      });
      mean = mean + spread / static_cast<A>(g.classes) * sum;
    }
    const int64_t column = target - g.first_class;
    if (column >= 0 && column < g.columns && spread < 1) mean = mean + (A(1) - spread) * logits[column];
    *loss = last ? log(total) + (base_of(largest) - mean) : mean;
  }
};

// dlogits = (softmax - target distribution) grad / divisor.
template <class T>
struct CrossEntropyBwdKernel {
  using A = accum_t<T>;
  using V = Vec<A>;

  static Plan plan(const CrossEntropyBwd& g) {
    return {g.rows, max_of(1, kCrossEntropyGrain / max_of(1, g.columns)), 0, false};
  }

  static void run(const CrossEntropyBwd& g, void*, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t place = g.places[row], column = g.target[place] - g.first_class;
      const A grad = static_cast<const A*>(g.grad)[g.grad_is_shared ? 0 : place] / static_cast<A>(g.divisor);
      const A* logits = static_cast<const A*>(g.logits) + row * g.logits_stride;
      const A* stats = static_cast<const A*>(g.stats) + 2 * place;
      T* dlogits = static_cast<T*>(g.dlogits) + row * g.dlogits_stride;
      const A spread = static_cast<A>(g.label_smoothing), share = spread / static_cast<A>(g.classes);
      // Taken before the logit at the target's place is overwritten.
      const bool is_here = column >= 0 && column < g.columns;
      const A logit = is_here ? logits[column] : A(0);
      const V base = V::set1(base_of(stats[0])), factor = V::set1(A(1) / stats[1]), shares = V::set1(share);
      const V slope = V::set1(grad);
      const auto difference = [=](V value) __attribute__((always_inline)) {
        return exp(value - base) * factor - shares;
      };
      for_vectors<V>(g.columns, [=](int64_t i, int lanes) __attribute__((always_inline)) {
        store_lanes(dlogits + i, difference(load_lanes<V>(logits + i, lanes)) * slope, lanes);
      });
      if (is_here) ((difference(V::set1(logit)) - V::set1(A(1) - spread)) * slope).store(dlogits + column, 1);
    }
  }
};

template <class T>
struct CrossEntropySumKernel {
  using A = accum_t<T>;
  static Plan plan(const CrossEntropySum&) { return {1, 1, 0, false}; }
  static void run(const CrossEntropySum& g, void*, int64_t begin, int64_t end) {
    if (begin == end) return;
    double sum = 0;
    for (int64_t i = 0; i < g.count; ++i) sum += static_cast<const A*>(g.loss)[i];
    *static_cast<A*>(g.out) = static_cast<A>(sum / static_cast<double>(g.divisor));
  }
};
