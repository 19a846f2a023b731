// The CPU kernel of residual_add, baseline and AVX2, against long double.
#include "common/cpu.h"
#include "tests/residual_add_problem.h"

namespace {

using namespace lsgm;
using namespace lsgm::residual_add;
using lsgm::testing::Example;
using lsgm::testing::ResidualAdd;

using Kernel = void (*)(const Problem&, int64_t, int64_t);

// In three ranges, as three threads would.
void in_ranges(const Problem& p, Kernel kernel) {
  const int64_t n = cpu::segments(p).count, third = n / 3;
  if (2 * third < n) kernel(p, 2 * third, n);
  if (third > 0) kernel(p, 0, third);
  if (third > 0) kernel(p, third, 2 * third);
}

void check_kernel(const char* who, Kernel kernel) {
  for (const Example& example : lsgm::testing::examples()) {
    ResidualAdd r(example);
    in_ranges(r.p, kernel);
    r.check(who);
  }
}

CASE("baseline kernel") { check_kernel("scalar", &scalar::run); }

#if defined(LSGM_HAVE_AVX2)
CASE("AVX2 kernel") {
  if (has_avx2()) check_kernel("avx2", &avx2::run);
}
#endif

CASE("the kernel chosen at run time") { check_kernel("cpu", &cpu::run); }

CASE("a sum beyond float16 whose part is not") {
  ResidualAdd r({40, DType::float16, true, 0});
  r.p.scale32 = 0.25f;
  for (int64_t i = 0; i < 40; ++i) {
    r.x.set(i, 60000);
    r.h.set(i, 40000);
  }
  in_ranges(r.p, &cpu::run);
  for (int64_t i = 0; i < 40; ++i) CHECK(r.out.at(i) == 24992) << r.out.at(i);
}

CASE("NaN and infinity stay where they are") {
  for (DType dtype : {DType::float32, DType::float64, DType::float16, DType::bfloat16}) {
    ResidualAdd r({45, dtype, true, 0});
    for (int64_t i = 0; i < 45; ++i) {
      if (i % 5 == 1) r.x.set(i, std::nan(""));
      if (i % 5 == 2) r.h.set(i, HUGE_VAL);
    }
    in_ranges(r.p, &cpu::run);
    for (int64_t i = 0; i < 45; ++i) {
      const double got = r.out.at(i);
      CHECK(i % 5 == 1 ? std::isnan(got) : i % 5 == 2 ? got == HUGE_VAL : std::isfinite(got)) << i << " " << got;
    }
  }
}

CASE("segments beyond 2^31 elements") {
  Problem p{};
  p.count = (int64_t(1) << 34) + 1;
  const Segments s = cpu::segments(p);
  CHECK(s.count == (int64_t(1) << 20) + 1 && s.outer == 1 && segment_at(s, s.count - 1).size == 1);
}

}  // namespace
