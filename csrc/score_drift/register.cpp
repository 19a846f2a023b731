// Binds score_drift to lsgm_fast::score_drift_{cpu,cuda}. Compiled into both libraries, with LSGM_CUDA defined in the
// CUDA one. The schemas are defined in Python (lsgm_fast/ops/score_drift.py).
#include <optional>

#include "common/channelwise_stable.h"
#include "score_drift/score_drift.h"

namespace lsgm {
namespace score_drift {
namespace {

#if defined(LSGM_CUDA)

void run(Problem& problem, const Tensor& z) {
  const torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
  cuda::plan(problem);
  cuda::forward(problem, current_stream(z));
}

#else

void run(Problem& problem, const Tensor&) {
  plan_for_cpu(problem);
  Table table(problem.channels);
  cpu::fill_table(problem, table.data());
  problem.table = table.data();
  run_segments(problem, &cpu::forward);
}

#endif

Tensor forward(const Tensor& eps, const Tensor& z, const std::optional<Tensor>& logit, const Tensor& p, const Tensor& q,
    const Tensor& r) {
  Problem problem{};
  describe(problem, eps, z, logit.has_value() ? &*logit : nullptr, r);
  problem.p = sample_scalars(p, "p", z);
  problem.q = sample_scalars(q, "q", z);
  Tensor out = torch::stable::empty_like(z);
  if (elements(problem) == 0) return out;
  join_channels(problem);
  problem.out = out.mutable_data_ptr();
  run(problem, z);
  return out;
}

}  // namespace
}  // namespace score_drift
}  // namespace lsgm

#if defined(LSGM_CUDA)
STABLE_TORCH_LIBRARY_IMPL(lsgm_fast, CUDA, m) { m.impl("score_drift_cuda", TORCH_BOX(&lsgm::score_drift::forward)); }
#else
STABLE_TORCH_LIBRARY_IMPL(lsgm_fast, CPU, m) { m.impl("score_drift_cpu", TORCH_BOX(&lsgm::score_drift::forward)); }
#endif
