// Elementary functions on whole registers. Nothing here exists without AVX2: there the standard library serves.
//
// The polynomials are minimax approximations made for these files (Remez exchange in extended precision); the error of
// each is given relative to the function. Every value depends on its own lane alone.
#pragma once

#include "common/vec.h"

#if LSGM_VEC_AVX2

namespace lsgm {
namespace LSGM_ISA {

// 1 + exp(-u), to about two units in the last place: infinite from u = -89 down, NaN at NaN.
static inline Vec<float> one_plus_exp_minus(Vec<float> u) {
  // (2^f - 1) / f for |f| <= 1/2; 1.2e-7, relative to 2^f.
  static constexpr float kPower[] = {
      0x1.62e42ap-1f, 0x1.ebf9bap-3f, 0x1.c6b758p-5f, 0x1.3ceb1p-7f, 0x1.5bb986p-10f};
  const auto all = [](float value) {
    Vec<float> x;
    fill(x, value);
    return x;
  };
  // The second operand is the result where one is NaN.
  const Vec<float> t = max(all(-89.5f), min(all(87.0f), u));
  // -u / ln 2 = n + f. The last bits of `shifted` are n + 126: the exponent of 2^(n - 1) (2^128 is no float).
  const Vec<float> by = all(-0x1.715476p+0f), shift = all(0x1.8p23f + 126.0f);
  const Vec<float> shifted = fma(t, by, shift);
  const Vec<float> half = power_from_bits(shifted);
  const Vec<float> f = fma(t, by, sub(shift, shifted));
  const Vec<float> one = all(1.0f);
  Vec<float> power = all(kPower[4]);
  for (int k = 3; k >= 0; --k) power = fma(power, f, all(kPower[k]));
  return fma(mul(fma(power, f, one), half), all(2.0f), one);
}

#if !LSGM_VEC_AVX512  // what philox_normal alone uses, which has no copy for it

// 32-bit unsigned integers to float32, rounded once, to nearest: both halves are exact.
static inline Vec<float> from_uint32(__m256i x) {
  const __m256 high = _mm256_cvtepi32_ps(_mm256_srli_epi32(x, 16));
  const __m256 low = _mm256_cvtepi32_ps(_mm256_blend_epi16(x, _mm256_setzero_si256(), 0xAA));
  return {_mm256_fmadd_ps(high, _mm256_set1_ps(0x1p16f), low)};
}

static inline Vec<double> lower_half(Vec<float> x) { return {_mm256_cvtps_pd(_mm256_castps256_ps128(x.v))}; }
static inline Vec<double> upper_half(Vec<float> x) { return {_mm256_cvtps_pd(_mm256_extractf128_ps(x.v, 1))}; }

static inline Vec<float> square_root(Vec<float> x) { return {_mm256_sqrt_ps(x.v)}; }
static inline Vec<double> square_root(Vec<double> x) { return {_mm256_sqrt_pd(x.v)}; }

// c[0] + c[1] x + ... + c[n - 1] x^(n - 1)
static inline __m256 polynomial(__m256 x, const float* c, int n) {
  __m256 y = _mm256_set1_ps(c[n - 1]);
  for (int k = n - 2; k >= 0; --k) y = _mm256_fmadd_ps(y, x, _mm256_set1_ps(c[k]));
  return y;
}
static inline __m256d polynomial(__m256d x, const double* c, int n) {
  __m256d y = _mm256_set1_pd(c[n - 1]);
  for (int k = n - 2; k >= 0; --k) y = _mm256_fmadd_pd(y, x, _mm256_set1_pd(c[k]));
  return y;
}

// Natural logarithm of positive, normal, finite numbers, to about one unit in the last place, near 1 too.
static inline Vec<float> log_positive(Vec<float> x) {
  // (ln(1 + f) - f + f^2 / 2) / f^3 for sqrt(1/2) <= 1 + f < sqrt(2); 6e-9.
  static constexpr float kTail[] = {0x1.555554p-2f, -0x1.000226p-2f, 0x1.99a00ap-3f, -0x1.547246p-3f, 0x1.22da06p-3f,
      -0x1.0d851ap-3f, 0x1.055be8p-3f, -0x1.38b75cp-4f};
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i above = _mm256_sub_epi32(bits, _mm256_set1_epi32(0x3f3504f3));  // sqrt(1/2)
  const __m256i exponent = _mm256_srai_epi32(above, 23);
  const __m256i mantissa = _mm256_sub_epi32(bits, _mm256_slli_epi32(exponent, 23));
  const __m256 f = _mm256_sub_ps(_mm256_castsi256_ps(mantissa), _mm256_set1_ps(1.0f));  // exact
  const __m256 e = _mm256_cvtepi32_ps(exponent);
  const __m256 tail = _mm256_fmadd_ps(f, polynomial(f, kTail, 8), _mm256_set1_ps(-0.5f));
  // e ln 2 in two parts: the larger joins last.
  const __m256 small = _mm256_fmadd_ps(_mm256_mul_ps(f, f), tail, _mm256_mul_ps(e, _mm256_set1_ps(-0x1.05c61p-29f)));
  return {_mm256_fmadd_ps(e, _mm256_set1_ps(0x1.62e43p-1f), _mm256_add_ps(f, small))};
}

static inline Vec<double> log_positive(Vec<double> x) {
  // (ln((1 + s) / (1 - s)) - 2 s) / s^3 as a function of s^2, for the same interval; 1.3e-18.
  static constexpr double kTail[] = {0x1.5555555555592p-1, 0x1.999999997fdb7p-2, 0x1.24924941f126ap-2,
      0x1.c71c52095c7a3p-3, 0x1.74663ee868b1dp-3, 0x1.39a1babb3820dp-3, 0x1.2f056340f7d53p-3};
  const __m256i bits = _mm256_castpd_si256(x.v);
  const __m256i above = _mm256_sub_epi64(bits, _mm256_set1_epi64x(0x3fe6a09e667f3bcd));  // sqrt(1/2)
  // The exponent is in the upper half of each lane, where AVX2 has the arithmetic shift that it lacks for 64 bits.
  const __m256i exponents = _mm256_srai_epi32(above, 20);
  const __m256i mantissa =
      _mm256_sub_epi64(bits, _mm256_slli_epi64(_mm256_srli_epi64(exponents, 32), 52));
  const __m256i packed = _mm256_permutevar8x32_epi32(exponents, _mm256_setr_epi32(1, 3, 5, 7, 1, 3, 5, 7));
  const __m256d e = _mm256_cvtepi32_pd(_mm256_castsi256_si128(packed));
  const __m256d f = _mm256_sub_pd(_mm256_castsi256_pd(mantissa), _mm256_set1_pd(1.0));  // exact
  const __m256d s = _mm256_div_pd(f, _mm256_add_pd(f, _mm256_set1_pd(2.0)));
  const __m256d square = _mm256_mul_pd(s, s);
  const __m256d tail = _mm256_mul_pd(_mm256_mul_pd(s, square), polynomial(square, kTail, 7));
  const __m256d small = _mm256_fmadd_pd(e, _mm256_set1_pd(0x1.abc9e3b39803fp-56), tail);
  return {_mm256_fmadd_pd(
      e, _mm256_set1_pd(0x1.62e42fefa39efp-1), _mm256_add_pd(_mm256_add_pd(s, s), small))};
}

// Sine and cosine of 2 pi `turns`, of magnitude up to 2^20, each to about one unit in the last place. The argument is
// reduced in turns, where that is exact: r, in quarter turns, from -1/2 to 1/2.
static inline void sincos_turns(Vec<float> turns, Vec<float>& sine, Vec<float>& cosine) {
  // sin(pi/2 r) / r = pi/2 + r^2 (...), 4e-9, and cos(pi/2 r) = 1 + r^2 (...), 6e-11
  static constexpr float kSine[] = {-0x1.4abbbcp-1f, 0x1.466032p-4f, -0x1.2dd048p-8f};
  static constexpr float kCosine[] = {-0x1.3bd3ccp+0f, 0x1.03c1dep-2f, -0x1.55c664p-6f, 0x1.d9f7bcp-11f};
  const __m256 quarters = _mm256_mul_ps(turns.v, _mm256_set1_ps(4.0f));
  const __m256i whole = _mm256_cvtps_epi32(quarters);
  const __m256 r = _mm256_sub_ps(quarters, _mm256_cvtepi32_ps(whole));
  const __m256 square = _mm256_mul_ps(r, r);
  // pi/2 is the sum of two constants, so that its rounding adds nothing to that of the product.
  const __m256 tail = _mm256_fmadd_ps(square, polynomial(square, kSine, 3), _mm256_set1_ps(-0x1.777a5cp-25f));
  const __m256 s = _mm256_fmadd_ps(r, _mm256_set1_ps(0x1.921fb6p+0f), _mm256_mul_ps(r, tail));
  const __m256 c = _mm256_fmadd_ps(square, polynomial(square, kCosine, 4), _mm256_set1_ps(1.0f));
  // An odd number of quarters swaps the two; the signs are those of the quadrant.
  const __m256 swap = _mm256_castsi256_ps(_mm256_slli_epi32(whole, 31));
  const __m256i sign = _mm256_set1_epi32(INT32_MIN);
  const __m256i sine_sign = _mm256_and_si256(_mm256_slli_epi32(whole, 30), sign);
  const __m256i cosine_sign =
      _mm256_and_si256(_mm256_slli_epi32(_mm256_add_epi32(whole, _mm256_set1_epi32(1)), 30), sign);
  sine.v = _mm256_xor_ps(_mm256_blendv_ps(s, c, swap), _mm256_castsi256_ps(sine_sign));
  cosine.v = _mm256_xor_ps(_mm256_blendv_ps(c, s, swap), _mm256_castsi256_ps(cosine_sign));
}

static inline void sincos_turns(Vec<double> turns, Vec<double>& sine, Vec<double>& cosine) {
  // As above; 4e-18 and 4e-20.
  static constexpr double kSine[] = {-0x1.4abbce625be47p-1, 0x1.466bc67758d85p-4, -0x1.32d2cce3332ddp-8,
      0x1.5078301b62443p-13, -0x1.e300a65a215edp-19, 0x1.e403d08310973p-25};
  static constexpr double kCosine[] = {-0x1.3bd3cc9be45dep+0, 0x1.03c1f081b5ab0p-2, -0x1.55d3c7e3c95bcp-6,
      0x1.e1f50683b42edp-11, -0x1.a6d1ecb7419b5p-16, 0x1.f9cc6ad0d293ep-22, -0x1.b26fe8a3bb7fap-28};
  const __m256d quarters = _mm256_mul_pd(turns.v, _mm256_set1_pd(4.0));
  const __m128i narrow = _mm256_cvtpd_epi32(quarters);
  const __m256i whole = _mm256_cvtepi32_epi64(narrow);
  const __m256d r = _mm256_sub_pd(quarters, _mm256_cvtepi32_pd(narrow));
  const __m256d square = _mm256_mul_pd(r, r);
  const __m256d tail = _mm256_fmadd_pd(square, polynomial(square, kSine, 6), _mm256_set1_pd(0x1.1a62633145c07p-54));
  const __m256d s = _mm256_fmadd_pd(r, _mm256_set1_pd(0x1.921fb54442d18p+0), _mm256_mul_pd(r, tail));
  const __m256d c = _mm256_fmadd_pd(square, polynomial(square, kCosine, 7), _mm256_set1_pd(1.0));
  const __m256d swap = _mm256_castsi256_pd(_mm256_slli_epi64(whole, 63));
  const __m256i sign = _mm256_set1_epi64x(INT64_MIN);
  const __m256i sine_sign = _mm256_and_si256(_mm256_slli_epi64(whole, 62), sign);
  const __m256i cosine_sign =
      _mm256_and_si256(_mm256_slli_epi64(_mm256_add_epi64(whole, _mm256_set1_epi64x(1)), 62), sign);
  sine.v = _mm256_xor_pd(_mm256_blendv_pd(s, c, swap), _mm256_castsi256_pd(sine_sign));
  cosine.v = _mm256_xor_pd(_mm256_blendv_pd(c, s, swap), _mm256_castsi256_pd(cosine_sign));
}

#endif

}  // namespace LSGM_ISA
}  // namespace lsgm

#endif
