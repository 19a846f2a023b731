// The CPU kernels of bn_swish, baseline and AVX2, against long double.
#include "common/cpu.h"
#include "tests/bn_swish_problem.h"

namespace {

using namespace lsgm;
using namespace lsgm::bn_swish;
using lsgm::testing::BnSwish;
using lsgm::testing::Example;
using lsgm::testing::examples;

using Kernel = void (*)(const Problem&, int64_t, int64_t);

struct Kernels {
  Kernel statistics, apply, backward_reduce, backward_apply, backward_both;
};

constexpr Kernels kChosen{
    &cpu::statistics, &cpu::apply, &cpu::backward_reduce, &cpu::backward_apply, &cpu::backward_both};
constexpr Kernels kScalar{
    &scalar::statistics, &scalar::apply, &scalar::backward_reduce, &scalar::backward_apply, &scalar::backward_both};

class OnCpu : public BnSwish {
 public:
  explicit OnCpu(const Example& e, const Kernels& kernels = kChosen)
      : BnSwish(e),
        k(kernels) {
    const auto channels = static_cast<size_t>(e.channels);
    cpu::plan(p);
    allocate_partials();
    table.assign(static_cast<size_t>(kTableRows * p.channels), std::nanf(""));
    moments.assign(channels, {std::nan(""), std::nan("")});
    sums.assign(channels, {std::nan(""), std::nan("")});
    p.table = table.data();
    p.moments = moments.data();
    p.sums = sums.data();
  }

  // In three ranges, as three threads would.
  void in_ranges(Kernel kernel) const {
    const int64_t n = p.chunks.count, third = n / 3;
    kernel(p, 2 * third, n);
    kernel(p, 0, third);
    kernel(p, third, 2 * third);
  }

  void statistics() const {
    in_ranges(k.statistics);
    cpu::combine_moments(p, 0, p.channels);
  }
  void forward() const {
    if (p.batch_stats) statistics();
    apply();
  }
  void apply() const {
    cpu::normalise(p, 0, p.channels);
    in_ranges(k.apply);
  }
  void backward_reduce() const {
    cpu::restore(p, 0, p.channels);
    in_ranges(p.batch_stats ? k.backward_reduce : k.backward_both);
    cpu::combine_sums(p, 0, p.channels);
  }
  void backward_apply() const {
    cpu::coefficients(p, 0, p.channels);
    in_ranges(k.backward_apply);
  }
  void backward() const {
    backward_reduce();
    if (p.batch_stats) backward_apply();
  }

