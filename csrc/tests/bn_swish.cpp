// The CPU kernels of bn_swish, baseline and AVX2, against long double.
#include <cmath>
#include <vector>

#include "bn_swish/bn_swish.h"
#include "common/cpu.h"
#include "tests/buffer.h"

namespace {

using namespace lsgm;
using namespace lsgm::bn_swish;
using lsgm::testing::Buffer;
using lsgm::testing::Random;

using Kernel = void (*)(const Problem&, int64_t, int64_t);

struct Kernels {
  Kernel statistics, apply, backward_reduce, backward_apply, backward_both;
};

constexpr Kernels kChosen{
    &cpu::statistics, &cpu::apply, &cpu::backward_reduce, &cpu::backward_apply, &cpu::backward_both};
constexpr Kernels kScalar{
    &scalar::statistics, &scalar::apply, &scalar::backward_reduce, &scalar::backward_apply, &scalar::backward_both};

struct Example {
  Order order;
  int64_t batch, channels, spatial;
  DType dtype;
  bool batch_stats, swish;
  int64_t offset;  // of every tensor, in elements
  double mean;
};

std::vector<Example> examples() {
  std::vector<Example> all;
  const int64_t shapes[][3] = {{1, 1, 5}, {3, 5, 63}, {2, 17, 2}, {5, 1, 1023}, {4, 3, 8}, {2, 2, 9001}, {300, 9, 4},
      {2, 1030, 5}, {1, 19, 700}};
  int64_t n = 0;
  for (const auto& s : shapes) {
    for (Order order : {Order::planes, Order::rows}) {
      for (bool batch_stats : {false, true}) {
        const DType dtype = n % 5 == 3 ? DType::bfloat16 : n % 5 == 4 ? DType::float16 : DType::float32;
        all.push_back({order, s[0], s[1], s[2], dtype, batch_stats, n % 3 != 2, n % 2, n % 4 == 1 ? 100.0 : 0.5});
        ++n;
      }
    }
  }
  return all;
}

class BnSwish {
 public:
  explicit BnSwish(const Example& e, const Kernels& kernels = kChosen)
      : example(e),
        k(kernels),
        count(e.batch * e.channels * e.spatial),
        random(static_cast<uint64_t>(count * 31 + e.channels)),
        x(count, e.dtype, e.offset),
        y(count, e.dtype, e.offset),
        grad(count, e.dtype, e.offset),
        grad_x(count, e.dtype, e.offset) {
    const auto channels = static_cast<size_t>(e.channels);
    for (int64_t i = 0; i < count; ++i) x.set(i, e.mean + random.uniform(-2, 2));
    grad.randomize(random);
    for (std::vector<float>* v : {&weight, &bias, &running_mean, &running_var, &mean, &var, &rstd, &grad_weight,
             &grad_bias}) {
      v->assign(channels, std::nanf(""));
    }
    for (size_t c = 0; c < channels; ++c) {
      weight[c] = static_cast<float>(random.uniform(-2, 2));
      bias[c] = static_cast<float>(random.uniform(-1, 1));
      running_mean[c] = static_cast<float>(e.mean + random.uniform(-1, 1));
      running_var[c] = static_cast<float>(random.uniform(0.3, 3));
    }
    p = Problem{};
    p.order = e.order;
    p.batch = e.batch;
    p.channels = e.channels;
    p.spatial = e.spatial;
    p.dtype = e.dtype;
    p.batch_stats = e.batch_stats;
    p.swish = e.swish;
    p.eps = 1e-5;
    p.x = x.data();
    p.y = y.data();
    p.grad = grad.data();
    p.grad_x = grad_x.data();
    p.weight = weight.data();
    p.bias = bias.data();
    p.running_mean = running_mean.data();
    p.running_var = running_var.data();
    p.mean = mean.data();
    p.var = var.data();
    p.rstd = rstd.data();
    p.grad_weight = grad_weight.data();
    p.grad_bias = grad_bias.data();
    cpu::plan(p);
    table.assign(static_cast<size_t>(kTableRows * p.channels), std::nanf(""));
    partials.assign(static_cast<size_t>(partial_count(p)), std::nan(""));
    moments.assign(channels, {std::nan(""), std::nan("")});
    sums.assign(channels, {std::nan(""), std::nan("")});
    p.table = table.data();
    p.partials = partials.data();
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

  int64_t at(int64_t sample, int64_t channel, int64_t position) const {
    if (p.order == Order::planes) return (sample * p.channels + channel) * p.spatial + position;
    return (sample * p.spatial + position) * p.channels + channel;
  }

  template <class F>
  void for_channel(int64_t channel, F&& f) const {
    for (int64_t b = 0; b < p.batch; ++b) {
      for (int64_t i = 0; i < p.spatial; ++i) f(at(b, channel, i));
    }
  }

  void check(const char* who) const {
    const long double n = static_cast<long double>(p.batch * p.spatial);
    // Roundings of u, which Swish and its derivative hand on with a factor near 1, and of x - mean.
    // Without AVX2, float32 sums run over up to 1024 squares.
    const long double unit = 0x1p-24L, stored = lsgm::testing::unit_roundoff(p.dtype);
    for (int64_t c = 0; c < p.channels; ++c) {
      const auto i = static_cast<size_t>(c);
      long double m = running_mean[i], v = running_var[i];
      if (p.batch_stats) {
        long double total = 0, squares = 0;
        for_channel(c, [&](int64_t j) { total += x.at(j); });
        m = total / n;
        for_channel(c, [&](int64_t j) { squares += (x.at(j) - m) * (x.at(j) - m); });
        v = squares / n;
        CHECK(std::fabs(var[i] - squares / (n - 1)) <= 64 * unit * squares / (n - 1)) << who << " var " << c;
        CHECK(std::fabs(mean[i] - m) <= 2 * unit * (std::fabs(m) + std::sqrt(v))) << who << " mean " << c;
      }
      const long double r = 1 / std::sqrt(v + 1e-5L), w = weight[i];
      CHECK(std::fabs(rstd[i] - r) <= 32 * unit * r) << who << " rstd " << c;
      const long double moved = 2 * unit * std::fabs(m) * r;  // the mean is rounded to float32
      long double sum = 0, centred = 0, size = 0;
      const auto inner = [&](int64_t j) {
        const long double u = (x.at(j) - m) * r * w + bias[i], s = 1 / (1 + std::exp(-u));
        return grad.at(j) * (p.swish ? s * (1 + u * (1 - s)) : 1);
      };
      for_channel(c, [&](int64_t j) {
        const long double u = (x.at(j) - m) * r * w + bias[i];
        const long double expected = p.swish ? u / (1 + std::exp(-u)) : u;
        const long double scale = std::fabs((x.at(j) - m) * r * w) + std::fabs(bias[i]) + 0.1L;
        const long double allowed = 12 * unit * scale + 1.2L * moved * std::fabs(w) + stored * std::fabs(expected);
        CHECK(std::fabs(y.at(j) - expected) <= allowed)
            << who << " y " << j << " " << y.at(j) << " " << double(expected);
        const long double d = inner(j);
        sum += d;
        centred += d * (x.at(j) - m);
        size += std::fabs(grad.at(j)) * (1 + std::fabs(x.at(j) - m) * r) * (1 + std::fabs(w));
      });
      const long double rounding = (24 * unit + 2 * moved) * size;
      CHECK(std::fabs(grad_bias[i] - sum) <= rounding) << who << " grad_bias " << c;
      CHECK(std::fabs(grad_weight[i] - centred * r) <= rounding * 4) << who << " grad_weight " << c;
      for_channel(c, [&](int64_t j) {
        const long double d = inner(j), h = (x.at(j) - m) * r;
        const long double expected = w * r * (p.batch_stats ? d - sum / n - h * centred * r / n : d);
        const long double parts = std::fabs(w) * r * (std::fabs(grad.at(j)) * (1 + std::fabs(w * h)) +
            (size / n) * (1 + std::fabs(h)) * 4);
        const long double allowed = (24 * unit + 3 * moved) * parts + stored * std::fabs(expected) + 1e-7L;
        CHECK(std::fabs(grad_x.at(j) - expected) <= allowed)
            << who << " grad_x " << j << " " << grad_x.at(j) << " " << double(expected);
      });
    }
  }

  Example example;
  Kernels k;
  int64_t count;
  Random random;
  Buffer x, y, grad, grad_x;
  std::vector<float> weight, bias, running_mean, running_var, mean, var, rstd, grad_weight, grad_bias, table;
  std::vector<double> partials;
  std::vector<Moments> moments;
  std::vector<Sums> sums;
  Problem p;
};

void check_kernels(const char* who, const Kernels& kernels) {
  for (const Example& example : examples()) {
    BnSwish b(example, kernels);
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

CASE("the kernels chosen at run time") { check_kernels("cpu", kChosen); }

CASE("channel by channel or part by part, the same bits") {
  for (bool swish : {false, true}) {
    const Example example{Order::planes, 5, 20, 1300, DType::float32, true, swish, 0, 3};
    BnSwish once(example), each(example);
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
      BnSwish b(example);
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
    BnSwish whole({order, 5, channels, spatial, DType::float32, true, true, 0, 2});
    whole.forward();
    whole.backward();
    BnSwish first({order, 2, channels, spatial, DType::float32, true, true, 0, 2});
    BnSwish second({order, 3, channels, spatial, DType::float32, true, true, 0, 2});
    BnSwish* const halves[2] = {&first, &second};
    // The batch is outermost in both orders.
    for (int64_t i = 0; i < whole.count; ++i) {
      BnSwish& half = i < first.count ? first : second;
      const int64_t j = i < first.count ? i : i - first.count;
      half.x.set(j, whole.x.at(i));
      half.grad.set(j, whole.grad.at(i));
    }
    for (BnSwish* half : halves) {
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
    for (BnSwish* half : halves) {
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
    for (BnSwish* half : halves) half->backward_apply();
    for (int64_t i = 0; i < whole.count; ++i) {
      const BnSwish& half = i < first.count ? first : second;
      const int64_t j = i < first.count ? i : i - first.count;
      CHECK(std::fabs(half.y.at(j) - whole.y.at(i)) < 1e-5) << i;
      CHECK(std::fabs(half.grad_x.at(j) - whole.grad_x.at(i)) < 1e-5) << i;
    }
  }
}

CASE("Swish at the ends of float32") {
  for (bool with_gradient : {false, true}) {
    BnSwish b({Order::planes, 1, 1, 33, DType::float32, false, true, 0, 0});
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
