// mixture_logistic: the log-probability of RGB pixels under a discretised mixture of K logistics, its gradient with
// respect to the logits, and the mixture's mean.
//
// The 10 K channels of the logits: K mixture logits a_k, then for each colour K means m, K log scales l, K coefficients
// (red: of red in green; green: of red in blue; blue: of green in blue; tanh of each is used). With d = 1 / (2^bits - 1),
// s = exp(max(l, -7)), the colour's mean shifted by the colours before it, z = (x - mean) / s and half = d / s:
//
//   inner bins   log delta, delta = sinh(half) / (cosh(half) + cosh(z)), where delta > 1e-5, which is F(z + half) -
//                F(z - half) for the logistic function F, without its cancellation; elsewhere the density at the centre
//                times the width, -|z| - log s - 2 log(1 + exp(-|z|)) - log((2^bits - 1) / 2)
//   first, last  log F(half + z), log F(half - z)
//
//   log_prob = logsumexp_k(a_k + sum of the three colours' terms) - logsumexp_k(a_k)
//
// All of it in float32. The description of a call and what runs it; no torch.
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "common/dtypes.h"
#include "common/indexing.h"
#include "common/macros.h"

namespace lsgm {
namespace mixture_logistic {

constexpr int64_t kColours = 3;

// One call. x, log_prob, parts and grad are float32.
struct Problem {
  int64_t batch, mixtures, spatial;
  DType dtype;    // of the logits, of their gradient and of the mean
  Order order;    // of the logits and of their gradient
  Order x_order;  // of x
  int64_t levels;  // 2^bits - 1
  const void* logits;
  const float* x;
  float* log_prob;  // [batch, spatial]
  float* parts;     // [2, batch, spatial], for backward: log of the joint sum = top + log(sum), first tops, then sums
  const float* grad;
  void* grad_logits;
  void* mean;  // [batch, 3, spatial], planes
  DType mean_dtype;
  Segments segments;  // made by cpu::plan: tiles of pixels of one image
};

LSGM_HD int64_t channels_of(const Problem& p) { return 10 * p.mixtures; }

// CPU. `plan` makes the tiles; the others do the tiles [begin, end) and may run in several threads.
namespace cpu {

void plan(Problem& p);
int64_t grain(const Problem& p);  // tiles below which a second thread does not pay
void log_prob(const Problem& p, int64_t begin, int64_t end);
void log_prob_backward(const Problem& p, int64_t begin, int64_t end);
void mean(const Problem& p, int64_t begin, int64_t end);

}  // namespace cpu

// `scratch`: a number for every channel and pixel of a tile; none where all tiles are worked on in place.
#define LSGM_MIXTURE_LOGISTIC_CPU_KERNELS                                             \
  void log_prob(const Problem& p, int64_t begin, int64_t end, float* scratch);          \
  void log_prob_backward(const Problem& p, int64_t begin, int64_t end, float* scratch); \
  void mean(const Problem& p, int64_t begin, int64_t end, float* scratch);

namespace scalar {
LSGM_MIXTURE_LOGISTIC_CPU_KERNELS
}
namespace avx2 {
LSGM_MIXTURE_LOGISTIC_CPU_KERNELS
}
namespace avx512 {
LSGM_MIXTURE_LOGISTIC_CPU_KERNELS
}
#undef LSGM_MIXTURE_LOGISTIC_CPU_KERNELS

}  // namespace mixture_logistic
}  // namespace lsgm
