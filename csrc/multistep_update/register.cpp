// Binds multistep_update to lsgm_fast::multistep_update_{cpu,cuda}. Compiled into both libraries, with LSGM_CUDA
// defined in the CUDA one. The schema is defined in Python (lsgm_fast/ops/multistep_update.py).
#include <vector>

#include "common/stable.h"
#include "multistep_update/multistep_update.h"

namespace lsgm {
namespace multistep_update {
namespace {

// The factor of a coefficient: (), (1,), (B,) or (1 or B, 1 or C, 1, ...).
void describe_factor(const Tensor& factor, const Tensor& y, Coefficient& c) {
  STD_TORCH_CHECK(same_device(factor, y), "a factor and y must be on one device");
  c.dtype = dtype_of(factor, "a factor");
  bool right = c.dtype == DType::float32 || c.dtype == DType::float64;
  if (factor.dim() == 1) {
    right = right && (factor.numel() == 1 || factor.numel() == y.size(0));
  } else if (factor.dim() > 1) {
    right = right && factor.dim() == y.dim();
    for (int64_t d = 0; right && d < factor.dim(); ++d) {
      right = factor.size(d) == 1 || (d < 2 && factor.size(d) == y.size(d));
    }
  }
  STD_TORCH_CHECK(right, "a factor has shape ", shape_of(factor), " and dtype ",
      torch::headeronly::toString(factor.scalar_type()), ": expected float32 or float64 of shape () or (", y.size(0),
      ",) or (1, ", y.size(1), ", 1, ...)");
  c.factor = factor.const_data_ptr();
  c.sample_stride = factor.dim() > 0 && factor.size(0) > 1 ? factor.stride(0) : 0;
  c.channel_stride = factor.dim() > 1 && factor.size(1) > 1 ? factor.stride(1) : 0;
}

Problem describe(const Tensor& y, const std::vector<Tensor>& history, const std::vector<double>& scales,
    const std::vector<Tensor>& factors, const std::vector<int64_t>& which) {
  STD_TORCH_CHECK(y.dim() >= 2, "y has shape ", shape_of(y), ": expected (B, C, ...)");
  STD_TORCH_CHECK(history.size() < kMaxTerms, "history has ", history.size(), " entries: expected at most ",
      kMaxTerms - 1);
  STD_TORCH_CHECK(scales.size() == history.size() + 1 && which.size() == scales.size(), "history has ", history.size(),
      " entries, scales ", scales.size(), " and which ", which.size(), ": expected one more than history");
  Problem p{};
  p.batch = y.size(0);
  p.channels = y.size(1);
  p.spatial = 1;
  for (int64_t d = 2; d < y.dim(); ++d) p.spatial *= y.size(d);
  p.terms = static_cast<int>(scales.size());
  p.y_dtype = dtype_of(y, "y");
  p.h_dtype = history.empty() ? p.y_dtype : dtype_of(history[0], "history[0]");
  for (size_t i = 0; i < history.size(); ++i) {
    const Tensor& entry = history[i];
    STD_TORCH_CHECK(same_shape(entry, y), "history[", i, "] has shape ", shape_of(entry), " and y ", shape_of(y),
        ": expected the same");
    STD_TORCH_CHECK(same_device(entry, y), "history[", i, "] and y must be on one device");
    STD_TORCH_CHECK(entry.scalar_type() == history[0].scalar_type(), "history[", i, "] has dtype ",
        torch::headeronly::toString(entry.scalar_type()), " and history[0] ",
        torch::headeronly::toString(history[0].scalar_type()), ": expected the same");
  }
  for (int t = 0; t < p.terms; ++t) {
    const auto i = static_cast<size_t>(t);
    Coefficient& c = p.coefficients[t];
    c.scale = scales[i];
    c.scale32 = static_cast<float>(scales[i]);
    if (which[i] < 0) continue;
    STD_TORCH_CHECK(which[i] < static_cast<int64_t>(factors.size()), "which[", i, "] is ", which[i], ": there are ",
        factors.size(), " factors");
    describe_factor(factors[static_cast<size_t>(which[i])], y, c);
  }
  if (elements(p) == 0) return p;
  p.order = order_of(y.dim(), y.sizes().data(), y.strides().data());
  STD_TORCH_CHECK(p.order != Order::unsupported, "y has shape ", shape_of(y), " and strides ", strides_of(y),
      ": expected contiguous or channels_last");
  p.inputs[0] = y.const_data_ptr();
  for (size_t i = 0; i < history.size(); ++i) {
    STD_TORCH_CHECK(same_strides(history[i], y), "history[", i, "] has strides ", strides_of(history[i]), " and y ",
        strides_of(y), ": expected the same");
    p.inputs[i + 1] = history[i].const_data_ptr();
  }
  return p;
}

#if defined(LSGM_CUDA)

void run(const Problem& p, const Tensor& y) {
  const torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
  cuda::forward(p, current_stream(y));
}

#else

void run(const Problem& p, const Tensor&) {
  const cpu::Plan plan = cpu::plan(p);
  torch::stable::parallel_for(0, plan.segments.count, plan.grain,
      [&p, &plan](int64_t begin, int64_t end) { cpu::forward(p, plan, begin, end); });
}

#endif

Tensor forward(const Tensor& y, const std::vector<Tensor>& history, const std::vector<double>& scales,
    const std::vector<Tensor>& factors, const std::vector<int64_t>& which) {
  Problem p = describe(y, history, scales, factors, which);
  Tensor out = torch::stable::empty_like(y);
  if (elements(p) == 0) return out;
  p.out = out.mutable_data_ptr();
  run(p, y);
  return out;
}

}  // namespace
}  // namespace multistep_update
}  // namespace lsgm

#if defined(LSGM_CUDA)
STABLE_TORCH_LIBRARY_IMPL(lsgm_fast, CUDA, m) {
  m.impl("multistep_update_cuda", TORCH_BOX(&lsgm::multistep_update::forward));
}
#else
STABLE_TORCH_LIBRARY_IMPL(lsgm_fast, CPU, m) {
  m.impl("multistep_update_cpu", TORCH_BOX(&lsgm::multistep_update::forward));
}
#endif
