// The backward's tile of scores, and the products that it is for (attention_bwd.inl).

// Keys of one tile.
constexpr int64_t kKeys = 128;

// A tile of keys on its way over the queries, and the tile of queries that it has come to.
template <class P>
struct KeyTile {
  using A = accum_t<P>;
  using V = Vec<A>;
  static constexpr int kStep = Packed<P>::kStep, kLeftStep = Packed<P>::kLeftStep, kCols = kTileCols<P>;
  // Tiles read and write the sums once for so many queries.
  static constexpr int64_t kRows = kAttendsOnMatrixUnit<P> ? 64 : 48;

  // A matrix of at most `most` rows as both operands of a product: `left`, and `right` in panels of `most` rows; one
  // and the same where their layouts agree and `left` does not change its sign. In parts, `right` is the transpose as a
  // left operand: so the tile's P and dS are right operands as they come.
  struct Rows {
    P *left, *right;
    int64_t left_stride, pitch, width;
    bool one_copy;

    Rows(ScratchPieces& pieces, int64_t most, int64_t columns, bool signs = false) : pitch(most), width(columns) {
      one_copy = kStep == 1 && columns <= kCols && !signs;
      left_stride = one_copy ? kCols : round_up(columns, kLeftStep);
      right = pieces.take<P>(most * round_up(columns, kCols));
      left = one_copy ? right : pieces.take<P>(most * left_stride);
    }
    template <class T>
    void pack(const T* from, int64_t row_stride, int64_t n) {
      if constexpr (kInParts<P>) {
        pack_left_transposed(from, row_stride, n, width, right, pitch);
      } else {
        pack_rows(from, row_stride, n, width, right, pitch * kCols);
      }
      if (!one_copy) pack_left(from, row_stride, n, width, left, left_stride);
    }
  };

  ScoreScale<A> scale;
  ProductUnit<P>* unit = nullptr;  // set while the kernel runs
  Rows q, dout;       // (kRows)
  Rows k;             // (kKeys)
  P *keys, *values;   // K and V of the tile, transposed, as right operands
  A *dk, *dv;         // (kKeys, dk_stride), (kKeys, dv_stride); in parts their transposes, as many values
  int64_t dk_stride, dv_stride;
  A *p, *ds;          // (kRows, kKeys): scores, then probabilities; dP, then dS
  P *p_left, *ds_left, *ds_right;  // what the products read of them: P^T, dS^T, dS; in parts P, dS twice
  A *bias, *keep;     // (kKeys), (kStep, kKeys)
  A* transposed;      // (kKeys, the greater of dk_stride and dv_stride), or null
  A* panels;          // for delta: (2, value_width, kTileCols<A>), or its product in parts

  KeyTile(const AttentionShape& g, ScratchPieces& pieces)
      : scale(g),
        q(pieces, kRows, g.width, g.scale < 0),
        dout(pieces, kRows, g.value_width),
        k(pieces, kKeys, g.width) {
    dk_stride = round_up(g.width, kCols);
    dv_stride = round_up(g.value_width, kCols);
    keys = pieces.take<P>(kKeys * round_up(g.width, kLeftStep));
    values = pieces.take<P>(kKeys * round_up(g.value_width, kLeftStep));
    dk = pieces.take<A>(kKeys * dk_stride);
    dv = pieces.take<A>(kKeys * dv_stride);
    p = pieces.take<A>(kRows * kKeys);
    ds = pieces.take<A>(kRows * kKeys);
    transposed = kInParts<P> ? pieces.take<A>(kKeys * max_of(dk_stride, dv_stride)) : nullptr;
    bias = pieces.take<A>(kKeys);
    keep = pieces.take<A>(kStep * kKeys);
    panels = pieces.take<A>(kInParts<P> ? 3 * kTileCols<P> * round_up(g.value_width, kLeftStep) +
                                              kTileCols<P> * kTileCols<P>
                                        : 2 * kTileCols<A> * g.value_width);
    if constexpr (kStep == 1) {
      p_left = p;
      ds_left = ds_right = ds;
    } else {
      p_left = pieces.take<P>(kRows * kKeys);
      ds_left = pieces.take<P>(kRows * kKeys);
      ds_right = pieces.take<P>(kRows * kKeys);
    }
  }

  // Room for rows that are not side by side.
  template <class T>
  static T* take_buffer(const AttentionShape& g, ScratchPieces& pieces) {
    return pieces.take<T>(max_of(kKeys, kRows) * max_of(1, max_of(g.width, g.value_width)));
  }

