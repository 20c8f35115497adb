// Elementary functions and activations, once, over Vec; included after a vec_*.h in its namespace.
//
// In float everything is polynomials, accurate to a few ulp near zero; in the negative tails of gelu and gelu' to 1e-7, in
// gelu_tanh's to 2e-5 of the value. In double exp is a polynomial too; erfc is the C library's, lane by lane.

// Coefficients from the highest power down.
template <class A, int n>
FASTTX_INLINE Vec<A> polynomial(Vec<A> x, const A (&coefficients)[n]) {
  Vec<A> sum = Vec<A>::set1(coefficients[0]);
  for (int i = 1; i < n; ++i) sum = fma(sum, x, Vec<A>::set1(coefficients[i]));
  return sum;
}

template <class F>
FASTTX_INLINE Vec<double> each_lane(Vec<double> x, F f) {
  double lanes[Vec<double>::kWidth];
  x.store(lanes);
  for (double& lane : lanes) lane = f(lane);
  return Vec<double>::load(lanes);
}

FASTTX_INLINE float log(float x) { return __builtin_logf(x); }
FASTTX_INLINE double log(double x) { return __builtin_log(x); }

// e^x = 2^n e^r with |r| <= ln2/2. kPolynomial is the minimax fit (Remez exchange) of e^r with
// value and slope at 0 held at 1; its relative error is 3.1e-9 in float, 3.6e-18 in double.
template <class A>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  // Below the first, where e^x would soon be subnormal, it is zero; above the second, infinity.
  static constexpr float kLowest = -87.33f, kHighest = 89.0f;
  static constexpr float kRounder = 0x1.8p23f;  // adding it rounds to an integer
  static constexpr float kLog2e = 0x1.715476p+0f;
  // ln 2 in two parts; n times the first is exact for any exponent n, even without a fused fma.
  static constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr float kPolynomial[] = {0.00138146058f, 0.00836871658f, 0.041668389f,
                                          0.166665211f,   0.49999994f,    1.0f,
                                          1.0f};
};
template <>
struct ExpConstants<double> {
  static constexpr double kLowest = -708.39, kHighest = 710.0;
  static constexpr double kRounder = 0x1.8p52;
  static constexpr double kLog2e = 0x1.71547652b82fep+0;
  static constexpr double kLn2High = 0x1.62e42fefap-1, kLn2Low = 0x1.cf79abc9e3b3ap-40;
  static constexpr double kPolynomial[] = {
      2.5000118937944871e-08, 2.7630250258607642e-07, 2.7557586171592723e-06,
      2.4801493093556609e-05, 0.00019841269506836446, 0.0013888888943635288,
      0.0083333333334943242,  0.041666666666530142,   0.16666666666666413,
      0.50000000000000111,    1.0,                    1.0};
};

template <class A>
FASTTX_INLINE Vec<A> exp_exponent(Vec<A> x) {
  const Vec<A> rounder = Vec<A>::set1(ExpConstants<A>::kRounder);
  return fma(x, Vec<A>::set1(ExpConstants<A>::kLog2e), rounder) - rounder;
}
template <class A>
FASTTX_INLINE Vec<A> exp_remainder(Vec<A> x, Vec<A> n) {
  const Vec<A> r = fnma(n, Vec<A>::set1(ExpConstants<A>::kLn2High), x);
  return fnma(n, Vec<A>::set1(ExpConstants<A>::kLn2Low), r);
}

// A subnormal result costs the processor some hundred cycles: a masked score, -inf, must not make
// one.
template <class A>
FASTTX_INLINE Vec<A> exp(Vec<A> x) {
  using K = ExpConstants<A>;
  const Vec<A> lowest = Vec<A>::set1(K::kLowest);
  const Vec<A> y = min(Vec<A>::set1(K::kHighest), max(lowest, x));  // in this order NaN stays
  const Vec<A> n = exp_exponent(y);
  const Vec<A> power = scalef(polynomial(exp_remainder(y, n), K::kPolynomial), n);
  return select(lt(x, lowest), Vec<A>::zero(), power);
}

// e^(a b) for a finite product below kHighest. What rounding the product loses counts, because the
// exponential turns an absolute error into a relative one.
template <class A>
FASTTX_INLINE Vec<A> exp_product(Vec<A> a, Vec<A> b) {
  const Vec<A> x = a * b;
  const Vec<A> n = exp_exponent(x);
  const Vec<A> r = exp_remainder(x, n) - product_error(a, b, x);
  return scalef(polynomial(r, ExpConstants<A>::kPolynomial), n);
}

