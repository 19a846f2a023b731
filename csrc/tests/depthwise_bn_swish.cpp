// The CPU kernels of depthwise_bn_swish, for every instruction set, against long double.
#include <cmath>
#include <memory>
#include <vector>

#include "common/cpu.h"
#include "tests/depthwise_bn_swish_problem.h"

namespace {

using namespace lsgm;
using namespace lsgm::depthwise_bn_swish;
using lsgm::testing::depthwise::Depthwise;
using lsgm::testing::depthwise::Example;
using lsgm::testing::depthwise::examples;

using Kernel = void (*)(const Problem&, int64_t, int64_t, float*);

class Case : public Depthwise {
 public:
  explicit Case(const Example& example, int64_t lanes = 0)
      : Depthwise(example) {
    p.lanes = lanes;
    cpu::plan(p);
    table.resize(static_cast<size_t>(cpu::table_size(p)));
    cpu::fill_table(p, table.data());
    p.table = table.data();
  }

  // Every range in memory of its own, allocated to the byte; in three ranges, as three threads would.
  void run(Kernel kernel, int64_t units, bool backward) {
    const auto size = static_cast<size_t>(cpu::scratch_size(p, backward));
    const int64_t third = units / 3;
    for (const auto& [begin, end] :
        {std::pair<int64_t, int64_t>{2 * third, units}, {0, third}, {third, 2 * third}}) {
      if (begin == end) continue;
      const std::unique_ptr<float[]> scratch(new float[size]);
      for (size_t i = 0; i < size; ++i) scratch[i] = std::nanf("");
      kernel(p, begin, end, scratch.get());
    }
  }

  void forward(Kernel kernel) {
    with_affines();
    run(kernel, cpu::forward_units(p), false);
  }

  void backward(Kernel kernel) {
    without_affines();
    partials.assign(static_cast<size_t>(p.sample_runs * p.channels * kTaps), std::nan(""));
    p.partials = partials.data();
    run(kernel, cpu::backward_units(p), true);
    cpu::finish(p);
  }

  std::vector<float> table;
};

void check_kernels(const char* who, int64_t lanes, Kernel forward, Kernel backward) {
  for (const Example& example : examples()) {
    Case c(example, lanes);
    c.forward(forward);
    c.check_forward(who);
    c.backward(backward);
    c.check_backward(who);
  }
}

CASE("baseline kernels") { check_kernels("scalar", 8, &scalar::forward, &scalar::backward); }

#if defined(LSGM_HAVE_AVX2)
CASE("AVX2 kernels") {
  if (has_avx2()) check_kernels("avx2", 8, &avx2::forward, &avx2::backward);
}
#endif

#if defined(LSGM_HAVE_AVX512)
CASE("AVX-512 kernels") {
  if (has_avx512()) check_kernels("avx512", 16, &avx512::forward, &avx512::backward);
}
#endif

CASE("the kernels chosen at run time") { check_kernels("cpu", 0, &cpu::forward, &cpu::backward); }

CASE("the same bits wherever a range of units begins") {
  for (Order order : {Order::planes, Order::rows}) {
    Case c({order, 130, 20, 33, 31, 2, DType::float32, false, false, 0});
    c.backward(&cpu::backward);
    const std::vector<double> once = c.partials;
    const int64_t units = cpu::backward_units(c.p);
    CHECK(units > 3);
    std::vector<float> scratch(static_cast<size_t>(cpu::scratch_size(c.p, true)));
    c.partials.assign(once.size(), std::nan(""));
    c.p.partials = c.partials.data();
    for (int64_t i = units - 1; i >= 0; --i) cpu::backward(c.p, i, i + 1, scratch.data());
    CHECK(once == c.partials);
  }
}

CASE("swish of large, small and undefined values") {
  for (DType dtype : {DType::float32, DType::bfloat16}) {
    Case c({Order::planes, 1, 1, 1, 9, 1, dtype, true, false, 0});
    const double values[] = {-HUGE_VAL, -200, -88.5, -30, 0, 30, 200, HUGE_VAL, std::nan("")};
    c.affine[0]->set(0, 1);
    c.affine[1]->set(0, 0);
    for (int64_t i = 0; i < kTaps; ++i) c.weight.set(i, i == 12 ? 1 : 0);
    cpu::fill_table(c.p, c.table.data());
    for (double value : values) {
      for (int64_t i = 0; i < 9; ++i) c.x_.set(i, value);
      c.forward(&cpu::forward);
      const double u = c.x_.at(0), expected = u / (1 + std::exp(-u));
      for (int64_t i = 0; i < 9; ++i) {
        // 0 * infinity, beside the tap that is not 0, is undefined too.
        const bool right = std::isfinite(u) ? std::fabs(c.out.at(i) - expected) <= 4e-3 * std::fabs(expected) + 1e-30
                                            : std::isnan(c.out.at(i));
        CHECK(right) << value << " " << i << " " << c.out.at(i);
      }
    }
  }
}

}  // namespace
