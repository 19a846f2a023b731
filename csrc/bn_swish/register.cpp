// Binds bn_swish to lsgm_fast::bn_swish_{cpu,cuda} and their backward operators. Compiled into both libraries, with
// LSGM_CUDA defined in the CUDA one. The schemas are defined in Python (lsgm_fast/ops/bn_swish.py).
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
  return p;
}

#if defined(LSGM_CUDA)

// `launch` with a plan and memory for partial results, which comes from PyTorch's allocator, so that a CUDA graph can
// own it.
void run(Problem& p, const Tensor& x, void (*launch)(const Problem&, void*)) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  cuda::plan(p);
  const Tensor partials = torch::stable::new_empty(x, {partial_count(p)}, ScalarType::Double);
  p.partials = static_cast<double*>(partials.mutable_data_ptr());
  launch(p, current_stream(x));
}

void run_forward(Problem& p, const Tensor& x) { run(p, x, &cuda::forward); }
void run_backward(Problem& p, const Tensor& x) { run(p, x, &cuda::backward); }

#else

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

void run_forward(Problem& p, const Tensor&) {
  if (elements(p) == 0) {
    for (int64_t channel = 0; channel < p.channels; ++channel) store_running(p, channel);
    return;
  }
  cpu::plan(p);
  channelwise::Table table((kTableRows * p.channels + 1) / 2);
  p.table = reinterpret_cast<float*>(table.data());
  if (!p.batch_stats) {
    cpu::normalise(p, 0, p.channels);
    in_threads(p, &cpu::apply);
    return;
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
}

void run_backward(Problem& p, const Tensor&) {
  cpu::plan(p);
  channelwise::Table table((kTableRows * p.channels + 1) / 2);
  p.table = reinterpret_cast<float*>(table.data());
  channelwise::Table partials(partial_count(p));
  p.partials = partials.data();
  std::vector<Sums> sums(static_cast<size_t>(p.channels));
  p.sums = sums.data();
  cpu::restore(p, 0, p.channels);
  if (!p.batch_stats) {
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
}

#endif

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
  p.y = y.mutable_data_ptr();
  if (p.channels > 0) run_forward(p, x);
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
  run_backward(p, x);
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace bn_swish
}  // namespace lsgm

#if defined(LSGM_CUDA)
STABLE_TORCH_LIBRARY_IMPL(lsgm_fast, CUDA, m) {
  m.impl("bn_swish_cuda", TORCH_BOX(&lsgm::bn_swish::forward));
  m.impl("bn_swish_cuda_backward", TORCH_BOX(&lsgm::bn_swish::backward));
}
#else
STABLE_TORCH_LIBRARY_IMPL(lsgm_fast, CPU, m) {
  m.impl("bn_swish_cpu", TORCH_BOX(&lsgm::bn_swish::forward));
  m.impl("bn_swish_cpu_backward", TORCH_BOX(&lsgm::bn_swish::backward));
}
#endif
