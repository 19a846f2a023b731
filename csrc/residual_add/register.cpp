// Binds residual_add to lsgm_fast::residual_add_{cpu,cuda} and their backward operators. Compiled into both libraries,
// with LSGM_CUDA defined in the CUDA one. The schemas are defined in Python (lsgm_fast/ops/residual_add.py).
#include "common/stable.h"
#include "residual_add/residual_add.h"

namespace lsgm {
namespace residual_add {
namespace {

void launch(const Problem& p, const Tensor& x) {
#if defined(LSGM_CUDA)
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  cuda::run(p, current_stream(x));
#else
  (void)x;
  torch::stable::parallel_for(0, cpu::segments(p).count, cpu::grain(p),
      [&p](int64_t begin, int64_t end) { cpu::run(p, begin, end); });
#endif
}

Tensor run(const Tensor& x, const Tensor* h, double scale, const char* name) {
  Problem p{};
  p.dtype = dtype_of(x, name);
  p.count = x.numel();
  p.scale = scale;
  p.scale32 = static_cast<float>(scale);
  Tensor out = torch::stable::empty_like(x);
  if (p.count == 0) return out;
  // Element by element the order does not matter, as long as the memory is dense and the order is one.
  const bool dense =
      x.is_contiguous() || order_of(x.dim(), x.sizes().data(), x.strides().data()) != Order::unsupported;
  STD_TORCH_CHECK(dense && (h == nullptr || same_strides(*h, x)), name, " has strides ", strides_of(x),
      h == nullptr ? "" : " and h ", h == nullptr ? "" : strides_of(*h),
      ": expected contiguous or channels_last, one for all");
  p.x = x.const_data_ptr();
  if (h != nullptr) p.h = h->const_data_ptr();
  p.out = out.mutable_data_ptr();
  launch(p, x);
  return out;
}

Tensor forward(const Tensor& x, const Tensor& h, double scale) {
  STD_TORCH_CHECK(same_shape(x, h), "x has shape ", shape_of(x), " and h ", shape_of(h), ": expected the same");
  STD_TORCH_CHECK(same_device(x, h), "x and h must be on one device");
  STD_TORCH_CHECK(x.scalar_type() == h.scalar_type(), "x has dtype ", torch::headeronly::toString(x.scalar_type()),
      " and h ", torch::headeronly::toString(h.scalar_type()), ": expected the same");
  return run(x, &h, scale, "x");
}

Tensor backward(const Tensor& grad, double scale) { return run(grad, nullptr, scale, "grad"); }

}  // namespace
}  // namespace residual_add
}  // namespace lsgm

#if defined(LSGM_CUDA)
STABLE_TORCH_LIBRARY_IMPL(lsgm_fast, CUDA, m) {
  m.impl("residual_add_cuda", TORCH_BOX(&lsgm::residual_add::forward));
  m.impl("residual_add_cuda_backward", TORCH_BOX(&lsgm::residual_add::backward));
}
#else
STABLE_TORCH_LIBRARY_IMPL(lsgm_fast, CPU, m) {
  m.impl("residual_add_cpu", TORCH_BOX(&lsgm::residual_add::forward));
  m.impl("residual_add_cpu_backward", TORCH_BOX(&lsgm::residual_add::backward));
}
#endif
