// Binds mixed_score to lsgm_fast::mixed_score_{cpu,cuda} and their backward operators. Compiled into both libraries,
// with LSGM_CUDA defined in the CUDA one. The schemas are defined in Python (lsgm_fast/ops/mixed_score.py).
#include <tuple>
#include <vector>

#include "common/channelwise_stable.h"
#include "mixed_score/mixed_score.h"

namespace lsgm {
namespace mixed_score {
namespace {

Problem describe_call(const Tensor& eps, const Tensor& z, const Tensor& logit, const Tensor& r) {
  Problem p{};
  describe(p, eps, z, &logit, r);
  return p;
}

#if defined(LSGM_CUDA)

void run_forward(Problem& p, const Tensor& z) {
  const torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
  cuda::plan(p);
  cuda::forward(p, current_stream(z));
}

// Memory for the partial sums comes from PyTorch's allocator, so that a CUDA graph can own it.
void run_backward(Problem& p, const Tensor& z) {
  const torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
  cuda::plan(p);
  const Tensor partials = torch::stable::new_empty(z, {partial_rows(p), p.channels}, ScalarType::Double);
  p.partials = static_cast<double*>(partials.mutable_data_ptr());
  cuda::backward(p, current_stream(z));
}

#else

void run_forward(Problem& p, const Tensor&) {
  plan_for_cpu(p);
  Table table(2 * p.channels);
  cpu::fill_table(p, table.data());
  p.table = table.data();
  run_segments(p, &cpu::forward);
}

void run_backward(Problem& p, const Tensor&) {
  plan_for_cpu(p);
  Table table(2 * p.channels);
  std::vector<double> partials(static_cast<size_t>(partial_rows(p) * p.channels));
  cpu::fill_table(p, table.data());
  p.table = table.data();
  p.partials = partials.data();
  run_segments(p, &cpu::backward);
  cpu::finish(p);
}

#endif

Tensor forward(const Tensor& eps, const Tensor& z, const Tensor& logit, const Tensor& r) {
  Problem p = describe_call(eps, z, logit, r);
  Tensor out = torch::stable::empty_like(z);
  if (elements(p) == 0) return out;
  p.out = out.mutable_data_ptr();
  run_forward(p, z);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& eps, const Tensor& z, const Tensor& logit, const Tensor& r) {
  Problem p = describe_call(eps, z, logit, r);
  STD_TORCH_CHECK(same_shape(grad, z) && grad.scalar_type() == z.scalar_type() && same_device(grad, z),
      "grad has shape ", shape_of(grad), " and dtype ", torch::headeronly::toString(grad.scalar_type()),
      ": expected those of z, ", shape_of(z), " and ", torch::headeronly::toString(z.scalar_type()),
      ", on the same device");
  Tensor grad_eps = torch::stable::empty_like(eps);
  Tensor grad_z = torch::stable::empty_like(z);
  Tensor grad_logit = torch::stable::new_empty(logit, logit.sizes());
  if (elements(p) == 0) {
    torch::stable::zero_(grad_logit);
    return {grad_eps, grad_z, grad_logit};
  }
  STD_TORCH_CHECK(
      same_strides(grad, z), "grad has strides ", strides_of(grad), ": expected those of z, ", strides_of(z));
  p.grad = grad.const_data_ptr();
  p.grad_eps = grad_eps.mutable_data_ptr();
  p.grad_z = grad_z.mutable_data_ptr();
  p.grad_logit = grad_logit.mutable_data_ptr();
  run_backward(p, z);
  return {grad_eps, grad_z, grad_logit};
}

}  // namespace
}  // namespace mixed_score
}  // namespace lsgm

#if defined(LSGM_CUDA)
STABLE_TORCH_LIBRARY_IMPL(lsgm_fast, CUDA, m) {
  m.impl("mixed_score_cuda", TORCH_BOX(&lsgm::mixed_score::forward));
  m.impl("mixed_score_cuda_backward", TORCH_BOX(&lsgm::mixed_score::backward));
}
#else
STABLE_TORCH_LIBRARY_IMPL(lsgm_fast, CPU, m) {
  m.impl("mixed_score_cpu", TORCH_BOX(&lsgm::mixed_score::forward));
  m.impl("mixed_score_cpu_backward", TORCH_BOX(&lsgm::mixed_score::backward));
}
#endif
