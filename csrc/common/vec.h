// Vec<C>: a SIMD register of arithmetic type C (float or double) with loads from and stores to every element type.
//
// Lane<C> is the same interface for a single element. It rounds exactly as Vec does, so that the value of an element
// never depends on whether it was computed in the body or in the tail of a loop.
#pragma once

#include <cstdint>

#include "common/dtypes.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define LSGM_VEC_AVX2 1
#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define LSGM_VEC_AVX512 1
#endif
#endif

namespace lsgm {
namespace LSGM_ISA {  // types whose functions differ between the instruction sets must differ by name

template <class C>
struct Lane {
  C v;
  static constexpr int width = 1;
};

template <class C, class T>
static inline void load(Lane<C>& x, const T* p) {
  x.v = widen<C>(*p);
}
template <class C, class T>
static inline void store(Lane<C> x, T* p) {
  narrow(x.v, *p);
}
template <class C>
static inline void fill(Lane<C>& x, C v) {
  x.v = v;
}
template <class C>
static inline Lane<C> mul(Lane<C> a, Lane<C> b) {
  return {a.v * b.v};
}
template <class C>
static inline Lane<C> add(Lane<C> a, Lane<C> b) {
  return {a.v + b.v};
}
template <class C>
static inline Lane<C> div(Lane<C> a, Lane<C> b) {
  return {a.v / b.v};
}
// The larger one; b where one is NaN.
template <class C>
static inline Lane<C> max(Lane<C> a, Lane<C> b) {
  return {a.v > b.v ? a.v : b.v};
}
static inline Lane<float> abs(Lane<float> a) { return {__builtin_fabsf(a.v)}; }
static inline Lane<double> abs(Lane<double> a) { return {__builtin_fabs(a.v)}; }
template <class C>
static inline C sum(Lane<C> a) {
  return a.v;
}

// What is left of x when it is stored as a T.
template <class C, class T>
static inline Lane<C> rounded(Lane<C> x, Type<T>) {
  T stored;
  store(x, &stored);
  load(x, &stored);
  return x;
}

#if LSGM_VEC_AVX2

// a b + c and c - a b, with one rounding.
static inline Lane<float> fma(Lane<float> a, Lane<float> b, Lane<float> c) { return {__builtin_fmaf(a.v, b.v, c.v)}; }
static inline Lane<float> fnma(Lane<float> a, Lane<float> b, Lane<float> c) { return {__builtin_fmaf(-a.v, b.v, c.v)}; }
static inline Lane<double> fma(Lane<double> a, Lane<double> b, Lane<double> c) {
  return {__builtin_fma(a.v, b.v, c.v)};
}
static inline Lane<double> fnma(Lane<double> a, Lane<double> b, Lane<double> c) {
  return {__builtin_fma(-a.v, b.v, c.v)};
}

template <class C>
struct Vec;

static inline __m256 widen8(__m128i bf16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16), 16));
}
static inline __m128i bf16x8(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  const __m256i chosen = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), _mm256_castps_si256(nan));
  const __m256i high = _mm256_srli_epi32(chosen, 16);
  const __m256i packed = _mm256_packus_epi32(high, high);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b1000));
}
static inline __m128i f16x8(__m256 x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

#if LSGM_VEC_AVX512

template <>
struct Vec<float> {
  __m512 v;
  static constexpr int width = 16;
};

static inline __m512 widen16(__m256i bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
}
static inline __m256i bf16x16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i chosen = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16));
}
static inline __m256i f16x16(__m512 x) {
  return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

static inline void load(Vec<float>& x, const float* p) { x.v = _mm512_loadu_ps(p); }
static inline void load(Vec<float>& x, const Half* p) {
  x.v = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline void load(Vec<float>& x, const BFloat16* p) {
  x.v = widen16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline void store(Vec<float> x, float* p) { _mm512_storeu_ps(p, x.v); }
static inline void store(Vec<float> x, Half* p) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), f16x16(x.v)); }
static inline void store(Vec<float> x, BFloat16* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bf16x16(x.v));
}

static inline void fill(Vec<float>& x, float v) { x.v = _mm512_set1_ps(v); }
static inline Vec<float> mul(Vec<float> a, Vec<float> b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline Vec<float> add(Vec<float> a, Vec<float> b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline Vec<float> sub(Vec<float> a, Vec<float> b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline Vec<float> div(Vec<float> a, Vec<float> b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline Vec<float> max(Vec<float> a, Vec<float> b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline Vec<float> min(Vec<float> a, Vec<float> b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline Vec<float> abs(Vec<float> a) { return {_mm512_abs_ps(a.v)}; }
static inline Vec<float> rounded(Vec<float> x, Type<float>) { return x; }
static inline Vec<float> rounded(Vec<float> x, Type<Half>) { return {_mm512_cvtph_ps(f16x16(x.v))}; }
static inline Vec<float> rounded(Vec<float> x, Type<BFloat16>) { return {widen16(bf16x16(x.v))}; }
static inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline Vec<float> fnma(Vec<float> a, Vec<float> b, Vec<float> c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
static inline float sum(Vec<float> a) { return _mm512_reduce_add_ps(a.v); }
// The lowest 8 bits of each number, as the exponent of a power of 2.
static inline Vec<float> power_from_bits(Vec<float> a) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), 23))};
}
static inline float first_of(Vec<float> a) { return _mm512_cvtss_f32(a.v); }

#else

template <>
struct Vec<float> {
  __m256 v;
  static constexpr int width = 8;
};

static inline void load(Vec<float>& x, const float* p) { x.v = _mm256_loadu_ps(p); }
static inline void load(Vec<float>& x, const Half* p) {
  x.v = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline void load(Vec<float>& x, const BFloat16* p) {
  x.v = widen8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline void store(Vec<float> x, float* p) { _mm256_storeu_ps(p, x.v); }
static inline void store(Vec<float> x, Half* p) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), f16x8(x.v)); }
static inline void store(Vec<float> x, BFloat16* p) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bf16x8(x.v)); }

