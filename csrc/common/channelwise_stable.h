// From PyTorch's tensors to the description of a channelwise operator's call, and its CPU kernels in threads.
#pragma once

#include <vector>

#include "common/channelwise.h"
#include "common/stable.h"

namespace lsgm {
namespace channelwise {

// All of `p` except for out and the segments. `logit`: null where there is no mixing.
static inline void describe(
    Operands& p, const Tensor& eps, const Tensor& z, const Tensor* logit, const Tensor& r) {
  STD_TORCH_CHECK(z.dim() >= 2, "z has shape ", shape_of(z), ": expected (B, C, ...)");
  STD_TORCH_CHECK(same_shape(eps, z), "eps has shape ", shape_of(eps), " and z ", shape_of(z), ": expected the same");
  STD_TORCH_CHECK(same_device(eps, z) && (logit == nullptr || same_device(*logit, z)),
      "eps, z and mixing_logit must be on one device");
  p.batch = z.size(0);
  p.channels = z.size(1);
  p.spatial = 1;
  for (int64_t d = 2; d < z.dim(); ++d) p.spatial *= z.size(d);
  p.eps_dtype = dtype_of(eps, "eps");
  p.z_dtype = dtype_of(z, "z");
  if (logit != nullptr) {
    STD_TORCH_CHECK(
        logit->numel() == p.channels && (p.channels == 1 || (logit->dim() >= 2 && logit->size(1) == p.channels)),
        "mixing_logit has shape ", shape_of(*logit), ": expected (1, ", p.channels, ", 1, 1)");
    p.logit = scalars(*logit, "mixing_logit", 1, p.channels);
  }
  p.r = sample_scalars(r, "r", z);
  if (elements(p) == 0) return;
  p.order = order_of(z.dim(), z.sizes().data(), z.strides().data());
  STD_TORCH_CHECK(p.order != Order::unsupported && same_strides(eps, z), "eps has strides ", strides_of(eps), " and z ",
      strides_of(z), ": expected both contiguous or both channels_last");
  p.eps = eps.const_data_ptr();
  p.z = z.const_data_ptr();
}

// Memory for numbers of type float or double, from the heap only where there are many.
class Table {
 public:
  explicit Table(int64_t count)
      : more_(count > kHere ? static_cast<size_t>(count) : 0),
        data_(count > kHere ? more_.data() : here_) {}
  Table(const Table&) = delete;
  Table& operator=(const Table&) = delete;
  double* data() { return data_; }

 private:
  static constexpr int64_t kHere = 512;
  double here_[kHere];
  std::vector<double> more_;
  double* data_;
};

// kernel(p, begin, end) for all segments, in as many threads as pay.
template <class Problem>
static inline void run_segments(const Problem& p, void (*kernel)(const Problem&, int64_t, int64_t)) {
  torch::stable::parallel_for(
      0, p.segments.count, grain(p), [&p, kernel](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

}  // namespace channelwise
}  // namespace lsgm