  Kernels k;
  std::vector<float> table;
  std::vector<Moments> moments;
  std::vector<Sums> sums;
};

void check_kernels(const char* who, const Kernels& kernels) {
  for (const Example& example : examples()) {
    OnCpu b(example, kernels);
    b.forward();
    b.backward();
    b.check(who);
  }
}

CASE("baseline kernels") { check_kernels("scalar", kScalar); }

#if defined(LSGM_HAVE_AVX2)
CASE("AVX2 kernels") {
  if (!has_avx2()) return;
  check_kernels("avx2",
      {&avx2::statistics, &avx2::apply, &avx2::backward_reduce, &avx2::backward_apply, &avx2::backward_both});
}
#endif

#if defined(LSGM_HAVE_AVX512)
CASE("AVX-512 kernels") {
  if (!has_avx512()) return;
  check_kernels("avx512",
      {&avx512::statistics, &avx512::apply, &avx512::backward_reduce, &avx512::backward_apply, &avx512::backward_both});
}
#endif

CASE("the kernels chosen at run time") { check_kernels("cpu", kChosen); }

CASE("channel by channel or part by part, the same bits") {
  for (bool swish : {false, true}) {
    const Example example{Order::planes, 5, 20, 1300, DType::float32, true, swish, 0, 3};
    OnCpu once(example), each(example);
    once.forward();
    once.backward();
    cpu::restore(each.p, 0, 20);
    for (int64_t c = 19; c >= 0; --c) {
      const int64_t begin = c * each.p.chunks.per_channel, end = begin + each.p.chunks.per_channel;
      cpu::statistics(each.p, begin, end);
      cpu::combine_moments(each.p, c, c + 1);
      cpu::normalise(each.p, c, c + 1);
      cpu::apply(each.p, begin, end);
      cpu::backward_reduce(each.p, begin, end);
      cpu::combine_sums(each.p, c, c + 1);
      cpu::coefficients(each.p, c, c + 1);
      cpu::backward_apply(each.p, begin, end);
    }
    CHECK(once.partials == each.partials && once.mean == each.mean && once.var == each.var);
    CHECK(once.grad_weight == each.grad_weight && once.grad_bias == each.grad_bias);
    for (int64_t i = 0; i < once.count; ++i) {
      CHECK(once.y.at(i) == each.y.at(i) && once.grad_x.at(i) == each.grad_x.at(i)) << i;
    }
  }
}

// The values lie far from 0 and close together; E[x^2] - E[x]^2 has no digits left. The first values of all chunks are
// far from the others, so that the pivot is a bad one.
CASE("variance far from zero") {
  for (Order order : {Order::planes, Order::rows}) {
    for (bool outliers : {false, true}) {
      const Example example{order, 3, 2, 3000, DType::float32, true, true, 0, 0};
      OnCpu b(example);
      for (int64_t c = 0; c < 2; ++c) {
        int64_t n = 0;
        b.for_channel(c, [&](int64_t i) {
          const double noise = static_cast<double>(static_cast<float>(b.random.uniform(-0.01, 0.01)));
          b.x.set(i, outliers && n++ % 3000 < 40 ? 0.0 : 1e4 + noise);
        });
      }
      b.statistics();
      for (int64_t c = 0; c < 2; ++c) {
        long double total = 0, squares = 0;
        b.for_channel(c, [&](int64_t i) { total += b.x.at(i); });
        b.for_channel(c, [&](int64_t i) { squares += (b.x.at(i) - total / 9000) * (b.x.at(i) - total / 9000); });
        const Moments m = b.moments[static_cast<size_t>(c)];
        CHECK(std::fabs(m.m2 - squares) <= 1e-5L * squares) << m.m2 << " " << double(squares);
        CHECK(std::fabs(m.mean - total / 9000) <= 1e-8L * std::fabs(total / 9000)) << m.mean;
      }
    }
  }
}

// Two processes with a part of the batch each: what they exchange is the moments and the sums of a channel.
CASE("the parts, with an all-reduce between them") {
  const int64_t channels = 6, spatial = 77;
  for (Order order : {Order::planes, Order::rows}) {
    OnCpu whole({order, 5, channels, spatial, DType::float32, true, true, 0, 2});
    whole.forward();
    whole.backward();
    OnCpu first({order, 2, channels, spatial, DType::float32, true, true, 0, 2});
    OnCpu second({order, 3, channels, spatial, DType::float32, true, true, 0, 2});
    OnCpu* const halves[2] = {&first, &second};
    // The batch is outermost in both orders.
    for (int64_t i = 0; i < whole.count; ++i) {
      OnCpu& half = i < first.count ? first : second;
      const int64_t j = i < first.count ? i : i - first.count;
      half.x.set(j, whole.x.at(i));
      half.grad.set(j, whole.grad.at(i));
    }
    for (OnCpu* half : halves) {
      half->weight = whole.weight;
      half->bias = whole.bias;
      half->p.weight = half->weight.data();
      half->p.bias = half->bias.data();
      half->statistics();
    }
    for (size_t c = 0; c < static_cast<size_t>(channels); ++c) {
      const Moments a = first.moments[c], b = second.moments[c];
      const double m = 2 * spatial, n = 3 * spatial, mean = (m * a.mean + n * b.mean) / (m + n);
      const double m2 = a.m2 + b.m2 + m * (a.mean - mean) * (a.mean - mean) + n * (b.mean - mean) * (b.mean - mean);
      first.moments[c] = second.moments[c] = {mean, m2};
    }
    for (OnCpu* half : halves) {
      half->p.count = 5 * spatial;
      half->apply();
      half->backward_reduce();
    }
    for (size_t c = 0; c < static_cast<size_t>(channels); ++c) {
      CHECK(std::fabs(first.grad_bias[c] + second.grad_bias[c] - whole.grad_bias[c]) < 2e-4f) << c;
      CHECK(std::fabs(first.grad_weight[c] + second.grad_weight[c] - whole.grad_weight[c]) < 2e-4f) << c;
      const Sums total{first.sums[c].grad + second.sums[c].grad, first.sums[c].centred + second.sums[c].centred};
      first.sums[c] = second.sums[c] = total;
    }
    for (OnCpu* half : halves) half->backward_apply();
    for (int64_t i = 0; i < whole.count; ++i) {
      const OnCpu& half = i < first.count ? first : second;
      const int64_t j = i < first.count ? i : i - first.count;
      CHECK(std::fabs(half.y.at(j) - whole.y.at(i)) < 1e-5) << i;
      CHECK(std::fabs(half.grad_x.at(j) - whole.grad_x.at(i)) < 1e-5) << i;
    }
  }
}

CASE("Swish at the ends of float32") {
  for (bool with_gradient : {false, true}) {
    OnCpu b({Order::planes, 1, 1, 33, DType::float32, false, true, 0, 0});
    b.weight[0] = 1;
    b.bias[0] = 0;
    b.running_mean[0] = 0;
    b.running_var[0] = 1;
    b.p.eps = 0;
    const double values[] = {0, -1e-30, 1e-30, -20, 20, -88, 88, -89.4, 89.4, -1000, 1000, HUGE_VAL, -3e38, 3e38};
    for (int64_t i = 0; i < 33; ++i) {
      b.x.set(i, values[i % 14]);
      b.grad.set(i, 1);
    }
    b.forward();
    if (with_gradient) b.backward();
    for (int64_t i = 0; i < 33; ++i) {
      const double u = b.x.at(i), s = 1 / (1 + std::exp(-u));
      if (!with_gradient) {
        const double expected = u == -3e38 ? 0 : u * s;
        CHECK(b.y.at(i) == u * s || std::fabs(b.y.at(i) - expected) <= 1e-6 * std::fabs(expected) + 1e-35) << u;
      } else if (!std::isinf(u)) {
        CHECK(std::fabs(b.grad_x.at(i) - s * (1 + u * (1 - s))) <= 1e-6) << u;
      }
    }
  }
}

CASE("chunks beyond 2^31 elements") {
  Problem p{};
  p.batch = 1 << 12;
  p.channels = 256;
  p.spatial = 1 << 14;  // 2^34 elements
  for (Order order : {Order::planes, Order::rows}) {
    p.order = order;
    cpu::plan(p);
    const Chunk last = chunk_at(p, p.chunks.per_channel - 1);
    const int64_t end = order == Order::planes
                            ? ((last.sample + last.samples - 1) * 256 + 255) * p.spatial + last.begin + last.size
                            : (last.begin + last.size) * 256;
    CHECK(end == elements(p)) << end;
    CHECK(partial_at(p, p.chunks.per_channel - 1, 1, 255) == partial_count(p) - 1);
    CHECK(partial_count(p) * 100 < elements(p));
  }
}

}  // namespace
