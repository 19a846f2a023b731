// Binds score_matching_loss to lsgm_fast::score_matching_loss_cpu and its backward operator. The schemas are defined in
// Python (lsgm_fast/ops/score_matching_loss.py). There is no CUDA kernel.
#if !defined(LSGM_CUDA)
#include <optional>
#include <tuple>
#include <vector>

#include "common/stable.h"
#include "score_matching_loss/score_matching_loss.h"

namespace lsgm {
namespace score_matching_loss {
namespace {

Problem describe(
    const Tensor& pred, const Tensor& noise, const Tensor& weight_p, const std::optional<Tensor>& weight_q) {
  STD_TORCH_CHECK(pred.dim() >= 2, "pred has shape ", shape_of(pred), ": expected (B, C, ...)");
  STD_TORCH_CHECK(same_shape(pred, noise), "pred has shape ", shape_of(pred), " and noise ", shape_of(noise),
      ": expected the same");
  STD_TORCH_CHECK(same_device(pred, noise), "pred and noise must be on one device");
  Problem p{};
  p.batch = pred.size(0);
  p.size = p.batch == 0 ? 0 : pred.numel() / p.batch;
  p.pred_dtype = dtype_of(pred, "pred");
  p.noise_dtype = dtype_of(noise, "noise");
  p.weight_p = sample_scalars(weight_p, "weight_p", pred);
  if (weight_q.has_value()) p.weight_q = sample_scalars(*weight_q, "weight_q", pred);
  if (elements(p) == 0) return p;
  // A sample is a run in memory, in whatever order: of a dense tensor.
  const bool dense = pred.is_contiguous() ||
                     order_of(pred.dim(), pred.sizes().data(), pred.strides().data()) != Order::unsupported;
  STD_TORCH_CHECK(dense && same_strides(pred, noise), "pred has strides ", strides_of(pred), " and noise ",
      strides_of(noise), ": expected both contiguous or both channels_last");
  p.pred = pred.const_data_ptr();
  p.noise = noise.const_data_ptr();
  cpu::plan(p);
  return p;
}

ScalarType arithmetic(const Problem& p) { return computes_in_double(p) ? ScalarType::Double : ScalarType::Float; }

std::tuple<Tensor, Tensor> forward(const Tensor& pred, const Tensor& noise, const Tensor& weight_p,
    const std::optional<Tensor>& weight_q, double constant) {
  Problem p = describe(pred, noise, weight_p, weight_q);
  Tensor p_loss = torch::stable::new_empty(pred, {p.batch}, arithmetic(p));
  Tensor cross_entropy = weight_q.has_value() ? empty_like(pred, arithmetic(p))
                                              : torch::stable::new_empty(pred, {0}, arithmetic(p));
  if (elements(p) == 0) {
    torch::stable::zero_(p_loss);
    return {p_loss, cross_entropy};
  }
  p.constant = constant;
  p.p_loss = p_loss.mutable_data_ptr();
  if (weight_q.has_value()) p.cross_entropy = cross_entropy.mutable_data_ptr();

  constexpr int64_t kFew = 256;
  double few[kFew];
  std::vector<double> many;
  if (p.segments.count > kFew) many.resize(static_cast<size_t>(p.segments.count));
  p.partials = many.empty() ? few : many.data();
  torch::stable::parallel_for(
      0, p.segments.count, cpu::grain(p), [&p](int64_t begin, int64_t end) { cpu::forward(p, begin, end); });
  cpu::finish(p);
  return {p_loss, cross_entropy};
}

std::tuple<Tensor, Tensor> backward(const std::optional<Tensor>& grad_p, const std::optional<Tensor>& grad_ce,
    const Tensor& pred, const Tensor& noise, const Tensor& weight_p, const std::optional<Tensor>& weight_q,
    bool for_pred, bool for_noise) {
  Problem p = describe(pred, noise, weight_p, weight_q);
  Tensor grad_pred = for_pred ? torch::stable::empty_like(pred) : torch::stable::new_empty(pred, {0});
  Tensor grad_noise = for_noise ? torch::stable::empty_like(noise) : torch::stable::new_empty(noise, {0});
  if (grad_p.has_value()) p.grad_p = sample_scalars(*grad_p, "grad_p", pred);
  if (grad_ce.has_value()) {
    STD_TORCH_CHECK(weight_q.has_value(), "a gradient of the cross entropy needs weight_q");
    if (grad_ce->dim() < 2) {
      p.sample_grad_ce = sample_scalars(*grad_ce, "grad_ce", pred);
    } else {
      STD_TORCH_CHECK(same_shape(*grad_ce, pred) && same_device(*grad_ce, pred) &&
                          grad_ce->scalar_type() == arithmetic(p) &&
                          (elements(p) == 0 || same_strides(*grad_ce, pred)),
          "grad_ce has shape ", shape_of(*grad_ce), ", strides ", strides_of(*grad_ce), " and dtype ",
          torch::headeronly::toString(grad_ce->scalar_type()), ": expected (B,) or pred's ", shape_of(pred),
          " with strides ", strides_of(pred), ", ", torch::headeronly::toString(arithmetic(p)), ", on pred's device");
      p.grad_ce = grad_ce->const_data_ptr();
    }
  }
  if (elements(p) == 0) return {grad_pred, grad_noise};
  if (for_pred) p.grad_pred = grad_pred.mutable_data_ptr();
  if (for_noise) p.grad_noise = grad_noise.mutable_data_ptr();
  torch::stable::parallel_for(
      0, p.segments.count, cpu::grain(p), [&p](int64_t begin, int64_t end) { cpu::backward(p, begin, end); });
  return {grad_pred, grad_noise};
}

}  // namespace
}  // namespace score_matching_loss
}  // namespace lsgm

STABLE_TORCH_LIBRARY_IMPL(lsgm_fast, CPU, m) {
  m.impl("score_matching_loss_cpu", TORCH_BOX(&lsgm::score_matching_loss::forward));
  m.impl("score_matching_loss_cpu_backward", TORCH_BOX(&lsgm::score_matching_loss::backward));
}
#endif
