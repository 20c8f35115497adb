// Cross-entropy of logits that are never there as a whole: sums kept relative to the largest so far, a stretch of classes
// after the other (Milakov and Gimelshein, "Online normalizer calculation for softmax", https://arxiv.org/abs/1805.02867).

// Elements that are worth waking a thread for.
constexpr int64_t kCrossEntropyGrain = 16384;
// Classes that are taken together: their logits stay in L1 between the pass for the largest and that for the sum.
constexpr int64_t kClassBlock = 128;

// Where no logit is finite, subtracting 0 lets exp give 0 for -inf and NaN for NaN.
template <class V>
static FASTTX_INLINE V base_of(V largest) {
  return select(eq(largest, V::set1(-__builtin_inff())), V::zero(), largest);
}

// What the lanes of a vector of rows read and write, each at its place.
template <class A>
struct RowLanes {
  static constexpr int kWidth = Vec<A>::kWidth;
  const int64_t* places;
  int lanes;
  template <class F>
  FASTTX_INLINE Vec<A> load(const F& at) const {
    A values[kWidth] = {};
    for (int i = 0; i < lanes; ++i) values[i] = at(i, places[i]);
    return Vec<A>::load(values);
  }
};

template <class T>
static inline int64_t cross_entropy_grain(int64_t columns) {
  return max_of(1, kCrossEntropyGrain / (Vec<accum_t<T>>::kWidth * max_of(1, columns)));
}

// The logit of class `column` of a stretch, in the lanes of the rows from `row` on.
template <class T, class G>
static FASTTX_INLINE auto logits_of(const G& g, int64_t row, int64_t column, int lanes) {
  using A = accum_t<T>;
  using V = Vec<A>;
  const V value = load_lanes<V>(static_cast<const A*>(g.logits) + column * g.logits_stride + row, lanes);
  if (g.bias == nullptr) return value;
  return value + V::set1(convert_one<A>(static_cast<const T*>(g.bias)[column]));
}

template <class T>
struct CrossEntropyFwdKernel {
  using A = accum_t<T>;
  using V = Vec<A>;

  static Plan plan(const CrossEntropyFwd& g) {
    return {ceil_div(g.rows, V::kWidth), cross_entropy_grain<T>(g.columns), 0, false};
  }

  static void run(const CrossEntropyFwd& g, void*, int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item * V::kWidth;
      take(g, row, static_cast<int>(min_of(V::kWidth, g.rows - row)));
    }
  }

  static void take(const CrossEntropyFwd g, int64_t row, int lanes) {
    const RowLanes<A> rows{g.places + row, lanes};
    A* stats = static_cast<A*>(g.stats);
    A* loss = static_cast<A*>(g.loss);
    const bool first = g.first_class == 0, last = g.first_class + g.columns == g.classes;
    V largest = V::set1(-__builtin_inff()), total = V::zero(), mean = V::zero();
    if (!first) {
      largest = rows.load([&](int, int64_t place) { return stats[2 * place]; });
      total = rows.load([&](int, int64_t place) { return stats[2 * place + 1]; });
      mean = rows.load([&](int, int64_t place) { return loss[place]; });
    }
    const auto logit = [&](int64_t column) __attribute__((always_inline)) { return logits_of<T>(g, row, column, lanes); };
    const bool spreads = g.label_smoothing > 0;  // not zero times a logit that is infinite
    V sum = V::zero();
    for (int64_t start = 0; start < g.columns; start += kClassBlock) {
      const int64_t columns = min_of(kClassBlock, g.columns - start);
      V here = largest;
      // max returns its second operand where the first is NaN.
      for (int64_t i = 0; i < columns; ++i) here = max(logit(start + i), here);
      const V base = base_of(here);
      const V block = sum_rows<V>(columns, [&](int64_t i) __attribute__((always_inline)) { return exp(logit(start + i) - base); });
      total = total * exp(largest - base) + block;
      largest = here;
      if (spreads) sum = sum + sum_rows<V>(columns, [&](int64_t i) { return logit(start + i); });
    }
    const A spread = static_cast<A>(g.label_smoothing);
    if (spreads) mean = mean + V::set1(spread / static_cast<A>(g.classes)) * sum;
    if (spread < 1) {
      mean = mean + V::set1(A(1) - spread) * rows.load([&](int i, int64_t place) {
        const int64_t column = g.target[place] - g.first_class;
        return column < 0 || column >= g.columns ? A(0) : one_logit(g, row + i, column);
      });
    }
    A largests[V::kWidth], totals[V::kWidth], means[V::kWidth], bases[V::kWidth];
    largest.store(largests);
    total.store(totals);
    mean.store(means);
    base_of(largest).store(bases);
    for (int i = 0; i < lanes; ++i) {
      const int64_t place = rows.places[i];
      stats[2 * place] = largests[i];
      stats[2 * place + 1] = totals[i];
      loss[place] = last ? log(totals[i]) + (bases[i] - means[i]) : means[i];
    }
  }

  static A one_logit(const CrossEntropyFwd& g, int64_t row, int64_t column) {
    const A value = static_cast<const A*>(g.logits)[column * g.logits_stride + row];
    return g.bias == nullptr ? value : value + convert_one<A>(static_cast<const T*>(g.bias)[column]);
  }
};

