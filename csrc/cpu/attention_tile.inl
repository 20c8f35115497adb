// What attention's forward and backward share: a tile's size, its exponentials, and the mask that lies on it.

// Rows and keys of one tile of scores. Both are whole tiles of the product's unit; a row's keys are padded to kKeyStep.
template <class P>
constexpr int64_t kQueryTile = kAttendsOnMatrixUnit<P> ? 32 : 48;
template <class P>
constexpr int64_t kKeyTile = kUsesAmx<P> ? 64 : 128;  // on tiles, what the first-level cache holds of all operands
template <class P>
constexpr int64_t kKeyStep = Vec<accum_t<P>>::kWidth > Packed<P>::kLeftStep ? Vec<accum_t<P>>::kWidth
                                                                             : Packed<P>::kLeftStep;

template <class A>
constexpr A kInfinity = __builtin_inf();

// 2^x for x that are not much above 0, by the minimax fit (Remez exchange) of 2^f, 0 <= f <= 1, with the value at 0 held
// at 1; its relative error is 8.5e-8 in float, 1.6e-17 in double.
template <class A>
struct Exp2Constants;
template <>
struct Exp2Constants<float> {
  static constexpr float kLowest = -126;  // below it the power would be subnormal, and is zero
  static constexpr float kPolynomial[] = {0.0018671444f, 0.009017031f, 0.055799916f, 0.24016446f, 0.6931513f, 1.0f};
};
template <>
struct Exp2Constants<double> {
  static constexpr double kLowest = -1022;
  static constexpr double kPolynomial[] = {
      6.263466142296021e-10, 6.559529322770528e-09, 1.0253212435721934e-07, 1.320836728895114e-06,
      1.5253175055562796e-05, 0.0001540351230962866, 0.0013333558629566756, 0.009618129099550796,
      0.05550410866560225, 0.2402265069590633, 0.693147180559946, 1.0};
};

#if defined(__AVX512F__)
// x - floor(x); 0 for -inf.
FASTTX_INLINE Vec<float> above_floor(Vec<float> x) { return {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF)}; }
FASTTX_INLINE Vec<double> above_floor(Vec<double> x) { return {_mm512_reduce_pd(x.v, _MM_FROUND_TO_NEG_INF)}; }
#endif

// A subnormal result costs the processor some hundred cycles: a masked score, -inf, must not make one.
template <class A>
FASTTX_INLINE Vec<A> exp2(Vec<A> x) {
  using K = Exp2Constants<A>;
  using V = Vec<A>;
#if defined(__AVX512F__)
  const V whole = x, fraction = above_floor(x);  // scalef takes the floor itself
#else
  const V whole = round(x - V::set1(A(0.5))), fraction = x - whole;
#endif
  return select(lt(x, V::set1(K::kLowest)), V::zero(), scalef(polynomial(fraction, K::kPolynomial), whole));
}

// Whether probabilities become bf16 before they are multiplied. Their sums are float32, for lse: the fit of 2^f is no
// shorter.
template <class P>
constexpr bool kRoundsPowers = false;
#if defined(__AVX512BF16__)
template <>
constexpr bool kRoundsPowers<bf16> = true;
#endif

// While it lives, the thread's subnormal results are zeros where powers are rounded: a product of bf16 takes them for
// zero anyway, and a power needs no comparison of its own against them.
template <class P>
class FlushesSubnormals {
 public:
#if defined(__AVX512BF16__)
  FlushesSubnormals() : before_(_mm_getcsr()) {
    if constexpr (kRoundsPowers<P>) _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON);
  }
  ~FlushesSubnormals() {
    if constexpr (kRoundsPowers<P>) _mm_setcsr(before_);
  }
  FlushesSubnormals(const FlushesSubnormals&) = delete;

 private:
  unsigned before_;
#else
  FlushesSubnormals() {}
#endif
};

// Scores as powers of 2 relative to a row's largest: one object for every kernel, so that the backward's are the
// forward's, bit for bit.
template <class P>
struct Powers {
  using A = accum_t<P>;
  using V = Vec<A>;
  V exponent;  // of 2, for one score
  explicit Powers(A exponent_of_score) : exponent(V::set1(exponent_of_score)) {}
  // What operator() wants to know of a row.
  FASTTX_INLINE V shift(V largest) const { return kRoundsPowers<P> ? fnma(largest, exponent, V::zero()) : largest; }
  FASTTX_INLINE V operator()(V score, V shift) const {
#if defined(__AVX512BF16__)
    if constexpr (kRoundsPowers<P>) {
      const V x = fma(score, exponent, shift);
      return scalef(polynomial(above_floor(x), Exp2Constants<float>::kPolynomial), x);
    }
#endif
    return exp2((score - shift) * exponent);
  }
};

// The (sequence, kv head) pairs of one launch.
static inline int64_t pair_count(const AttentionShape& g) { return g.pairs != 0 ? g.pairs : g.batch * g.kv_heads; }

