// gelu for results in bf16: cubics in place of exponentials, one way for both GELUs; included in math.h.
//
// Both are x F(x) (math.h). F(-a) and gelu'(-a) are smooth: 32 cubics on 0 <= a <= 6.5 are within 4e-7 of F(-a), 2e-6 of
// gelu'(-a). Relative to a F(-a) that is 6e-4 up to a = 4, a sixth of bf16's rounding, and less than 3e-8 of all beyond.
// The coefficients of a lane's cubic come from a table that two registers hold, made while this is compiled.

constexpr int kCubics = 32;
constexpr double kCubicsEnd = 6.5;  // gelu'(-a) = -2e-9

// Coefficients from the highest power of a down, each of all cubics.
struct Cubics {
  alignas(64) float coefficients[4][kCubics];
};

constexpr double exactly_exp(double x) {
  double term = 1, sum = 1;
  for (int i = 1; i < 12; ++i) sum += term *= x / 1024 / i;
  for (int i = 0; i < 10; ++i) sum *= sum;
  return sum;
}

// F(-a), or the derivative of -a F(-a).
template <Activation act>
constexpr double exact_tail(double a, bool gradient) {
  if (act == Activation::gelu) {  // Phi(-a) = 1/2 - phi(a) (a + a^3/3 + a^5/15 + ...)
    const double density = 0.39894228040143268 * exactly_exp(-a * a / 2);
    double term = a, sum = a;
    for (int i = 3; i < 200; i += 2) sum += term *= a * a / i;
    return 0.5 - density * sum - (gradient ? a * density : 0);
  }
  constexpr double kLinear = 1.5957691216057307, kCubic = 0.071354816272600249;  // as in LogisticTail
  const double w = exactly_exp(-a * (kLinear + a * a * kCubic)), tail = w / (1 + w);
  return tail * (1 - (gradient ? a * (kLinear + 3 * a * a * kCubic) / (1 + w) : 0));
}

// The i-th interpolates at four Chebyshev points of the stretch of which i times the stretch's length is the middle: a
// lane's number is a / length, rounded.
template <Activation act>
constexpr Cubics cubics(bool gradient) {
  constexpr double kNodes[] = {-0.92387953251128674, -0.38268343236508977, 0.38268343236508977, 0.92387953251128674};
  constexpr double kLength = kCubicsEnd / (kCubics - 1);
  Cubics result{};
  for (int i = 0; i < kCubics; ++i) {
    double at[4]{}, difference[4]{};  // Newton's divided differences
    for (int k = 0; k < 4; ++k) {
      at[k] = (i + kNodes[k] / 2) * kLength;
      difference[k] = exact_tail<act>(at[k], gradient);
    }
    for (int order = 1; order < 4; ++order)
      for (int k = 3; k >= order; --k)
        difference[k] = (difference[k] - difference[k - 1]) / (at[k] - at[k - order]);
    double power[4]{};  // of a^0 to a^3
    for (int k = 3; k >= 0; --k) {  // power = power (a - at[k]) + difference[k]
      for (int j = 3; j > 0; --j) power[j] = power[j - 1] - at[k] * power[j];
      power[0] = difference[k] - at[k] * power[0];
    }
    for (int j = 0; j < 4; ++j) result.coefficients[j][i] = static_cast<float>(power[3 - j]);
  }
  return result;
}

template <Activation act>
struct CubicTail {
  using V = Vec<float>;
  static constexpr float kEnd = kCubicsEnd, kGradientEnd = kCubicsEnd;
  static constexpr Cubics kValue = cubics<act>(false), kGradient = cubics<act>(true);

  static FASTTX_INLINE V value(V a) { return at(kValue, number(a), a); }
  static FASTTX_INLINE V gradient(V a) { return at(kGradient, number(a), a); }
  static FASTTX_INLINE GeluTail<float> both(V a) {
    const V i = number(a);
    return {at(kValue, i, a), at(kGradient, i, a)};
  }

 private:
  // In the last bits, where a lookup reads it.
  static FASTTX_INLINE V number(V a) {
    return fma(a, V::set1((kCubics - 1) / kEnd), V::set1(ExpConstants<float>::kRounder));
  }
  static FASTTX_INLINE V at(const Cubics& of, V i, V a) {
    V sum = lookup(of.coefficients[0], i);
    for (int power = 1; power < 4; ++power) sum = fma(sum, a, lookup(of.coefficients[power], i));
    return sum;
  }
};
