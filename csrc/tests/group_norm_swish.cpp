// The CPU kernels of group_norm_swish, for every instruction set, against long double.
#include <memory>
#include <utility>

#include "common/cpu.h"
#include "tests/group_norm_swish_problem.h"

namespace {

using namespace lsgm;
using namespace lsgm::group_norm_swish;
using lsgm::testing::group_norm::Example;
using lsgm::testing::group_norm::examples;
using lsgm::testing::group_norm::GroupNorm;
using lsgm::testing::group_norm::Kind;

using Kernel = void (*)(const Problem&, int64_t, int64_t, double*);

struct Kernels {
  Kernel forward, statistics, apply, backward, backward_reduce, backward_apply;
};

constexpr Kernels kChosen{&cpu::forward, &cpu::statistics, &cpu::apply, &cpu::backward, &cpu::backward_reduce,
    &cpu::backward_apply};
constexpr Kernels kScalar{&scalar::forward, &scalar::statistics, &scalar::apply, &scalar::backward,
    &scalar::backward_reduce, &scalar::backward_apply};

class OnCpu : public GroupNorm {
 public:
  explicit OnCpu(const Example& e, const Kernels& kernels = kChosen)
      : GroupNorm(e),
        k(kernels) {}

  // In three ranges, as three threads would, each with memory of its own, allocated to the byte.
  void in_ranges(Kernel kernel, int64_t count) const {
    const auto size = static_cast<size_t>(cpu::scratch_size(p));
    const int64_t third = count / 3;
    for (const auto& [begin, end] :
        {std::pair<int64_t, int64_t>{2 * third, count}, {0, third}, {third, 2 * third}}) {
      if (begin == end) continue;
      const std::unique_ptr<double[]> scratch(new double[size]);
      for (size_t i = 0; i < size; ++i) scratch[i] = std::nan("");
      kernel(p, begin, end, scratch.get());
    }
  }

  // `size`: positions of a piece instead of the planned ones.
  void plan(bool backward, int64_t size) {
    cpu::plan(p, backward);
    if (size > 0) {
      p.units.size = size;
      p.units.pieces = ceil_div(p.spatial, size);
    }
    moments.assign(static_cast<size_t>(cpu::moment_count(p)), {std::nan(""), std::nan("")});
    sums.assign(static_cast<size_t>(cpu::sum_count(p)), std::nan(""));
    p.moments = moments.data();
    p.sums = sums.data();
  }

  void forward(int64_t size = 0) {
    plan(false, size);
    const int64_t pieces = p.units.count * p.units.pieces;
    if (p.units.pieces == 1) return in_ranges(k.forward, pieces);
    in_ranges(k.statistics, pieces);
    cpu::combine(p);
    in_ranges(k.apply, pieces);
  }

  void backward(int64_t size = 0) {
    plan(true, size);
    const int64_t pieces = p.units.count * p.units.pieces;
    if (p.units.pieces == 1) {
      in_ranges(k.backward, pieces);
    } else {
      in_ranges(k.backward_reduce, pieces);
      cpu::combine_sums(p);
      in_ranges(k.backward_apply, pieces);
    }
    cpu::finish(p);
  }

