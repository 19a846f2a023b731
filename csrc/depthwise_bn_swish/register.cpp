// Binds depthwise_bn_swish to lsgm_fast::depthwise_bn_swish_{cpu,cuda} and their backward operators. Compiled into both
// libraries, with LSGM_CUDA defined in the CUDA one. The schemas are defined in Python
// (lsgm_fast/ops/depthwise_bn_swish.py).
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "common/stable.h"
#include "depthwise_bn_swish/depthwise_bn_swish.h"

namespace lsgm {
namespace depthwise_bn_swish {
namespace {

// Whether an image of that size is dense in one of the orders; the stride of an axis of size 1 means nothing.
bool lies_in(const Tensor& t, Order order) {
  const int64_t channels = t.size(1), height = t.size(2), width = t.size(3);
  const bool planes = order == Order::planes;
  const int64_t expected[4] = {channels * height * width, planes ? height * width : 1,
      planes ? width : width * channels, planes ? 1 : channels};
  for (int64_t d = 0; d < 4; ++d) {
    if (t.size(d) > 1 && t.stride(d) != expected[d]) return false;
  }
  return true;
}

const void* parameter(const std::optional<Tensor>& t, const char* name, const Tensor& x) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == x.size(1) && t->scalar_type() == x.scalar_type() &&
                      same_device(*t, x) && t->is_contiguous(),
      name, " has shape ", shape_of(*t), " and dtype ", torch::headeronly::toString(t->scalar_type()),
      ": expected a dense (", x.size(1), ",) of dtype ", torch::headeronly::toString(x.scalar_type()));
  return t->const_data_ptr();
}

DType type_of(const Tensor& t, const char* name) {
  const DType dtype = dtype_of(t, name);
  STD_TORCH_CHECK(dtype != DType::float64, name, " has dtype Double: expected float32, float16 or bfloat16");
  return dtype;
}

Problem describe(const Tensor& x, const Tensor& weight, int64_t stride) {
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4 && weight.size(0) == x.size(1) && weight.size(1) == 1 &&
                      weight.size(2) == 5 && weight.size(3) == 5,
      "x has shape ", shape_of(x), " and weight ", shape_of(weight), ": expected (N, C, H, W) and (C, 1, 5, 5)");
  STD_TORCH_CHECK(stride == 1 || stride == 2, "stride is ", stride, ": expected 1 or 2");
  STD_TORCH_CHECK(same_device(weight, x) && weight.is_contiguous(), "weight must be contiguous, on the device of x");
  Problem p{};
  p.batch = x.size(0);
  p.channels = x.size(1);
  p.height = x.size(2);
  p.width = x.size(3);
  p.stride = stride;
  p.out_height = out_size(p.height, stride);
  p.out_width = out_size(p.width, stride);
  p.dtype = type_of(x, "x");
  p.weight_dtype = type_of(weight, "weight");
  if (x.numel() == 0) return p;
  const bool rows = lies_in(x, Order::rows);
  STD_TORCH_CHECK(rows || lies_in(x, Order::planes), "x has strides ", strides_of(x),
      ": expected the contiguous or the channels_last format");
  // Where both are true, a single channel is a plane, and single pixels are rows of channels.
  p.order = rows && (p.channels > 1 || !lies_in(x, Order::planes)) ? Order::rows : Order::planes;
  p.x = x.const_data_ptr();
  p.weight = weight.const_data_ptr();
  return p;
}

#if defined(LSGM_CUDA)

void check_weight(const Problem& p) {
  STD_TORCH_CHECK(p.dtype == p.weight_dtype, "x and weight have different dtypes");
}

void run_forward(Problem& p, const Tensor& x) {
  check_weight(p);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  cuda::forward(p, current_stream(x));
}

// Memory for partial results comes from PyTorch's allocator, so that a CUDA graph can own it.
void run_backward(Problem& p, const Tensor& x) {
  check_weight(p);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor partials = torch::stable::new_empty(x, {cuda::partial_count(p)}, ScalarType::Double);
  p.partials = static_cast<double*>(partials.mutable_data_ptr());
  cuda::backward(p, current_stream(x));
}

#else

// Memory for floats, from the heap only where there are many. Not initialised.
template <int64_t kHere>
class Floats {
 public:
  explicit Floats(int64_t count)
      : more_(count > kHere ? new float[static_cast<size_t>(count)] : nullptr) {}
  float* data() { return more_ ? more_.get() : here_; }

 private:
  std::unique_ptr<float[]> more_;
  float here_[kHere];
};

