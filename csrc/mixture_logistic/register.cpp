// Binds mixture_logistic to lsgm_fast::mixture_logistic_log_prob_cpu with its backward operator, and
// lsgm_fast::mixture_logistic_mean_cpu. The schemas are defined in Python (lsgm_fast/ops/mixture_logistic.py). There is
// no CUDA kernel.
#if !defined(LSGM_CUDA)
#include <tuple>

#include "common/stable.h"
#include "mixture_logistic/mixture_logistic.h"

namespace lsgm {
namespace mixture_logistic {
namespace {

Order dense_order(const Tensor& t, const char* name) {
  const Order order = order_of(t.dim(), t.sizes().data(), t.strides().data());
  STD_TORCH_CHECK(order != Order::unsupported, name, " has strides ", strides_of(t),
      ": expected contiguous or channels_last");
  return order;
}

Problem describe(const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 4 && logits.size(1) > 0 && logits.size(1) % 10 == 0, "logits have shape ",
      shape_of(logits), ": expected (N, 10 K, H, W)");
  Problem p{};
  p.batch = logits.size(0);
  p.mixtures = logits.size(1) / 10;
  p.spatial = logits.size(2) * logits.size(3);
  p.dtype = dtype_of(logits, "logits");
  STD_TORCH_CHECK(p.dtype != DType::float64, "logits have dtype float64: expected float32, float16 or bfloat16");
  if (logits.numel() > 0) p.order = dense_order(logits, "logits");
  p.logits = logits.const_data_ptr();
  return p;
}

// (..., N, H, W)
const float* per_pixel(const Tensor& t, const char* name, const Tensor& logits, int64_t dims) {
  STD_TORCH_CHECK(t.dim() == dims && (dims == 3 || t.size(0) == 2) && t.size(dims - 3) == logits.size(0) &&
                      t.size(dims - 2) == logits.size(2) && t.size(dims - 1) == logits.size(3) &&
                      t.scalar_type() == ScalarType::Float && t.is_contiguous() && same_device(t, logits),
      name, " has shape ", shape_of(t), ", strides ", strides_of(t), " and dtype ",
      torch::headeronly::toString(t.scalar_type()), ": expected ", dims == 3 ? "(" : "(2, ", logits.size(0), ", ",
      logits.size(2), ", ", logits.size(3), ") and float32, contiguous, on the logits' device");
  return static_cast<const float*>(t.const_data_ptr());
}

Problem describe(const Tensor& x, const Tensor& logits, int64_t num_bits) {
  Problem p = describe(logits);
  STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == logits.size(0) && x.size(1) == kColours &&
                      x.size(2) == logits.size(2) && x.size(3) == logits.size(3) &&
                      x.scalar_type() == ScalarType::Float && same_device(x, logits),
      "x has shape ", shape_of(x), " and dtype ", torch::headeronly::toString(x.scalar_type()), ": expected (", p.batch,
      ", 3, ", logits.size(2), ", ", logits.size(3), ") and float32, on the logits' device");
  STD_TORCH_CHECK(num_bits >= 5 && num_bits <= 8, "num_bits is ", num_bits, ": expected 5 to 8");
  p.levels = (int64_t{1} << num_bits) - 1;
  if (x.numel() > 0) p.x_order = dense_order(x, "x");
  p.x = static_cast<const float*>(x.const_data_ptr());
  return p;
}

void run(Problem& p, void (*kernel)(const Problem&, int64_t, int64_t)) {
  if (p.batch * p.spatial == 0) return;
  cpu::plan(p);
  torch::stable::parallel_for(
      0, p.segments.count, cpu::grain(p), [&p, kernel](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

std::tuple<Tensor, Tensor> log_prob(const Tensor& x, const Tensor& logits, int64_t num_bits) {
  Problem p = describe(x, logits, num_bits);
  Tensor result = torch::stable::new_empty(x, {p.batch, logits.size(2), logits.size(3)});
  Tensor parts = torch::stable::new_empty(x, {2, p.batch, logits.size(2), logits.size(3)});
  p.log_prob = static_cast<float*>(result.mutable_data_ptr());
  p.parts = static_cast<float*>(parts.mutable_data_ptr());
  run(p, &cpu::log_prob);
  return {result, parts};
}

Tensor log_prob_backward(
    const Tensor& grad, const Tensor& x, const Tensor& logits, const Tensor& parts, int64_t num_bits) {
  Problem p = describe(x, logits, num_bits);
  p.grad = per_pixel(grad, "grad", logits, 3);
  p.parts = const_cast<float*>(per_pixel(parts, "parts", logits, 4));
  Tensor result = torch::stable::empty_like(logits);
  p.grad_logits = result.mutable_data_ptr();
  run(p, &cpu::log_prob_backward);
  return result;
}

Tensor mean(const Tensor& logits, bool widen) {
  Problem p = describe(logits);
  const ScalarType type = widen ? ScalarType::Float : logits.scalar_type();
  Tensor result = torch::stable::new_empty(logits, {p.batch, kColours, logits.size(2), logits.size(3)}, type);
  p.mean_dtype = widen ? DType::float32 : p.dtype;
  p.mean = result.mutable_data_ptr();
  run(p, &cpu::mean);
  return result;
}

}  // namespace
}  // namespace mixture_logistic
}  // namespace lsgm

STABLE_TORCH_LIBRARY_IMPL(lsgm_fast, CPU, m) {
  m.impl("mixture_logistic_log_prob_cpu", TORCH_BOX(&lsgm::mixture_logistic::log_prob));
  m.impl("mixture_logistic_log_prob_cpu_backward", TORCH_BOX(&lsgm::mixture_logistic::log_prob_backward));
  m.impl("mixture_logistic_mean_cpu", TORCH_BOX(&lsgm::mixture_logistic::mean));
}
#endif
