// A mixed_score problem on the host with guarded buffers, and its solution in long double.
#pragma once

#include <cmath>
#include <vector>

#include "mixed_score/mixed_score.h"
#include "tests/channelwise_problem.h"

namespace lsgm {
namespace testing {
namespace {  // these names occur in several test files, which lsgm_fast._C links into one library

using lsgm::mixed_score::partial_rows;
using lsgm::mixed_score::Problem;

class MixedScore : public ChannelwiseProblem {
 public:
  explicit MixedScore(const Example& x)
      : ChannelwiseProblem(x),
        grad(count, x.z, x.offset),
        grad_eps(count, x.eps, x.offset),
        grad_z(count, x.z, x.offset),
        grad_logit(x.channels, x.logit, 0) {
    grad.randomize(random);
    p = Problem{};
    describe(p);
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

  Buffer grad, grad_eps, grad_z, grad_logit;
  std::vector<double> partials;
  Problem p;

 private:
  struct Terms {
    long double a, r, eps, z;
    int64_t channel;
  };

  Terms terms(int64_t i) const { return {network(i), sample_value(r, i), eps.at(i), z.at(i), channel_of(i)}; }
};

}  // namespace
}  // namespace testing
}  // namespace lsgm
