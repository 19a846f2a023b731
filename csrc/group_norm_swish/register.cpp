// Binds the operators of GroupNorm to lsgm_fast::group_norm_swish_{cpu,cuda}, group_norm_swish_residual_{cpu,cuda} and
// group_norm_swish_affine_{cpu,cuda}, and the backward operators of the first two. Compiled into both libraries, with
// LSGM_CUDA defined in the CUDA one. The schemas are defined in Python (lsgm_fast/ops/group_norm_swish.py).
#include <initializer_list>
#include <memory>
#include <optional>
#include <tuple>

#include "common/channelwise_stable.h"
#include "group_norm_swish/group_norm_swish.h"
#if defined(LSGM_CUDA)
#include "group_norm_swish/device.h"
#endif

namespace lsgm {
namespace group_norm_swish {
namespace {

void check_dense(const Tensor& t, const char* name, const Tensor& x, const char* shape, bool matches) {
  STD_TORCH_CHECK(matches && t.scalar_type() == ScalarType::Float && same_device(t, x) && t.is_contiguous(), name,
      " has shape ", shape_of(t), " and dtype ", torch::headeronly::toString(t.scalar_type()), ": expected ", shape,
      " and float32, contiguous, on the device of x, ", shape_of(x));
}

const float* per_channel(const Tensor& t, const char* name, const Tensor& x) {
  check_dense(t, name, x, "(C,)", t.dim() == 1 && t.size(0) == x.size(1));
  return static_cast<const float*>(t.const_data_ptr());
}

// One number per sample and channel, or group.
const float* per_sample(const Tensor& t, const char* name, const Tensor& x, const char* shape, int64_t columns) {
  check_dense(t, name, x, shape, t.dim() == 2 && t.size(0) == x.size(0) && t.size(1) == columns);
  return static_cast<const float*>(t.const_data_ptr());
}

// Of the type, shape and memory of x.
const void* like(const Tensor& t, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(same_shape(t, x) && t.scalar_type() == x.scalar_type() && same_device(t, x) && same_strides(t, x),
      name, " has shape ", shape_of(t), ", strides ", strides_of(t), " and dtype ",
      torch::headeronly::toString(t.scalar_type()), ": expected those of x, ", shape_of(x), ", ", strides_of(x),
      " and ", torch::headeronly::toString(x.scalar_type()), ", on the same device");
  return t.const_data_ptr();
}

Problem describe(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups, bool swish) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) > 0 && x.size(2) * x.size(3) > 0, "x has shape ", shape_of(x),
      ": expected (N, C, H, W) with samples that are not empty");
  STD_TORCH_CHECK(groups > 0 && x.size(1) % groups == 0, "groups is ", groups, ": expected a divisor of the ",
      x.size(1), " channels");
  Problem p{};
  p.batch = x.size(0);
  p.channels = x.size(1);
  p.spatial = x.size(2) * x.size(3);
  p.groups = groups;
  p.dtype = dtype_of(x, "x");
  STD_TORCH_CHECK(p.dtype != DType::float64, "x has dtype float64: expected float32, float16 or bfloat16");
  p.swish = swish;
  p.scale = 1;
  p.weight = per_channel(weight, "weight", x);
  p.bias = per_channel(bias, "bias", x);
  if (p.batch == 0) return p;
  p.order = order_of(x.dim(), x.sizes().data(), x.strides().data());
  STD_TORCH_CHECK(p.order != Order::unsupported,
      "x has strides ", strides_of(x), ": expected contiguous or channels_last");
  p.x = x.const_data_ptr();
  p.v = const_cast<void*>(p.x);
  return p;
}

Tensor new_floats(const Tensor& x, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(x, sizes, ScalarType::Float);
}

float* data_of(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

#if defined(LSGM_CUDA)

cuda::Call call_of(const Problem& p) {
  cuda::Call c{};
  c.order = p.order;
  c.batch = p.batch;
  c.channels = p.channels;
  c.spatial = p.spatial;
  c.groups = p.groups;
  c.dtype = p.dtype;
  c.swish = p.swish;
  c.eps = p.eps;
  c.scale = static_cast<double>(p.scale);
  c.channel_bias = p.channel_bias;
  c.weight = p.weight;
  c.bias = p.bias;
  c.mean = p.mean;
  c.rstd = p.rstd;
  return c;
}

// `launch` with a plan and memory for partial results, which comes from PyTorch's allocator, so that a CUDA graph can
// own it.
void run(cuda::Call& c, const Tensor& x, int64_t (*sum_count)(const cuda::Call&),
    void (*launch)(const cuda::Call&, void*)) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  cuda::plan(c);
  const Tensor partials = torch::stable::new_empty(x, {cuda::partial_count(c)}, ScalarType::Double);
  Tensor sums = new_floats(x, {sum_count(c)});
  c.partials = static_cast<double*>(partials.mutable_data_ptr());
  c.sums = data_of(sums);
  launch(c, current_stream(x));
}