// How scores become exponents of 2. They are kept as the product leaves them, of queries with the scale's sign; only
// where something is added to scores are they scaled first: then for every tile, so that all rows round alike.
template <class A>
struct ScoreScale {
  bool added;  // a bias is added
  A scale;     // what the product is multiplied by, then or at last
  A exponent;  // exponents of 2 for one score
  explicit ScoreScale(const AttentionShape& g)
      : added(g.mask.kind == MaskKind::additive || g.alibi_slopes != nullptr),
        scale(static_cast<A>(g.scale < 0 ? -g.scale : g.scale)) {
    constexpr double kLog2e = 1.4426950408889634;
    constexpr double kTiny = sizeof(A) == 4 ? 0x1p-126 : 0x1p-1022;  // which leaves of -inf what it is
    const double size = g.scale < 0 ? -g.scale : g.scale;
    exponent = static_cast<A>(added ? kLog2e : size * kLog2e > kTiny ? size * kLog2e : kTiny);
  }
  A natural(A score) const { return added ? score : score * scale; }
};

// Gives rows of a left operand, `stride` values apart, the sign of the scale.
template <class P>
static void sign_queries(const AttentionShape& g, P* q, int64_t stride, int64_t rows) {
  if (g.scale >= 0) return;
  uint8_t* bytes = reinterpret_cast<uint8_t*>(q);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < g.width; ++i) bytes[(row * stride + i + 1) * sizeof(P) - 1] ^= 0x80;
}

// Widens a mask's values for n > 0 keys from `key` on, `stride` apart; a boolean becomes 0 where it allows and -inf
// where it does not.
template <class S, class A>
static inline A mask_value(S value, A*) {
  if constexpr (sizeof(S) == 1) {
    return value != 0 ? A(0) : -kInfinity<A>;
  } else {
    return convert_one<A>(value);
  }
}
template <class S, class A>
static void widen_mask(const S* from, int64_t stride, const Places& keys, int64_t key, int64_t n, A* out) {
  if (!keys.adjoin(key, n)) {
    for (int64_t i = 0; i < n; ++i) out[i] = mask_value(from[keys[key + i] * stride], out);
    return;
  }
  from += keys[key] * stride;
  if (stride == 0) {
    const A value = mask_value(*from, out);
    for (int64_t i = 0; i < n; ++i) out[i] = value;
  } else if (stride != 1) {
    for (int64_t i = 0; i < n; ++i) out[i] = mask_value(from[i * stride], out);
  } else if constexpr (sizeof(S) == 1) {
    for (int64_t i = 0; i < n; ++i) out[i] = mask_value(from[i], out);
  } else {
    copy_as(from, out, n);
  }
}

// How far the keys from the i-th on stand from the first of n > i, which is `key`.
template <class V>
static inline V steps_from(const Places& keys, int64_t key, int64_t n, int64_t i) {
  using A = decltype(reduce_max(V::zero()));
  if (keys.adjoin(key, n)) return V::iota() + V::set1(static_cast<A>(i));
  A lanes[V::kWidth] = {};
  for (int64_t j = i; j < min_of(n, i + V::kWidth); ++j) lanes[j - i] = static_cast<A>(keys[key + j] - keys[key]);
  return V::load(lanes);
}

// The mask and the positional bias of one tile: which scores stay, and what is added to them.
template <class T, class P>
struct TileMask {
  using A = accum_t<T>;
  using V = Vec<A>;
  static constexpr int64_t kStep = kKeyStep<P>;
  const AttentionShape& g;
  const TileRows& rows;
  const ScoreScale<A> scale;
  const Sequence& sequence;
  int64_t key;
  int64_t n;      // keys up to the last that a shared row of the mask allows
  A* bias;        // of one row
  bool has_bias;  // there is something to add
  bool shared;    // one row of bias serves every row
  bool full;      // every row sees all n keys, as far as positions go

  TileMask(const AttentionShape& shape, const TileRows& tile, const Sequence& of, int64_t first_key, int64_t keys,
           A* buffer)
      : g(shape), rows(tile), scale(shape), sequence(of), key(first_key), n(keys), bias(buffer) {
    const bool one_head = rows.rows[0].head == rows.rows[rows.count - 1].head;
    has_bias = g.mask.kind != MaskKind::none;
    shared = has_bias && g.mask.stride_q == 0 && (g.mask.stride_h == 0 || one_head);
    if (shared) {
      fill(rows.rows[0], 0);
      bool adds = false;
      while (n > 0 && bias[n - 1] == -kInfinity<A>) --n;
      for (int64_t i = 0; i < n; ++i) adds |= bias[i] != 0;
      has_bias = adds;
    }
    full = n % kStep == 0 && rows.all_see(key, n);
  }