// Both GELUs are x F(x) with F(-a) = 1 - F(a). With a = |x|, gelu(x) = max(x, 0) - a F(-a), which does not cancel in
// the negative tail, and gelu'(-a) = 1 - gelu'(a). From kEnd on F(-a) is taken as zero, from kGradientEnd on gelu'(-a):
// nothing becomes subnormal, which would cost the processor some hundred cycles each time.
template <class A>
struct ValueAndGradient {
  Vec<A> value;
  Vec<A> gradient;
};
// F(-a) and gelu'(-a).
template <class A>
using GeluTail = ValueAndGradient<A>;

// F = Phi, the normal distribution.
template <class A>
struct NormalTail;

// kRoot is sqrt(2 Phi(-a)): no exponential and no division, in return for a tail that is accurate absolutely and not
// relatively, as float32 eager's is. It is a weighted minimax fit (Lawson's iteration, the coefficients rounded one by
// one) on 0 <= a <= kEnd with the value at 0 held at 1; a Phi(-a) comes out within 1e-7.
template <>
struct NormalTail<float> {
  static constexpr float kEnd = 5.6f;  // a Phi(-a) = 6e-8
  static FASTTX_INLINE Vec<float> value(Vec<float> a) {
    constexpr float kRoot[] = {3.2843964e-08f,   -1.00381794e-06f, 1.26024388e-05f, -8.01348069e-05f, 0.000239626388f,
                               -0.000107168853f, -0.000572837482f, -0.0031794596f,  0.0107787531f,    0.0347339734f,
                               -0.0795792863f,   -0.398941934f,    1.0f};
    const Vec<float> root = polynomial(a, kRoot);
    return Vec<float>::set1(0.5f) * root * root;
  }

  // e^(-a^2/2) times a polynomial that the weight of the exponential lets be short: kFactor is the weighted fit of
  // (Phi(-a) - a phi(a)) e^(a^2/2) on 0 <= a <= kGradientEnd, the value at 0 held at 1/2, and kPower that of 2^r on
  // |r| <= 1/2. Rounding included, gelu'(-a) comes out within 8e-8; float32 eager's is off by 2.7e-7.
  static constexpr float kGradientEnd = 6.5f;  // gelu'(-a) = -2e-9
  static FASTTX_INLINE Vec<float> gradient(Vec<float> a) { return both(a).gradient; }

  // The value for four operations more: gelu'(-a) = Phi(-a) - a phi(a). It is as accurate, in other last bits.
  static FASTTX_INLINE GeluTail<float> both(Vec<float> a) {
    using V = Vec<float>;
    constexpr float kFactor[] = {-3.23843977e-07f, 7.87953104e-06f, -8.62695015e-05f, 0.000571004406f,
                                 -0.00261228858f,  0.00904665887f,  -0.0255248044f,   0.061965134f,
                                 -0.132824913f,    0.24997738f,     -0.797883451f,    0.5f};
    constexpr float kPower[] = {0.00132647273f, 0.00967151299f, 0.0555073358f, 0.240222424f, 0.693147004f, 1.0f};
    const V square = a * a, rate = V::set1(-0.721347520f), rounder = V::set1(ExpConstants<float>::kRounder);
    const V n = fma(square, rate, rounder) - rounder;
    const V e = scalef(polynomial(fma(square, rate, -n), kPower), n);
    const V gradient = e * polynomial(a, kFactor);
    return {fma(a * V::set1(0.398942280f), e, gradient), gradient};
  }
};

template <>
struct NormalTail<double> {
  static constexpr double kEnd = 37.5, kGradientEnd = kEnd;
  static FASTTX_INLINE Vec<double> value(Vec<double> a) { return both(a).value; }
  static FASTTX_INLINE Vec<double> gradient(Vec<double> a) { return both(a).gradient; }

  // Phi(-a) = erfc(a / sqrt 2) / 2.
  static FASTTX_INLINE GeluTail<double> both(Vec<double> a) {
    using V = Vec<double>;
    const V e = exp_product(V::set1(-0.5) * a, a);
    // a / sqrt 2 = z + low, and -e / sqrt pi is the slope of erfc(z) / 2.
    const V root = V::set1(0x1.6a09e667f3bcdp-1);
    const V z = a * root;
    const V low = fma(a, V::set1(-0x1.bdd3413b26456p-55), -product_error(a, root, z));
    const V erfc = each_lane(z, [](double x) { return __builtin_erfc(x); });
    const V value = fnma(low * V::set1(0.56418958354775629), e, V::set1(0.5) * erfc);
    return {value, fnma(a * V::set1(0.39894228040143268), e, value)};
  }
};

