// Element types, and their conversion to and from the type in which arithmetic is done. No torch, no standard library
// beyond <cstdint>: the same code runs on the CPU and in CUDA kernels.
#pragma once

#include <cstdint>

#include "common/macros.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace lsgm {

enum class DType : int32_t { float32, float64, float16, bfloat16 };

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<T>{}) with the element type of `dtype`.
template <class F>
static inline decltype(auto) visit(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float64:
      return f(Type<double>{});
    case DType::float16:
      return f(Type<Half>{});
    case DType::bfloat16:
      return f(Type<BFloat16>{});
    default:
      return f(Type<float>{});
  }
}

LSGM_HD int64_t size_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// The type of the arithmetic: float32, or float64 where an operand has it.
template <class A, class B>
struct Compute {
  using type = float;
};
template <class B>
struct Compute<double, B> {
  using type = double;
};
template <class A>
struct Compute<A, double> {
  using type = double;
};
template <>
struct Compute<double, double> {
  using type = double;
};

LSGM_HD uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

LSGM_HD float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

LSGM_HD float to_float(float x) { return x; }

LSGM_HD float to_float(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

LSGM_HD float to_float(Half x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude > 0x7c00u) return float_of(sign | 0x7fc00000u | (magnitude << 13));  // NaN, made quiet
  if (magnitude == 0x7c00u) return float_of(sign | 0x7f800000u);
  if (magnitude >= 0x0400u) return float_of(sign | ((magnitude << 13) + 0x38000000u));
  return float_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-24f));  // subnormal: exact in float32
#endif
}

// Round to nearest, ties to even, as the hardware instructions do.
LSGM_HD void from_float(float x, float& out) { out = x; }

LSGM_HD void from_float(float x, BFloat16& out) {
#if defined(__CUDA_ARCH__)
  out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out.bits = 0x7fc0u;  // the carry below could turn a NaN into infinity
  } else {
    out.bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
#endif
}

LSGM_HD void from_float(float x, Half& out) {
#if defined(__CUDA_ARCH__)
  out.bits = __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t bits = bits_of(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x47800000u) {
    half = 0x7c00u;  // 65536 and beyond; what rounds up to 65536 gets there by the carry below
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 leaves the subnormal half, rounded, in the last bits.
    half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | half);
#endif
}

// Element to arithmetic type C, and back. float64 reaches the 16-bit types through float32, as in PyTorch.
template <class C, class T>
LSGM_HD C widen(T x) {
  return static_cast<C>(to_float(x));
}
template <class C>
LSGM_HD C widen(double x) {
  return static_cast<C>(x);
}

template <class T, class C>
LSGM_HD void narrow(C x, T& out) {
  from_float(static_cast<float>(x), out);
}
template <class C>
LSGM_HD void narrow(C x, double& out) {
  out = static_cast<double>(x);
}

}  // namespace lsgm
