// Binds diffuse to lsgm_fast::diffuse_cpu and its backward operator. The schemas are defined in Python
// (lsgm_fast/ops/diffuse.py). There is no CUDA kernel.
#if !defined(LSGM_CUDA)
#include "common/stable.h"
#include "diffuse/diffuse.h"

namespace lsgm {
namespace diffuse {
namespace {

// Elements per sample of a tensor whose samples are runs in memory: of an order that has no gaps.
template <class P>
void describe_samples(P& p, const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() >= 1, name, " has shape (): expected (B, ...)");
  p.batch = t.size(0);
  p.size = p.batch == 0 ? 0 : t.numel() / p.batch;
  const bool dense = elements(p) == 0 || t.is_contiguous() ||
                     order_of(t.dim(), t.sizes().data(), t.strides().data()) != Order::unsupported;
  STD_TORCH_CHECK(dense, name, " has strides ", strides_of(t), ": expected contiguous or channels_last");
}

Tensor forward(const Tensor& z0, const Tensor& noise, const Tensor& m, const Tensor& var) {
  Problem p{};
  STD_TORCH_CHECK(
      same_shape(z0, noise), "z0 has shape ", shape_of(z0), " and noise ", shape_of(noise), ": expected the same");
  STD_TORCH_CHECK(same_device(z0, noise), "z0 and noise must be on one device");
  describe_samples(p, z0, "z0");
  p.z0_dtype = dtype_of(z0, "z0");
  p.noise_dtype = dtype_of(noise, "noise");
  p.m = sample_scalars(m, "m", z0);
  p.var = sample_scalars(var, "var", z0);
  Tensor out = torch::stable::empty_like(z0);
  if (elements(p) == 0) return out;
  STD_TORCH_CHECK(same_strides(z0, noise), "z0 has strides ", strides_of(z0), " and noise ", strides_of(noise),
      ": expected the same");
  p.z0 = z0.const_data_ptr();
  p.noise = noise.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.segments = cpu::plan(p.batch, p.size);
  torch::stable::parallel_for(0, p.segments.count, cpu::grain(p.segments),
      [&p](int64_t begin, int64_t end) { cpu::forward(p, begin, end); });
  return out;
}

Tensor backward(const Tensor& grad, const Tensor& factor, ScalarType dtype) {
  Scaling p{};
  describe_samples(p, grad, "grad");
  p.factor = sample_scalars(factor, "factor", grad);
  p.grad_dtype = dtype_of(grad, "grad");
  Tensor out = empty_like(grad, dtype);
  p.out_dtype = dtype_of(out, "the result");
  if (elements(p) == 0) return out;
  p.grad = grad.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.segments = cpu::plan(p.batch, p.size);
  torch::stable::parallel_for(0, p.segments.count, cpu::grain(p.segments),
      [&p](int64_t begin, int64_t end) { cpu::backward(p, begin, end); });
  return out;
}

}  // namespace
}  // namespace diffuse
}  // namespace lsgm

STABLE_TORCH_LIBRARY_IMPL(lsgm_fast, CPU, m) {
  m.impl("diffuse_cpu", TORCH_BOX(&lsgm::diffuse::forward));
  m.impl("diffuse_cpu_backward", TORCH_BOX(&lsgm::diffuse::backward));
}
#endif
