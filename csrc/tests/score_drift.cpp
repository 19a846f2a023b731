// The CPU kernels of score_drift, baseline and AVX2, against long double.
#include <vector>

#include "common/cpu.h"
#include "tests/score_drift_problem.h"

namespace {

using namespace lsgm;
using namespace lsgm::score_drift;
using lsgm::testing::Example;
using lsgm::testing::ScoreDrift;

using Kernel = void (*)(const Problem&, int64_t, int64_t);

constexpr DType f32 = DType::float32;

void prepare(ScoreDrift& d, std::vector<double>& table) {
  plan_for_cpu(d.problem);
  table.resize(static_cast<size_t>(d.problem.channels));
  cpu::fill_table(d.problem, table.data());
  d.problem.table = table.data();
}

void check_kernel(const char* who, Kernel forward) {
  for (const Example& example : lsgm::testing::examples()) {
    for (bool mixing : {true, false}) {
      ScoreDrift d(example, mixing);
      std::vector<double> table;
      prepare(d, table);
      // In three ranges, as three threads would.
      const int64_t n = d.problem.segments.count, third = n / 3;
      forward(d.problem, 2 * third, n);
      forward(d.problem, 0, third);
      forward(d.problem, third, 2 * third);
      d.check_forward(who);
    }
  }
}

CASE("baseline kernels") { check_kernel("scalar", &scalar::forward); }

#if defined(LSGM_HAVE_AVX2)
CASE("AVX2 kernels") {
  if (has_avx2()) check_kernel("avx2", &avx2::forward);
}
#endif

CASE("the kernels chosen at run time") { check_kernel("cpu", &cpu::forward); }

CASE("an element's value does not depend on its place") {
  // The same numbers at the start of a plane and in its tail.
  for (int64_t spatial : {5, 8, 9, 15, 16, 23}) {
    ScoreDrift d({Order::planes, 1, 1, spatial, f32, f32, f32, f32, true, 0});
    for (int64_t i = 0; i < spatial; ++i) {
      d.eps.set(i, 0.7);
      d.z.set(i, -1.3);
    }
    std::vector<double> table;
    prepare(d, table);
    cpu::forward(d.problem, 0, d.problem.segments.count);
    for (int64_t i = 1; i < spatial; ++i) CHECK(d.out.at(i) == d.out.at(0)) << spatial << " " << i;
  }
}

// Where eps is r z but for a small part, as at small times, a large q magnifies that part and no rounding of q eps or
// q r z: those are not formed.
CASE("a small difference times a large number") {
  for (Order order : {Order::planes, Order::rows}) {
    ScoreDrift d({order, 2, 3, 37, f32, f32, f32, f32, true, 0}, true);
    d.r.set(0, 0.5);
    d.p.set(0, 0.0);
    d.q.set(0, 1e6);
    for (int64_t c = 0; c < 3; ++c) d.logit.set(c, 100.0);  // a is 1
    for (int64_t i = 0; i < d.count; ++i) {
      d.z.set(i, 2 * (1 + 0x1p-23 * static_cast<double>(i)));
      d.eps.set(i, 1 + 0x1p-22 * static_cast<double>(i));  // r z + i 2^-23
    }
    std::vector<double> table;
    prepare(d, table);
    cpu::forward(d.problem, 0, d.problem.segments.count);
    for (int64_t i = 0; i < d.count; ++i) {
      const double expected = 1e6 * 0x1p-23 * static_cast<double>(i);
      CHECK(std::fabs(d.out.at(i) - expected) <= 0x1p-22 * expected) << i << " " << d.out.at(i);
    }
  }
}

CASE("NaN and infinity go through, and what is too large becomes infinite") {
  for (DType dtype : {f32, DType::float64, DType::float16, DType::bfloat16}) {
    ScoreDrift d({Order::planes, 1, 1, 40, dtype, dtype, f32, f32, true, 0});
    d.logit.set(0, 0.0);
    d.p.set(0, 1.0);
    d.q.set(0, 2.0);
    d.r.set(0, 1.0);
    for (int64_t i = 0; i < 40; ++i) {
      d.z.set(i, 1);
      d.eps.set(i, i % 5 == 1 ? std::nan("") : i % 5 == 2 ? HUGE_VAL : i % 5 == 3 ? -HUGE_VAL : 3);
    }
    std::vector<double> table;
    prepare(d, table);
    cpu::forward(d.problem, 0, d.problem.segments.count);
    for (int64_t i = 0; i < 40; ++i) {
      const double x = d.out.at(i);
      const bool right = i % 5 == 1 ? std::isnan(x) : i % 5 == 2 ? x == HUGE_VAL : i % 5 == 3 ? x == -HUGE_VAL : x == 3;
      CHECK(right) << static_cast<int>(dtype) << " " << i << " " << x;
    }
  }
  ScoreDrift d({Order::planes, 1, 1, 9, f32, DType::float16, f32, f32, true, 0}, false);
  d.q.set(0, 1.0);
  for (int64_t i = 0; i < 9; ++i) d.eps.set(i, 1e6);
  std::vector<double> table;
  prepare(d, table);
  cpu::forward(d.problem, 0, d.problem.segments.count);
  for (int64_t i = 0; i < 9; ++i) CHECK(d.out.at(i) == HUGE_VAL) << i;
}

CASE("from one segment to the next without divisions") {
  for (int64_t spatial : {1, 7, 16384, 40000}) {
    ScoreDrift d({Order::planes, 3, 2, spatial, f32, f32, f32, f32, true, 0});
    plan_for_cpu(d.problem);
    Plane plane = plane_at(d.problem, 0);
    for (int64_t s = 0; s < d.problem.segments.count; ++s, advance(d.problem, plane)) {
      const Plane found = plane_at(d.problem, s);
      CHECK(plane.at == found.at && plane.size == found.size && plane.sample == found.sample &&
            plane.channel == found.channel && plane.piece == found.piece)
          << spatial << " " << s;
    }
  }
}

}  // namespace
