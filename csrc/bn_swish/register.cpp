// Binds bn_swish to lsgm_fast::bn_swish_cpu and its backward operator. The schemas are defined in Python
// (lsgm_fast/ops/bn_swish.py). There is no CUDA kernel.
#if !defined(LSGM_CUDA)
#include <tuple>
#include <vector>

#include "bn_swish/bn_swish.h"
#include "common/channelwise_stable.h"

namespace lsgm {
namespace bn_swish {
namespace {

const float* per_channel(const Tensor& t, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == x.size(1) && t.scalar_type() == ScalarType::Float && same_device(t, x) &&
                      t.is_contiguous(),
      name, " has shape ", shape_of(t), " and dtype ", torch::headeronly::toString(t.scalar_type()), ": expected (",
      x.size(1), ",) and float32, contiguous, on the device of x");
  return static_cast<const float*>(t.const_data_ptr());
}

Problem describe(const Tensor& x, const Tensor& weight, const Tensor& bias, bool batch_stats, bool swish) {
  STD_TORCH_CHECK(x.dim() == 4, "x has shape ", shape_of(x), ": expected (N, C, H, W)");
  Problem p{};
  p.batch = x.size(0);
  p.channels = x.size(1);
  p.spatial = x.size(2) * x.size(3);
  p.dtype = dtype_of(x, "x");
  STD_TORCH_CHECK(p.dtype != DType::float64, "x has dtype float64: expected float32, float16 or bfloat16");
  p.batch_stats = batch_stats;
  p.swish = swish;
  p.weight = per_channel(weight, "weight", x);
  p.bias = per_channel(bias, "bias", x);
  if (elements(p) == 0) return p;
  p.order = order_of(x.dim(), x.sizes().data(), x.strides().data());
  STD_TORCH_CHECK(p.order != Order::unsupported,
      "x has strides ", strides_of(x), ": expected contiguous or channels_last");
  p.x = x.const_data_ptr();
  cpu::plan(p);
  return p;
}

void in_threads(const Problem& p, void (*kernel)(const Problem&, int64_t, int64_t)) {
  torch::stable::parallel_for(
      0, p.chunks.count, cpu::grain(p), [&p, kernel](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

// f(channel) for all channels, in threads.
template <class F>
void channels_in_threads(const Problem& p, F&& f) {
  const int64_t grain = ceil_div(cpu::grain(p), p.chunks.per_channel);
  torch::stable::parallel_for(0, p.channels, grain, [&f](int64_t begin, int64_t end) {
    for (int64_t channel = begin; channel < end; ++channel) f(channel);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const Tensor& bias,
    const Tensor& running_mean, const Tensor& running_var, bool batch_stats, double eps, bool swish) {
  Problem p = describe(x, weight, bias, batch_stats, swish);
  p.eps = eps;
  p.running_mean = per_channel(running_mean, "running_mean", x);
  p.running_var = per_channel(running_var, "running_var", x);
  Tensor y = torch::stable::empty_like(x);
  Tensor mean = torch::stable::empty_like(weight);
  Tensor var = torch::stable::empty_like(weight);
  Tensor rstd = torch::stable::empty_like(weight);
  STD_TORCH_CHECK(!batch_stats || p.batch * p.spatial > 1, "x has shape ", shape_of(x),
      ": statistics of the batch need more than one element per channel");
  p.mean = static_cast<float*>(mean.mutable_data_ptr());
  p.var = static_cast<float*>(var.mutable_data_ptr());
  p.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  channelwise::Table table((kTableRows * p.channels + 1) / 2);
  p.table = reinterpret_cast<float*>(table.data());
  if (elements(p) == 0) {
    cpu::normalise(p, 0, p.channels);
    return {y, mean, var, rstd};
  }
  p.y = y.mutable_data_ptr();
  if (!batch_stats) {
    cpu::normalise(p, 0, p.channels);
    in_threads(p, &cpu::apply);
    return {y, mean, var, rstd};
  }
  channelwise::Table partials(partial_count(p));
  p.partials = partials.data();
  std::vector<Moments> moments(static_cast<size_t>(p.channels));
  p.moments = moments.data();
  if (cpu::by_channel(p)) {
    channels_in_threads(p, [&p](int64_t channel) {
      const int64_t begin = channel * p.chunks.per_channel, end = begin + p.chunks.per_channel;
      cpu::statistics(p, begin, end);
      cpu::combine_moments(p, channel, channel + 1);
      cpu::normalise(p, channel, channel + 1);
      cpu::apply(p, begin, end);
    });
  } else {
    in_threads(p, &cpu::statistics);
    cpu::combine_moments(p, 0, p.channels);
    cpu::normalise(p, 0, p.channels);
    in_threads(p, &cpu::apply);
  }
  return {y, mean, var, rstd};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
    const Tensor& bias, const Tensor& mean, const Tensor& rstd, bool batch_stats, bool swish) {
  Problem p = describe(x, weight, bias, batch_stats, swish);
  STD_TORCH_CHECK(same_shape(grad, x) && grad.scalar_type() == x.scalar_type() && same_device(grad, x),
      "grad has shape ", shape_of(grad), " and dtype ", torch::headeronly::toString(grad.scalar_type()),
      ": expected those of x, ", shape_of(x), " and ", torch::headeronly::toString(x.scalar_type()),
      ", on the same device");
  p.mean = const_cast<float*>(per_channel(mean, "mean", x));
  p.rstd = const_cast<float*>(per_channel(rstd, "rstd", x));
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grad_weight = torch::stable::empty_like(weight);
  Tensor grad_bias = torch::stable::empty_like(bias);
  if (elements(p) == 0) {
    torch::stable::zero_(grad_weight);
    torch::stable::zero_(grad_bias);
    return {grad_x, grad_weight, grad_bias};
  }
  STD_TORCH_CHECK(
      same_strides(grad, x), "grad has strides ", strides_of(grad), ": expected those of x, ", strides_of(x));
  p.grad = grad.const_data_ptr();
  p.grad_x = grad_x.mutable_data_ptr();
  p.grad_weight = static_cast<float*>(grad_weight.mutable_data_ptr());
  p.grad_bias = static_cast<float*>(grad_bias.mutable_data_ptr());
  channelwise::Table table((kTableRows * p.channels + 1) / 2);
  p.table = reinterpret_cast<float*>(table.data());
  channelwise::Table partials(partial_count(p));
  p.partials = partials.data();
  std::vector<Sums> sums(static_cast<size_t>(p.channels));
  p.sums = sums.data();
  cpu::restore(p, 0, p.channels);
  if (!batch_stats) {
    in_threads(p, &cpu::backward_both);
    cpu::combine_sums(p, 0, p.channels);
  } else if (cpu::by_channel(p)) {
    channels_in_threads(p, [&p](int64_t channel) {
      const int64_t begin = channel * p.chunks.per_channel, end = begin + p.chunks.per_channel;
      cpu::backward_reduce(p, begin, end);
      cpu::combine_sums(p, channel, channel + 1);
      cpu::coefficients(p, channel, channel + 1);
      cpu::backward_apply(p, begin, end);
    });
  } else {
    in_threads(p, &cpu::backward_reduce);
    cpu::combine_sums(p, 0, p.channels);
    cpu::coefficients(p, 0, p.channels);
    in_threads(p, &cpu::backward_apply);
  }
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace bn_swish
}  // namespace lsgm

STABLE_TORCH_LIBRARY_IMPL(lsgm_fast, CPU, m) {
  m.impl("bn_swish_cpu", TORCH_BOX(&lsgm::bn_swish::forward));
  m.impl("bn_swish_cpu_backward", TORCH_BOX(&lsgm::bn_swish::backward));
}
#endif