// F(x) = (1 + tanh u) / 2 = 1 / (1 + e^-z) with z = 2u = 2 sqrt(2/pi) (x + 0.044715 x^3).
template <class A>
struct LogisticTail {
  static constexpr A kEnd = sizeof(A) == 4 ? A(9.95) : A(21.1), kGradientEnd = kEnd;  // e^-z is about to be subnormal
  static FASTTX_INLINE Vec<A> value(Vec<A> a) { return both(a).value; }
  static FASTTX_INLINE Vec<A> gradient(Vec<A> a) { return both(a).gradient; }

  static FASTTX_INLINE GeluTail<A> both(Vec<A> a) {
    using V = Vec<A>;
    const V one = V::set1(1), linear = V::set1(A(1.5957691216057307));
    const V cubic = V::set1(A(0.071354816272600249)), square = a * a;
    const V w = exp_product(-a, fma(square, cubic, linear));
    const V s = reciprocal(one + w);
    const V slope = a * fma(square, V::set1(3) * cubic, linear);  // a dz/da
    const V value = w * s;
    return {value, value * fnma(s, slope, one)};
  }
};

#if defined(__AVX512F__)
#include "gelu_cubics.h"
#endif

// By what its results are rounded to.
template <Activation act, class T>
struct GeluTailOf {
  using type = NormalTail<accum_t<T>>;
};
template <class T>
struct GeluTailOf<Activation::gelu_tanh, T> {
  using type = LogisticTail<accum_t<T>>;
};
#if defined(__AVX512F__)
template <Activation act>
struct GeluTailOf<act, bf16> {
  using type = CubicTail<act>;
};
template <>
struct GeluTailOf<Activation::gelu_tanh, bf16> {
  using type = CubicTail<Activation::gelu_tanh>;
};
#endif

// The activation `act` of x, to be rounded to T. NaN stays NaN, and -infinity gives 0.
template <Activation act, class T>
FASTTX_INLINE Vec<accum_t<T>> gelu(Vec<accum_t<T>> x) {
  using V = Vec<accum_t<T>>;
  if constexpr (act == Activation::none) {
    return x;
  } else if constexpr (act == Activation::relu) {
    return max(V::zero(), x);
  } else {
    using Tail = typename GeluTailOf<act, T>::type;
    const V size = abs(x);
    const V a = select(lt(size, V::set1(Tail::kEnd)), size, V::zero());
    return fnma(a, Tail::value(a), max(V::zero(), x));  // max keeps a NaN x
  }
}

// Its derivative; relu's is 0 at 0.
template <Activation act, class T>
FASTTX_INLINE Vec<accum_t<T>> gelu_grad(Vec<accum_t<T>> x) {
  using V = Vec<accum_t<T>>;
  const V one = V::set1(1);
  if constexpr (act == Activation::none) {
    return one;
  } else if constexpr (act == Activation::relu) {
    return select(le(x, V::zero()), V::zero(), one);
  } else {
    using Tail = typename GeluTailOf<act, T>::type;
    const V end = V::set1(Tail::kGradientEnd), size = abs(x);
    // A NaN is not ge, and min keeps it.
    const V tail = select(ge(size, end), V::zero(), Tail::gradient(min(end, size)));
    return select(lt(x, V::zero()), tail, one - tail);
  }
}

// The activation and its derivative at once, where both are wanted.
template <Activation act, class T>
FASTTX_INLINE ValueAndGradient<accum_t<T>> gelu_and_grad(Vec<accum_t<T>> x) {
  using A = accum_t<T>;
  using V = Vec<A>;
  if constexpr (act == Activation::none || act == Activation::relu) {
    return {gelu<act, T>(x), gelu_grad<act, T>(x)};
  } else {
    using Tail = typename GeluTailOf<act, T>::type;
    const V end = V::set1(Tail::kGradientEnd), size = abs(x), a = min(end, size);
    const GeluTail<A> tail = Tail::both(a);
    const V value = select(ge(size, V::set1(Tail::kEnd)), V::zero(), tail.value);
    const V gradient = select(ge(size, end), V::zero(), tail.gradient);
    return {fnma(a, value, max(V::zero(), x)), select(lt(x, V::zero()), gradient, V::set1(1) - gradient)};
  }
}

// Calls f.template operator()<kActivation>(): one copy of the code inside for each activation.
template <class F>
FASTTX_INLINE auto with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::relu: return f.template operator()<Activation::relu>();
    case Activation::gelu: return f.template operator()<Activation::gelu>();
    case Activation::gelu_tanh: return f.template operator()<Activation::gelu_tanh>();
    case Activation::none: break;
  }
  return f.template operator()<Activation::none>();
}
