// The CPU kernels of fir_resample, for every instruction set, against long double.
#include <cmath>
#include <limits>

#include "common/cpu.h"
#include "tests/fir_resample_problem.h"

namespace {

using namespace lsgm;
using namespace lsgm::fir_resample;
using lsgm::testing::Buffer;
using lsgm::testing::resampling::Example;
using lsgm::testing::resampling::examples;
using lsgm::testing::resampling::Resampling;

using Kernel = void (*)(const Problem&, int64_t, int64_t, float*);

// In three ranges, as three threads would, each with memory of its own: allocated to the byte, and NaN at first.
void run(Resampling& r, Kernel kernel) {
  const int64_t units = cpu::units(r.p), third = units / 3;
  for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{2 * third, units}, {0, third}, {third, 2 * third}}) {
    if (begin == end) continue;
    const Buffer scratch(cpu::scratch_size(r.p), DType::float32, 0);
    kernel(r.p, begin, end, static_cast<float*>(scratch.data()));
  }
}

void check_kernels(const char* who, int64_t lanes, Kernel kernel) {
  for (const Example& example : examples()) {
    Resampling r(example);
    r.p.lanes = lanes;
    cpu::plan(r.p);
    run(r, kernel);
    r.check(who);
  }
}

CASE("baseline kernels") { check_kernels("scalar", 8, &scalar::run); }

#if defined(LSGM_HAVE_AVX2)
CASE("AVX2 kernels") {
  if (has_avx2()) check_kernels("avx2", 8, &avx2::run);
}
#endif

#if defined(LSGM_HAVE_AVX512)
CASE("AVX-512 kernels") {
  if (has_avx512()) check_kernels("avx512", 16, &avx512::run);
}
#endif

CASE("the kernels chosen at run time") { check_kernels("cpu", 0, &cpu::run); }

CASE("groups of channels") {
  for (bool up : {true, false}) {
    for (bool active : {false, true}) {
      Resampling r({Order::rows, up, true, active, 2, 70, 9, 3, DType::float32, 0});
      cpu::plan(r.p);
      r.p.group = 32;
      r.p.groups = 3;
      r.p.band_steps = 4;
      r.p.bands = 3;
      run(r, &cpu::run);
      r.check("groups");
    }
  }
}

CASE("what is not a number stays where it is") {
  const float infinity = std::numeric_limits<float>::infinity();
  for (Order order : {Order::planes, Order::rows}) {
    for (bool up : {true, false}) {
      for (int64_t width : {4, 8, 16, 40}) {
        Resampling r({order, up, true, false, 1, 20, 8, width, DType::float32, 0});
        for (int64_t i = 0; i < r.x_.count(); ++i) r.x_.set(i, 1);
        const int64_t plane = 3, y = r.height - 1, x = r.width - 1;
        r.x_.set(r.at(plane, y, x, r.height, r.width), infinity);
        cpu::plan(r.p);
        run(r, &cpu::run);
        const int64_t lines = out_height(r.p), columns = out_width(r.p);
        int64_t infinite = 0;
        for (int64_t i = 0; i < r.out.count(); ++i) {
          CHECK(!std::isnan(r.out.at(i))) << i;
          infinite += std::isinf(r.out.at(i));
        }
        CHECK(infinite == (up ? 9 : 1)) << infinite;
        CHECK(std::isinf(r.out.at(r.at(plane, lines - 1, columns - 1, lines, columns))));
      }
    }
  }
}

CASE("plans of all sizes") {
  for (Order order : {Order::planes, Order::rows}) {
    for (bool up : {true, false}) {
      for (bool active : {false, true}) {
        for (int64_t channels : {1, 3, 512, 5000, 1 << 20}) {
          for (const auto& [height, width] :
              {std::pair<int64_t, int64_t>{2, 2}, {16, 16}, {64, 64}, {2, 100000}, {100000, 2}, {1 << 14, 1 << 14}}) {
            Resampling r({order, up, true, active, 1, 1, 1, 1, DType::float32, 0});
            Problem p = r.p;
            p.batch = 64;
            p.channels = channels;
            p.height = height;
            p.width = width;
            cpu::plan(p);
            CHECK(p.group * p.groups >= channels && p.group * (p.groups - 1) < channels);
            CHECK(p.band_steps * p.bands >= p.steps && p.band_steps * (p.bands - 1) < p.steps);
            CHECK(cpu::grain(p) >= 1);
            CHECK(cpu::scratch_size(p) <= larger(1 << 18, 5 * 64 * width)) << cpu::scratch_size(p);
          }
        }
      }
    }
  }
}

}  // namespace