void run_forward(Problem& p, const Tensor& x) {
  if (p.batch == 0) return;
  cuda::Call c = call_of(p);
  c.x = p.x;
  c.residual = p.residual;
  c.v = p.residual == nullptr ? nullptr : p.v;
  c.y = p.y;
  c.factor = p.factor;
  c.shift = p.shift;
  run(c, x, [](const cuda::Call&) { return int64_t{0}; }, &cuda::forward);
}

void run_backward(Problem& p, const Tensor& x) {
  cuda::Call c = call_of(p);
  c.x = p.v;
  c.grad = p.grad;
  c.grad_v = p.grad_v;
  c.grad_x = p.grad_x;
  c.grad_weight = p.grad_weight;
  c.grad_bias = p.grad_bias;
  c.grad_channel = p.grad_channel_bias;
  run(c, x, &cuda::sum_count, &cuda::backward);
}

#else

void in_threads(const Problem& p, int64_t count, void (*kernel)(const Problem&, int64_t, int64_t, double*)) {
  const int64_t size = cpu::scratch_size(p);
  torch::stable::parallel_for(0, count, cpu::grain(p), [&p, size, kernel](int64_t begin, int64_t end) {
    channelwise::Table scratch(size);
    kernel(p, begin, end, scratch.data());
  });
}

void run_forward(Problem& p, const Tensor&) {
  if (p.batch == 0) return;
  cpu::plan(p, false);
  channelwise::Table moments(2 * cpu::moment_count(p));
  p.moments = reinterpret_cast<Moments*>(moments.data());
  if (p.units.pieces == 1) {
    in_threads(p, p.units.count, &cpu::forward);
    return;
  }
  in_threads(p, p.units.count * p.units.pieces, &cpu::statistics);
  cpu::combine(p);
  in_threads(p, p.units.count * p.units.pieces, &cpu::apply);
}

void run_backward(Problem& p, const Tensor&) {
  cpu::plan(p, true);
  const std::unique_ptr<double[]> sums(new double[static_cast<size_t>(cpu::sum_count(p))]);  // not set to 0
  p.sums = sums.get();
  if (p.units.pieces == 1) {
    in_threads(p, p.units.count, &cpu::backward);
  } else {
    in_threads(p, p.units.count * p.units.pieces, &cpu::backward_reduce);
    cpu::combine_sums(p);
    in_threads(p, p.units.count * p.units.pieces, &cpu::backward_apply);
  }
  cpu::finish(p);
}

