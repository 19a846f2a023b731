// Conversions between element types, against the definition of the formats and against the processor's own.
#include "common/dtypes.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "common/cpu.h"
#include "tests/check.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using namespace lsgm;

// The value of a half, from its definition.
double value_of_half(uint16_t bits) {
  const int exponent = (bits >> 10) & 31;
  const int mantissa = bits & 1023;
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  if (exponent == 31) return mantissa ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  if (exponent == 0) return sign * std::ldexp(mantissa, -24);
  return sign * std::ldexp(1024 + mantissa, exponent - 25);
}

CASE("every half, to float32 and back") {
  for (uint32_t i = 0; i < 65536; ++i) {
    const Half half{static_cast<uint16_t>(i)};
    const float wide = to_float(half);
    const double expected = value_of_half(half.bits);
    Half back;
    from_float(wide, back);
    if (std::isnan(expected)) {
      CHECK(std::isnan(wide)) << i;
      CHECK((back.bits & 0x7c00) == 0x7c00 && (back.bits & 0x3ff) != 0) << i;
    } else {
      CHECK(static_cast<double>(wide) == expected && std::signbit(wide) == std::signbit(expected)) << i;
      CHECK(back.bits == half.bits) << i;
    }
  }
}

CASE("float32 to half rounds to nearest, ties to even") {
  for (uint32_t i = 0; i < 0x7bff; ++i) {  // between neighbours: just below, at and just above the middle
    const float low = to_float(Half{static_cast<uint16_t>(i)});
    const float high = to_float(Half{static_cast<uint16_t>(i + 1)});
    const float middle = low + (high - low) / 2;
    Half below, at, above;
    from_float(std::nextafter(middle, low), below);
    from_float(middle, at);
    from_float(std::nextafter(middle, high), above);
    CHECK(below.bits == i) << i;
    CHECK(at.bits == (i & 1 ? i + 1 : i)) << i;
    CHECK(above.bits == i + 1) << i;
  }
  Half half;
  from_float(65519.0f, half);
  CHECK(half.bits == 0x7bff);
  from_float(65520.0f, half);
  CHECK(half.bits == 0x7c00);
  from_float(-1e30f, half);
  CHECK(half.bits == 0xfc00);
}

CASE("float32 to bfloat16 and back") {
  for (uint32_t i = 0; i < 65536; ++i) {
    const BFloat16 x{static_cast<uint16_t>(i)};
    BFloat16 back;
    from_float(to_float(x), back);
    if (std::isnan(to_float(x))) {
      CHECK(std::isnan(to_float(back))) << i;
    } else {
      CHECK(back.bits == i) << i;
      if ((i & 0x7f80) == 0x7f80) continue;
      BFloat16 tie, above;
      from_float(float_of((i << 16) | 0x8000u), tie);
      from_float(float_of((i << 16) | 0x8001u), above);
      CHECK(tie.bits == (i & 1 ? i + 1 : i)) << i;
      CHECK(above.bits == i + 1) << i;
    }
  }
  BFloat16 x;
  from_float(float_of(0x7f800001u), x);  // a NaN whose upper half looks like infinity
  CHECK(std::isnan(to_float(x)));
}

#if defined(__x86_64__) && defined(LSGM_HAVE_AVX2)
__attribute__((target("avx2,f16c"))) uint16_t half_of_hardware(float x) {
  return static_cast<uint16_t>(_mm_extract_epi16(_mm_cvtps_ph(_mm_set1_ps(x), 0), 0));
}

CASE("half conversion equals the processor's") {
  if (!has_avx2()) return;
  lsgm::testing::Random random(1);
  for (int i = 0; i < 200000; ++i) {
    const float x = float_of(static_cast<uint32_t>(random.bits()));
    Half half;
    from_float(x, half);
    CHECK(half.bits == half_of_hardware(x)) << bits_of(x);
  }
}
#endif

}  // namespace
