// A call of the operators of GroupNorm with its memory, and the check of its results against long double.
#pragma once

#include <cmath>
#include <vector>

#include "group_norm_swish/group_norm_swish.h"
#include "tests/buffer.h"

namespace lsgm {
namespace testing {
namespace group_norm {
namespace {  // these names occur in several test files, which lsgm_fast._C links into one library

using namespace lsgm::group_norm_swish;

enum class Kind { plain, bias, residual };

struct Example {
  Order order;
  int64_t batch, groups, per_group, spatial;
  DType dtype;
  Kind kind;
  bool swish;
  int64_t offset;  // of every tensor, in elements
  double mean;
};

// Around the widths of registers, the blocks of a pivot, and what is cut into pieces.
std::vector<Example> examples() {
  std::vector<Example> all;
  const int64_t shapes[][4] = {{1, 1, 1, 5}, {3, 5, 1, 63}, {2, 1, 17, 2}, {5, 4, 4, 16}, {4, 3, 1, 8}, {1, 2, 2, 9001},
      {30, 3, 3, 4}, {2, 5, 206, 5}, {1, 19, 1, 700}, {2, 2, 24, 33}, {1, 2, 3, 23001}, {3, 9, 4, 1}};
  int64_t n = 0;
  for (const auto& s : shapes) {
    for (Order order : {Order::planes, Order::rows}) {
      for (Kind kind : {Kind::plain, Kind::bias, Kind::residual}) {
        const DType dtype = n % 5 == 3 ? DType::bfloat16 : n % 5 == 4 ? DType::float16 : DType::float32;
        all.push_back(
            {order, s[0], s[1], s[2], s[3], dtype, kind, n % 4 != 2, n % 2, dtype == DType::float32 ? 100.0 : 0.5});
        ++n;
      }
    }
  }
  return all;
}

class GroupNorm {
 public:
  explicit GroupNorm(const Example& e)
      : example(e),
        channels(e.groups * e.per_group),
        count(e.batch * channels * e.spatial),
        random(static_cast<uint64_t>(count * 31 + channels)),
        x(count, e.dtype, e.offset),
        residual(count, e.dtype, e.offset),
        v(count, e.dtype, e.offset),
        y(count, e.dtype, e.offset),
        grad(count, e.dtype, e.offset),
        grad_v(count, e.dtype, e.offset),
        grad_x(count, e.dtype, e.offset) {
    for (int64_t i = 0; i < count; ++i) x.set(i, e.mean + random.uniform(-2, 2));
    for (Buffer* b : {&residual, &grad, &grad_v}) b->randomize(random);
    const auto per_channel = static_cast<size_t>(channels), per_sample = static_cast<size_t>(e.batch * channels);
    for (auto* numbers : {&weight, &bias, &grad_weight, &grad_bias}) numbers->assign(per_channel, std::nanf(""));
    for (auto* numbers : {&channel_bias, &grad_channel_bias, &factor, &shift}) {
      numbers->assign(per_sample, std::nanf(""));
    }
    for (auto* numbers : {&mean, &rstd}) numbers->assign(static_cast<size_t>(e.batch * e.groups), std::nanf(""));
    for (float& w : weight) w = static_cast<float>(random.uniform(-2, 2));
    for (float& b : bias) b = static_cast<float>(random.uniform(-1, 1));
    for (float& b : channel_bias) b = static_cast<float>(random.uniform(-3, 3));
    p = Problem{};
    p.order = e.order;
    p.batch = e.batch;
    p.channels = channels;
    p.spatial = e.spatial;
    p.groups = e.groups;
    p.dtype = e.dtype;
    p.swish = e.swish;
    p.scale = 1;
    p.eps = 1e-6;
    p.x = p.v = x.data();
    p.weight = weight.data();
    p.bias = bias.data();
    p.y = y.data();
    p.mean = mean.data();
    p.rstd = rstd.data();
    p.grad = grad.data();
    p.grad_x = grad_x.data();
    p.grad_weight = grad_weight.data();
    p.grad_bias = grad_bias.data();
    if (e.kind == Kind::bias) {
      p.channel_bias = channel_bias.data();
      p.grad_channel_bias = grad_channel_bias.data();
    }
    if (e.kind == Kind::residual) {
      p.scale = 0.70710677f;
      p.residual = residual.data();
      p.v = v.data();
      p.grad_v = grad_v.data();
    }
  }

  // v of an element, with its channel bias.
  long double value(int64_t sample, int64_t channel, int64_t position) const {
    const int64_t i = element_at(p, sample, channel, position);
    if (example.kind == Kind::residual) return v.at(i);
    if (example.kind == Kind::plain) return x.at(i);
    return static_cast<long double>(x.at(i)) + channel_bias[static_cast<size_t>(sample * channels + channel)];
  }

  template <class F>
  void for_group(int64_t group, F&& f) const {
    for (int64_t c = group * example.per_group; c < (group + 1) * example.per_group; ++c) {
      for (int64_t i = 0; i < p.spatial; ++i) f(c, i);
    }
  }

  struct Exact {
    long double mean, var;
  };
  Exact exact(int64_t sample, int64_t group) const {
    const long double n = static_cast<long double>(group_elements(p));
    long double total = 0, squares = 0;
    for_group(group, [&](int64_t c, int64_t i) { total += value(sample, c, i); });
    for_group(group, [&](int64_t c, int64_t i) {
      const long double distance = value(sample, c, i) - total / n;
      squares += distance * distance;
    });
    return {total / n, squares / n};
  }

