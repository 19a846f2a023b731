// group_norm_swish: GroupNorm over the channels of a group and all positions of a sample, then Swish, in float32:
//
//   v = x + channel_bias, or v = (x + residual) scale, stored in the type of x
//   u = (v - mean) rstd weight + bias,  y = u sigmoid(u), or y = u without Swish
//
//   with d = grad y'(u), and n elements per group:
//   grad_bias   = sum d                      over samples and positions
//   grad_weight = sum rstd d (v - mean)      the same
//   grad_v      = rstd (weight d - A / n - (v - mean) rstd^2 B / n)
//                 A = sum weight d, B = sum weight d (v - mean), over the group
//   grad_channel_bias = sum grad_v           over positions
//
// A channel bias is one number per sample and channel: it is never added to x, but joins the mean in one offset per
// sample and channel, and moves the channels' means against each other in the variance.
//
// The description of a call and how it is cut into pieces. No torch.
//
// Statistics: sums of differences from a pivot, the mean of a block's first elements, with sum d and sum d^2, where
// M2 = sum d^2 - (sum d)^2 / n loses at most a factor of (block / first elements) in accuracy, wherever the mean lies
// and whatever the order of the values. The moments of the blocks and of the channels are then combined about their
// common mean (Chan, Golub, LeVeque 1979), in float64.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/dtypes.h"
#include "common/indexing.h"
#include "common/macros.h"

namespace lsgm {
namespace group_norm_swish {

// CPU. A unit is `groups` groups of a sample, of which `per_sample` make up all; each is cut into `pieces` of `size`
// positions, one where units are enough for all threads. A function of the shape alone.
struct Units {
  int64_t groups, per_sample;
  int64_t size, pieces;
  int64_t count;  // of units
};

struct Moments {
  double mean, m2;  // m2: the sum of the squared distances from the mean
};

// Sums over positions of one sample and channel: of d, of d (v - mean) and, for a channel bias, of v - mean.
enum SumRow : int32_t { kGrad, kGradCentred, kCentred, kSumRows };

// One call. x, residual, v, y and the gradients of their size lie in the same order of memory and have one type;
// everything else is dense, and float32.
struct Problem {
  Order order;
  int64_t batch, channels, spatial;
  int64_t groups;  // of one sample; they divide the channels
  Units units;     // CPU, made by plan
  DType dtype;
  bool swish;
  float scale;  // of the sum with the residual; otherwise 1
  double eps;

  const void* x;         // forward
  const void* residual;  // forward, or null
  void* v;               // x itself where there is no residual
  const float* weight;
  const float* bias;
  const float* channel_bias;  // (batch, channels), or null
  void* y;                    // null: factor and shift are wanted
  float* factor;              // (batch, channels)
  float* shift;
  float* mean;  // (batch, groups); written forward, if not null, and read backward
  float* rstd;

  const void* grad;
  const void* grad_v;  // of v beside its part in y, or null
  void* grad_x;        // and of the residual
  float* grad_weight;
  float* grad_bias;
  float* grad_channel_bias;  // null without a channel bias

  Moments* moments;  // CPU; moment_count
  double* sums;      // CPU; sum_count
};

LSGM_HD int64_t elements(const Problem& p) { return p.batch * p.channels * p.spatial; }
LSGM_HD int64_t channels_per_group(const Problem& p) { return p.channels / p.groups; }
LSGM_HD int64_t group_elements(const Problem& p) { return channels_per_group(p) * p.spatial; }

// Of the first element of a channel at a position.
LSGM_HD int64_t element_at(const Problem& p, int64_t sample, int64_t channel, int64_t position) {
  if (p.order == Order::planes) return (sample * p.channels + channel) * p.spatial + position;
  return (sample * p.spatial + position) * p.channels + channel;
}

LSGM_HD double rstd_of(const Problem& p, double m2) {
  const double positive = m2 < 0 ? 0 : m2;  // rounding may leave it a little below 0; NaN stays
  return 1 / std::sqrt(positive / static_cast<double>(group_elements(p)) + p.eps);
}

// What an element's arithmetic needs of its sample and channel: u = (v + offset) scale + shift, where v has no channel
// bias yet. The offset's own rounding, which is large far from zero, is made up for in the shift.
struct Affine {
  float offset, scale, shift;
};

LSGM_HD double offset_of(float channel_bias, double mean) { return static_cast<double>(channel_bias) - mean; }

// What the offset loses as a float32 number.
LSGM_HD double lost_by(float channel_bias, double mean) {
  const double offset = offset_of(channel_bias, mean);
  return offset - static_cast<double>(static_cast<float>(offset));
}

LSGM_HD Affine affine_of(float weight, float bias, float channel_bias, double mean, double rstd) {
  const double scale = static_cast<double>(weight) * rstd;
  Affine a;
  a.offset = static_cast<float>(offset_of(channel_bias, mean));
  a.scale = static_cast<float>(scale);
  a.shift = static_cast<float>(static_cast<double>(bias) + lost_by(channel_bias, mean) * scale);
  return a;
}

// CPU. `forward` and `backward` work on units [begin, end), `scratch_size` numbers at `scratch` each; `finish` ends
// backward. Where a unit has several pieces, these are done part by part over pieces [begin, end):
//
//   statistics, combine | apply              backward_reduce, combine_sums | backward_apply
//
// Of float32, the reduction leaves its d in grad_x, and the rest goes on from there.
namespace cpu {

void plan(Problem& p, bool backward);
int64_t grain(const Problem& p);  // units or pieces below which a second thread does not pay
int64_t moment_count(const Problem& p);
int64_t sum_count(const Problem& p);
int64_t scratch_size(const Problem& p);

void forward(const Problem& p, int64_t begin, int64_t end, double* scratch);
void statistics(const Problem& p, int64_t begin, int64_t end, double* scratch);
void combine(const Problem& p);
void apply(const Problem& p, int64_t begin, int64_t end, double* scratch);

void backward(const Problem& p, int64_t begin, int64_t end, double* scratch);
void backward_reduce(const Problem& p, int64_t begin, int64_t end, double* scratch);
void combine_sums(const Problem& p);
void backward_apply(const Problem& p, int64_t begin, int64_t end, double* scratch);
void finish(const Problem& p);

}  // namespace cpu

#define LSGM_GROUP_NORM_SWISH_CPU_KERNELS                                              \
  void forward(const Problem& p, int64_t begin, int64_t end, double* scratch);         \
  void statistics(const Problem& p, int64_t begin, int64_t end, double* scratch);      \
  void apply(const Problem& p, int64_t begin, int64_t end, double* scratch);           \
  void backward(const Problem& p, int64_t begin, int64_t end, double* scratch);        \
  void backward_reduce(const Problem& p, int64_t begin, int64_t end, double* scratch); \
  void backward_apply(const Problem& p, int64_t begin, int64_t end, double* scratch);

namespace scalar {
LSGM_GROUP_NORM_SWISH_CPU_KERNELS
}
namespace avx2 {
LSGM_GROUP_NORM_SWISH_CPU_KERNELS
}
namespace avx512 {
LSGM_GROUP_NORM_SWISH_CPU_KERNELS
}
#undef LSGM_GROUP_NORM_SWISH_CPU_KERNELS

}  // namespace group_norm_swish
}  // namespace lsgm
