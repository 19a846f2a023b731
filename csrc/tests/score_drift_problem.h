// A score_drift problem on the host with guarded buffers, and its solution in long double.
#pragma once

#include <cmath>

#include "score_drift/score_drift.h"
#include "tests/channelwise_problem.h"

namespace lsgm {
namespace testing {
namespace {  // these names occur in several test files, which lsgm_fast._C links into one library

class ScoreDrift : public ChannelwiseProblem {
 public:
  // Without mixing a is 1.
  explicit ScoreDrift(const Example& x, bool mixing = true)
      : ChannelwiseProblem(x),
        p(r.count(), x.r, 0),
        q(r.count(), x.r, 0),
        mixed(mixing) {
    p.randomize(random);
    q.randomize(random);
    problem = score_drift::Problem{};
    describe(problem);
    problem.p = per_sample(p);
    problem.q = per_sample(q);
    problem.out = out.data();
    if (mixed) return;
    problem.logit.data = nullptr;
    join_channels(problem);
  }

  void check_forward(const char* who) const {
    for (int64_t i = 0; i < count; ++i) {
      const long double weight = (mixed ? network(i) : 1) * sample_value(q, i);
      const long double linear = sample_value(p, i) * z.at(i), normal = sample_value(r, i) * z.at(i);
      const long double scale = std::fabs(linear) + std::fabs(weight) * (std::fabs(normal) + std::fabs(eps.at(i)));
      check(who, "out", i, out.at(i), linear + weight * (eps.at(i) - normal), scale, example.z);
    }
  }

  Buffer p, q;
  bool mixed;
  score_drift::Problem problem;
};

}  // namespace
}  // namespace testing
}  // namespace lsgm
