// Packing of the operands of linear layers.

// k as a packed operand holds it.
template <class T>
static inline int64_t packed_k(int64_t k) {
  return round_up(k, Packed<T>::kLeftStep);
}

// Values of k that are taken together: a tile's rows and as much of a panel, 32 KiB in float32 with AVX-512, stay in L1;
// and the parts of both, 24 KiB each, as far as they need to. On AMX bf16 comes from L2 fast enough.
template <class T>
constexpr int64_t kBlockK = kUsesAmx<T> ? 1024 : 128;
// Rows of the left operand that are packed together as [step][row][kLeftStep].
template <class T>
constexpr int kLeftRows = kOnMatrixUnit<T> ? 32 : kTileRows;

// Packs `rows` <= kLeftRows rows of k values, given by their strides, for one tile; zero up to a whole step.
template <class T>
struct PackLeft {
  using P = typename Packed<T>::type;
  using A = accum_t<T>;
  using V = Vec<A>;
  static constexpr int kStep = Packed<T>::kLeftStep;

  static void run(const T* from, int64_t row_stride, int64_t k_stride, int64_t rows, int64_t k, P* to) {
    if (k_stride == 1) {
      pack_rows_of_k(from, row_stride, rows, k, to);
    } else if (row_stride == 1) {
      for (int64_t kk = 0; kk < k; kk += kStep, to += rows * kStep)
        pack_columns(from + kk * k_stride, k_stride, rows, min_of(kStep, k - kk), to);
    } else {
      pack_any(from, row_stride, k_stride, rows, k, to);
    }
  }

  static void pack_any(const T* from, int64_t row_stride, int64_t k_stride, int64_t rows, int64_t k, P* to) {
    for (int64_t kk = 0; kk < packed_k<T>(k); ++kk)
      for (int64_t row = 0; row < rows; ++row)
        to[(kk / kStep * rows + row) * kStep + kk % kStep] =
            kk < k ? convert_one<P>(from[row * row_stride + kk * k_stride]) : P{};
  }

  // Values of k side by side.
  static void pack_rows_of_k(const T* from, int64_t row_stride, int64_t rows, int64_t k, P* to) {
    if constexpr (V::kWidth == 1 || sizeof(A) == 8) {
      pack_any(from, row_stride, 1, rows, k, to);
    } else if constexpr (kStep == Packed<T>::kStep) {
      const int64_t steps = ceil_div(k, kStep);
      A* out = reinterpret_cast<A*>(to);  // a step is as wide as a sum
      for (int64_t step = 0; step < steps; step += V::kWidth) {
        V block[V::kWidth];
#pragma GCC unroll 16
        for (int i = 0; i < V::kWidth; ++i)
          block[i] = i < rows ? StepVector<P>::load(from + i * row_stride + step * kStep, k - step * kStep) : V::zero();
        transpose(block);
        V stored[V::kWidth];
        for (int i = 0; i < V::kWidth; ++i) stored[i] = block[i];
        for (int i = 0; i < min_of(V::kWidth, steps - step); ++i)
          stored[i].store(out + (step + i) * rows, static_cast<int>(rows));
      }
    } else {
      for (int64_t kk = 0; kk < k; kk += kStep, to += rows * kStep) {
        for (int64_t row = 0; row < rows; ++row) {
          StepVector<P>::store(StepVector<P>::load(from + row * row_stride + kk, k - kk), to + row * kStep);
        }
      }
    }
  }

  // Rows side by side: the first `present` values of one step of k, the rest zero.
  static void pack_columns(const T* from, [[maybe_unused]] int64_t k_stride, int64_t rows,
                           [[maybe_unused]] int64_t present, P* to) {
    if constexpr (kStep == 1) {
      for_vectors<V>(rows, [&](int64_t i, int lanes) { store_lanes(to + i, load_lanes<V>(from + i, lanes), lanes); });
    } else {
#if defined(__AVX512BF16__)
      // Pairs of values of k, of sixteen rows.
      const auto pairs = [&](int64_t row, int64_t kk, __mmask16 lanes) {
        const bf16* even = from + kk * k_stride + row;
        const __m256i low = _mm256_maskz_loadu_epi16(kk < present ? lanes : 0, even);
        const __m256i high = _mm256_maskz_loadu_epi16(kk + 1 < present ? lanes : 0, even + k_stride);
        return V{_mm512_castsi512_ps(interleave(low, high))};
      };
      for (int64_t row = 0; row < rows; row += V::kWidth) {
        const int height = static_cast<int>(min_of(V::kWidth, rows - row));
        float* out = reinterpret_cast<float*>(to + row * kStep);
        if constexpr (kStep == 2) {
          pairs(row, 0, V::first_lanes(height)).store(out, height);
        } else {
          V block[V::kWidth];
          for (int i = 0; i < V::kWidth; ++i) block[i] = pairs(row, 2 * i, V::first_lanes(height));
          transpose(block);
          for (int i = 0; i < height; ++i) block[i].store(out + i * V::kWidth);
        }
      }
#endif
    }
  }
};

