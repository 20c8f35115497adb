// Softmax over rows, with a mask broadcast by its strides and a causal limit.

// Elements of a softmax that are worth waking a thread for.
constexpr int64_t kSoftmaxGrain = 16384;

// Largest f(offset, lanes) over a row, or -inf where there is none; NaN is passed over. f gives -inf in the lanes past
// the end.
template <class V, class F>
static inline auto max_vectors(int64_t width, const F& f) {
  const V lowest = V::set1(-__builtin_inff());
  V largest[4] = {lowest, lowest, lowest, lowest};
  int64_t i = 0;
  // max returns its second operand where the first is NaN.
  for (; i + 4 * V::kWidth <= width; i += 4 * V::kWidth)
    for (int j = 0; j < 4; ++j) largest[j] = max(f(i + j * V::kWidth, V::kWidth), largest[j]);
  for (; i < width; i += V::kWidth)
    largest[0] = max(f(i, static_cast<int>(min_of(V::kWidth, width - i))), largest[0]);
  return reduce_max(max(max(largest[0], largest[1]), max(largest[2], largest[3])));
}

// Items are rows.
template <class T>
struct SoftmaxFwdKernel {
  using A = accum_t<T>;
  using V = Vec<A>;

  static Plan plan(const SoftmaxFwd& g) {
    // The scratch holds a row's exponentials and, widened, its mask. Causal rows differ in length.
    const int64_t lines = g.mask.kind == MaskKind::none ? 1 : 2;
    return {g.batch * g.heads * g.queries, max_of(1, kSoftmaxGrain / max_of(1, g.width)),
            sizeof(A) * lines * padded(g), g.is_causal};
  }

  static void run(const SoftmaxFwd& g, void* scratch, int64_t begin, int64_t end) {
    switch (g.mask.kind) {
      case MaskKind::none: return rows<MaskKind::none>(g, static_cast<A*>(scratch), begin, end);
      case MaskKind::boolean: return rows<MaskKind::boolean>(g, static_cast<A*>(scratch), begin, end);
      case MaskKind::additive: return rows<MaskKind::additive>(g, static_cast<A*>(scratch), begin, end);
    }
  }

  static int64_t padded(const SoftmaxFwd& g) { return round_up(g.width, V::kWidth); }

  template <MaskKind kMask>
  static void rows(const SoftmaxFwd& g, A* exponentials, int64_t begin, int64_t end) {
    A* mask = exponentials + padded(g);
    int64_t widened = -1;  // where the mask in the scratch comes from
    for (int64_t row = begin; row < end; ++row) {
      const int64_t query = row % g.queries;
      const int64_t kept = g.is_causal ? min_of(g.width, query + 1) : g.width;
      if constexpr (kMask != MaskKind::none) {
        const int64_t head = row / g.queries % g.heads, batch = row / g.queries / g.heads;
        const int64_t offset =
            batch * g.mask.stride_b + head * g.mask.stride_h + query * g.mask.stride_q;
        if (offset != widened) widen_mask(g, offset, mask);
        widened = offset;
      }
      const int64_t first = row * g.width;
      softmax_row<kMask>(static_cast<const T*>(g.x) + first, mask, static_cast<T*>(g.y) + first, kept,
                         exponentials);
      memset(static_cast<T*>(g.y) + first + kept, 0, sizeof(T) * (g.width - kept));
    }
  }

  template <MaskKind kMask>
  static void softmax_row(const T* x, const A* mask, T* y, int64_t width, A* exponentials) {
    const V lowest = V::set1(-__builtin_inff());
    const auto score = [&](int64_t i, int lanes) __attribute__((always_inline)) {
      V value = load_lanes<V>(x + i, lanes);
      if constexpr (kMask == MaskKind::additive) value = value + load_lanes<V>(mask + i, lanes);
      if constexpr (kMask == MaskKind::boolean)
        value = select(gt(load_lanes<V>(mask + i, lanes), V::zero()), value, lowest);
      return lanes == V::kWidth ? value : select(first_lanes<V>(lanes), value, lowest);
    };
    const A largest = max_vectors<V>(width, score);
    // Where nothing is finite, subtracting 0 lets exp give 0 for -inf and NaN for NaN.
    const V shift = V::set1(largest == -__builtin_inff() ? A(0) : largest);
    const A sum = sum_vectors<V>(width, [&](int64_t i, int lanes) __attribute__((always_inline)) {
      const V value = exp(score(i, lanes) - shift);
      value.store(exponentials + i);  // whole vectors: the scratch is padded
      return value;
    });
    const V factor = V::set1(sum == 0 ? A(0) : A(1) / sum);
    for_vectors<V>(width, [&](int64_t i, int lanes) __attribute__((always_inline)) {
      store_lanes(y + i, V::load(exponentials + i) * factor, lanes);
    });
  }

  // out = one row of the mask: 1 and 0 where it is boolean.
  static void widen_mask(const SoftmaxFwd& g, int64_t offset, A* out) {
    if (g.mask.kind == MaskKind::boolean) {
      widen_row(static_cast<const uint8_t*>(g.mask.data) + offset, g.mask.stride_k, g.width, out);
    } else if (g.mask.wide) {
      widen_row(static_cast<const A*>(g.mask.data) + offset, g.mask.stride_k, g.width, out);
    } else {
      widen_row(static_cast<const T*>(g.mask.data) + offset, g.mask.stride_k, g.width, out);
    }
  }

  static A widen_one(uint8_t kept) { return kept != 0 ? A(1) : A(0); }
  template <class S>
  static A widen_one(S value) {
    return convert_one<A>(value);
  }
  template <class S>
  static void widen_row(const S* from, int64_t stride, int64_t width, A* out) {
    if (stride == 0) {
      const V value = V::set1(widen_one(*from));
      for_vectors<V>(width, [&](int64_t i, int lanes) { store_lanes(out + i, value, lanes); });
    } else if (stride != 1) {
      for (int64_t i = 0; i < width; ++i) out[i] = widen_one(from[i * stride]);
    } else if constexpr (sizeof(S) == 1) {
      for (int64_t i = 0; i < width; ++i) out[i] = widen_one(from[i]);
    } else {
      copy_as(from, out, width);
    }
  }
};

// dx = y (dy - sum(dy y)); items are rows.
template <class T>
struct SoftmaxBwdKernel {
  using A = accum_t<T>;
  using V = Vec<A>;

  static Plan plan(const SoftmaxBwd& g) {
    return {g.rows, max_of(1, kSoftmaxGrain / max_of(1, g.width)), 0, false};
  }

  static void run(const SoftmaxBwd& g, void*, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* dy = static_cast<const T*>(g.dy) + row * g.width;
      const T* y = static_cast<const T*>(g.y) + row * g.width;
      T* dx = static_cast<T*>(g.dx) + row * g.width;
      const V mean = V::set1(
          sum_vectors<V>(g.width, [&](int64_t i, int lanes) __attribute__((always_inline)) {
            return load_lanes<V>(dy + i, lanes) * load_lanes<V>(y + i, lanes);
          }));
      for_vectors<V>(g.width, [&](int64_t i, int lanes) __attribute__((always_inline)) {
        const V value = load_lanes<V>(y + i, lanes) * (load_lanes<V>(dy + i, lanes) - mean);
        store_lanes(dx + i, value, lanes);
      });
    }
  }
};
