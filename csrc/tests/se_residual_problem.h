// A se_residual problem on the host with guarded buffers, and its solution in long double.
#pragma once

#include <cmath>
#include <vector>

#include "se_residual/se_residual.h"
#include "tests/buffer.h"

namespace lsgm {
namespace testing {
namespace {  // these names occur in several test files, which lsgm_fast._C links into one library

using lsgm::se_residual::elements;
using lsgm::se_residual::partial_count;
using lsgm::se_residual::Problem;
using lsgm::se_residual::state_size;

struct Example {
  Order order;
  int64_t batch, channels, spatial, hidden;
  DType dtype;
  int64_t offset;  // of every tensor, in elements
};

inline std::vector<Example> examples() {
  std::vector<Example> all;
  const int64_t shapes[][4] = {{1, 1, 5, 1}, {3, 5, 63, 4}, {2, 17, 2, 4}, {5, 1, 1023, 4}, {4, 3, 8, 9},
      {2, 2, 9001, 3}, {3, 40, 64, 16}, {2, 1030, 5, 21}, {1, 19, 700, 8}, {2, 128, 16, 33}, {9, 64, 256, 4}};
  int64_t n = 0;
  for (const auto& s : shapes) {
    for (Order order : {Order::planes, Order::rows}) {
      for (DType dtype : {DType::float32, n % 2 ? DType::bfloat16 : DType::float16}) {
        all.push_back({order, s[0], s[1], s[2], s[3], dtype, n % 3 == 2});
        ++n;
      }
    }
  }
  return all;
}

class SeResidual {
 public:
  explicit SeResidual(const Example& e)
      : example(e),
        count(e.batch * e.channels * e.spatial),
        random(static_cast<uint64_t>(count * 31 + e.hidden)),
        skip(count, e.dtype, e.offset),
        x(count, e.dtype, e.offset),
        y(count, e.dtype, e.offset),
        grad(count, e.dtype, e.offset),
        grad_x(count, e.dtype, e.offset) {
    skip.randomize(random);
    grad.randomize(random);
    for (int64_t i = 0; i < count; ++i) x.set(i, 0.3 + random.uniform(-2, 2));
    const double wide = 3 / std::sqrt(static_cast<double>(e.channels)), deep = 3 / std::sqrt(double(e.hidden));
    fill(reduce_weight, e.hidden * e.channels, wide);
    fill(reduce_bias, e.hidden, 1);
    fill(expand_weight, e.channels * e.hidden, deep);
    fill(expand_bias, e.channels, 1);
    p = Problem{};
    p.order = e.order;
    p.batch = e.batch;
    p.channels = e.channels;
    p.spatial = e.spatial;
    p.hidden = e.hidden;
    p.dtype = e.dtype;
    p.scale = 0.25f;
    p.skip = skip.data();
    p.x = x.data();
    p.y = y.data();
    p.grad = grad.data();
    p.grad_x = grad_x.data();
    p.reduce_weight = reduce_weight.data();
    p.reduce_bias = reduce_bias.data();
    p.expand_weight = expand_weight.data();
    p.expand_bias = expand_bias.data();
    p.state = empty(state, e.batch * state_size(p));
    p.deltas = empty(deltas, e.batch * state_size(p));
    p.grad_reduce_weight = empty(grad_reduce_weight, e.hidden * e.channels);
    p.grad_reduce_bias = empty(grad_reduce_bias, e.hidden);
    p.grad_expand_weight = empty(grad_expand_weight, e.channels * e.hidden);
    p.grad_expand_bias = empty(grad_expand_bias, e.channels);
  }

  // After the plan.
  void allocate_partials() {
    partials.assign(static_cast<size_t>(partial_count(p)), std::nan(""));
    p.partials = partials.data();
  }

  int64_t at(int64_t sample, int64_t channel, int64_t position) const {
    if (p.order == Order::planes) return (sample * p.channels + channel) * p.spatial + position;
    return (sample * p.spatial + position) * p.channels + channel;
  }

