// A call of bn_swish with its memory, and the check of its results against long double.
#pragma once

#include <cmath>
#include <vector>

#include "bn_swish/bn_swish.h"
#include "tests/buffer.h"

namespace lsgm {
namespace testing {
namespace {  // these names occur in several test files, which lsgm_fast._C links into one library

using namespace lsgm::bn_swish;

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
  explicit BnSwish(const Example& e)
      : example(e),
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
  }

  // For chunks of the plan.
  void allocate_partials() {
    partials.assign(static_cast<size_t>(partial_count(p)), std::nan(""));
    p.partials = partials.data();
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
  int64_t count;
  Random random;
  Buffer x, y, grad, grad_x;
  std::vector<float> weight, bias, running_mean, running_var, mean, var, rstd, grad_weight, grad_bias;
  std::vector<double> partials;
  Problem p;
};

}  // namespace
}  // namespace testing
}  // namespace lsgm
