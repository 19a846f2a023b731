// Binds winograd_conv2d to lsgm_fast::winograd_conv2d_cpu. The schema is defined in Python
// (lsgm_fast/ops/winograd_conv2d.py). There is no CUDA kernel.
#if !defined(LSGM_CUDA)
#include <optional>

#include "common/stable.h"
#include "winograd_conv2d/winograd_conv2d.h"

namespace lsgm {
namespace winograd_conv2d {
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

Problem describe(const Tensor& x, const Tensor& prepared, const std::optional<Tensor>& bias, int64_t out_channels) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0, "x has shape ", shape_of(x),
      ": expected (B, C, H, W), only B may be 0");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && is_channels_last(x), "x has dtype ",
      torch::headeronly::toString(x.scalar_type()), " and strides ", strides_of(x),
      ": expected float32 in the channels_last format");
  Problem p{};
  p.batch = x.size(0);
  p.channels = x.size(1);
  p.height = x.size(2);
  p.width = x.size(3);
  p.filters = out_channels;
  p.tile = prepared.dim() == 4 && prepared.size(0) == 16 ? 2 : 4;
  STD_TORCH_CHECK(out_channels > 0 && prepared.dim() == 4 && prepared.size(0) == positions(p) &&
                      prepared.size(1) == ceil_div(out_channels, kPanel) && prepared.size(2) == p.channels &&
                      prepared.size(3) == kPanel && prepared.scalar_type() == ScalarType::Float &&
                      prepared.is_contiguous() && same_device(prepared, x),
      "prepared has shape ", shape_of(prepared), " and dtype ", torch::headeronly::toString(prepared.scalar_type()),
      ": expected (16 or 36, ", ceil_div(out_channels, kPanel), ", ", p.channels, ", ", kPanel,
      ") and float32, contiguous, on the device of x");
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == out_channels && bias->scalar_type() == ScalarType::Float &&
                        bias->is_contiguous() && same_device(*bias, x),
        "bias has shape ", shape_of(*bias), " and dtype ", torch::headeronly::toString(bias->scalar_type()),
        ": expected a dense (", out_channels, ",) of float32");
    p.bias = bias->const_data_ptr<float>();
  }
  p.x = x.const_data_ptr<float>();
  p.weight = prepared.const_data_ptr<float>();
  return p;
}

using torch::stable::parallel_for;

void run_alone(Problem p, float* scratch, int64_t worker) {
  cpu::place(p, scratch + worker * cpu::scratch_size(p));
  for (int64_t i = 0; i < cpu::blocks(p); ++i) {
    const Block b = cpu::block_at(p, worker, i);
    cpu::transform_input(p, b, 0, b.count);
    cpu::multiply(p, b, 0, cpu::products(p));
    cpu::transform_output(p, b, 0, b.count);
  }
}

void run_together(Problem p, float* scratch) {
  cpu::place(p, scratch);
  for (int64_t i = 0; i < cpu::blocks(p); ++i) {
    const Block b = cpu::block_at(p, 0, i);
    parallel_for(0, b.count, cpu::tile_grain(p),
        [&](int64_t begin, int64_t end) { cpu::transform_input(p, b, begin, end); });
    parallel_for(0, cpu::products(p), cpu::product_grain(p, b),
        [&](int64_t begin, int64_t end) { cpu::multiply(p, b, begin, end); });
    parallel_for(0, b.count, cpu::tile_grain(p),
        [&](int64_t begin, int64_t end) { cpu::transform_output(p, b, begin, end); });
  }
}

Tensor forward(const Tensor& x, const Tensor& prepared, const std::optional<Tensor>& bias, int64_t out_channels) {
  Problem p = describe(x, prepared, bias, out_channels);
  cpu::plan(p, torch::stable::get_num_threads());
  // Before the result: what is freed then lies below it, and stays the process's own for the next call.
  Tensor scratch = torch::stable::new_empty(x, {p.workers * cpu::scratch_size(p)});
  Tensor out = torch::stable::new_empty(x, {p.batch, p.height, p.width, p.filters});
  float* const memory = scratch.mutable_data_ptr<float>();
  p.out = out.mutable_data_ptr<float>();
  if (p.workers == 1) {
    run_together(p, memory);
  } else {
    parallel_for(0, p.workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) run_alone(p, memory, worker);
    });
  }
  return torch::stable::transpose(torch::stable::transpose(out, 2, 3), 1, 2);
}

}  // namespace
}  // namespace winograd_conv2d
}  // namespace lsgm

STABLE_TORCH_LIBRARY_IMPL(lsgm_fast, CPU, m) {
  m.impl("winograd_conv2d_cpu", TORCH_BOX(&lsgm::winograd_conv2d::forward));
}
#endif
