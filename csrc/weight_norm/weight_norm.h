// weight_norm of a list of weights: w = s v per output filter, s = exp(g) / (n + eps), n = ||v||.
//
//   grad_v = s grad - (s <grad, v> / ((n + eps) n)) v      (s grad where n = 0)
//   grad_g = s <grad, v>
//
// The arithmetic and the description of a call. No torch.
#pragma once

#include <cstdint>

#include "common/indexing.h"
#include "common/macros.h"
#include "common/math.h"

namespace lsgm {
namespace weight_norm {

// One weight. Filter k is the run of elements [k length, (k + 1) length) of all its tensors, in whatever order.
struct Weight {
  const float* v;
  const float* log_norm;  // [filters]
  const float* grad;      // backward only
  float* out;             // w, or grad_v
  int64_t filters, length;
  int64_t first;  // index of its first filter among those of all weights
  // Made by cpu::plan: pieces of `filters_per_piece` filters, the first of them number `first_piece` of all.
  int64_t first_piece, filters_per_piece;
};

struct Problem {
  Weight* weights;
  int64_t count;
  float eps;
  float* norms;              // [filters of all weights], which forward writes
  const float* saved_norms;  // the same, for backward
  float* grad_log_norm;      // [filters of all weights], which backward writes
  int64_t pieces;
};

LSGM_HD float scale_of(float log_norm, float norm, float eps) { return exp_of(log_norm) / (norm + eps); }

// What v is multiplied with and subtracted from s grad; `product` is <grad, v>. Divided by the norm first: the product
// is no larger than it, while the square of a small norm would vanish.
LSGM_HD float projection_of(float scale, float product, float norm, float eps) {
  return norm == 0.0f ? 0.0f : scale * (product / norm) / (norm + eps);
}

// CPU. `plan` cuts the weights into pieces; `forward` and `backward` do the pieces [begin, end) and may run in several
// threads. A filter is never cut: its sums do not depend on the number of threads.
namespace cpu {

void plan(Problem& p);
int64_t grain(const Problem& p);  // pieces below which a second thread does not pay
void forward(const Problem& p, int64_t begin, int64_t end);
void backward(const Problem& p, int64_t begin, int64_t end);

}  // namespace cpu

#define LSGM_WEIGHT_NORM_CPU_KERNELS                          \
  void forward(const Problem& p, int64_t begin, int64_t end); \
  void backward(const Problem& p, int64_t begin, int64_t end);

namespace scalar {
LSGM_WEIGHT_NORM_CPU_KERNELS
}
namespace avx2 {
LSGM_WEIGHT_NORM_CPU_KERNELS
}
#undef LSGM_WEIGHT_NORM_CPU_KERNELS

}  // namespace weight_norm
}  // namespace lsgm
