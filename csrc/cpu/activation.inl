// y = activation(x + bias) over rows, and its gradient.

// Elements that one item takes where there is no bias: a tensor without one is a single long row, cut into these.
constexpr int64_t kActivationChunk = 4096;
// Elements that are worth waking a thread for.
constexpr int64_t kActivationGrain = 16384;

// Bytes ahead of the vector at work that memory is asked for.
constexpr int64_t kActivationAhead = 2048;
template <class T>
static FASTTX_INLINE T* ahead(T* p) {
  return p + kActivationAhead / static_cast<int64_t>(sizeof(T));
}

// Args is ActivationFwd or ActivationBwd.
template <class Args>
static inline Plan activation_plan(const Args& g) {
  if (g.bias != nullptr) return {g.rows, max_of(1, kActivationGrain / max_of(1, g.width)), 0, false};
  return {ceil_div(g.rows * g.width, kActivationChunk), kActivationGrain / kActivationChunk, 0, false};
}

// Calls f.template operator()<kActivation>(offset, lanes, value) for every vector of the items: `value` is x + bias.
template <class T, class Args, class F>
static inline void for_activation_items(const Args& g, int64_t begin, int64_t end, const F& f) {
  using V = Vec<accum_t<T>>;
  const T* x = static_cast<const T*>(g.x);
  const T* bias = static_cast<const T*>(g.bias);
  with_activation(g.activation, [&]<Activation kActivation>() {
    if (bias == nullptr) {
      const int64_t first = begin * kActivationChunk;
      const int64_t size = min_of(end * kActivationChunk, g.rows * g.width) - first;
      for_vectors<V>(size, [&](int64_t i, int lanes) __attribute__((always_inline)) {
        prefetch(ahead(x + first + i));
        f.template operator()<kActivation>(first + i, lanes, load_lanes<V>(x + first + i, lanes));
      });
      return;
    }
    for (int64_t row = begin; row < end; ++row) {
      const int64_t first = row * g.width;
      for_vectors<V>(g.width, [&](int64_t i, int lanes) __attribute__((always_inline)) {
        prefetch(ahead(x + first + i));
        const V value = load_lanes<V>(x + first + i, lanes) + load_lanes<V>(bias + i, lanes);
        f.template operator()<kActivation>(first + i, lanes, value);
      });
    }
  });
}

template <class T>
struct ActivationFwdKernel {
  using V = Vec<accum_t<T>>;
  static Plan plan(const ActivationFwd& g) { return activation_plan(g); }
  static void run(const ActivationFwd& g, void*, int64_t begin, int64_t end) {
    T* y = static_cast<T*>(g.y);
    for_activation_items<T>(
        g, begin, end,
        [&]<Activation kActivation>(int64_t i, int lanes, V value) __attribute__((always_inline)) {
          prefetch_to_write(ahead(y + i));
          store_lanes(y + i, gelu<kActivation, T>(value), lanes);
        });
  }
};

template <class T>
struct ActivationBwdKernel {
  using V = Vec<accum_t<T>>;
  static Plan plan(const ActivationBwd& g) { return activation_plan(g); }
  static void run(const ActivationBwd& g, void*, int64_t begin, int64_t end) {
    const T* dy = static_cast<const T*>(g.dy);
    T* dx = static_cast<T*>(g.dx);
    for_activation_items<T>(
        g, begin, end,
        [&]<Activation kActivation>(int64_t i, int lanes, V value) __attribute__((always_inline)) {
          prefetch(ahead(dy + i));
          prefetch_to_write(ahead(dx + i));
          const V grad = load_lanes<V>(dy + i, lanes);
          store_lanes(dx + i, grad * gelu_grad<kActivation, T>(value), lanes);
        });
  }
};
