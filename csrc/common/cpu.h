// Which instruction sets a CPU kernel is compiled for, and which one this processor runs.
//
// CMake compiles every csrc/<op>/cpu.cpp once per instruction set, with LSGM_ISA = scalar | avx2, and those that are
// bound by arithmetic with avx512 too. The kernels live in the namespace of that name, and their callers choose with
// `lsgm::has_avx2()` and `lsgm::has_avx512()`.
#pragma once

#if defined(__x86_64__) && defined(LSGM_HAVE_AVX2)
#include <cpuid.h>
#endif

namespace lsgm {

#if defined(__x86_64__) && defined(LSGM_HAVE_AVX2)
static inline bool detect_avx2() {
  unsigned int a = 0, b = 0, c = 0, d = 0;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
  return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
static inline bool has_avx2() {
  static const bool found = detect_avx2();
  return found;
}
#else
static inline bool has_avx2() { return false; }
#endif

#if defined(__x86_64__) && defined(LSGM_HAVE_AVX512)
static inline bool has_avx512() {
  static const bool found = has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  return found;
}
#else
static inline bool has_avx512() { return false; }
#endif

}  // namespace lsgm

// Code that names kernels of an instruction set, where they are compiled.
#if defined(LSGM_HAVE_AVX2)
#define LSGM_IF_AVX2(...) __VA_ARGS__
#else
#define LSGM_IF_AVX2(...)
#endif
#if defined(LSGM_HAVE_AVX512)
#define LSGM_IF_AVX512(...) __VA_ARGS__
#else
#define LSGM_IF_AVX512(...)
#endif
