// Binds mixed_score to lsgm_fast::mixed_score_{cpu,cuda} and their backward operators. Compiled into both libraries,
// with LSGM_CUDA defined in the CUDA one. The schemas are defined in Python (lsgm_fast/ops/mixed_score.py).
#include <tuple>
#include <vector>

#include "common/stable.h"
#include "mixed_score/mixed_score.h"

namespace lsgm {
namespace mixed_score {
namespace {

Problem describe(const Tensor& eps, const Tensor& z, const Tensor& logit, const Tensor& r) {
  STD_TORCH_CHECK(z.dim() >= 2, "z has shape ", shape_of(z), ": expected (B, C, ...)");
  STD_TORCH_CHECK(same_shape(eps, z), "eps has shape ", shape_of(eps), " and z ", shape_of(z), ": expected the same");
  STD_TORCH_CHECK(same_device(eps, z) && same_device(logit, z) && same_device(r, z),
      "eps, z, mixing_logit and r must be on one device");
  Problem p{};
  p.batch = z.size(0);
  p.channels = z.size(1);
  p.spatial = 1;
  for (int64_t d = 2; d < z.dim(); ++d) p.spatial *= z.size(d);
  STD_TORCH_CHECK(logit.numel() == p.channels && (p.channels == 1 || (logit.dim() >= 2 && logit.size(1) == p.channels)),
      "mixing_logit has shape ", shape_of(logit), ": expected (1, ", p.channels, ", 1, 1)");
  STD_TORCH_CHECK(r.dim() <= 1 && (r.numel() == 1 || r.numel() == p.batch), "r has shape ", shape_of(r),
      ": expected () or (", p.batch, ",)");
  p.eps_dtype = dtype_of(eps, "eps");
  p.z_dtype = dtype_of(z, "z");
  p.logit = scalars(logit, "mixing_logit", 1, p.channels);
  p.r = scalars(r, "r", 0, p.batch);
  if (elements(p) == 0) return p;
  p.order = order_of(z.dim(), z.sizes().data(), z.strides().data());
  STD_TORCH_CHECK(p.order != Order::unsupported && same_strides(eps, z), "eps has strides ", strides_of(eps), " and z ",
      strides_of(z), ": expected both contiguous or both channels_last");
  p.eps = eps.const_data_ptr();
  p.z = z.const_data_ptr();
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
  cpu::plan(p);
  std::vector<unsigned char> table(static_cast<size_t>(2 * p.channels) * sizeof(double));
  cpu::fill_table(p, table.data());
  p.table = table.data();
  torch::stable::parallel_for(
      0, p.segments.count, cpu::grain(p), [&p](int64_t begin, int64_t end) { cpu::forward(p, begin, end); });
}

void run_backward(Problem& p, const Tensor&) {
  cpu::plan(p);
  std::vector<unsigned char> table(static_cast<size_t>(2 * p.channels) * sizeof(double));
  std::vector<double> partials(static_cast<size_t>(partial_rows(p) * p.channels));
  cpu::fill_table(p, table.data());
  p.table = table.data();
  p.partials = partials.data();
  torch::stable::parallel_for(
      0, p.segments.count, cpu::grain(p), [&p](int64_t begin, int64_t end) { cpu::backward(p, begin, end); });
  cpu::finish(p);
}

#endif

Tensor forward(const Tensor& eps, const Tensor& z, const Tensor& logit, const Tensor& r) {
  Problem p = describe(eps, z, logit, r);
  Tensor out = torch::stable::empty_like(z);
  if (elements(p) == 0) return out;
  p.out = out.mutable_data_ptr();
  run_forward(p, z);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& eps, const Tensor& z, const Tensor& logit, const Tensor& r) {
  Problem p = describe(eps, z, logit, r);
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