#endif

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const Tensor& bias,
    const std::optional<Tensor>& channel_bias, int64_t groups, double eps, bool swish) {
  Problem p = describe(x, weight, bias, groups, swish);
  p.eps = eps;
  if (channel_bias) p.channel_bias = per_sample(*channel_bias, "channel_bias", x, "(N, C)", p.channels);
  Tensor y = torch::stable::empty_like(x);
  Tensor mean = new_floats(x, {p.batch, p.groups}), rstd = new_floats(x, {p.batch, p.groups});
  p.y = y.mutable_data_ptr();
  p.mean = data_of(mean);
  p.rstd = data_of(rstd);
  run_forward(p, x);
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_forward(const Tensor& x, const Tensor& residual,
    const Tensor& weight, const Tensor& bias, int64_t groups, double scale, double eps, bool swish) {
  Problem p = describe(x, weight, bias, groups, swish);
  p.eps = eps;
  p.scale = static_cast<float>(scale);
  Tensor v = torch::stable::empty_like(x), y = torch::stable::empty_like(x);
  Tensor mean = new_floats(x, {p.batch, p.groups}), rstd = new_floats(x, {p.batch, p.groups});
  p.residual = like(residual, "residual", x);
  p.v = v.mutable_data_ptr();
  p.y = y.mutable_data_ptr();
  p.mean = data_of(mean);
  p.rstd = data_of(rstd);
  run_forward(p, x);
  return {v, y, mean, rstd};
}

std::tuple<Tensor, Tensor> affine(
    const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups, double eps) {
  Problem p = describe(x, weight, bias, groups, false);
  p.eps = eps;
  Tensor factor = new_floats(x, {p.batch, p.channels}), shift = new_floats(x, {p.batch, p.channels});
  p.factor = data_of(factor);
  p.shift = data_of(shift);
  run_forward(p, x);
  return {factor, shift};
}

// Backward of either operator, whose normalised tensor is p.v; the results without the gradient of a channel bias.
std::tuple<Tensor, Tensor, Tensor> gradients(
    Problem& p, const Tensor& grad, const Tensor& v, const Tensor& weight, const Tensor& mean, const Tensor& rstd) {
  p.mean = const_cast<float*>(per_sample(mean, "mean", v, "(N, groups)", p.groups));
  p.rstd = const_cast<float*>(per_sample(rstd, "rstd", v, "(N, groups)", p.groups));
  Tensor grad_x = torch::stable::empty_like(v);
  Tensor grad_weight = torch::stable::empty_like(weight), grad_bias = torch::stable::empty_like(weight);
  if (p.batch == 0) {
    torch::stable::zero_(grad_weight);
    torch::stable::zero_(grad_bias);
    return {grad_x, grad_weight, grad_bias};
  }
  p.grad = like(grad, "grad", v);
  p.grad_x = grad_x.mutable_data_ptr();
  p.grad_weight = data_of(grad_weight);
  p.grad_bias = data_of(grad_bias);
  run_backward(p, v);
  return {grad_x, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
    const Tensor& bias, const std::optional<Tensor>& channel_bias, const Tensor& mean, const Tensor& rstd,
    int64_t groups, bool swish) {
  Problem p = describe(x, weight, bias, groups, swish);
  Tensor grad_channel = channel_bias ? torch::stable::empty_like(*channel_bias) : new_floats(x, {0});
  if (channel_bias) {
    p.channel_bias = per_sample(*channel_bias, "channel_bias", x, "(N, C)", p.channels);
    p.grad_channel_bias = data_of(grad_channel);
  }
  const auto [grad_x, grad_weight, grad_bias] = gradients(p, grad, x, weight, mean, rstd);
  return {grad_x, grad_weight, grad_bias, grad_channel};
}

std::tuple<Tensor, Tensor, Tensor> residual_backward(const std::optional<Tensor>& grad_v, const Tensor& grad,
    const Tensor& v, const Tensor& weight, const Tensor& bias, const Tensor& mean, const Tensor& rstd, int64_t groups,
    double scale, bool swish) {
  Problem p = describe(v, weight, bias, groups, swish);
  p.scale = static_cast<float>(scale);
  if (grad_v) p.grad_v = like(*grad_v, "grad_v", v);
  return gradients(p, grad, v, weight, mean, rstd);
}

}  // namespace
}  // namespace group_norm_swish
}  // namespace lsgm

#if defined(LSGM_CUDA)
STABLE_TORCH_LIBRARY_IMPL(lsgm_fast, CUDA, m) {
  m.impl("group_norm_swish_cuda", TORCH_BOX(&lsgm::group_norm_swish::forward));
  m.impl("group_norm_swish_cuda_backward", TORCH_BOX(&lsgm::group_norm_swish::backward));
  m.impl("group_norm_swish_residual_cuda", TORCH_BOX(&lsgm::group_norm_swish::residual_forward));
  m.impl("group_norm_swish_residual_cuda_backward", TORCH_BOX(&lsgm::group_norm_swish::residual_backward));
  m.impl("group_norm_swish_affine_cuda", TORCH_BOX(&lsgm::group_norm_swish::affine));
}
#else
STABLE_TORCH_LIBRARY_IMPL(lsgm_fast, CPU, m) {
  m.impl("group_norm_swish_cpu", TORCH_BOX(&lsgm::group_norm_swish::forward));
  m.impl("group_norm_swish_cpu_backward", TORCH_BOX(&lsgm::group_norm_swish::backward));
  m.impl("group_norm_swish_residual_cpu", TORCH_BOX(&lsgm::group_norm_swish::residual_forward));
  m.impl("group_norm_swish_residual_cpu_backward", TORCH_BOX(&lsgm::group_norm_swish::residual_backward));
  m.impl("group_norm_swish_affine_cpu", TORCH_BOX(&lsgm::group_norm_swish::affine));
}
#endif
