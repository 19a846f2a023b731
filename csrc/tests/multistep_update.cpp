// The CPU kernels of multistep_update, baseline and AVX2, against long double.
#include "common/cpu.h"
#include "tests/multistep_update_problem.h"

namespace {

using namespace lsgm;
using namespace lsgm::multistep_update;
using lsgm::testing::Example;
using lsgm::testing::Kind;
using lsgm::testing::MultistepUpdate;

using Kernel = void (*)(const Problem&, const cpu::Plan&, int64_t, int64_t);

void check_kernel(const char* who, Kernel kernel) {
  for (const Example& example : lsgm::testing::examples()) {
    MultistepUpdate m(example);
    const cpu::Plan plan = cpu::plan(m.p);
    // In three ranges, as three threads would.
    const int64_t n = plan.segments.count, third = n / 3;
    kernel(m.p, plan, 2 * third, n);
    kernel(m.p, plan, 0, third);
    kernel(m.p, plan, third, 2 * third);
    m.check(who);
  }
}

CASE("baseline kernel") { check_kernel("scalar", &scalar::forward); }

#if defined(LSGM_HAVE_AVX2)
CASE("AVX2 kernel") {
  if (has_avx2()) check_kernel("avx2", &avx2::forward);
}
#endif

CASE("the kernel chosen at run time") { check_kernel("cpu", &cpu::forward); }

const std::vector<Kind> kNumbers = {Kind::number, Kind::number, Kind::number};
const std::vector<Kind> kMixed = {Kind::channel, Kind::sample, Kind::number};

CASE("one thread or many, the same bits") {
  for (Order order : {Order::planes, Order::rows}) {
    for (int64_t spatial : {9, 2500}) {
      for (const auto& kinds : {kNumbers, kMixed, std::vector<Kind>{Kind::channel, Kind::channel}}) {
        MultistepUpdate m({order, 30, 20, spatial, DType::float32, DType::bfloat16, kinds, DType::float32, 0});
        const cpu::Plan plan = cpu::plan(m.p);
        cpu::forward(m.p, plan, 0, plan.segments.count);
        std::vector<double> once;
        for (int64_t i = 0; i < m.count; ++i) once.push_back(m.out.at(i));
        for (int64_t i = 0; i < m.count; ++i) m.out.set(i, std::nan(""));
        for (int64_t s = plan.segments.count - 1; s >= 0; --s) cpu::forward(m.p, plan, s, s + 1);
        for (int64_t i = 0; i < m.count; ++i) CHECK(m.out.at(i) == once[static_cast<size_t>(i)]) << i;
      }
    }
  }
}

CASE("an element's value does not depend on its place") {
  for (Order order : {Order::planes, Order::rows}) {
    for (int64_t spatial : {1, 5, 8, 9, 31, 33, 39, 70, 105}) {
      for (const auto& kinds : {kNumbers, kMixed}) {
        MultistepUpdate m({order, 1, 3, spatial, DType::float32, DType::float32, kinds, DType::float32, 0});
        for (int t = 0; t < 3; ++t) {
          for (int64_t i = 0; i < m.count; ++i) m.inputs[static_cast<size_t>(t)]->set(i, 0.7 - t);
        }
        const cpu::Plan plan = cpu::plan(m.p);
        cpu::forward(m.p, plan, 0, plan.segments.count);
        for (int64_t c = 0; c < 3; ++c) {
          const int64_t first = order == Order::planes ? c * spatial : c;
          for (int64_t j = 1; j < spatial; ++j) {
            const int64_t i = order == Order::planes ? first + j : first + 3 * j;
            CHECK(m.out.at(i) == m.out.at(first)) << spatial << " " << i;
          }
        }
      }
    }
  }
}

CASE("NaN and infinity go through, and what is too large becomes infinite") {
  for (DType dtype : {DType::float32, DType::float64, DType::float16, DType::bfloat16}) {
    MultistepUpdate m({Order::planes, 1, 1, 45, dtype, dtype, kNumbers, DType::float32, 0});
    const double scales[] = {1.0, 2.0, 0.0};
    for (int t = 0; t < 3; ++t) {
      m.p.coefficients[t].scale = scales[t];
      m.p.coefficients[t].scale32 = static_cast<float>(scales[t]);
    }
    for (int64_t i = 0; i < 45; ++i) {
      m.inputs[0]->set(i, 1);
      m.inputs[1]->set(i, i % 5 == 1 ? std::nan("") : i % 5 == 2 ? HUGE_VAL : i % 5 == 3 ? -HUGE_VAL : 3);
      m.inputs[2]->set(i, i % 5 == 4 ? HUGE_VAL : 1);  // 0 times infinity
    }
    const cpu::Plan plan = cpu::plan(m.p);
    cpu::forward(m.p, plan, 0, plan.segments.count);
    for (int64_t i = 0; i < 45; ++i) {
      const double x = m.out.at(i);
      const bool right = i % 5 == 2   ? x == HUGE_VAL
                         : i % 5 == 3 ? x == -HUGE_VAL
                         : i % 5 == 0 ? x == 7
                                      : std::isnan(x);
      CHECK(right) << static_cast<int>(dtype) << " " << i << " " << x;
    }
  }
  MultistepUpdate m({Order::planes, 1, 1, 9, DType::float16, DType::float32, kNumbers, DType::float32, 0});
  m.p.coefficients[1].scale32 = 1;
  for (int64_t i = 0; i < 9; ++i) m.inputs[1]->set(i, 1e6);
  const cpu::Plan plan = cpu::plan(m.p);
  cpu::forward(m.p, plan, 0, plan.segments.count);
  for (int64_t i = 0; i < 9; ++i) CHECK(m.out.at(i) == HUGE_VAL) << i;
}

CASE("numbers are float64 where the arithmetic is") {
  MultistepUpdate m({Order::planes, 1, 1, 3, DType::float64, DType::float64, kNumbers, DType::float32, 0});
  m.p.coefficients[1].scale = m.p.coefficients[2].scale = 0;
  m.p.coefficients[0].scale = 1.0 / 3;
  const cpu::Plan plan = cpu::plan(m.p);
  cpu::forward(m.p, plan, 0, plan.segments.count);
  for (int64_t i = 0; i < 3; ++i) CHECK(m.out.at(i) == 1.0 / 3 * m.inputs[0]->at(i));
}

CASE("plans beyond 2^31 elements") {
  Problem p{};
  p.order = Order::planes;
  p.batch = 1 << 12;
  p.channels = 256;
  p.spatial = 1 << 14;  // 2^34 elements
  p.terms = 2;
  const auto covered = [&] {
    const cpu::Plan plan = cpu::plan(p);
    const Segment last = segment_at(plan.segments, plan.segments.count - 1);
    const int64_t units = last.run * plan.segments.length + last.begin + last.size;
    return units * larger(1, plan.columns) == int64_t(1) << 34 && plan.segments.count >= 1 << 20;
  };
  CHECK(covered());
  p.coefficients[1].sample_stride = 1;
  CHECK(covered());
  p.coefficients[0].channel_stride = 1;
  CHECK(covered());
  p.order = Order::rows;
  CHECK(covered());
  p.coefficients[1].sample_stride = 0;
  CHECK(covered());
}

}  // namespace