  void check(const char* who) const {
    const int64_t channels = p.channels, hidden = p.hidden;
    std::vector<long double> w1(reduce_weight.size()), w1_size(w1), w2(w1), w2_size(w1), b1(reduce_bias.size()),
        b1_size(b1), b2(expand_bias.size()), b2_size(b2);
    for (int64_t n = 0; n < p.batch; ++n) {
      std::vector<long double> pooled(u(channels)), gate(pooled), d_gate(pooled), h(u(hidden)), d_h(h);
      long double size = 0;  // of what enters a hidden unit
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t i = 0; i < p.spatial; ++i) pooled[u(c)] += x.at(at(n, c, i));
        pooled[u(c)] /= static_cast<long double>(p.spatial);
        size += 3 / std::sqrt(static_cast<long double>(channels)) * 2;
      }
      for (int64_t r = 0; r < hidden; ++r) {
        h[u(r)] = reduce_bias[u(r)];
        for (int64_t c = 0; c < channels; ++c) h[u(r)] += reduce_weight[u(r * channels + c)] * pooled[u(c)];
        if (h[u(r)] < 0) h[u(r)] = 0;
      }
      // A gate's error: roundings of what enters the hidden units, times the weights behind them.
      const long double unit = 0x1p-24L, of_gate = 8 * unit * (2 + size * 0.1L * 3 * std::sqrt(double(hidden)));
      for (int64_t c = 0; c < channels; ++c) {
        long double v = expand_bias[u(c)], product = 0, product_size = 0;
        for (int64_t r = 0; r < hidden; ++r) v += expand_weight[u(c * hidden + r)] * h[u(r)];
        gate[u(c)] = 1 / (1 + std::exp(-v));
        for (int64_t i = 0; i < p.spatial; ++i) {
          const int64_t j = at(n, c, i);
          const long double gated = p.scale * x.at(j), expected = skip.at(j) + gate[u(c)] * gated;
          near(who, "y", j, y.at(j), expected, unit * 4 * (std::fabs(skip.at(j)) + std::fabs(gated)) +
              of_gate * std::fabs(gated) + stored() * std::fabs(expected));
          product += static_cast<long double>(grad.at(j)) * x.at(j);
          product_size += std::fabs(grad.at(j) * x.at(j));
        }
        d_gate[u(c)] = p.scale * product * gate[u(c)] * (1 - gate[u(c)]);
        const long double d_size = p.scale * product_size + 1e-3L;
        b2[u(c)] += d_gate[u(c)];
        b2_size[u(c)] += d_size;
        for (int64_t r = 0; r < hidden; ++r) {
          w2[u(c * hidden + r)] += d_gate[u(c)] * h[u(r)];
          w2_size[u(c * hidden + r)] += d_size * (h[u(r)] + 1);
          if (h[u(r)] > 0) d_h[u(r)] += expand_weight[u(c * hidden + r)] * d_gate[u(c)];
        }
      }
      // Sums of products of sums: relative to the largest of their kind.
      long double d_h_size = 1e-3L;
      for (int64_t c = 0; c < channels; ++c) d_h_size += std::fabs(d_gate[u(c)]) * 3 / std::sqrt(double(hidden)) + 1e-3L;
      for (int64_t r = 0; r < hidden; ++r) {
        b1[u(r)] += d_h[u(r)];
        b1_size[u(r)] += d_h_size;
        for (int64_t c = 0; c < channels; ++c) {
          w1[u(r * channels + c)] += d_h[u(r)] * pooled[u(c)];
          w1_size[u(r * channels + c)] += d_h_size * (std::fabs(pooled[u(c)]) + 1);
        }
      }
      for (int64_t c = 0; c < channels; ++c) {
        long double offset = 0;
        for (int64_t r = 0; r < hidden; ++r) offset += reduce_weight[u(r * channels + c)] * d_h[u(r)];
        offset /= static_cast<long double>(p.spatial);
        const long double offset_size = d_h_size * static_cast<long double>(hidden) / static_cast<long double>(p.spatial);
        for (int64_t i = 0; i < p.spatial; ++i) {
          const int64_t j = at(n, c, i);
          const long double g = p.scale * grad.at(j), expected = gate[u(c)] * g + offset;
          near(who, "grad_x", j, grad_x.at(j), expected,
              (4 * unit + of_gate) * std::fabs(g) + 64 * unit * offset_size + stored() * std::fabs(expected) + 1e-7L);
        }
      }
    }
    compare(who, "grad_reduce_weight", grad_reduce_weight, w1, w1_size);
    compare(who, "grad_reduce_bias", grad_reduce_bias, b1, b1_size);
    compare(who, "grad_expand_weight", grad_expand_weight, w2, w2_size);
    compare(who, "grad_expand_bias", grad_expand_bias, b2, b2_size);
  }

  bool same_results(const SeResidual& other) const {
    for (int64_t i = 0; i < count; ++i) {
      if (y.at(i) != other.y.at(i) || grad_x.at(i) != other.grad_x.at(i)) return false;
    }
    return state == other.state && grad_reduce_weight == other.grad_reduce_weight &&
           grad_reduce_bias == other.grad_reduce_bias && grad_expand_weight == other.grad_expand_weight &&
           grad_expand_bias == other.grad_expand_bias;
  }

  Example example;
  int64_t count;
  Random random;
  Buffer skip, x, y, grad, grad_x;
  std::vector<float> reduce_weight, reduce_bias, expand_weight, expand_bias, state, deltas;
  std::vector<float> grad_reduce_weight, grad_reduce_bias, grad_expand_weight, grad_expand_bias;
  std::vector<double> partials;
  Problem p;

 private:
  static size_t u(int64_t i) { return static_cast<size_t>(i); }

  void fill(std::vector<float>& v, int64_t n, double size) {
    for (int64_t i = 0; i < n; ++i) v.push_back(static_cast<float>(random.uniform(-size, size)));
  }

  static float* empty(std::vector<float>& v, int64_t n) {
    v.assign(u(n), std::nanf(""));
    return v.data();
  }

  long double stored() const { return unit_roundoff(p.dtype); }

  void near(const char* who, const char* what, int64_t i, double got, long double expected, long double allowed) const {
    CHECK(std::fabs(got - expected) <= allowed) << who << " " << what << " " << i << ": " << got << ", expected "
        << double(expected) << ", allowed error " << double(allowed) << " (order " << int(p.order) << ", " << p.batch
        << " x " << p.channels << " x " << p.spatial << ", " << p.hidden << ")";
  }

  void compare(const char* who, const char* what, const std::vector<float>& got,
      const std::vector<long double>& expected, const std::vector<long double>& sizes) const {
    for (size_t i = 0; i < got.size(); ++i) {
      near(who, what, static_cast<int64_t>(i), got[i], expected[i], 256 * 0x1p-24L * sizes[i]);
    }
  }
};

}  // namespace
}  // namespace testing
}  // namespace lsgm
