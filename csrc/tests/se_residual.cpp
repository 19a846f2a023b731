// The CPU kernels of se_residual, baseline and AVX2, against long double.
#include "common/cpu.h"
#include "tests/se_residual_problem.h"

namespace {

using namespace lsgm;
using namespace lsgm::se_residual;
using lsgm::testing::Example;
using lsgm::testing::examples;
using lsgm::testing::SeResidual;

using Kernel = void (*)(const Problem&, int64_t, int64_t);

struct Kernels {
  Kernel reduce, gate, apply, backward_reduce, gate_backward, backward_apply, parameters_backward;
};

constexpr Kernels kChosen{&cpu::reduce, &cpu::gate, &cpu::apply, &cpu::backward_reduce, &cpu::gate_backward,
    &cpu::backward_apply, &cpu::parameters_backward};
constexpr Kernels kScalar{&scalar::reduce, &scalar::gate, &scalar::apply, &scalar::backward_reduce,
    &scalar::gate_backward, &scalar::backward_apply, &scalar::parameters_backward};

void plan(SeResidual& s) {
  cpu::plan(s.p);
  s.allocate_partials();
}

// In three ranges, as three threads would.
void in_ranges(const Problem& p, Kernel kernel, int64_t n) {
  const int64_t third = n / 3;
  kernel(p, 2 * third, n);
  kernel(p, 0, third);
  kernel(p, third, 2 * third);
}

void run(const Problem& p, const Kernels& k) {
  const int64_t segments = p.segments.count;
  in_ranges(p, k.reduce, segments);
  in_ranges(p, k.gate, p.batch);
  in_ranges(p, k.apply, segments);
  in_ranges(p, k.backward_reduce, segments);
  in_ranges(p, k.gate_backward, p.batch);
  in_ranges(p, k.backward_apply, segments);
  in_ranges(p, k.parameters_backward, p.channels);
}

void check_kernels(const char* who, const Kernels& kernels) {
  for (const Example& example : examples()) {
    SeResidual s(example);
    plan(s);
    run(s.p, kernels);
    s.check(who);
  }
}

CASE("baseline kernels") { check_kernels("scalar", kScalar); }

#if defined(LSGM_HAVE_AVX2)
CASE("AVX2 kernels") {
  if (!has_avx2()) return;
  check_kernels("avx2", {&avx2::reduce, &avx2::gate, &avx2::apply, &avx2::backward_reduce, &avx2::gate_backward,
                            &avx2::backward_apply, &avx2::parameters_backward});
}
#endif

CASE("the kernels chosen at run time") { check_kernels("cpu", kChosen); }

CASE("sample by sample or part by part, the same bits") {
  for (const Example& example : examples()) {
    SeResidual once(example), each(example);
    plan(once);
    plan(each);
    run(once.p, kChosen);
    for (int64_t n = example.batch - 1; n >= 0; --n) {
      const int64_t begin = n * each.p.segments.per_run, end = begin + each.p.segments.per_run;
      cpu::reduce(each.p, begin, end);
      cpu::gate(each.p, n, n + 1);
      cpu::apply(each.p, begin, end);
      cpu::backward_reduce(each.p, begin, end);
      cpu::gate_backward(each.p, n, n + 1);
      cpu::backward_apply(each.p, begin, end);
    }
    cpu::parameters_backward(each.p, 0, example.channels);
    CHECK(once.same_results(each));
  }
}

CASE("gates at the ends of float32") {
  for (const Kernels& k : {kChosen, kScalar}) {
    SeResidual s({Order::planes, 1, 16, 4, 1, DType::float32, 0});
    plan(s);
    const float biases[] = {0, -1e-30f, 20, -20, 87, -87, 88, -88, 100, -100, 3e38f, -3e38f, HUGE_VALF, -HUGE_VALF,
        std::nanf(""), 1};
    for (size_t c = 0; c < 16; ++c) {
      s.expand_bias[c] = biases[c];
      s.expand_weight[c] = 0;
    }
    k.reduce(s.p, 0, s.p.segments.count);
    k.gate(s.p, 0, 1);
    for (size_t c = 0; c < 16; ++c) {
      const double expected = 1 / (1 + std::exp(-static_cast<double>(biases[c])));
      const double got = s.state[c];
      CHECK(std::isnan(biases[c]) ? std::isnan(got) : std::fabs(got - expected) <= 4e-7 * expected + 2e-38)
          << biases[c] << ": " << got;
    }
  }
}

CASE("segments beyond 2^31 elements") {
  Problem p{};
  p.batch = 1 << 12;
  p.channels = 256;
  p.spatial = 1 << 14;  // 2^34 elements
  p.hidden = 16;
  for (Order order : {Order::planes, Order::rows}) {
    p.order = order;
    cpu::plan(p);
    const Segment last = segment_at(p.segments, p.segments.count - 1);
    const int64_t end = order == Order::planes ? (last.run * p.channels + last.begin + last.size) * p.spatial
                                               : (last.run * p.spatial + last.begin + last.size) * p.channels;
    CHECK(end == elements(p)) << end;
    CHECK(partial_count(p) * 50 < elements(p));
  }
}

}  // namespace
