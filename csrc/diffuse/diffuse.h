// diffuse: out = m z0 + sqrt(var) noise, m and var shared or per sample. Both gradients are scalings:
//
//   grad_z0    = m g
//   grad_noise = sqrt(var) g
//
// The arithmetic and the description of a call. No torch.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/dtypes.h"
#include "common/indexing.h"
#include "common/macros.h"
#include "common/scalars.h"

namespace lsgm {
namespace diffuse {

// One call. A sample is a run of `size` elements; z0, noise and out lie in the same order of memory, whichever it is.
struct Problem {
  int64_t batch, size;
  Segments segments;  // made by cpu::plan
  DType z0_dtype, noise_dtype;
  const void* z0;
  const void* noise;
  Scalars m, var;  // `batch` values, or one with stride 0
  void* out;       // of z0's type
};

// One call of the backward pass: out = factor grad.
struct Scaling {
  int64_t batch, size;
  Segments segments;
  DType grad_dtype, out_dtype;
  const void* grad;
  Scalars factor;
  void* out;
};

// The root is taken in float64, so that float32 gets the nearest one whatever the type of var.
template <class C>
LSGM_HD C deviation(const Scalars& var, int64_t sample) {
  return static_cast<C>(std::sqrt(scalar_at<double>(var, sample)));
}

template <class P>
LSGM_HD int64_t elements(const P& p) {
  return p.batch * p.size;
}

// CPU. `plan` makes the segments; the others do the segments [begin, end) and may run in several threads.
namespace cpu {

Segments plan(int64_t batch, int64_t size);
int64_t grain(const Segments& segments);  // segments below which a second thread does not pay
void forward(const Problem& p, int64_t begin, int64_t end);
void backward(const Scaling& p, int64_t begin, int64_t end);

}  // namespace cpu

#define LSGM_DIFFUSE_CPU_KERNELS                              \
  void forward(const Problem& p, int64_t begin, int64_t end); \
  void backward(const Scaling& p, int64_t begin, int64_t end);

namespace scalar {
LSGM_DIFFUSE_CPU_KERNELS
}
namespace avx2 {
LSGM_DIFFUSE_CPU_KERNELS
}
#undef LSGM_DIFFUSE_CPU_KERNELS

}  // namespace diffuse
}  // namespace lsgm
