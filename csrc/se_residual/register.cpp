// Binds se_residual to lsgm_fast::se_residual_{cpu,cuda} and their backward operators. Compiled into both libraries,
// with LSGM_CUDA defined in the CUDA one. The schemas are defined in Python (lsgm_fast/ops/se_residual.py).
#include <tuple>

#include "common/channelwise_stable.h"
#include "se_residual/se_residual.h"

namespace lsgm {
namespace se_residual {
namespace {

const float* parameter(const Tensor& t, const char* name, const Tensor& x, int64_t rows, int64_t columns) {
  const bool vector = columns == 0;
  STD_TORCH_CHECK(t.dim() == (vector ? 1 : 2) && t.size(0) == rows && (vector || t.size(1) == columns) &&
                      t.scalar_type() == ScalarType::Float && same_device(t, x) && t.is_contiguous(),
      name, " has shape ", shape_of(t), " and dtype ", torch::headeronly::toString(t.scalar_type()), ": expected (",
      rows, vector ? "" : ", ", vector ? "" : std::to_string(columns),
      ") and float32, contiguous, on the device of x");
  return static_cast<const float*>(t.const_data_ptr());
}

Problem describe(const Tensor& x, const Tensor& reduce_weight, const Tensor& expand_weight, double scale) {
  STD_TORCH_CHECK(x.dim() == 4, "x has shape ", shape_of(x), ": expected (N, C, H, W)");
  STD_TORCH_CHECK(reduce_weight.dim() == 2, "reduce_weight has shape ", shape_of(reduce_weight), ": expected (R, C)");
  Problem p{};
  p.batch = x.size(0);
  p.channels = x.size(1);
  p.spatial = x.size(2) * x.size(3);
  p.hidden = reduce_weight.size(0);
  p.dtype = dtype_of(x, "x");
  STD_TORCH_CHECK(p.dtype != DType::float64, "x has dtype float64: expected float32, float16 or bfloat16");
  STD_TORCH_CHECK(p.channels > 0 && p.spatial > 0 && p.hidden > 0, "x has shape ", shape_of(x), " and reduce_weight ",
      shape_of(reduce_weight), ": expected channels, positions and hidden units");
  p.scale = static_cast<float>(scale);
  p.reduce_weight = parameter(reduce_weight, "reduce_weight", x, p.hidden, p.channels);
  p.expand_weight = parameter(expand_weight, "expand_weight", x, p.channels, p.hidden);
  if (elements(p) == 0) return p;
  p.order = order_of(x.dim(), x.sizes().data(), x.strides().data());
  STD_TORCH_CHECK(p.order != Order::unsupported,
      "x has strides ", strides_of(x), ": expected contiguous or channels_last");
  p.x = x.const_data_ptr();
  return p;
}

void like_x(const Tensor& t, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(same_shape(t, x) && t.scalar_type() == x.scalar_type() && same_device(t, x) &&
                      (x.numel() == 0 || same_strides(t, x)),
      name, " has shape ", shape_of(t), ", strides ", strides_of(t), " and dtype ",
      torch::headeronly::toString(t.scalar_type()), ": expected those of x, ", shape_of(x), ", ", strides_of(x), " and ",
      torch::headeronly::toString(x.scalar_type()), ", on the same device");
}

float* data_of(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

#if defined(LSGM_CUDA)

// Memory for what is needed in between comes from PyTorch's allocator, so that a CUDA graph can own it.
void run_forward(Problem& p, const Tensor& x) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  cuda::plan(p);
  const Tensor partials = torch::stable::new_empty(x, {partial_count(p)}, ScalarType::Double);
  p.partials = static_cast<double*>(partials.mutable_data_ptr());
  cuda::forward(p, current_stream(x));
}

void run_backward(Problem& p, const Tensor& x) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  cuda::plan(p);
  const Tensor partials = torch::stable::new_empty(x, {partial_count(p)}, ScalarType::Double);
  const Tensor deltas = torch::stable::new_empty(x, {p.batch, state_size(p)}, ScalarType::Float);
  p.partials = static_cast<double*>(partials.mutable_data_ptr());
  p.deltas = data_of(deltas);
  cuda::backward(p, current_stream(x));
}

#else

using Kernel = void (*)(const Problem&, int64_t, int64_t);

// reduce, gate, apply: sample by sample, each while it is in the cache, where there are enough samples for all threads;
// else part by part. The results are the same.
void run_parts(const Problem& p, Kernel reduce, Kernel gate, Kernel apply) {
  const int64_t grain = cpu::grain(p), per_sample = p.segments.per_run;
  const auto sample_by_sample = [&](int64_t begin, int64_t end) {
    for (int64_t sample = begin; sample < end; ++sample) {
      reduce(p, sample * per_sample, (sample + 1) * per_sample);
      gate(p, sample, sample + 1);
      apply(p, sample * per_sample, (sample + 1) * per_sample);
    }
  };
  if (p.segments.count <= grain) return sample_by_sample(0, p.batch);
  const int64_t threads = torch::stable::get_num_threads();
  if (p.batch % threads == 0 || p.batch > 4 * threads) {
    return torch::stable::parallel_for(0, p.batch, ceil_div(grain, per_sample), sample_by_sample);
  }
  const auto in_threads = [&](Kernel kernel) {
    torch::stable::parallel_for(
        0, p.segments.count, grain, [&p, kernel](int64_t begin, int64_t end) { kernel(p, begin, end); });
  };
  in_threads(reduce);
  gate(p, 0, p.batch);
  in_threads(apply);
}

void run_forward(Problem& p, const Tensor&) {
  cpu::plan(p);
  channelwise::Table partials(partial_count(p));
  p.partials = partials.data();
  run_parts(p, &cpu::reduce, &cpu::gate, &cpu::apply);
}

void run_backward(Problem& p, const Tensor&) {
  cpu::plan(p);
  channelwise::Table partials(partial_count(p)), deltas((p.batch * state_size(p) + 1) / 2);
  p.partials = partials.data();
  p.deltas = reinterpret_cast<float*>(deltas.data());
  run_parts(p, &cpu::backward_reduce, &cpu::gate_backward, &cpu::backward_apply);
  constexpr int64_t kProductsPerThread = 65536;  // some ten microseconds
  torch::stable::parallel_for(0, p.channels, larger(1, kProductsPerThread / (p.batch * p.hidden)),
      [&p](int64_t begin, int64_t end) { cpu::parameters_backward(p, begin, end); });
}

#endif

std::tuple<Tensor, Tensor> forward(const Tensor& skip, const Tensor& x, const Tensor& reduce_weight,
    const Tensor& reduce_bias, const Tensor& expand_weight, const Tensor& expand_bias, double scale) {
  Problem p = describe(x, reduce_weight, expand_weight, scale);
  p.reduce_bias = parameter(reduce_bias, "reduce_bias", x, p.hidden, 0);
  p.expand_bias = parameter(expand_bias, "expand_bias", x, p.channels, 0);
  like_x(skip, "skip", x);
  Tensor y = torch::stable::empty_like(x);
  Tensor state = torch::stable::new_empty(reduce_weight, {p.batch, state_size(p)});
  if (elements(p) == 0) return {y, state};
  p.skip = skip.const_data_ptr();
  p.y = y.mutable_data_ptr();
  p.state = data_of(state);
  run_forward(p, x);
  return {y, state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x,
    const Tensor& reduce_weight, const Tensor& expand_weight, const Tensor& state, double scale) {
  Problem p = describe(x, reduce_weight, expand_weight, scale);
  p.state = const_cast<float*>(parameter(state, "state", x, p.batch, state_size(p)));
  like_x(grad, "grad", x);
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grad_reduce_weight = torch::stable::empty_like(reduce_weight);
  Tensor grad_reduce_bias = torch::stable::new_empty(reduce_weight, {p.hidden});
  Tensor grad_expand_weight = torch::stable::empty_like(expand_weight);
  Tensor grad_expand_bias = torch::stable::new_empty(reduce_weight, {p.channels});
  if (elements(p) == 0) {
    for (Tensor* t : {&grad_reduce_weight, &grad_reduce_bias, &grad_expand_weight, &grad_expand_bias}) {
      torch::stable::zero_(*t);
    }
  } else {
    p.grad = grad.const_data_ptr();
    p.grad_x = grad_x.mutable_data_ptr();
    p.grad_reduce_weight = data_of(grad_reduce_weight);
    p.grad_reduce_bias = data_of(grad_reduce_bias);
    p.grad_expand_weight = data_of(grad_expand_weight);
    p.grad_expand_bias = data_of(grad_expand_bias);
    run_backward(p, x);
  }
  return {grad_x, grad_reduce_weight, grad_reduce_bias, grad_expand_weight, grad_expand_bias};
}

}  // namespace
}  // namespace se_residual
}  // namespace lsgm

#if defined(LSGM_CUDA)
STABLE_TORCH_LIBRARY_IMPL(lsgm_fast, CUDA, m) {
  m.impl("se_residual_cuda", TORCH_BOX(&lsgm::se_residual::forward));
  m.impl("se_residual_cuda_backward", TORCH_BOX(&lsgm::se_residual::backward));
}
#else
STABLE_TORCH_LIBRARY_IMPL(lsgm_fast, CPU, m) {
  m.impl("se_residual_cpu", TORCH_BOX(&lsgm::se_residual::forward));
  m.impl("se_residual_cpu_backward", TORCH_BOX(&lsgm::se_residual::backward));
}
#endif