  // The mask's values for all keys and a row, as they lie there, to f.
  template <class F>
  void with_values(const TileRow& row, const F& f) const {
    const Mask& mask = g.mask;
    const int64_t at = sequence.batch * mask.stride_b + row.head * mask.stride_h + row.query * mask.stride_q;
    if (mask.kind == MaskKind::boolean) {
      f(static_cast<const uint8_t*>(mask.data) + at);
    } else if (mask.wide) {
      f(static_cast<const A*>(mask.data) + at);
    } else {
      f(static_cast<const T*>(mask.data) + at);
    }
  }
  // The bias of a row from the start-th of the tile's keys on.
  void fill(const TileRow& row, int64_t start) {
    with_values(row, [&](auto* values) {
      widen_mask(values, g.mask.stride_k, sequence.keys, key + start, n - start, bias + start);
    });
  }

  // Applies all of it to the scores, rows `stride` apart; -inf from n up to a whole step.
  void apply(A* scores, int64_t stride) {
    if (full && !has_bias && !scale.added) return;
    const bool in_place = g.mask.stride_k == 1 && n > 0 && sequence.keys.adjoin(key, n);
    const int64_t whole = n / V::kWidth * V::kWidth, end = round_up(n, kStep);
    for (int64_t i = 0; i < rows.count; ++i) {
      const TileRow& row = rows.rows[i];
      A* const to = scores + i * stride;
      int64_t done = 0;
      if (has_bias && !shared && !in_place) fill(row, 0);
      if (g.alibi_slopes == nullptr && row.first <= key && key + n <= row.last) {
        done = whole;
        if (!has_bias) {
          if (scale.added) multiply_row(to, done);
        } else if (!shared && in_place) {
          with_values(row, [&](auto* values) { mask_row(to, values + sequence.keys[key], done); });
        } else {
          mask_row(to, bias, done);
        }
      }
      if (done == end) continue;
      if (has_bias && !shared && in_place) fill(row, done);
      apply_row(row, to, done);
    }
  }

  // The quicker ways of whole vectors of a row that sees all of its keys, as far as positions go.
  void multiply_row(A* scores, int64_t count) const {
    for (int64_t i = 0; i < count; i += V::kWidth) (V::load(scores + i) * V::set1(scale.scale)).store(scores + i);
  }
  template <class S>
  void mask_row(A* scores, const S* values, int64_t count) const {
    if constexpr (sizeof(S) == 1) {
      for (int64_t i = 0; i < count; i += V::kWidth)
        select(V::nonzero(values + i), V::load(scores + i), V::set1(-kInfinity<A>)).store(scores + i);
    } else if (scale.added) {
      for (int64_t i = 0; i < count; i += V::kWidth) {
        const V added = V::load(values + i);
        masked(plus(V::load(scores + i), added), added).store(scores + i);
      }
    } else {
      for (int64_t i = 0; i < count; i += V::kWidth)
        masked(V::load(scores + i), V::load(values + i)).store(scores + i);
    }
  }
  // The score scaled, and what is added to it; as an exponent of 2 it must not overflow.
  FASTTX_INLINE V plus(V score, V added) const {
    const V least = V::set1(sizeof(A) == 4 ? A(-0x1p126) : A(-0x1p1022));
    return max(least, fma(score, V::set1(scale.scale), added));
  }
  // Whatever a score is, and be it NaN, what is masked is -inf.
  FASTTX_INLINE V masked(V score, V added) const {
    const V lowest = V::set1(-kInfinity<A>);
    return select(eq(added, lowest), lowest, score);
  }

  void apply_row(const TileRow& row, A* scores, int64_t start) {
    const V lowest = V::set1(-kInfinity<A>);
    // Counted from the tile's first key, and clamped, they are exact in A.
    const V first = V::set1(static_cast<A>(max_of(0, min_of(n, row.first - key))));
    const V last = V::set1(static_cast<A>(max_of(0, min_of(n, row.last - key))));
    const V slope = V::set1(g.alibi_slopes == nullptr ? A(0) : static_cast<const A*>(g.alibi_slopes)[row.head]);
    const V distance = V::set1(static_cast<A>(sequence.keys[key] - row.query - g.query_offset));
    // What nothing is added to stays as it is where the row sees it.
    const bool begins = has_bias || scale.added || row.first > key;
    if (!begins) start = max_of(start, max_of(0, min_of(n, row.last - key)) / V::kWidth * V::kWidth);
    for (int64_t i = start; i < round_up(n, kStep); i += V::kWidth) {
      const V index = V::iota() + V::set1(static_cast<A>(i));
      V score = V::load(scores + i);
      auto seen = mask_and(ge(index, first), lt(index, last));
      if (has_bias) {
        const V added = V::load(bias + i);
        seen = mask_and(seen, mask_not(eq(added, lowest)));
        if (scale.added) score = plus(score, added);
      } else if (scale.added) {
        score = score * V::set1(scale.scale);
      }
      if (g.alibi_slopes != nullptr) score = fnma(slope, abs(distance + steps_from<V>(sequence.keys, key, n, i)), score);
      select(seen, score, lowest).store(scores + i);
    }
  }
};