  // out = rows * panels^T.
  void multiply_keys(const Rows& rows, const P* panels_of_keys, int64_t count, int64_t n, A* out) {
    const int64_t steps = round_up(rows.width, kLeftStep);
    multiply<P>(*unit, {rows.left, rows.left_stride, kLeftStep, panels_of_keys, steps * kCols, steps, out, kKeys,
                       false, nullptr},
                count, n);
  }

  // Scores and dP become the (dropped) probabilities and dS, as the products read them; stats and delta are those of
  // all of the head's queries.
  __attribute__((noinline)) void differentiate(const AttentionShape& g, const Sequence& sequence,
                                               const TileRows& rows, const A* stats, const A* delta, int64_t key,
                                               int64_t n) {
    const Powers<P> power(scale.exponent);
    // Rows that make a step of a product along the queries: of parts, sixteen apart in blocks of 32.
    constexpr int64_t apart = kInParts<P> ? kLeftStep / 2 : 1;
    const int64_t steps = ceil_div(rows.count, kInParts<P> ? kLeftStep : kStep) * apart;
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t r = step / apart * apart * kStep + step % apart;
      V shift[kStep], factor[kStep], row_delta[kStep];
      int present = 0;
      for (int j = 0; j < kStep; ++j) {
        const int64_t row = r + j * apart;
        const bool is_present = row < rows.count;  // else its probabilities are zero
        const int64_t query = is_present ? rows.rows[row].query : 0;
        shift[j] = power.shift(V::set1(is_present ? stats[2 * query] : A(0)));
        factor[j] = V::set1(is_present ? stats[2 * query + 1] : A(0));
        row_delta[j] = V::set1(is_present ? delta[query] : A(0));
        if (is_present && g.dropout.active) keep_keys(g, sequence, rows.rows[row], key, n, keep + j * kKeys);
        present += is_present;
      }
      constexpr int64_t kVecs = kInParts<P> ? 2 : 1;  // that a product's step along the keys has
      for (int64_t i = 0; i < n; i += kVecs * V::kWidth) {
        V probability[kVecs][kStep], slope[kVecs][kStep];
        for (int v = 0; v < kVecs; ++v) {
          for (int j = 0; j < kStep; ++j) {
            if (j >= present) {
              probability[v][j] = slope[v][j] = V::zero();
              continue;
            }
            const int64_t column = i + v * V::kWidth, at = (r + j * apart) * kKeys + column;
            const V exact = power(V::load(p + at), shift[j]) * factor[j];
            V dp = V::load(ds + at);
            probability[v][j] = exact;
            if (g.dropout.active) {
              const V kept = V::load(keep + j * kKeys + column);
              dp = dp * kept;
              probability[v][j] = exact * kept;
            }
            slope[v][j] = exact * (dp - row_delta[j]);
          }
        }
        if constexpr (kInParts<P>) {
          store_parts(r, i, probability, slope);
        } else {
          store(r, i, present, probability[0], slope[0]);
        }
      }
    }
    finish(rows.count, n);
  }

#if defined(FASTTX_SPLITS)
  // Two rows' probabilities and slopes at 32 keys, as the products read them in parts: the rows' steps of panels of keys,
  // and of the slopes, rows of a left operand.
  FASTTX_INLINE void store_parts(int64_t r, int64_t i, V (&probability)[2][kStep], V (&slope)[2][kStep]) {
    constexpr int64_t kPair = 2 * kAmxCols, kPanel = kSplitPanelPart;
    const int64_t block = r / kAmxK, at = (i * kRows + block * kAmxK * kCols);
    bf16 *p_panel = reinterpret_cast<bf16*>(p_left + at) + r % kAmxK * kPair;
    bf16 *ds_panel = reinterpret_cast<bf16*>(ds_left + at) + r % kAmxK * kPair;
    for (int v = 0; v < 2; ++v) {
      store_pairs(SplitPairs(probability[v][0].v, probability[v][1].v), p_panel + v * kSplitTile, kPanel);
      store_pairs(SplitPairs(slope[v][0].v, slope[v][1].v), ds_panel + v * kSplitTile, kPanel);
    }
    bf16* rows = reinterpret_cast<bf16*>(ds_right + block * kAmxK * kKeys + i * kAmxK) + r % kAmxK * kAmxK;
    for (int j = 0; j < kStep; ++j)
      store_pairs(SplitPairs(slope[0][j].v, slope[1][j].v), rows + j * kAmxRows * kAmxK, kAmxK * kAmxK);
  }