template <class Kernel>
void in_threads(const Problem& p, int64_t units, int64_t grain, bool backward, Kernel kernel) {
  const int64_t size = cpu::scratch_size(p, backward);
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    Floats<4096> scratch(size);
    kernel(p, begin, end, scratch.data());
  });
}

void run_forward(Problem& p, const Tensor&) {
  cpu::plan(p);
  Floats<1024> table(cpu::table_size(p));
  cpu::fill_table(p, table.data());
  p.table = table.data();
  in_threads(p, cpu::forward_units(p), cpu::forward_grain(p), false, &cpu::forward);
}

void run_backward(Problem& p, const Tensor&) {
  cpu::plan(p);
  Floats<1024> table(cpu::table_size(p));
  cpu::fill_table(p, table.data());
  p.table = table.data();
  std::vector<double> partials(static_cast<size_t>(p.sample_runs * p.channels * kTaps));
  p.partials = partials.data();
  in_threads(p, cpu::backward_units(p), cpu::backward_grain(p), true, &cpu::backward);
  cpu::finish(p);
}

#endif

Tensor forward(const Tensor& x, const Tensor& weight, int64_t stride, const std::optional<Tensor>& pre_scale,
    const std::optional<Tensor>& pre_shift, const std::optional<Tensor>& post_scale,
    const std::optional<Tensor>& post_shift) {
  Problem p = describe(x, weight, stride);
  p.pre_scale = parameter(pre_scale, "pre_scale", x);
  p.pre_shift = parameter(pre_shift, "pre_shift", x);
  p.post_scale = parameter(post_scale, "post_scale", x);
  p.post_shift = parameter(post_shift, "post_shift", x);
  STD_TORCH_CHECK(!p.pre_scale == !p.pre_shift && !p.post_scale == !p.post_shift,
      "scale and shift must be given together");
  Tensor out = x;
  if (stride == 1) {
    out = torch::stable::empty_like(x);
  } else if (x.is_contiguous()) {
    out = torch::stable::new_empty(x, {p.batch, p.channels, p.out_height, p.out_width});
  } else {
    out = torch::stable::new_empty(x, {p.batch, p.out_height, p.out_width, p.channels});
    out = torch::stable::transpose(torch::stable::transpose(out, 2, 3), 1, 2);
  }
  if (x.numel() == 0) return out;
  p.out = out.mutable_data_ptr();
  run_forward(p, x);
  return out;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& weight, int64_t stride) {
  Problem p = describe(x, weight, stride);
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == p.batch && grad.size(1) == p.channels &&
                      grad.size(2) == p.out_height && grad.size(3) == p.out_width &&
                      grad.scalar_type() == x.scalar_type() && same_device(grad, x),
      "grad has shape ", shape_of(grad), " and dtype ", torch::headeronly::toString(grad.scalar_type()),
      ": expected (", p.batch, ", ", p.channels, ", ", p.out_height, ", ", p.out_width, ") and dtype ",
      torch::headeronly::toString(x.scalar_type()));
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grad_weight = torch::stable::empty_like(weight);
  if (x.numel() == 0) {
    torch::stable::zero_(grad_weight);
    return {grad_x, grad_weight};
  }
  STD_TORCH_CHECK(lies_in(grad, p.order), "grad has strides ", strides_of(grad), ": expected the memory format of x");
  p.grad = grad.const_data_ptr();
  p.grad_x = grad_x.mutable_data_ptr();
  p.grad_weight = grad_weight.mutable_data_ptr();
  run_backward(p, x);
  return {grad_x, grad_weight};
}

}  // namespace
}  // namespace depthwise_bn_swish
}  // namespace lsgm

#if defined(LSGM_CUDA)
STABLE_TORCH_LIBRARY_IMPL(lsgm_fast, CUDA, m) {
  m.impl("depthwise_bn_swish_cuda", TORCH_BOX(&lsgm::depthwise_bn_swish::forward));
  m.impl("depthwise_bn_swish_cuda_backward", TORCH_BOX(&lsgm::depthwise_bn_swish::backward));
}
#else
STABLE_TORCH_LIBRARY_IMPL(lsgm_fast, CPU, m) {
  m.impl("depthwise_bn_swish_cpu", TORCH_BOX(&lsgm::depthwise_bn_swish::forward));
  m.impl("depthwise_bn_swish_cpu_backward", TORCH_BOX(&lsgm::depthwise_bn_swish::backward));
}
#endif
