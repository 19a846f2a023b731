// The CPU kernels of mixed_score, baseline and AVX2, against long double.
#include "common/cpu.h"
#include "tests/mixed_score_problem.h"

namespace {

using namespace lsgm;
using namespace lsgm::mixed_score;
using lsgm::testing::Example;
using lsgm::testing::MixedScore;

using Kernel = void (*)(const Problem&, int64_t, int64_t);

void prepare(MixedScore& m, std::vector<double>& table) {
  plan_for_cpu(m.p);
  table.resize(static_cast<size_t>(2 * m.p.channels));
  cpu::fill_table(m.p, table.data());
  m.p.table = table.data();
}

// In three ranges, as three threads would.
void in_ranges(const Problem& p, Kernel kernel) {
  const int64_t n = p.segments.count, third = n / 3;
  kernel(p, 2 * third, n);
  kernel(p, 0, third);
  kernel(p, third, 2 * third);
}

void check_kernels(const char* who, Kernel forward, Kernel backward) {
  for (const Example& example : lsgm::testing::examples()) {
    MixedScore m(example);
    std::vector<double> table;
    prepare(m, table);
    m.bind_forward();
    in_ranges(m.p, forward);
    m.check_forward(who);
    m.bind_backward();
    m.allocate_partials();
    in_ranges(m.p, backward);
    cpu::finish(m.p);
    m.check_backward(who);
  }
}

CASE("baseline kernels") { check_kernels("scalar", &scalar::forward, &scalar::backward); }

#if defined(LSGM_HAVE_AVX2)
CASE("AVX2 kernels") {
  if (has_avx2()) check_kernels("avx2", &avx2::forward, &avx2::backward);
}
#endif

CASE("the kernels chosen at run time") { check_kernels("cpu", &cpu::forward, &cpu::backward); }

CASE("one thread or many, the same bits") {
  for (Order order : {Order::planes, Order::rows}) {
    MixedScore m({order, 3, 20, 2500, DType::float32, DType::float32, DType::float32, DType::float32, false, 0});
    std::vector<double> table;
    prepare(m, table);
    m.bind_backward();
    m.allocate_partials();
    cpu::backward(m.p, 0, m.p.segments.count);
    const std::vector<double> once = m.partials;
    m.allocate_partials();
    for (int64_t s = m.p.segments.count - 1; s >= 0; --s) cpu::backward(m.p, s, s + 1);
    CHECK(once == m.partials);
  }
}

CASE("an element's value does not depend on its place") {
  // The same numbers at the start of a plane and in its tail.
  for (int64_t spatial : {5, 8, 9, 15, 16, 23}) {
    MixedScore m(
        {Order::planes, 1, 1, spatial, DType::float32, DType::float32, DType::float32, DType::float32, true, 0});
    for (int64_t i = 0; i < spatial; ++i) {
      m.eps.set(i, 0.7);
      m.z.set(i, -1.3);
    }
    std::vector<double> table;
    prepare(m, table);
    m.bind_forward();
    cpu::forward(m.p, 0, m.p.segments.count);
    for (int64_t i = 1; i < spatial; ++i) CHECK(m.out.at(i) == m.out.at(0)) << spatial << " " << i;
  }
}

CASE("NaN and infinity go through, and what is too large becomes infinite") {
  for (DType dtype : {DType::float32, DType::float64, DType::float16, DType::bfloat16}) {
    MixedScore m({Order::planes, 1, 1, 40, dtype, dtype, DType::float32, DType::float32, true, 0});
    m.logit.set(0, 0.0);
    m.r.set(0, 1.0);
    for (int64_t i = 0; i < 40; ++i) {
      m.z.set(i, 1);
      m.eps.set(i, i % 5 == 1 ? std::nan("") : i % 5 == 2 ? HUGE_VAL : i % 5 == 3 ? -HUGE_VAL : 3);
    }
    std::vector<double> table;
    prepare(m, table);
    m.bind_forward();
    cpu::forward(m.p, 0, m.p.segments.count);
    for (int64_t i = 0; i < 40; ++i) {
      const double x = m.out.at(i);
      const bool right = i % 5 == 1 ? std::isnan(x) : i % 5 == 2 ? x == HUGE_VAL : i % 5 == 3 ? x == -HUGE_VAL : x == 2;
      CHECK(right) << static_cast<int>(dtype) << " " << i << " " << x;
    }
  }
  MixedScore m({Order::planes, 1, 1, 9, DType::float32, DType::float16, DType::float32, DType::float32, true, 0});
  m.logit.set(0, 0.0);
  for (int64_t i = 0; i < 9; ++i) m.eps.set(i, 1e6);
  std::vector<double> table;
  prepare(m, table);
  m.bind_forward();
  cpu::forward(m.p, 0, m.p.segments.count);
  for (int64_t i = 0; i < 9; ++i) CHECK(m.out.at(i) == HUGE_VAL) << i;
}

CASE("saturated and undefined logits") {
  for (double logit : {-200.0, -40.0, 40.0, 200.0}) {
    const Mix<float> mix = mix_of(static_cast<float>(logit));
    const double small = std::exp(-std::fabs(logit));
    CHECK(std::fabs((logit > 0 ? mix.normal : mix.network) - small) <= 1e-6 * small + 1e-44) << logit;
    CHECK((logit > 0 ? mix.network : mix.normal) == 1.0f) << logit;
  }
  const Mix<float> undefined = mix_of(std::nanf(""));
  CHECK(std::isnan(undefined.network) && std::isnan(undefined.normal));
}

}  // namespace
