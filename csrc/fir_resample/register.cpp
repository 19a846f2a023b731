// Binds fir_resample to lsgm_fast::fir_resample_{cpu,cuda} and their backward operators. Compiled into both libraries,
// with LSGM_CUDA defined in the CUDA one. The schemas are defined in Python (lsgm_fast/ops/fir_resample.py).
#include <memory>
#include <optional>

#include "common/stable.h"
#include "fir_resample/fir_resample.h"

namespace lsgm {
namespace fir_resample {
namespace {

// Whether the channels of t are innermost; the stride of an axis of size 1 means nothing.
bool is_channels_last(const Tensor& t) {
  const int64_t channels = t.size(1), row = t.size(3) * channels;
  const int64_t expected[4] = {t.size(2) * row, 1, row, channels};
  for (int64_t d = 0; d < 4; ++d) {
    if (t.size(d) > 1 && t.stride(d) != expected[d]) return false;
  }
  return true;
}

const float* parameter(const std::optional<Tensor>& t, const char* name, const Tensor& x) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(t->dim() == 2 && t->size(0) == x.size(0) && t->size(1) == x.size(1) &&
                      t->scalar_type() == ScalarType::Float && same_device(*t, x) && t->is_contiguous(),
      name, " has shape ", shape_of(*t), " and dtype ", torch::headeronly::toString(t->scalar_type()),
      ": expected a dense (", x.size(0), ", ", x.size(1), ") of dtype Float");
  return static_cast<const float*>(t->const_data_ptr());
}

#if defined(LSGM_CUDA)

void start(Problem& p, const Tensor& x) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  cuda::run(p, current_stream(x));
}

#else

void start(Problem& p, const Tensor&) {
  cpu::plan(p);
  const int64_t size = cpu::scratch_size(p);
  torch::stable::parallel_for(0, cpu::units(p), cpu::grain(p), [&](int64_t begin, int64_t end) {
    constexpr int64_t kHere = 2048;
    float here[kHere];
    const std::unique_ptr<float[]> more(size > kHere ? new float[static_cast<size_t>(size)] : nullptr);
    cpu::run(p, begin, end, more ? more.get() : here);
  });
}

#endif

Tensor resample(Problem& p, const Tensor& x, const std::optional<Tensor>& factor, const std::optional<Tensor>& shift) {
  STD_TORCH_CHECK(x.dim() == 4 && (p.up || (x.size(2) % 2 == 0 && x.size(3) % 2 == 0)), "x has shape ", shape_of(x),
      ": expected (N, C, H, W), even H and W to go down");
  p.batch = x.size(0);
  p.channels = x.size(1);
  p.height = x.size(2);
  p.width = x.size(3);
  p.dtype = dtype_of(x, "x");
  STD_TORCH_CHECK(p.dtype != DType::float64, "x has dtype Double: expected float32, float16 or bfloat16");
  p.factor = parameter(factor, "factor", x);
  p.shift = parameter(shift, "shift", x);
  STD_TORCH_CHECK(!p.factor == !p.shift, "factor and shift must be given together");
  // What is both, such as a single pixel, gets a result that is contiguous.
  p.order = x.is_contiguous() ? Order::planes : Order::rows;
  STD_TORCH_CHECK(p.order == Order::planes || is_channels_last(x), "x has strides ", strides_of(x),
      ": expected the contiguous or the channels_last format");
  Tensor out = x;
  if (p.order == Order::planes) {
    out = torch::stable::new_empty(x, {p.batch, p.channels, out_height(p), out_width(p)});
  } else {
    out = torch::stable::new_empty(x, {p.batch, out_height(p), out_width(p), p.channels});
    out = torch::stable::transpose(torch::stable::transpose(out, 2, 3), 1, 2);
  }
  if (x.numel() == 0) return out;
  p.x = x.const_data_ptr();
  p.out = out.mutable_data_ptr();
  start(p, x);
  return out;
}

Tensor forward(
    const Tensor& x, const std::optional<Tensor>& factor, const std::optional<Tensor>& shift, bool up, bool fir) {
  Problem p{};
  p.up = up;
  p.fir = fir;
  p.scale = scale_of(up, fir);
  return resample(p, x, factor, shift);
}

// `up`: the way that forward went.
Tensor backward(const Tensor& grad, bool up, bool fir) {
  Problem p{};
  p.up = !up;
  p.fir = fir;
  p.scale = scale_of(up, fir);
  return resample(p, grad, std::nullopt, std::nullopt);
}

}  // namespace
}  // namespace fir_resample
}  // namespace lsgm

#if defined(LSGM_CUDA)
STABLE_TORCH_LIBRARY_IMPL(lsgm_fast, CUDA, m) {
  m.impl("fir_resample_cuda", TORCH_BOX(&lsgm::fir_resample::forward));
  m.impl("fir_resample_cuda_backward", TORCH_BOX(&lsgm::fir_resample::backward));
}
#else
STABLE_TORCH_LIBRARY_IMPL(lsgm_fast, CPU, m) {
  m.impl("fir_resample_cpu", TORCH_BOX(&lsgm::fir_resample::forward));
  m.impl("fir_resample_cpu_backward", TORCH_BOX(&lsgm::fir_resample::backward));
}
#endif