#endif

  FASTTX_INLINE void store(int64_t r, int64_t i, [[maybe_unused]] int present, V (&probability)[kStep],
                           V (&slope)[kStep]) {
    if constexpr (kStep == 1) {
      probability[0].store(p + r * kKeys + i);
      slope[0].store(ds + r * kKeys + i);
    }
#if defined(__AVX512BF16__)
    if constexpr (kStep == 2 && !kInParts<P>) {
      // Where they wait for their transposition, they take the place of scores that have been read.
      store_operand_pair(probability[0], probability[1], pairs(p, p_left) + r * kKeys + 2 * i);
      store_operand_pair(slope[0], slope[1], pairs(ds, ds_left) + r * kKeys + 2 * i);
      for (int j = 0; j < present; ++j) store_operand(slope[j], ds_right + (r + j) * kKeys + i);
    }
#endif
  }
  // Steps of P^T or dS^T: pairs of queries, key by key.
  static P* pairs(A* scores, P* left) { return kUsesAmx<P> ? reinterpret_cast<P*>(scores) : left; }

  // Tiles take whole rows of the left operand: keys with kRows queries each.
  void finish([[maybe_unused]] int64_t rows, [[maybe_unused]] int64_t n) {
#if defined(__AMX_BF16__)
    if constexpr (kUsesAmx<P>) {
      transpose_pairs(p, rows, n, p_left);
      transpose_pairs(ds, rows, n, ds_left);
    }
#endif
  }
#if defined(__AMX_BF16__)
  static void transpose_pairs(A* scores, int64_t rows, int64_t n, P* left) {
    const int64_t present = ceil_div(rows, 2), padded = round_up(rows, kLeftStep) / 2;
    memset(scores + present * kKeys, 0, sizeof(A) * (padded - present) * kKeys);
    for (int64_t pair = 0; pair < padded; pair += V::kWidth) {
      for (int64_t i = 0; i < n; i += V::kWidth) {
        V block[V::kWidth];
#pragma GCC unroll 16
        for (int j = 0; j < V::kWidth; ++j) block[j] = V::load(scores + (pair + j) * kKeys + i);
        transpose(block);
#pragma GCC unroll 16
        for (int j = 0; j < V::kWidth; ++j) block[j].store(reinterpret_cast<A*>(left + (i + j) * kRows + 2 * pair));
      }
    }
  }
#endif

  // (kKeys, width) of sums that lie as the products leave them.
  A* by_keys(A* sums, [[maybe_unused]] int64_t width) {
#if defined(FASTTX_SPLITS)
    if constexpr (kInParts<P>) {
      for (int64_t key = 0; key < kKeys; key += V::kWidth) {
        for (int64_t column = 0; column < width; column += V::kWidth) {
          V block[V::kWidth];
          for (int i = 0; i < V::kWidth; ++i) block[i] = V::load(sums + (column + i) * kKeys + key);
          transpose(block);
          for (int i = 0; i < V::kWidth; ++i) block[i].store(transposed + (key + i) * width + column);
        }
      }
      memcpy(sums, transposed, sizeof(A) * kKeys * width);
    }
#endif
    return sums;
  }

  void multiply_outputs(const AttentionShape& g, int64_t rows, int64_t n, A* dq, int64_t dq_stride) {
    constexpr int64_t stride = kUsesAmx<P> ? kRows : kStep, step = kUsesAmx<P> ? kLeftStep : kKeys * kStep;
    const int64_t row_steps = round_up(rows, kLeftStep);
    if constexpr (kInParts<P>) {
      multiply<P>(*unit, {dout.right, kRows, step, p_left, kRows * kCols, row_steps, dv, kKeys, true, nullptr},
                  g.value_width, n);
      multiply<P>(*unit, {q.right, kRows, step, ds_left, kRows * kCols, row_steps, dk, kKeys, true, nullptr}, g.width,
                  n);
    } else {
      multiply<P>(*unit, {p_left, stride, step, dout.right, dout.pitch * kCols, row_steps, dv, dv_stride, true, nullptr},
                  n, g.value_width);
      multiply<P>(*unit, {ds_left, stride, step, q.right, q.pitch * kCols, row_steps, dk, dk_stride, true, nullptr}, n,
                  g.width);
    }
    multiply<P>(*unit, {ds_right, kKeys, kLeftStep, k.right, k.pitch * kCols, round_up(n, kLeftStep), dq, dq_stride,
                       true, nullptr},
                rows, g.width);
  }
};
