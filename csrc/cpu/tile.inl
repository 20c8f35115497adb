// The register tile that every matrix product is made of: linear layers, and the products of attention.
//
// A tile of sums stays in registers while k runs. B is packed in panels [panel][k][columns], so that its loads are
// consecutive; A is read by broadcast. Every sum runs over k in order, whatever the tile's place or height: a row's result
// does not depend on the rows beside it. A tile is kTileRows x kTileCols, wide and low: more sums of fewer columns would
// need more instructions for a multiplication.

// A packed operand of storage T holds P = Packed<T>::type. A panel has steps of kStep values along k, rows of the left
// operand have steps of kLeftStep; both are filled up with zeros to a whole kLeftStep.
template <class T>
struct Packed {
  using type = accum_t<T>;
  static constexpr int kStep = 1, kLeftStep = 1;
};
#if defined(__AVX512BF16__)
// vdpbf16ps multiplies pairs that lie together along k; so do AMX tiles, of 32 values of the left operand.
template <>
struct Packed<bf16> {
  using type = bf16;
  static constexpr int kStep = 2;
#if defined(__AMX_BF16__)
  static constexpr int kLeftStep = 32;
#else
  static constexpr int kLeftStep = 2;
#endif
};
#endif
#if defined(FASTTX_SPLITS)
// Parts are multiplied as bf16 is.
template <>
struct Packed<Split> {
  using type = Split;
  static constexpr int kStep = 2, kLeftStep = 32;
};
#endif

// Whether an operand is kept in parts.
template <class P>
constexpr bool kInParts = false;
template <>
constexpr bool kInParts<Split> = true;

// Whether products of T run on AMX tiles rather than on vectors.
template <class T>
#if defined(__AMX_BF16__)
constexpr bool kUsesAmx = sizeof(typename Packed<T>::type) == sizeof(bf16);
#else
constexpr bool kUsesAmx = false;
#endif

// Whether products of T, floats when packed, run on AMX tiles all the same, in bf16 parts (split.inl).
template <class T>
constexpr bool kSplits = false;
#if defined(FASTTX_SPLITS)
template <>
constexpr bool kSplits<float> = true;
template <>
constexpr bool kSplits<fp16> = true;
#endif
// Whether linear layers' products run beside the vector unit.
template <class T>
constexpr bool kOnMatrixUnit = kUsesAmx<T> || kSplits<T>;
// Whether attention's do, of operands P. Those of one type, whole or in parts, are in tiles of one size.
template <class P>
constexpr bool kAttendsOnMatrixUnit = kOnMatrixUnit<P> || kInParts<P>;

constexpr int kTileRows = 6;
#if defined(__AVX512F__)
constexpr int kTileVecs = 4;  // 24 sums, 4 columns of B and one broadcast: 29 of 32 registers
#else
constexpr int kTileVecs = 2;  // 12 sums, 2 columns of B and one broadcast: 15 of 16 registers
#endif

template <class T>
constexpr int kTileCols = kTileVecs * Vec<accum_t<T>>::kWidth;
template <>
constexpr int kTileCols<Split> = 2 * Vec<float>::kWidth;
// Linear layers' panels are as wide as the tile of the unit that they are packed for.
template <class T>
constexpr int kGemmVecs = kOnMatrixUnit<T> ? 2 : kTileVecs;
template <class T>
constexpr int kGemmCols = kGemmVecs<T> * Vec<accum_t<T>>::kWidth;

static inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
static inline int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }
static inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// Hands out pieces of the scratch, from a null base to find how much is needed.
struct ScratchPieces {
  char* base;
  size_t used = 0;
  template <class X>
  X* take(int64_t count) {
    X* piece = reinterpret_cast<X*>(reinterpret_cast<uintptr_t>(base) + used);
    used += round_up(sizeof(X) * count, 64);
    return piece;
  }
};

// One step of the tile: a's `kStep` values broadcast, times kStep rows of one vector of columns.
template <class P>
struct Step {
  using V = Vec<P>;
  using Reg = V;
  static Reg broadcast(const P* a) { return V::set1(*a); }
  static Reg columns(const P* b) { return V::load(b); }
  static V fma_step(Reg a, Reg b, V sum) { return fma(a, b, sum); }
};
#if defined(__AVX512BF16__)
template <>
struct Step<bf16> {
  using V = Vec<float>;
  using Reg = __m512i;
  static Reg broadcast(const bf16* a) {
    int pair;
    memcpy(&pair, a, sizeof(pair));
    return _mm512_set1_epi32(pair);
  }
  static Reg columns(const bf16* b) { return _mm512_loadu_si512(b); }
  static V fma_step(Reg a, Reg b, V sum) {
    return V{_mm512_dpbf16_ps(sum.v, (__m512bh)a, (__m512bh)b)};
  }
};
#endif

// sum[i][j] += a[i][0:k] . b[0:k][j], for kRows rows of A and the first kVecs of a panel's kPanelVecs vectors; k is a whole
// number of steps. Row i of A starts at a + i * a_stride, and its next step lies `a_step` further on. kFetches: what lies
// as far behind `next` is fetched into L2 beside every step.
template <class T, int kRows, int kPanelVecs = kTileVecs, bool kFetches = false, int kVecs,
          class P = typename Packed<T>::type>
static FASTTX_INLINE void multiply_tile(const P* a, int64_t a_stride, const P* b, int64_t k,
                                        Vec<accum_t<T>> (&sum)[kRows][kVecs], int64_t a_step = Packed<T>::kStep,
                                        [[maybe_unused]] const char* next = nullptr) {
  using S = Step<P>;
  constexpr int kStep = Packed<T>::kStep;
  constexpr int kWidth = Vec<accum_t<T>>::kWidth;
  constexpr int kBytes = kVecs * kWidth * kStep * static_cast<int>(sizeof(P));
  for (int64_t kk = 0; kk < k; kk += kStep, a += a_step, b += kPanelVecs * kWidth * kStep) {
    typename S::Reg columns[kVecs];
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) columns[j] = S::columns(b + j * kWidth * kStep);
    if constexpr (kFetches && kBytes >= 64) {
#pragma GCC unroll 8
      for (int line = 0; line < kBytes; line += 64) __builtin_prefetch(next + line, 0, 2);
      next += kBytes;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const typename S::Reg row = S::broadcast(a + i * a_stride);
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) sum[i][j] = S::fma_step(row, columns[j], sum[i][j]);
    }
  }
}

// Calls f.template operator()<n>() for 1 <= n <= kMost.
template <int kMost, class F>
static FASTTX_INLINE void with_count(int64_t n, const F& f) {
  if (n == kMost) {
    f.template operator()<kMost>();
  } else if constexpr (kMost > 1) {
    with_count<kMost - 1>(n, f);
  }
}
template <class F>
static FASTTX_INLINE void with_rows(int64_t rows, const F& f) {
  with_count<kTileRows>(rows, f);
}

// Copies one vector's worth of T to P: widened, or as it is where the packed operand keeps T.
template <class T, class P>
static inline void copy_as(const T* from, P* to, int64_t n) {
  if constexpr (sizeof(T) == sizeof(P)) {
    memcpy(to, from, n * sizeof(T));
  } else {
    using V = Vec<P>;
    int64_t i = 0;
    for (; i + V::kWidth <= n; i += V::kWidth) V::load(from + i).store(to + i);
    if (i < n) V::load(from + i, n - i).store(to + i, n - i);
  }
}

template <class P, class T>
static inline P convert_one(T value) {
  P out;
  copy_as(&value, &out, 1);
  return out;
}