static inline void fill(Vec<float>& x, float v) { x.v = _mm256_set1_ps(v); }
static inline Vec<float> mul(Vec<float> a, Vec<float> b) { return {_mm256_mul_ps(a.v, b.v)}; }
static inline Vec<float> add(Vec<float> a, Vec<float> b) { return {_mm256_add_ps(a.v, b.v)}; }
static inline Vec<float> sub(Vec<float> a, Vec<float> b) { return {_mm256_sub_ps(a.v, b.v)}; }
static inline Vec<float> div(Vec<float> a, Vec<float> b) { return {_mm256_div_ps(a.v, b.v)}; }
static inline Vec<float> max(Vec<float> a, Vec<float> b) { return {_mm256_max_ps(a.v, b.v)}; }
static inline Vec<float> min(Vec<float> a, Vec<float> b) { return {_mm256_min_ps(a.v, b.v)}; }
static inline Vec<float> abs(Vec<float> a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
static inline Vec<float> rounded(Vec<float> x, Type<float>) { return x; }
static inline Vec<float> rounded(Vec<float> x, Type<Half>) { return {_mm256_cvtph_ps(f16x8(x.v))}; }
static inline Vec<float> rounded(Vec<float> x, Type<BFloat16>) { return {widen8(bf16x8(x.v))}; }
static inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
static inline Vec<float> fnma(Vec<float> a, Vec<float> b, Vec<float> c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
static inline float sum(Vec<float> a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
static inline Vec<float> power_from_bits(Vec<float> a) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), 23))};
}
static inline float first_of(Vec<float> a) { return _mm256_cvtss_f32(a.v); }

#endif

template <>
struct Vec<double> {
  __m256d v;
  static constexpr int width = 4;
};

static inline void load(Vec<double>& x, const double* p) { x.v = _mm256_loadu_pd(p); }
static inline void load(Vec<double>& x, const float* p) { x.v = _mm256_cvtps_pd(_mm_loadu_ps(p)); }
static inline void load(Vec<double>& x, const Half* p) {
  x.v = _mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
static inline void load(Vec<double>& x, const BFloat16* p) {
  const __m128i wide = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  x.v = _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(wide, 16)));
}
static inline void store(Vec<double> x, double* p) { _mm256_storeu_pd(p, x.v); }
static inline void store(Vec<double> x, float* p) { _mm_storeu_ps(p, _mm256_cvtpd_ps(x.v)); }
static inline void store(Vec<double> x, Half* p) {
  const __m128i half = _mm_cvtps_ph(_mm256_cvtpd_ps(x.v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), half);
}
static inline void store(Vec<double> x, BFloat16* p) {
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), bf16x8(_mm256_castps128_ps256(_mm256_cvtpd_ps(x.v))));
}

static inline void fill(Vec<double>& x, double v) { x.v = _mm256_set1_pd(v); }
static inline Vec<double> mul(Vec<double> a, Vec<double> b) { return {_mm256_mul_pd(a.v, b.v)}; }
static inline Vec<double> add(Vec<double> a, Vec<double> b) { return {_mm256_add_pd(a.v, b.v)}; }
static inline Vec<double> div(Vec<double> a, Vec<double> b) { return {_mm256_div_pd(a.v, b.v)}; }
static inline Vec<double> max(Vec<double> a, Vec<double> b) { return {_mm256_max_pd(a.v, b.v)}; }
static inline Vec<double> abs(Vec<double> a) { return {_mm256_andnot_pd(_mm256_set1_pd(-0.0), a.v)}; }
static inline Vec<double> rounded(Vec<double> x, Type<double>) { return x; }
static inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
static inline Vec<double> fnma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return {_mm256_fnmadd_pd(a.v, b.v, c.v)};
}
static inline double sum(Vec<double> a) {
  const __m128d x = _mm_add_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(x, _mm_unpackhi_pd(x, x)));
}

#else

template <class C>
using Vec = Lane<C>;

template <class C>
static inline Lane<C> fma(Lane<C> a, Lane<C> b, Lane<C> c) {
  return {a.v * b.v + c.v};
}
template <class C>
static inline Lane<C> fnma(Lane<C> a, Lane<C> b, Lane<C> c) {
  return {c.v - a.v * b.v};
}

#endif

}  // namespace LSGM_ISA
}  // namespace lsgm