// dlogits = (softmax - target distribution) grad / divisor.
template <class T>
struct CrossEntropyBwdKernel {
  using A = accum_t<T>;
  using V = Vec<A>;

  static Plan plan(const CrossEntropyBwd& g) {
    return {ceil_div(g.rows, V::kWidth), cross_entropy_grain<T>(g.columns), 0, false};
  }

  static void run(const CrossEntropyBwd& g, void*, int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item * V::kWidth;
      take(g, row, static_cast<int>(min_of(V::kWidth, g.rows - row)));
    }
  }

  static void take(const CrossEntropyBwd g, int64_t row, int lanes) {
    const RowLanes<A> rows{g.places + row, lanes};
    const A* stats = static_cast<const A*>(g.stats);
    const A* grad = static_cast<const A*>(g.grad);
    const V base = base_of(rows.load([&](int, int64_t place) { return stats[2 * place]; }));
    const V factor = V::set1(A(1)) / rows.load([&](int, int64_t place) { return stats[2 * place + 1]; });
    const V slope = rows.load([&](int, int64_t place) {
      return grad[g.grad_is_shared ? 0 : place] / static_cast<A>(g.divisor);
    });
    const A spread = static_cast<A>(g.label_smoothing);
    const V share = V::set1(spread / static_cast<A>(g.classes)), most = V::set1(A(1) - spread);
    // Of each row the target, as a column; compared as lanes, which hold columns exactly.
    const V target = rows.load([&](int, int64_t place) {
      const int64_t column = g.target[place] - g.first_class;
      return column < 0 || column >= g.columns ? A(-1) : static_cast<A>(column);
    });
    for (int64_t column = 0; column < g.columns; ++column) {
      const V value = exp(logits_of<T>(g, row, column, lanes) - base) * factor - share;
      const V less = select(eq(target, V::set1(static_cast<A>(column))), most, V::zero());
      store_lanes(static_cast<T*>(g.dlogits) + column * g.logits_stride + row, (value - less) * slope, lanes);
    }
  }
};

template <class T>
struct LineSumKernel {
  using A = accum_t<T>;
  using V = Vec<A>;
  static Plan plan(const LineSum& g) { return {g.lines, max_of(1, kCrossEntropyGrain / max_of(1, g.width)), 0, false}; }
  static void run(const LineSum& g, void*, int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const T* x = static_cast<const T*>(g.x) + line * g.x_stride;
      A sum = sum_vectors<V>(g.width, [=](int64_t i, int lanes) __attribute__((always_inline)) {
        return load_lanes<V>(x + i, lanes);
      });
      A* kept = static_cast<A*>(g.sum) + line;
      if (!g.first) sum = *kept + sum;
      *kept = sum;
      if (g.out != nullptr) V::set1(sum).store(static_cast<T*>(g.out) + line, 1);
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