// Packs `columns` <= kGemmCols columns of b as one panel.
template <class T, class P = typename Packed<T>::type>
static inline void pack_panel(const T* b, int64_t k_stride, int64_t n_stride, int64_t k, int64_t columns, P* panel) {
  constexpr int kStep = Packed<T>::kStep, kCols = kGemmCols<T>;
  if (columns < kCols || k < packed_k<T>(k)) memset(panel, 0, sizeof(P) * packed_k<T>(k) * kCols);
  if (k_stride == 1) {
    pack_transposed<P, kCols>(b, n_stride, columns, k, panel);
  } else if (n_stride == 1) {
    pack_rows<P, kCols>(b, k_stride, k, columns, panel, 0);
  } else {
    for (int64_t column = 0; column < columns; ++column)
      for (int64_t kk = 0; kk < k; ++kk)
        panel[(kk / kStep * kCols + column) * kStep + kk % kStep] =
            convert_one<P>(b[column * n_stride + kk * k_stride]);
  }
}

#if defined(FASTTX_SPLITS)
// One step of a panel in parts, of a matrix given by its strides. What lies along k is transposed before it is split:
// its parts would be three times as much to transpose.
template <class T>
static FASTTX_INLINE void split_panel(const T* b, int64_t k_stride, int64_t n_stride, int64_t present, int64_t columns,
                                      bf16* to) {
  if (n_stride == 1 && columns == kGemmCols<T>) {
    split_columns(b, k_stride, present, columns, to);
  } else {
    alignas(64) float panel[kAmxK * kGemmCols<T>];
    pack_panel(b, k_stride, n_stride, present, columns, panel);
    split_columns(panel, kGemmCols<T>, present, kGemmCols<T>, to);
  }
}
#endif

// The panels of a right operand, packed: [block of k][panel][step][column], as the product passes over them, so that the
// processor fetches ahead.
template <class T, bool kParts>
struct Panels {
  using P = typename Packed<T>::type;
  static constexpr int64_t kValue = 1;  // how many P a value of the operand is
  static int64_t whole_k(int64_t k) { return packed_k<T>(k); }
  static void pack(const T* b, int64_t k_stride, int64_t n_stride, int64_t k, int64_t columns, P* panel) {
    pack_panel(b, k_stride, n_stride, k, columns, panel);
  }
};
#if defined(FASTTX_SPLITS)
template <class T>
struct Panels<T, true> {
  using P = bf16;
  static constexpr int64_t kValue = kSplitParts;
  static int64_t whole_k(int64_t k) { return round_up(k, kAmxK); }
  static void pack(const T* b, int64_t k_stride, int64_t n_stride, int64_t k, int64_t columns, P* panel) {
    for (int64_t kk = 0; kk < k; kk += kAmxK, panel += kSplitPanelStep)
      split_panel(b + kk * k_stride, k_stride, n_stride, min_of(kAmxK, k - kk), columns, panel);
  }
};
#endif

// Where the part from k on, `depth` values deep, of a panel is among them.
template <class T, bool kParts>
static inline int64_t panel_offset(int64_t panels, int64_t panel, int64_t k, int64_t depth) {
  using Of = Panels<T, kParts>;
  return (k * panels + panel * Of::whole_k(depth)) * kGemmCols<T> * Of::kValue;
}

// Calls f.template operator()<kParts>(): whether products of T are of parts.
template <class T, class F>
static FASTTX_INLINE auto with_parts([[maybe_unused]] bool on_vectors, const F& f) {
  if constexpr (kSplits<T>) {
    if (!on_vectors) return f.template operator()<true>();
  }
  return f.template operator()<false>();
}

template <class T>
static size_t packed_b_bytes(int64_t k, int64_t n, bool on_vectors) {
  return with_parts<T>(on_vectors, [&]<bool kParts>() {
    using Of = Panels<T, kParts>;
    return sizeof(typename Of::P) * Of::kValue * Of::whole_k(k) * round_up(n, kGemmCols<T>);
  });
}

// Items are panels.
template <class T>
struct PackBKernel {
  static Plan plan(const PackB& g) {
    return {ceil_div(g.n, kGemmCols<T>), max_of(1, 32768 / (kGemmCols<T> * max_of(g.k, 1))), 0, false};
  }
  static void run(const PackB& g, void*, int64_t begin, int64_t end) {
    with_parts<T>(g.on_vectors, [&]<bool kParts>() {
      using Of = Panels<T, kParts>;
      const int64_t panels = ceil_div(g.n, kGemmCols<T>);
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t column = panel * kGemmCols<T>;
        for (int64_t k = 0; k < g.k; k += kBlockK<T>) {
          const int64_t depth = min_of(g.k - k, kBlockK<T>);
          Of::pack(static_cast<const T*>(g.b) + column * g.n_stride + k * g.k_stride, g.k_stride, g.n_stride, depth,
                   min_of(kGemmCols<T>, g.n - column),
                   static_cast<typename Of::P*>(g.packed) + panel_offset<T, kParts>(panels, panel, k, depth));
        }
      }
    });
  }
};