  void check(const char* who) const {
    const long double n = static_cast<long double>(group_elements(p));
    const long double unit = 0x1p-24L, stored = unit_roundoff(p.dtype);
    std::vector<long double> weights(weight.size()), biases(weight.size()), sizes(weight.size());
    for (int64_t sample = 0; sample < p.batch; ++sample) {
      for (int64_t g = 0; g < p.groups; ++g) {
        const auto [m, var] = exact(sample, g);
        const long double r = 1 / std::sqrt(var + 1e-6L), moved = 2 * unit * std::fabs(m) * r;
        const auto at = static_cast<size_t>(sample * p.groups + g);
        // Without AVX2, float32 sums run over up to 1024 differences.
        CHECK(std::fabs(mean[at] - m) <= 4 * unit * (std::fabs(m) + std::sqrt(var))) << who << " mean " << at;
        // eps is the whole of the variance where all elements are one number.
        CHECK(std::fabs(rstd[at] - r) <= (32 * unit + moved * moved) * r)
            << who << " rstd " << rstd[at] << " " << double(r);
        long double sum = 0, sum_centred = 0, size = 0;
        const auto inner = [&](int64_t c, int64_t i, long double& centred) {
          const long double w = weight[static_cast<size_t>(c)], b = bias[static_cast<size_t>(c)];
          centred = value(sample, c, i) - m;
          const long double u = centred * r * w + b, s = 1 / (1 + std::exp(-u));
          return grad.at(element_at(p, sample, c, i)) * (p.swish ? s * (1 + u * (1 - s)) : 1);
        };
        for (int64_t c = g * example.per_group; c < (g + 1) * example.per_group; ++c) {
          const auto k = static_cast<size_t>(c);
          const long double w = weight[k];
          for (int64_t i = 0; i < p.spatial; ++i) {
            long double centred;
            const int64_t j = element_at(p, sample, c, i);
            const long double d = inner(c, i, centred), u = centred * r * w + bias[k];
            const long double expected = p.swish ? u / (1 + std::exp(-u)) : u;
            const long double scale = std::fabs(centred * r * w) + std::fabs(bias[k]) + 0.1L;
            const long double allowed =
                (16 * unit + moved * moved) * scale + 1.2L * moved * std::fabs(w) + stored * std::fabs(expected);
            CHECK(std::fabs(y.at(j) - expected) <= allowed)
                << who << " y " << j << " " << y.at(j) << " " << double(expected);
            const long double more = std::fabs(grad.at(j)) * (1 + std::fabs(centred) * r) * (1 + std::fabs(w));
            weights[k] += d * centred * r;
            biases[k] += d;
            sizes[k] += (24 * unit + 2 * moved) * more;
            sum += w * d;
            sum_centred += w * d * centred * r;
            size += std::fabs(w) * more;
          }
        }
        for (int64_t c = g * example.per_group; c < (g + 1) * example.per_group; ++c) {
          const long double w = weight[static_cast<size_t>(c)];
          long double total = 0, wrong = 0;
          for (int64_t i = 0; i < p.spatial; ++i) {
            long double centred;
            const int64_t j = element_at(p, sample, c, i);
            const long double d = inner(c, i, centred), h = centred * r;
            long double expected = r * (w * d - sum / n - h * sum_centred / n);
            const long double parts =
                r * (std::fabs(w * grad.at(j)) * (1 + std::fabs(w * h)) + size / n * (1 + std::fabs(h)) * 4);
            total += expected;
            wrong += (24 * unit + 3 * moved) * parts;
            expected *= p.scale;
            if (p.grad_v != nullptr) expected += static_cast<long double>(p.scale) * grad_v.at(j);
            const long double allowed =
                (24 * unit + 3 * moved) * parts + (stored + 4 * unit) * (std::fabs(expected) + 2) + 1e-7L;
            CHECK(std::fabs(grad_x.at(j) - expected) <= allowed)
                << who << " grad_x " << j << " " << grad_x.at(j) << " " << double(expected);
          }
          if (p.channel_bias == nullptr) continue;
          const double got = grad_channel_bias[static_cast<size_t>(sample * channels + c)];
          CHECK(std::fabs(got - total) <= wrong + 1e-7L)
              << who << " grad_channel_bias " << sample << " " << c << " " << got << " " << double(total);
        }
      }
    }
    for (size_t c = 0; c < weight.size(); ++c) {
      CHECK(std::fabs(grad_bias[c] - biases[c]) <= sizes[c]) << who << " grad_bias " << c;
      CHECK(std::fabs(grad_weight[c] - weights[c]) <= sizes[c] * 4) << who << " grad_weight " << c;
    }
    if (p.residual == nullptr) return;
    for (int64_t i = 0; i < count; ++i) {
      const long double sum = (static_cast<long double>(x.at(i)) + residual.at(i)) * p.scale;
      CHECK(std::fabs(v.at(i) - sum) <= (stored + 2 * unit) * 1.01L * std::fabs(sum) + 2 * unit) << who << " v " << i;
    }
  }

  Example example;
  int64_t channels, count;
  Random random;
  Buffer x, residual, v, y, grad, grad_v, grad_x;
  std::vector<float> weight, bias, channel_bias, mean, rstd, factor, shift, grad_weight, grad_bias, grad_channel_bias;
  Problem p;
};

}  // namespace
}  // namespace group_norm
}  // namespace testing
}  // namespace lsgm
