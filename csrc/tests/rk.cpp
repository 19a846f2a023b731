// The CPU kernels of the Runge-Kutta methods, baseline and AVX2, against long double; and the control of the step size.
#include "common/cpu.h"
#include "tests/rk_problem.h"

namespace {

using namespace lsgm;
using namespace lsgm::rk;
using lsgm::testing::Random;
using lsgm::testing::Rk;
using lsgm::testing::RkExample;

using Kernel = void (*)(const Problem&, int64_t, int64_t);

// Plans the call and gives it memory of exactly the size that it asks for (in elements of two bytes).
class Scratch {
 public:
  explicit Scratch(Problem& p)
      : memory_((cpu::plan(p), cpu::scratch(p) / 2), DType::float16, 0) {
    cpu::prepare(p, memory_.data());
  }

 private:
  lsgm::testing::Buffer memory_;
};

// In three ranges, as three threads would.
void in_ranges(const Problem& p, Kernel kernel) {
  const int64_t n = p.segments.count, third = n / 3;
  kernel(p, 2 * third, n);
  kernel(p, 0, third);
  kernel(p, third, 2 * third);
  if (p.norm != nullptr) cpu::finish(p);
}

void check_kernel(const char* who, Kernel kernel) {
  for (const RkExample& example : lsgm::testing::rk_examples()) {
    Rk m(example);
    const Scratch scratch(m.p);
    in_ranges(m.p, kernel);
    m.check(who);
  }
}

CASE("baseline kernels") { check_kernel("scalar", &scalar::step); }

#if defined(LSGM_HAVE_AVX2)
CASE("AVX2 kernels") {
  if (has_avx2()) check_kernel("avx2", &avx2::step);
}
#endif

CASE("the kernels chosen at run time") { check_kernel("cpu", &cpu::step); }

RkExample plain(int64_t batch, int64_t channels, int64_t spatial, DType dtype) {
  return {batch, channels, spatial, dtype, false, false, dtype, true, false, 15, {0.5, 0.25}, {0.5, -0.25}, 0, 0};
}

CASE("one thread or many, the same bits") {
  for (bool drift : {false, true}) {
    for (int64_t spatial : {9, 2500}) {
      RkExample example = plain(3, 20, spatial, DType::float32);
      example.drift = example.mixing = drift;
      example.shared = drift ? 0 : 15;
      Rk once(example), often(example);
      const Scratch first(once.p), second(often.p);
      cpu::step(once.p, 0, once.p.segments.count);
      for (int64_t s = often.p.segments.count - 1; s >= 0; --s) cpu::step(often.p, s, s + 1);
      for (int64_t s = 0; s < once.p.segments.count; ++s) CHECK(once.p.partials[s] == often.p.partials[s]) << s;
      for (int64_t i = 0; i < once.count; ++i) CHECK(once.z.at(i) == often.z.at(i)) << i;
    }
  }
}

CASE("a norm per sample is that of the sample alone") {
  RkExample example = plain(4, 7, 333, DType::float32);
  example.per_sample = true;
  Rk all(example);
  const Scratch scratch(all.p);
  in_ranges(all.p, &cpu::step);
  example.batch = 1;
  for (int64_t b = 0; b < 4; ++b) {
    Rk one(example);
    for (int64_t i = 0; i < one.count; ++i) {
      one.y.set(i, all.y.at(b * one.count + i));
      for (int64_t s = 0; s < 2; ++s) one.k.set(s * one.count + i, all.k.at(s * all.count + b * one.count + i));
    }
    one.scalars.set(0, all.scalars.at(0));
    const Scratch own(one.p);
    in_ranges(one.p, &cpu::step);
    CHECK(one.norm.at(0) == all.norm.at(b)) << b;
  }
}

CASE("an element's value does not depend on its place") {
  // The same numbers at the start of a plane and in its tail, in planes that are runs and in those that are not.
  for (DType dtype : {DType::float32, DType::float64}) {
    for (int64_t spatial : {1, 5, 8, 9, 31, 47, 64, 67, 79, 131}) {
      RkExample example = plain(1, 3, spatial, dtype);
      example.drift = example.mixing = true;
      Rk m(example);
      for (int64_t c = 0; c < 3; ++c) m.logit.set(c, 0.3);
      for (int64_t i = 0; i < m.count; ++i) {
        m.y.set(i, 0.9);
        m.z.set(i, -1.3);
        m.eps.set(i, 0.7);
        m.k.set(m.count + i, 0.4);
      }
      const Scratch scratch(m.p);
      in_ranges(m.p, &cpu::step);
      for (int64_t i = 1; i < m.count; ++i) CHECK(m.z.at(i) == m.z.at(0)) << spatial << " " << i;
      for (int64_t i = 1; i < m.count; ++i) CHECK(m.k.at(i) == m.k.at(0)) << spatial << " " << i;
    }
  }
}

CASE("NaN and infinity reach the solution and the norm, and only those") {
  for (DType dtype : {DType::float32, DType::float64, DType::float16, DType::bfloat16}) {
    for (int64_t at : {0, 20, 39, 40}) {  // a block, single registers, the tail
      for (double bad : {std::nan(""), HUGE_VAL}) {
        Rk in_y(plain(1, 1, 41, dtype));
        in_y.y.set(at, bad);
        const Scratch first(in_y.p);
        in_ranges(in_y.p, &cpu::step);
        for (int64_t i = 0; i < 41; ++i) CHECK(std::isfinite(in_y.z.at(i)) == (i != at)) << at << " " << i;
        // An infinite state has an infinite tolerance.
        CHECK(std::isnan(bad) ? std::isnan(in_y.norm.at(0)) : std::isfinite(in_y.norm.at(0))) << at;

        Rk in_k(plain(1, 1, 41, dtype));
        in_k.k.set(at, bad);
        const Scratch second(in_k.p);
        in_ranges(in_k.p, &cpu::step);
        for (int64_t i = 0; i < 41; ++i) CHECK(std::isfinite(in_k.z.at(i)) == (i != at)) << at << " " << i;
        CHECK(std::isnan(in_k.norm.at(0))) << at;  // infinity / infinity

        // In a stage of the solution alone: the tolerance is NaN or infinite.
        RkExample only = plain(1, 1, 41, dtype);
        only.e[0] = 0;
        Rk in_solution(only);
        in_solution.k.set(at, bad);
        const Scratch fourth(in_solution.p);
        in_ranges(in_solution.p, &cpu::step);
        for (int64_t i = 0; i < 41; ++i) CHECK(std::isfinite(in_solution.z.at(i)) == (i != at)) << at << " " << i;
        CHECK(std::isnan(bad) ? std::isnan(in_solution.norm.at(0)) : std::isfinite(in_solution.norm.at(0))) << at;

        // In a stage of the error alone it leaves the solution in peace.
        only = plain(1, 1, 41, dtype);
        only.a[0] = 0;
        Rk in_error(only);
        in_error.k.set(at, bad);
        const Scratch third(in_error.p);
        in_ranges(in_error.p, &cpu::step);
        for (int64_t i = 0; i < 41; ++i) CHECK(std::isfinite(in_error.z.at(i))) << at << " " << i;
        CHECK(std::isnan(bad) ? std::isnan(in_error.norm.at(0)) : in_error.norm.at(0) == HUGE_VAL) << at;
      }
    }
  }
}

CASE("a drift that is not finite stays out of what does not use it") {
  for (bool solution : {true, false}) {
    RkExample example = plain(1, 2, 41, DType::float64);
    example.drift = example.mixing = true;
    (solution ? example.a : example.e)[0] = 0;
    Rk m(example);
    m.eps.set(17, HUGE_VAL);
    const Scratch scratch(m.p);
    in_ranges(m.p, &cpu::step);
    CHECK(std::isinf(m.k.at(17)));
    for (int64_t i = 0; i < m.count; ++i) CHECK(std::isfinite(m.z.at(i)) == (solution || i != 17)) << i;
    // Without a part in the error it makes the tolerance infinite.
    CHECK(solution ? m.norm.at(0) == HUGE_VAL : std::isfinite(m.norm.at(0))) << m.norm.at(0);
  }
}

CASE("the solution counts as rounded") {
  // 1 + 2^-10 rounds to 1 in bfloat16, with which the tolerance is rtol.
  RkExample example = plain(1, 1, 9, DType::bfloat16);
  example.a = {1, 0};
  example.e = {1, 0};
  Rk m(example);
  m.p.rtol = 1;
  m.p.atol = 0;
  m.scalars.set(0, 1);
  for (int64_t i = 0; i < 9; ++i) {
    m.y.set(i, 1);
    m.k.set(i, 0x1p-10);
  }
  const Scratch scratch(m.p);
  in_ranges(m.p, &cpu::step);
  CHECK(m.norm.at(0) == 0x1p-10) << m.norm.at(0);
}

CASE("sums of float32 lose nothing over millions of elements") {
  RkExample example = plain(1, 1, 3000001, DType::float32);
  example.a = {1};
  example.e = {1};
  Rk m(example);
  m.p.rtol = 0;
  m.p.atol = 1;
  m.scalars.set(0, 1);
  const double value = 0.1f;
  for (int64_t i = 0; i < m.count; ++i) m.k.set(i, value);
  const Scratch scratch(m.p);
  for (Kernel kernel : {&scalar::step, &cpu::step}) {
    in_ranges(m.p, kernel);
    // Equal terms err in one direction: a float32 sum of all of them would be off by 1e-2.
    CHECK(std::fabs(m.norm.at(0) / value - 1) < 3e-6) << m.norm.at(0);
  }
}

CASE("spacing is that of nextafter") {
  const double values[] = {
      0.0, -0.0, 1.0, -1.0, 0.5, 1e-300, 5e-324, -5e-324, 2.2250738585072014e-308, 1e300, 0.1, -0.3};
  for (double x : values) {
    for (double direction : {1.0, -1.0}) {
      const double expected = std::fabs(std::nextafter(x, direction * HUGE_VAL) - x);
      CHECK(spacing(x, direction) == expected) << x << " " << direction;
    }
  }
  Random random(1);
  for (int i = 0; i < 2000; ++i) {
    const double x = std::ldexp(random.uniform(-1, 1), static_cast<int>(random.uniform(-1000, 1000)));
    const double direction = i % 2 == 0 ? 1 : -1;
    CHECK(spacing(x, direction) == std::fabs(std::nextafter(x, direction * HUGE_VAL) - x)) << x;
  }
  CHECK(std::isnan(spacing(std::nan(""), 1)));
}

CASE("a control that has arrived stays, and samples do not touch each other") {
  double before[2 * kFields] = {1, 0, 1, 0, 1, 7, 2, 0.5, 0.5, -0.25, 0.25, 0, 0.5, 3, 1, 0.9};
  double after[2 * kFields];
  const float norms[2] = {9, 0.5f};
  const Control c{2, before, after, {norms, DType::float32, 1}, 0.0, -0.2, 0.9, 0.2, 10.0};
  for (int64_t i = 0; i < 2; ++i) advance(c, i);
  for (int f = 0; f < kFields; ++f) CHECK(after[f] == before[f]) << f;
  const double* second = after + kFields;
  CHECK(second[kT] == 0.25 && second[kAccepted] == 4 && second[kRejected] == 1 && second[kNorm] == 0.5);
  CHECK(second[kTNext] == 0 && second[kH] == -0.25);  // 0.9 0.5^-0.2 of 0.25 would go beyond the end
}

}  // namespace
