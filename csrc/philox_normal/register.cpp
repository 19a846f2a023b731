// Binds philox_normal to lsgm_fast::philox_normal_{cpu,cuda}. Compiled into both libraries, with LSGM_CUDA defined in
// the CUDA one. The schema is defined in Python (lsgm_fast/ops/philox_normal.py).
#include <vector>

#include "common/stable.h"
#include "philox_normal/philox_normal.h"

namespace lsgm {
namespace philox_normal {
namespace {

uint32_t word(int64_t value, const char* name) {
  STD_TORCH_CHECK(value >= 0 && value <= int64_t(UINT32_MAX), name, " must be from 0 to 2**32 - 1, got ", value);
  return static_cast<uint32_t>(value);
}

#if defined(LSGM_CUDA)

void run(Problem& p, const Tensor& out) {
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  cuda::forward(p, current_stream(out));
}

#else

void run(Problem& p, const Tensor&) {
  // A compiled graph comes here unchecked, since Python cannot look at a tensor's values while it is traced.
  for (int64_t i = 0; i < p.samples; ++i) word(p.indices[i * p.index_stride], "sample_indices");
  cpu::plan(p);
  torch::stable::parallel_for(
      0, p.segments.count, cpu::grain(p), [&p](int64_t begin, int64_t end) { cpu::forward(p, begin, end); });
}

#endif

// `indices` is on the device of the result and so chooses the implementation.
Tensor forward(const Tensor& indices, int64_t key0, int64_t key1, int64_t stream, int64_t substream,
    std::vector<int64_t> shape, ScalarType dtype) {
  STD_TORCH_CHECK(indices.dim() == 1 && indices.scalar_type() == ScalarType::Long, "indices has shape ",
      shape_of(indices), " and dtype ", torch::headeronly::toString(indices.scalar_type()), ": expected (N,) int64");
  Problem p{};
  p.samples = indices.size(0);
  p.elements = 1;
  for (int64_t size : shape) p.elements *= size;
  STD_TORCH_CHECK(blocks_of(p) <= int64_t(1) << 32, "at most 2**34 values per sample, got ", p.elements);
  p.indices = static_cast<const int64_t*>(indices.const_data_ptr());
  p.index_stride = indices.stride(0);
  p.key0 = word(key0, "key0");
  p.key1 = word(key1, "key1");
  p.stream = word(stream, "stream");
  p.substream = word(substream, "substream");
  shape.insert(shape.begin(), p.samples);
  Tensor out = torch::stable::new_empty(indices, shape, dtype);
  p.dtype = dtype_of(out, "the result");
  if (p.samples * p.elements == 0) return out;
  p.out = out.mutable_data_ptr();
  run(p, out);
  return out;
}

}  // namespace
}  // namespace philox_normal
}  // namespace lsgm

#if defined(LSGM_CUDA)
STABLE_TORCH_LIBRARY_IMPL(lsgm_fast, CUDA, m) {
  m.impl("philox_normal_cuda", TORCH_BOX(&lsgm::philox_normal::forward));
}
#else
STABLE_TORCH_LIBRARY_IMPL(lsgm_fast, CPU, m) {
  m.impl("philox_normal_cpu", TORCH_BOX(&lsgm::philox_normal::forward));
}
#endif
