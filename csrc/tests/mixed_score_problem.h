// A mixed_score problem on the host with guarded buffers, and its solution in long double.
#pragma once

#include <cmath>
#include <vector>

#include "mixed_score/mixed_score.h"
#include "tests/buffer.h"
#include "tests/check.h"

namespace lsgm {
namespace testing {

using lsgm::mixed_score::partial_rows;
using lsgm::mixed_score::Problem;

struct Example {
  Order order;
  int64_t batch, channels, spatial;
  DType eps, z, logit, r;
  bool shared_r;
  int64_t offset;  // of every tensor, in elements: 0 is aligned
};

class MixedScore {
 public:
  explicit MixedScore(const Example& x)
      : example(x),
        count(x.batch * x.channels * x.spatial),
        eps(count, x.eps, x.offset),
        z(count, x.z, x.offset),
        grad(count, x.z, x.offset),
        out(count, x.z, x.offset),
        grad_eps(count, x.eps, x.offset),
        grad_z(count, x.z, x.offset),
        logit(x.channels, x.logit, 0),
        grad_logit(x.channels, x.logit, 0),
        r(x.shared_r ? 1 : x.batch, x.r, 0) {
    Random random(static_cast<uint64_t>(count * 31 + x.channels));
    for (Buffer* b : {&eps, &z, &grad, &logit, &r}) b->randomize(random);
    p = Problem{};
    p.order = x.order;
    p.batch = x.batch;
    p.channels = x.channels;
    p.spatial = x.spatial;
    p.eps_dtype = x.eps;
    p.z_dtype = x.z;
    p.eps = eps.data();
    p.z = z.data();
    p.logit = {logit.data(), x.logit, 1};
    p.r = {r.data(), x.r, x.shared_r ? 0 : 1};
  }

  void bind_forward() { p.out = out.data(); }

  void bind_backward() {
    p.grad = grad.data();
    p.grad_eps = grad_eps.data();
    p.grad_z = grad_z.data();
    p.grad_logit = grad_logit.data();
  }

  void allocate_partials() {
    partials.assign(static_cast<size_t>(partial_rows(p) * p.channels), std::nan(""));
    p.partials = partials.data();
  }

  void check_forward(const char* who) const {
    for (int64_t i = 0; i < count; ++i) {
      const Terms t = terms(i);
      const long double expected = (1 - t.a) * t.r * t.z + t.a * t.eps;
      const long double scale = std::fabs((1 - t.a) * t.r * t.z) + std::fabs(t.a * t.eps);
      check(who, "out", i, out.at(i), expected, scale, example.z);
    }
  }

  void check_backward(const char* who) const {
    std::vector<long double> sums(static_cast<size_t>(example.channels)), scales(sums.size());
    for (int64_t i = 0; i < count; ++i) {
      const Terms t = terms(i);
      const long double g = grad.at(i);
      check(who, "grad_eps", i, grad_eps.at(i), t.a * g, std::fabs(t.a * g), example.eps);
      check(who, "grad_z", i, grad_z.at(i), (1 - t.a) * t.r * g, std::fabs((1 - t.a) * t.r * g), example.z);
      sums[static_cast<size_t>(t.channel)] += t.a * (1 - t.a) * g * (t.eps - t.r * t.z);
      scales[static_cast<size_t>(t.channel)] +=
          t.a * (1 - t.a) * std::fabs(g) * (std::fabs(t.eps) + std::fabs(t.r * t.z));
    }
    for (int64_t c = 0; c < example.channels; ++c) {
      const auto i = static_cast<size_t>(c);
      check(who, "grad_logit", c, grad_logit.at(c), sums[i], scales[i], example.logit);
    }
  }

  Example example;
  int64_t count;
  Buffer eps, z, grad, out, grad_eps, grad_z, logit, grad_logit, r;
  std::vector<double> partials;
  Problem p;

 private:
  struct Terms {
    long double a, r, eps, z;
    int64_t channel;
  };

  Terms terms(int64_t i) const {
    const bool planes = example.order == Order::planes;
    Terms t;
    t.channel = planes ? i / example.spatial % example.channels : i % example.channels;
    const int64_t sample = i / (example.channels * example.spatial);
    t.a = 1 / (1 + std::exp(-static_cast<long double>(logit.at(t.channel))));
    t.r = r.at(example.shared_r ? 0 : sample);
    t.eps = eps.at(i);
    t.z = z.at(i);
    return t;
  }

  void check(const char* who, const char* what, int64_t i, double got, long double expected, long double scale,
      DType dtype) const {
    const DType arithmetic = lsgm::mixed_score::computes_in_double(p) ? DType::float64 : DType::float32;
    const long double allowed = 8 * unit_roundoff(arithmetic) * scale +
                                unit_roundoff(dtype) * (std::fabs(expected) * 1.01L) +
                                0x1p-25L * (dtype == DType::float16 ? 1 : 0);
    CHECK(std::fabs(got - expected) <= allowed)
        << who << ": " << what << "[" << i << "] is " << got << ", expected " << static_cast<double>(expected)
        << "; order " << static_cast<int>(example.order) << " shape " << example.batch << "x" << example.channels << "x"
        << example.spatial << " dtypes " << static_cast<int>(example.eps) << static_cast<int>(example.z) << " offset "
        << example.offset;
  }
};

// Every mixture of types in both orders, with shapes around the widths of registers, warps, blocks and segments.
inline std::vector<Example> examples() {
  const DType all[] = {DType::float32, DType::float64, DType::float16, DType::bfloat16};
  struct Shape {
    int64_t batch, channels, spatial;
  };
  const Shape small[] = {{1, 1, 1}, {2, 3, 7}, {2, 8, 16}, {3, 5, 64}, {2, 40, 33}, {1, 2, 260}};
  const Shape large[] = {{1, 2, 16391}, {2, 1, 4100}, {2, 270, 5}, {1, 2100, 3}, {3, 16, 4096}, {2, 180, 256}};
  std::vector<Example> list;
  for (Order order : {Order::planes, Order::rows}) {
    for (DType eps : all) {
      for (DType z : all) {
        int64_t n = 0;
        for (const Shape& s : small) {
          const bool odd = n++ % 2 == 1;
          list.push_back({order, s.batch, s.channels, s.spatial, eps, z, odd ? DType::float64 : DType::float32,
              odd ? DType::float32 : DType::float64, odd, n % 3 == 2 ? 1 : 0});
        }
      }
    }
    for (const Shape& s : large) {
      for (DType eps : {DType::float32, DType::bfloat16}) {
        list.push_back(
            {order, s.batch, s.channels, s.spatial, eps, DType::float32, DType::float32, DType::float32, false, 0});
      }
    }
  }
  return list;
}

}  // namespace testing
}  // namespace lsgm
