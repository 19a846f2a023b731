// What the CUDA kernels of group_norm_swish and its family are called with. No torch.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/indexing.h"

namespace lsgm {
namespace group_norm_swish {
namespace cuda {

// How a call is cut into blocks; a function of the shape and of the alignment of the pointers.
// A block has channels of one cell, whole groups side by side, and positions of one sample. A launch that does
// everything has whole cells; else `splits` blocks share the channels of a cell and `parts` its positions.
struct Plan {
  bool whole;
  int width;             // elements at a time, neighbours in memory
  int columns, lines;    // threads side by side, and what they walk along: see threads.h
  int rounds;            // planes: times that the lines go on to further channels
  int64_t cell;          // channels of one
  int64_t cells, splits, parts;
  int64_t size;          // positions of a part
  int64_t blocks;
};

// One call. x, residual, v, y, grad, grad_v and grad_x lie in the same order of memory and have one type, not float64;
// everything else is dense float32. What is null is not there.
struct Call {
  Order order;
  int64_t batch, channels, spatial, groups;
  DType dtype;
  bool swish;
  double eps;
  double scale;  // of the sum with the residual, 1 without

  const void* x;              // backward: x or v
  const void* residual;       // v = (x + residual) scale, else v = x + channel_bias
  const float* channel_bias;  // (N, C)
  const float* weight;        // (C,), as bias
  const float* bias;
  void* v;        // with a residual
  void* y;        // with mean and rstd; without it, factor and shift
  float* mean;    // (N, groups), as rstd; read backward
  float* rstd;
  float* factor;  // (N, C), as shift
  float* shift;

  const void* grad;
  const void* grad_v;  // with a residual: the gradient that v has of its own
  void* grad_x;        // with a residual: of either summand
  float* grad_weight;
  float* grad_bias;
  float* grad_channel;  // (N, C), with a channel bias

  double* partials;  // partial_count numbers
  float* sums;       // backward: sum_count numbers
  Plan plan;
};

// First of all, when the pointers to tensors are there: fills in `plan`. Then comes memory for `partials` and `sums`.
void plan(Call& c);
int64_t partial_count(const Call& c);
int64_t sum_count(const Call& c);

// Enqueued on `stream`. The batch is not empty.
void forward(const Call& c, void* stream);
void backward(const Call& c, void* stream);

}  // namespace cuda
}  // namespace group_norm_swish
}  // namespace lsgm
