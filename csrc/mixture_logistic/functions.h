// What the mixture of logistics needs of registers beyond common/vec.h: operators, masks, exponentials, logarithm.
#pragma once

#include <cmath>

#include "common/vec_math.h"

namespace lsgm {
namespace mixture_logistic {
namespace LSGM_ISA {
namespace {

using namespace lsgm::LSGM_ISA;

using R = Vec<float>;

inline R all(float value) {
  R x;
  fill(x, value);
  return x;
}

inline R operator+(R a, R b) { return add(a, b); }
inline R operator*(R a, R b) { return mul(a, b); }
inline R operator/(R a, R b) { return div(a, b); }

// exp(t), and 1 - exp(t) without cancellation near 0.
struct Exponential {
  R value, one_minus;
};

#if LSGM_VEC_AVX2

inline R operator-(R a, R b) { return sub(a, b); }

#if LSGM_VEC_AVX512

struct Mask {
  __mmask16 m;
};
inline Mask greater(R a, R b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
inline R select(Mask mask, R a, R b) { return {_mm512_mask_blend_ps(mask.m, b.v, a.v)}; }
// `a` with its sign changed where b's is negative.
inline R flip(R a, R b) { return {_mm512_xor_ps(a.v, _mm512_and_ps(b.v, _mm512_set1_ps(-0.0f)))}; }
inline Mask negative(R a) { return {_mm512_movepi32_mask(_mm512_castps_si512(a.v))}; }
inline bool any(Mask mask) { return mask.m != 0; }

#else

struct Mask {
  __m256 m;
};
inline Mask greater(R a, R b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
inline R select(Mask mask, R a, R b) { return {_mm256_blendv_ps(b.v, a.v, mask.m)}; }
inline R flip(R a, R b) { return {_mm256_xor_ps(a.v, _mm256_and_ps(b.v, _mm256_set1_ps(-0.0f)))}; }
inline Mask negative(R a) { return {a.v}; }
inline bool any(Mask mask) { return _mm256_movemask_ps(mask.m) != 0; }

#endif

// For t up to 87, and exp(-87) below -87; NaN at NaN. About one unit in the last place beyond the rounding of t.
inline Exponential exponential(R t) {
  // (2^f - 1) / f for |f| <= 1/2, a minimax polynomial; 2.1e-8.
  static constexpr float kPower[] = {
      0x1.62e43p-1f, 0x1.ebfbdep-3f, 0x1.c6af6ep-5f, 0x1.3b2bap-7f, 0x1.5f07b4p-10f, 0x1.4308fap-13f};
  t = max(all(-87.0f), t);  // the second operand is the result where one is NaN
  // t / ln 2 = n + f. The last bits of `shifted` are n + 127, the exponent of 2^n.
  const R by = all(0x1.715476p+0f), shift = all(0x1.8p23f + 127.0f);
  const R shifted = fma(t, by, shift);
  const R scale = power_from_bits(shifted);
  const R f = fma(t, by, shift - shifted);
  R power = all(kPower[5]);
  for (int k = 4; k >= 0; --k) power = fma(power, f, all(kPower[k]));
  power = power * f;
  return {fma(scale, power, scale), fnma(scale, power, all(1.0f) - scale)};
}

#if LSGM_VEC_AVX512

// As vec_math.h's for 8 numbers: of positive, normal, finite ones.
inline R log_positive(R x) {
  // (ln(1 + f) - f + f^2 / 2) / f^3 for sqrt(1/2) <= 1 + f < sqrt(2); 6e-9.
  static constexpr float kTail[] = {0x1.555554p-2f, -0x1.000226p-2f, 0x1.99a00ap-3f, -0x1.547246p-3f, 0x1.22da06p-3f,
      -0x1.0d851ap-3f, 0x1.055be8p-3f, -0x1.38b75cp-4f};
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i above = _mm512_sub_epi32(bits, _mm512_set1_epi32(0x3f3504f3));  // sqrt(1/2)
  const __m512i exponent = _mm512_srai_epi32(above, 23);
  const R mantissa = {_mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(exponent, 23)))};
  const R f = mantissa - all(1.0f), e = {_mm512_cvtepi32_ps(exponent)};
  R tail = all(kTail[7]);
  for (int k = 6; k >= 0; --k) tail = fma(tail, f, all(kTail[k]));
  tail = fma(f, tail, all(-0.5f));
  // e ln 2 in two parts: the larger joins last.
  const R small = fma(f * f, tail, e * all(-0x1.05c61p-29f));
  return fma(e, all(0x1.62e43p-1f), f + small);
}

#endif

// The logarithm of positive, normal, finite numbers; NaN at NaN.
inline R logarithm(R x) { return fma(x, all(0.0f), log_positive(x)); }

#else

inline R operator-(R a, R b) { return {a.v - b.v}; }
inline R min(R a, R b) { return {a.v < b.v ? a.v : b.v}; }

struct Mask {
  bool m;
};
inline Mask greater(R a, R b) { return {a.v > b.v}; }
inline R select(Mask mask, R a, R b) { return mask.m ? a : b; }
inline R flip(R a, R b) { return {std::signbit(b.v) ? -a.v : a.v}; }
inline Mask negative(R a) { return {std::signbit(a.v)}; }
inline bool any(Mask mask) { return mask.m; }

inline Exponential exponential(R t) {
  t = max(all(-87.0f), t);
  const float value = std::exp(t.v);
  return {{value}, {t.v > -0.5f ? -std::expm1(t.v) : 1.0f - value}};
}

inline R logarithm(R x) { return {std::log(x.v)}; }

#endif

}  // namespace
}  // namespace LSGM_ISA
}  // namespace mixture_logistic
}  // namespace lsgm
