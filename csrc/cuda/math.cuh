// Elementary functions and GELU in float32.
#pragma once

namespace fasttx::cuda {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// 2^x within 2 ulp; 0 for -infinity.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Both GELUs are x F(x) with F(-a) = 1 - F(a). With a = |x|, gelu(x) = max(x, 0) - a F(-a), which does not cancel in the
// negative tail, and gelu'(-a) = 1 - gelu'(a). From kEnd on F(-a) is nothing, and a is taken as zero there, so that no
// infinity meets it. NaN stays NaN, and -infinity gives 0.

// F the standard normal distribution function. Hendrycks and Gimpel 2016.
struct Normal {
  static constexpr float kEnd = 6.5f;

  // a F(-a), for 0 <= a < kEnd.
  static __device__ __forceinline__ float value(float a) {
    const float weight = half_square_exp(a);
    return a * weight * fmaf(a, 0.3989422804014327f, weighted_gradient(a));
  }
  // gelu'(-a) = F(-a) - a F'(a), within 1e-7.
  static __device__ __forceinline__ float gradient(float a) { return half_square_exp(a) * weighted_gradient(a); }

 private:
  static __device__ __forceinline__ float half_square_exp(float a) { return exp2_approx(a * a * -0.7213475204444817f); }
  // (F(-a) - a F'(a)) e^(a^2 / 2): the minimax fit weighted by the exponential that it is multiplied by, its value at 0
  // held at 1/2. The weight lets it be short.
  static __device__ __forceinline__ float weighted_gradient(float a) {
    constexpr float kPowers[] = {7.87953104e-06f, -8.62695015e-05f, 0.000571004406f, -0.00261228858f, 0.00904665887f,
                                 -0.0255248044f,  0.061965134f,     -0.132824913f,   0.24997738f,     -0.797883451f,
                                 0.5f};
    float sum = -3.23843977e-07f;
#pragma unroll
    for (const float power : kPowers) sum = fmaf(sum, a, power);
    return sum;
  }
};

// F(x) = (1 + tanh u) / 2 = 1 / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3).
struct Logistic {
  static constexpr float kEnd = 10.f;

  static __device__ __forceinline__ float value(float a) {
    const float e = exp(a);
    return a * __fdividef(e, 1.f + e);
  }
  // s (1 - 2 a u' (1 - s)) with s = F(-a).
  static __device__ __forceinline__ float gradient(float a) {
    const float e = exp(a), upper = __fdividef(1.f, 1.f + e);
    const float slope = a * fmaf(a * a, 3.f * kCubic, kLinear);
    return e * upper * (1.f - upper * slope);
  }

 private:
  static constexpr float kLinear = 1.5957691216057308f, kCubic = 0.0713548162726002f;
  // e^-2u.
  static __device__ __forceinline__ float exp(float a) {
    return exp2_approx(-kLog2e * a * fmaf(a * a, kCubic, kLinear));
  }
};

template <class Distribution>
__device__ __forceinline__ float gelu(float x) {
  const float size = fabsf(x), a = size < Distribution::kEnd ? size : 0.f;
  return (x < 0.f ? 0.f : x) - Distribution::value(a);
}

template <class Distribution>
__device__ __forceinline__ float gelu_grad(float x) {
  const float size = fabsf(x);
  const float tail = size < Distribution::kEnd ? Distribution::gradient(size) : 0.f;
  return x > 0.f ? 1.f - tail : x == x ? tail : x;
}

}  // namespace fasttx::cuda
