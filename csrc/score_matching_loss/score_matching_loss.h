// score_matching_loss, with d = pred - noise and the weights shared or per sample:
//
//   p_loss[b]     = sum over the sample of weight_p d^2
//   cross_entropy = weight_q d^2 + constant
//   grad_pred     = 2 d (weight_p grad_p[b] + weight_q grad_ce),  grad_noise = -grad_pred
//
// The arithmetic and the description of a call. No torch.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/indexing.h"
#include "common/macros.h"
#include "common/scalars.h"

namespace lsgm {
namespace score_matching_loss {

// One call. A sample is a run of `size` elements; pred, noise, cross_entropy and the gradients lie in the same order of
// memory, whichever it is. What has the type of the arithmetic is float, or double where computes_in_double().
struct Problem {
  int64_t batch, size;
  Segments segments;  // made by cpu::plan
  DType pred_dtype, noise_dtype;
  const void* pred;
  const void* noise;
  Scalars weight_p;  // `batch` values, or one with stride 0
  Scalars weight_q;  // the same; no data where there is no cross entropy

  double constant;
  void* p_loss;         // type of the arithmetic
  void* cross_entropy;  // type of the arithmetic; null where there is none
  double* partials;     // [segments.count]: sums of weight_p d^2

  // Gradients that arrive; what is absent has no data. That of the cross entropy is one value per element or, where all
  // values of a sample are equal (it was summed), one per sample.
  Scalars grad_p;
  const void* grad_ce;  // type of the arithmetic
  Scalars sample_grad_ce;
  void* grad_pred;   // of pred's type; null where it is not wanted
  void* grad_noise;  // of noise's type; null where it is not wanted
};

LSGM_HD bool computes_in_double(const Problem& p) {
  return p.pred_dtype == DType::float64 || p.noise_dtype == DType::float64;
}

LSGM_HD int64_t elements(const Problem& p) { return p.batch * p.size; }

// What 2 d is multiplied with, apart from weight_q grad_ce where that differs between the elements of a sample.
template <class C>
LSGM_HD C sample_factor(const Problem& p, int64_t sample) {
  C factor = 0;
  if (p.grad_p.data != nullptr) factor = scalar_at<C>(p.weight_p, sample) * scalar_at<C>(p.grad_p, sample);
  if (p.sample_grad_ce.data != nullptr) {
    factor += scalar_at<C>(p.weight_q, sample) * scalar_at<C>(p.sample_grad_ce, sample);
  }
  return factor;
}

// CPU. `plan` makes the segments; `forward` and `backward` do the segments [begin, end) and may run in several threads;
// `finish` sums the partials in a fixed order.
namespace cpu {

void plan(Problem& p);
int64_t grain(const Problem& p);  // segments below which a second thread does not pay
void forward(const Problem& p, int64_t begin, int64_t end);
void backward(const Problem& p, int64_t begin, int64_t end);
void finish(const Problem& p);

}  // namespace cpu

#define LSGM_SCORE_MATCHING_LOSS_CPU_KERNELS                  \
  void forward(const Problem& p, int64_t begin, int64_t end); \
  void backward(const Problem& p, int64_t begin, int64_t end);

namespace scalar {
LSGM_SCORE_MATCHING_LOSS_CPU_KERNELS
}
namespace avx2 {
LSGM_SCORE_MATCHING_LOSS_CPU_KERNELS
}
#undef LSGM_SCORE_MATCHING_LOSS_CPU_KERNELS

}  // namespace score_matching_loss
}  // namespace lsgm
