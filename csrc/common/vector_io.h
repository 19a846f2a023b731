// Loads and stores of several elements at a time, for CUDA threads (and their emulation on the CPU).
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dtypes.h"
#include "common/macros.h"

namespace lsgm {

// Operands whose types are looked up at run time: one kernel for all rare mixtures of types, one element at a time.
struct Any {};

template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T v[N];
};

// One or two accesses of 16 bytes on the GPU; the host compiler must not be told that a Pack lies there.
template <class T, int N>
LSGM_HD void copy_aligned(Pack<T, N>& to, const T* from) {
#if defined(__CUDA_ARCH__)
  to = *reinterpret_cast<const Pack<T, N>*>(from);
#else
  __builtin_memcpy(&to, __builtin_assume_aligned(from, alignof(Pack<T, N>)), sizeof to);
#endif
}

template <class T, int N>
LSGM_HD void copy_aligned(T* to, const Pack<T, N>& from) {
#if defined(__CUDA_ARCH__)
  *reinterpret_cast<Pack<T, N>*>(to) = from;
#else
  __builtin_memcpy(__builtin_assume_aligned(to, alignof(Pack<T, N>)), &from, sizeof from);
#endif
}

// N elements, at index i that is a multiple of N; the base is aligned to 16 bytes where N > 1.
template <class T, class C, int N>
LSGM_HD void load(const void* base, DType dtype, int64_t i, C (&x)[N]) {
  if constexpr (std::is_same<T, Any>::value) {
    static_assert(N == 1, "types known at run time are read one by one");
    switch (dtype) {
      case DType::float32:
        x[0] = static_cast<C>(static_cast<const float*>(base)[i]);
        break;
      case DType::float64:
        x[0] = static_cast<C>(static_cast<const double*>(base)[i]);
        break;
      case DType::float16:
        x[0] = widen<C>(static_cast<const Half*>(base)[i]);
        break;
      default:
        x[0] = widen<C>(static_cast<const BFloat16*>(base)[i]);
        break;
    }
  } else {
    Pack<T, N> pack;
    copy_aligned(pack, static_cast<const T*>(base) + i);
    for (int k = 0; k < N; ++k) x[k] = widen<C>(pack.v[k]);
  }
}

template <class T, class C, int N>
LSGM_HD void store(void* base, DType dtype, int64_t i, const C (&x)[N]) {
  if constexpr (std::is_same<T, Any>::value) {
    static_assert(N == 1, "types known at run time are written one by one");
    switch (dtype) {
      case DType::float32:
        static_cast<float*>(base)[i] = static_cast<float>(x[0]);
        break;
      case DType::float64:
        static_cast<double*>(base)[i] = static_cast<double>(x[0]);
        break;
      case DType::float16:
        narrow(x[0], static_cast<Half*>(base)[i]);
        break;
      default:
        narrow(x[0], static_cast<BFloat16*>(base)[i]);
        break;
    }
  } else {
    Pack<T, N> pack;
    for (int k = 0; k < N; ++k) narrow(x[k], pack.v[k]);
    copy_aligned(static_cast<T*>(base) + i, pack);
  }
}

LSGM_HD bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace lsgm
