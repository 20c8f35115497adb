// Dropout from Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
// 1, 2, 3", SC 2011), the same bit for bit in every instruction set; included after a vec_*.h.

// words[4 i + k] = word k of Philox at counter (column + i, row, head, batch), 0 <= i < counters.
template <int counters>
inline void philox(uint32_t* words, uint64_t seed, uint32_t batch, uint32_t head, uint32_t row,
                   uint32_t column) {
  constexpr int kVectors = counters / Words::kWidth;
  Words c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors];
  for (int i = 0; i < kVectors; ++i) {
    c0[i] = Words::count(column + uint32_t(i * Words::kWidth));
    c1[i] = Words::set1(row);
    c2[i] = Words::set1(head);
    c3[i] = Words::set1(batch);
  }
  const Words m0 = Words::set1(0xD2511F53u), m1 = Words::set1(0xCD9E8D57u);
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const Words k0 = Words::set1(key0), k1 = Words::set1(key1);
    for (int i = 0; i < kVectors; ++i) {  // independent chains hide the multiplier's latency
      const Words p0 = product(c0[i], m0), p1 = product(c2[i], m1);
      c0[i] = xor3(upper_half(p1), c1[i], k0);
      c2[i] = xor3(upper_half(p0), c3[i], k1);
      c1[i] = p1;
      c3[i] = p0;
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  for (int i = 0; i < kVectors; ++i)
    store_words(words + 4 * i * Words::kWidth, c0[i], c1[i], c2[i], c3[i]);
}

// Counters that are taken together: four vectors' worth, whose chains hide the multiplier's latency.
constexpr int kDropoutCounters = Words::kWidth < 4 ? 16 : 4 * Words::kWidth;

// words[i] = the word of (batch 0, head 0, row, column i), 0 <= i < n, in a block of dropout_words_bytes(n).
static inline size_t dropout_words_bytes(int64_t n) {
  return sizeof(uint32_t) * round_up(n, 4 * kDropoutCounters);
}
static inline void dropout_words(uint32_t* words, int64_t n, uint64_t seed, int64_t row) {
  for (int64_t i = 0; i < n; i += 4 * kDropoutCounters)
    philox<kDropoutCounters>(words + i, seed, 0, 0, uint32_t(row), uint32_t(i / 4));
}

// out[i] = scale where the word of (batch, head, row, col0 + i) is at least `threshold`, else 0,
// for 0 <= i < n. The counter is (column >> 2, row, head, batch) and the word column & 3.
template <class A>
inline void dropout_keep(A* out, int64_t n, uint64_t seed, uint32_t batch, uint32_t head,
                         int64_t row, int64_t col0, uint32_t threshold, A scale) {
  constexpr int kCounters = kDropoutCounters, kWords = 4 * kCounters;
  alignas(64) uint32_t words[kWords];
  uint32_t counter = uint32_t(uint64_t(col0) >> 2);
  int skip = int(col0 & 3);
  while (n > 0) {
    philox<kCounters>(words, seed, batch, head, uint32_t(row), counter);
    if (skip == 0 && n >= kWords) {
      for (int i = 0; i < kWords; ++i) out[i] = words[i] >= threshold ? scale : A(0);
      out += kWords;
      n -= kWords;
    } else {
      const int count = n < kWords - skip ? int(n) : kWords - skip;
      for (int i = 0; i < count; ++i) out[i] = words[skip + i] >= threshold ? scale : A(0);
      out += count;
      n -= count;
      skip = 0;
    }
    counter += kCounters;
  }
}

// x times what dropout_keep gave; what is dropped is zero even where x is not finite.
template <class A>
inline Vec<A> drop(Vec<A> x, Vec<A> keep) {
  return select(eq(keep, Vec<A>::zero()), Vec<A>::zero(), x * keep);
}
// The same of a mask, of where a word is at least the threshold.
template <class A>
FASTTX_INLINE Vec<A> drop(Vec<A> x, typename Vec<A>::Mask kept, Vec<A> scale) {
  return select(kept, x * scale, Vec<A>::zero());
}