  Kernels k;
  std::vector<Moments> moments;
  std::vector<double> sums;
};

void check_kernels(const char* who, const Kernels& kernels) {
  bool cut[2] = {false, false};
  for (const Example& example : examples()) {
    OnCpu whole(example, kernels);
    whole.forward();
    cut[0] |= whole.p.units.pieces > 1;
    whole.backward();
    cut[1] |= whole.p.units.pieces > 1;
    whole.check(who);
    if (example.spatial < 30 || example.spatial > 1000) continue;
    OnCpu pieces(example, kernels);
    pieces.forward(13);
    pieces.backward(13);
    pieces.check(who);
  }
  CHECK(cut[0] && cut[1]);
}

CASE("baseline kernels") { check_kernels("scalar", kScalar); }

#if defined(LSGM_HAVE_AVX2)
CASE("AVX2 kernels") {
  if (!has_avx2()) return;
  check_kernels("avx2", {&avx2::forward, &avx2::statistics, &avx2::apply, &avx2::backward, &avx2::backward_reduce,
                            &avx2::backward_apply});
}
#endif

#if defined(LSGM_HAVE_AVX512)
CASE("AVX-512 kernels") {
  if (!has_avx512()) return;
  check_kernels("avx512", {&avx512::forward, &avx512::statistics, &avx512::apply, &avx512::backward,
                              &avx512::backward_reduce, &avx512::backward_apply});
}
#endif

CASE("the kernels chosen at run time") { check_kernels("cpu", kChosen); }

// The values lie far from 0 and close together; E[x^2] - E[x]^2 has no digits left. The first values of all blocks are
// far from the others, so that the pivot is a bad one.
CASE("variance far from zero") {
  for (Order order : {Order::planes, Order::rows}) {
    for (Kind kind : {Kind::plain, Kind::bias}) {
      for (bool outliers : {false, true}) {
        OnCpu b({order, 2, 2, 3, 3000, DType::float32, kind, true, 0, 0});
        for (int64_t sample = 0; sample < 2; ++sample) {
          for (int64_t c = 0; c < 6; ++c) {
            for (int64_t i = 0; i < 3000; ++i) {
              const double noise = b.random.uniform(-0.01, 0.01);
              b.x.set(element_at(b.p, sample, c, i), outliers && i < 20 ? 0.0 : 1e4 + noise);
            }
          }
        }
        b.forward();
        for (int64_t sample = 0; sample < 2; ++sample) {
          for (int64_t g = 0; g < 2; ++g) {
            const auto [mean, var] = b.exact(sample, g);
            const Moments m = b.moments[static_cast<size_t>(sample * 2 + g)];
            CHECK(std::fabs(m.m2 / 9000 - var) <= 1e-5L * var) << m.m2 / 9000 << " " << double(var);
            CHECK(std::fabs(m.mean - mean) <= 1e-8L * std::fabs(mean)) << m.mean << " " << double(mean);
          }
        }
      }
    }
  }
}

// A channel's own mean is 1e4 in x and is taken away by its bias: neither may cost the other's digits.
CASE("a channel bias that cancels the mean") {
  for (Order order : {Order::planes, Order::rows}) {
    OnCpu b({order, 1, 1, 2, 500, DType::float32, Kind::bias, false, 0, 0});
    b.channel_bias[0] = -1e4f;
    b.channel_bias[1] = 0;
    for (int64_t i = 0; i < 500; ++i) {
      b.x.set(element_at(b.p, 0, 0, i), 1e4 + b.random.uniform(-2, 2));
      b.x.set(element_at(b.p, 0, 1, i), b.random.uniform(-2, 2));
    }
    b.forward();
    const auto [mean, var] = b.exact(0, 0);
    for (int64_t c = 0; c < 2; ++c) {
      for (int64_t i = 0; i < 500; ++i) {
        const auto at = static_cast<size_t>(c);
        const long double u = (b.value(0, c, i) - mean) / std::sqrt(var + 1e-6L) * b.weight[at] + b.bias[at];
        const double got = b.y.at(element_at(b.p, 0, c, i));
        CHECK(std::fabs(got - u) <= 1e-5L) << c << " " << i << " " << got << " " << double(u);
      }
    }
    // Gradients of one sign: every sum has what the channel's offset loses as often as there are elements.
    for (int64_t i = 0; i < b.count; ++i) b.grad.set(i, 1);
    b.backward();
    const long double r = 1 / std::sqrt(var + 1e-6L);
    long double centred[2] = {0, 0}, sum_centred = 0;
    for (int64_t c = 0; c < 2; ++c) {
      for (int64_t i = 0; i < 500; ++i) centred[c] += (b.value(0, c, i) - mean) * r;
      sum_centred += b.weight[static_cast<size_t>(c)] * centred[c];
    }
    for (size_t c = 0; c < 2; ++c) {
      CHECK(std::fabs(b.grad_weight[c] - centred[c]) <= 2e-5L * 500) << c << " " << b.grad_weight[c];
      const long double total = r * (500 * b.weight[c] - 250 * (b.weight[0] + b.weight[1]) -
                                        centred[c] * sum_centred / 1000);
      CHECK(std::fabs(b.grad_channel_bias[c] - total) <= 2e-5L * 500) << c << " " << b.grad_channel_bias[c];
    }
  }
}

CASE("factor and shift") {
  for (Order order : {Order::planes, Order::rows}) {
    for (int64_t size : {0, 64}) {
      OnCpu b({order, 2, 3, 5, 200, DType::float32, Kind::plain, false, 0, 30});
      b.p.y = b.p.mean = b.p.rstd = nullptr;
      b.p.factor = b.factor.data();
      b.p.shift = b.shift.data();
      b.forward(size);
      for (int64_t sample = 0; sample < 2; ++sample) {
        for (int64_t c = 0; c < 15; ++c) {
          const auto [mean, var] = b.exact(sample, c / 5);
          const auto k = static_cast<size_t>(c), at = static_cast<size_t>(sample * 15 + c);
          const long double factor = b.weight[k] / std::sqrt(var + 1e-6L), shift = b.bias[k] - mean * factor;
          CHECK(std::fabs(b.factor[at] - factor) <= 1e-6L * std::fabs(factor)) << at;
          CHECK(std::fabs(b.shift[at] - shift) <= 1e-6L * (std::fabs(shift) + 30 * std::fabs(factor))) << at;
        }
      }
    }
  }
}

CASE("without a second gradient of the sum") {
  for (Order order : {Order::planes, Order::rows}) {
    OnCpu with({order, 2, 2, 3, 19, DType::float32, Kind::residual, true, 0, 0.5});
    OnCpu without({order, 2, 2, 3, 19, DType::float32, Kind::residual, true, 0, 0.5});
    without.p.grad_v = nullptr;
    for (OnCpu* b : {&with, &without}) {
      b->forward();
      b->backward();
    }
    for (int64_t i = 0; i < with.count; ++i) {
      const double difference = with.grad_x.at(i) - without.grad_x.at(i);
      CHECK(std::fabs(difference - static_cast<double>(with.p.scale) * with.grad_v.at(i)) <= 1e-5) << i;
    }
  }
}

CASE("a unit's size depends on neither its neighbours nor the memory beyond 2^31 elements") {
  for (Order order : {Order::planes, Order::rows}) {
    for (bool backward : {false, true}) {
      for (int64_t batch : {1, 4096}) {
        Problem p{};
        p.order = order;
        p.dtype = DType::bfloat16;
        p.batch = batch;
        p.channels = 256;
        p.groups = 32;
        p.spatial = int64_t{1} << (batch == 1 ? 26 : 14);  // 2^34 elements
        cpu::plan(p, backward);
        CHECK(p.units.per_sample * p.units.groups >= 32 && p.units.count == batch * p.units.per_sample);
        CHECK(p.units.size * p.units.pieces >= p.spatial && p.units.size * (p.units.pieces - 1) < p.spatial);
        CHECK(p.units.count * p.units.pieces >= 16);
        CHECK(cpu::sum_count(p) * 20 < elements(p) && cpu::moment_count(p) * 100 < elements(p));
        CHECK(element_at(p, batch - 1, 255, p.spatial - 1) == elements(p) - 1);
      }
    }
  }
}

}  // namespace
