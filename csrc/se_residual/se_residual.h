// se_residual: a squeeze-and-excitation gate and the scaled residual add, in float32:
//
//   y = skip + scale gate x,  gate = sigmoid(W2 hidden + b2),  hidden = relu(W1 pooled + b1),  pooled = mean of x
//
// per sample and channel. With m positions, g the gradient of y, and each d the gradient of what is named behind it:
//
//   d gate (before the sigmoid) = scale gate (1 - gate) sum over positions of g x
//   d hidden (before the relu)  = W2^T d gate, where hidden > 0
//   grad_x                      = scale gate g + W1^T d hidden / m
//   grad_W2 = sum over samples of d gate hidden^T,  grad_W1 = sum over samples of d hidden pooled^T
//
// and the gradient of skip is g. This header is what the CPU and the CUDA code share: the description of one call and
// how it is cut into pieces. No torch.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/indexing.h"
#include "common/macros.h"

namespace lsgm {
namespace se_residual {

// One call. skip, x, y, grad and grad_x lie in the same order of memory and have one type; the weights are dense.
struct Problem {
  Order order;
  int64_t batch, channels, spatial, hidden;
  // A function of the shape alone. Rows: runs are the samples, cut along the positions. Planes: on the CPU the same, cut
  // along the channels; on the GPU runs are the planes, cut along the positions.
  Segments segments;
  int64_t pieces;  // partial sums of a channel
  DType dtype;
  float scale;

  const void* skip;
  const void* x;
  void* y;
  const float* reduce_weight;  // W1: (hidden, channels)
  const float* reduce_bias;
  const float* expand_weight;  // W2: (channels, hidden)
  const float* expand_bias;

  float* state;  // per sample: gate and pooled, one value per channel, and hidden; written forward, read backward

  const void* grad;
  void* grad_x;
  float* deltas;  // as `state`: d gate, W1^T d hidden / m and d hidden
  float* grad_reduce_weight;
  float* grad_reduce_bias;
  float* grad_expand_weight;
  float* grad_expand_bias;

  double* partials;  // [batch][pieces][channels]: sums of x, or of g x, over a piece
};

LSGM_HD int64_t elements(const Problem& p) { return p.batch * p.channels * p.spatial; }
LSGM_HD int64_t partial_count(const Problem& p) { return p.batch * p.pieces * p.channels; }

// What `state` and `deltas` hold of one sample.
LSGM_HD int64_t state_size(const Problem& p) { return 2 * p.channels + p.hidden; }

struct State {
  float* gate;
  float* pooled;
  float* hidden;
};

LSGM_HD State state_at(const Problem& p, float* all, int64_t sample) {
  State s;
  s.gate = all + sample * state_size(p);
  s.pooled = s.gate + p.channels;
  s.hidden = s.pooled + p.channels;
  return s;
}

// CPU. `plan` makes the segments, of which a sample has segments.per_run. `reduce`, `apply` and their backward twins do
// segments [begin, end), `gate` and `gate_backward` samples [begin, end), `parameters_backward` channels [begin, end).
// All may run in several threads; the order of the parts:
//
//   reduce, gate, apply      backward_reduce, gate_backward, backward_apply; parameters_backward after gate_backward
namespace cpu {

void plan(Problem& p);
int64_t grain(const Problem& p);  // segments below which a second thread does not pay
void reduce(const Problem& p, int64_t begin, int64_t end);
void gate(const Problem& p, int64_t begin, int64_t end);
void apply(const Problem& p, int64_t begin, int64_t end);
void backward_reduce(const Problem& p, int64_t begin, int64_t end);
void gate_backward(const Problem& p, int64_t begin, int64_t end);
void backward_apply(const Problem& p, int64_t begin, int64_t end);
void parameters_backward(const Problem& p, int64_t begin, int64_t end);

}  // namespace cpu

#define LSGM_SE_RESIDUAL_CPU_KERNELS                                      \
  void reduce(const Problem& p, int64_t begin, int64_t end);              \
  void gate(const Problem& p, int64_t begin, int64_t end);                \
  void apply(const Problem& p, int64_t begin, int64_t end);               \
  void backward_reduce(const Problem& p, int64_t begin, int64_t end);     \
  void gate_backward(const Problem& p, int64_t begin, int64_t end);       \
  void backward_apply(const Problem& p, int64_t begin, int64_t end);      \
  void parameters_backward(const Problem& p, int64_t begin, int64_t end);

namespace scalar {
LSGM_SE_RESIDUAL_CPU_KERNELS
}
namespace avx2 {
LSGM_SE_RESIDUAL_CPU_KERNELS
}
#undef LSGM_SE_RESIDUAL_CPU_KERNELS

// CUDA: on `stream` (a cudaStream_t) of the current device. A failed launch throws std::runtime_error. `plan` before
// the partials are allocated, with the pointers to x, skip, y, grad and grad_x in place.
namespace cuda {

void plan(Problem& p);
void forward(const Problem& p, void* stream);
void backward(const Problem& p, void* stream);

}  // namespace cuda

}  // namespace se_residual
}  // namespace lsgm
