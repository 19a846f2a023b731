// mixed_score: out = (1 - a) r z + a eps, a = sigmoid(logit) per channel, r shared or per sample.
//
//   grad_eps      = a g
//   grad_z        = (1 - a) r g
//   grad_logit[c] = a (1 - a) sum over samples and positions of g (eps - r z)
//
// This header is what the CPU and the CUDA code share: the arithmetic, and the description of one call. No torch.
#pragma once

#include <cstdint>

#include "common/channelwise.h"
#include "common/macros.h"
#include "common/math.h"
#include "common/scalars.h"

namespace lsgm {
namespace mixed_score {

using namespace channelwise;

// One call. grad, grad_eps and grad_z lie in the order of memory of eps and z; grad and grad_z have z's type, grad_eps
// eps' type, grad_logit (dense) the logit's type.
struct Problem : Operands {
  const void* grad;
  void* grad_eps;
  void* grad_z;
  void* grad_logit;
  double* partials;   // [batch * segments.per_run][channels]: sums of g (eps - r z) over one segment
  const void* table;  // CPU: a and 1 - a of every channel, in the type of the arithmetic
};

// `weight` is (1 - a) r.
template <class C>
LSGM_HD C value(C network, C weight, C eps, C z) {
  return network * eps + weight * z;
}

// One element's part of grad_logit / (a (1 - a)).
template <class C>
LSGM_HD C logit_term(C grad, C r, C eps, C z) {
  return grad * (eps - r * z);
}

LSGM_HD double logit_gradient(const Scalars& logit, int64_t channel, double total) {
  const Mix<double> mix = mix_of(scalar_at<double>(logit, channel));
  return mix.network * mix.normal * total;
}

LSGM_HD void store_logit_gradient(const Problem& p, int64_t channel, double total) {
  const double gradient = logit_gradient(p.logit, channel, total);
  if (p.logit.dtype == DType::float64) {
    static_cast<double*>(p.grad_logit)[channel] = gradient;
  } else {
    static_cast<float*>(p.grad_logit)[channel] = static_cast<float>(gradient);
  }
}

// Rows of `partials`.
LSGM_HD int64_t partial_rows(const Problem& p) { return p.batch * p.segments.per_run; }

// Where the sum over a segment of a plane belongs.
LSGM_HD int64_t plane_partial(const Problem& p, const Plane& plane) {
  return (plane.sample * p.segments.per_run + plane.piece) * p.channels + plane.channel;
}

// CPU. `fill_table` wants room for 2 * channels doubles; `forward` and `backward` do the segments [begin, end) that
// plan_for_cpu made and may run in several threads; `finish` sums the partials in a fixed order.
namespace cpu {

void fill_table(const Problem& p, void* table);
void forward(const Problem& p, int64_t begin, int64_t end);
void backward(const Problem& p, int64_t begin, int64_t end);
void finish(const Problem& p);

}  // namespace cpu

#define LSGM_MIXED_SCORE_CPU_KERNELS                          \
  void forward(const Problem& p, int64_t begin, int64_t end); \
  void backward(const Problem& p, int64_t begin, int64_t end);

namespace scalar {
LSGM_MIXED_SCORE_CPU_KERNELS
}
namespace avx2 {
LSGM_MIXED_SCORE_CPU_KERNELS
}
#undef LSGM_MIXED_SCORE_CPU_KERNELS

// CUDA: on `stream` (a cudaStream_t) of the current device. A failed launch throws std::runtime_error.
namespace cuda {

void plan(Problem& p);
void forward(const Problem& p, void* stream);
void backward(const Problem& p, void* stream);

}  // namespace cuda

}  // namespace mixed_score
}  // namespace lsgm
