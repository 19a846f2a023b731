// bn_swish: BatchNorm over samples and positions, then Swish, in float32:
//
//   u = (x - mean) rstd weight + bias,  y = u sigmoid(u), or y = u without Swish
//
//   with d = grad y'(u), and n elements per channel:
//   grad_bias   = sum d
//   grad_weight = rstd sum d (x - mean)
//   grad_x      = weight rstd (d - grad_bias / n - (x - mean) rstd grad_weight / n), or weight rstd d where the
//                 statistics are not those of the batch
//
// The description of a call and how it is cut into pieces. No torch.
//
// Statistics: one pass over a chunk about a pivot, the mean of the chunk's first elements, with both sums of the
// differences, sum d and sum d^2: M2 = sum d^2 - (sum d)^2 / n loses at most a factor of (chunk / first elements) in
// accuracy, wherever the mean lies and whatever the order of the values. The chunks' moments are then combined about
// their common mean (Chan, Golub, LeVeque 1979), in float64.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/dtypes.h"
#include "common/indexing.h"
#include "common/macros.h"

namespace lsgm {
namespace bn_swish {

// How the elements of a channel are cut into chunks; a function of the shape alone.
//   planes: `samples` samples and, of each, `size` positions, of one channel. With the statistics of the batch the chunks
//           of a channel follow each other, on the CPU otherwise those of a sample.
//   rows:   `size` rows of all channels; `per_channel` chunks in all.
struct Chunks {
  int64_t samples, size;
  int64_t pieces;  // of one plane
  int64_t per_channel;
  int64_t count;
};

struct Moments {
  double mean, m2;  // m2: the sum of the squared distances from the mean
};

struct Sums {
  double grad, centred;  // of d, and of d (x - mean)
};

// Rows of `table`, each of `channels` floats: what an element's arithmetic needs of its channel.
enum TableRow : int32_t { kMinusMean, kScale, kBias, kSlope, kOffset, kTableRows };

// One call. x, y, grad and grad_x lie in the same order of memory and have one type; everything per channel is dense.
struct Problem {
  Order order;
  int64_t batch, channels, spatial;
  Chunks chunks;  // made by plan
  DType dtype;
  bool batch_stats, swish;
  double eps;
  double count;  // elements per channel that the statistics are of: with several processes, those of all of them

  const void* x;
  const float* weight;
  const float* bias;
  const float* running_mean;
  const float* running_var;
  void* y;
  float* mean;  // written forward, read backward
  float* var;   // unbiased
  float* rstd;

  const void* grad;
  void* grad_x;
  float* grad_weight;
  float* grad_bias;

  double* partials;  // 2 * per_channel * channels: a chunk's moments or sums
  Moments* moments;  // CPU; per channel, of this process's elements; then, if others join, of all
  Sums* sums;        // CPU; the same
  float* table;      // CPU
};

LSGM_HD int64_t elements(const Problem& p) { return p.batch * p.channels * p.spatial; }
LSGM_HD int64_t partial_count(const Problem& p) { return 2 * p.chunks.per_channel * p.channels; }

// Chunk k of a channel.
struct Chunk {
  int64_t sample, samples;  // planes only
  int64_t begin, size;      // positions, or rows over all samples
};

LSGM_HD Chunk chunk_at(const Problem& p, int64_t k) {
  Chunk c;
  c.sample = 0;
  c.samples = 1;
  if (p.order == Order::planes) {
    const int64_t group = k / p.chunks.pieces;
    c.sample = group * p.chunks.samples;
    c.samples = smaller(p.chunks.samples, p.batch - c.sample);
    c.begin = (k - group * p.chunks.pieces) * p.chunks.size;
    c.size = smaller(p.chunks.size, p.spatial - c.begin);
  } else {
    c.begin = k * p.chunks.size;
    c.size = smaller(p.chunks.size, p.batch * p.spatial - c.begin);
  }
  return c;
}

// Where the two numbers of chunk k and a channel are, `which` 0 or 1.
LSGM_HD int64_t partial_at(const Problem& p, int64_t k, int64_t which, int64_t channel) {
  if (p.order == Order::planes) return (channel * p.chunks.per_channel + k) * 2 + which;
  return (k * 2 + which) * p.channels + channel;
}

// Elements of each channel in chunk k.
LSGM_HD int64_t chunk_elements(const Problem& p, int64_t k) {
  const Chunk c = chunk_at(p, k);
  return c.samples * c.size;
}

// mean, var and rstd of a channel: of its moments, or the running ones.
LSGM_HD void store_moments(const Problem& p, int64_t channel, Moments moments) {
  const double m2 = moments.m2 < 0 ? 0 : moments.m2;  // rounding may leave it a little below 0
  p.mean[channel] = static_cast<float>(moments.mean);
  p.var[channel] = static_cast<float>(m2 / (p.count - 1));
  p.rstd[channel] = static_cast<float>(1 / std::sqrt(m2 / p.count + p.eps));
}

LSGM_HD void store_running(const Problem& p, int64_t channel) {
  p.mean[channel] = p.running_mean[channel];
  p.var[channel] = p.running_var[channel];
  p.rstd[channel] = static_cast<float>(1 / std::sqrt(static_cast<double>(p.running_var[channel]) + p.eps));
}

// CPU. The four parts work on chunks [begin, end) and may run in several threads; what stands between them works on
// channels [begin, end). Where a batch is spread over processes, `moments` and `sums` are what they exchange:
//
//   statistics, combine_moments | normalise, apply      backward_reduce, combine_sums | coefficients, backward_apply
//
// Of float32, backward_reduce leaves its d in grad_x, and backward_apply goes on from there.
// `backward_both` is reduce and apply in one pass, for statistics that are not the batch's. Backward begins with
// `restore`, which refills the table.
namespace cpu {

void plan(Problem& p);
int64_t grain(const Problem& p);  // chunks below which a second thread does not pay
bool by_channel(const Problem& p);  // whether all parts of a channel can follow each other, while it is in the cache

void statistics(const Problem& p, int64_t begin, int64_t end);
void combine_moments(const Problem& p, int64_t begin, int64_t end);
void normalise(const Problem& p, int64_t begin, int64_t end);
void apply(const Problem& p, int64_t begin, int64_t end);

void restore(const Problem& p, int64_t begin, int64_t end);
void backward_reduce(const Problem& p, int64_t begin, int64_t end);
void combine_sums(const Problem& p, int64_t begin, int64_t end);
void coefficients(const Problem& p, int64_t begin, int64_t end);
void backward_apply(const Problem& p, int64_t begin, int64_t end);
void backward_both(const Problem& p, int64_t begin, int64_t end);

}  // namespace cpu

#define LSGM_BN_SWISH_CPU_KERNELS                                     \
  void statistics(const Problem& p, int64_t begin, int64_t end);      \
  void apply(const Problem& p, int64_t begin, int64_t end);           \
  void backward_reduce(const Problem& p, int64_t begin, int64_t end); \
  void backward_apply(const Problem& p, int64_t begin, int64_t end);  \
  void backward_both(const Problem& p, int64_t begin, int64_t end);

namespace scalar {
LSGM_BN_SWISH_CPU_KERNELS
}
namespace avx2 {
LSGM_BN_SWISH_CPU_KERNELS
}
namespace avx512 {
LSGM_BN_SWISH_CPU_KERNELS
}
#undef LSGM_BN_SWISH_CPU_KERNELS

// CUDA. The same four parts, each enqueued on `stream`:
//
//   statistics | apply,  backward_reduce | backward_apply
//
// statistics leaves mean, var and rstd of this process's elements, and apply reads mean and rstd; backward_reduce
// leaves grad_weight and grad_bias, which backward_apply reads, with `count`: these are what processes exchange. Where
// the statistics are the running ones, apply alone is forward, and backward_both is backward. Where channels are small,
// forward and backward do two parts in one launch.
namespace cuda {

void plan(Problem& p);

void statistics(const Problem& p, void* stream);
void apply(const Problem& p, void* stream);
void forward(const Problem& p, void* stream);

void backward_reduce(const Problem& p, void* stream);
void backward_apply(const Problem& p, void* stream);
void backward_both(const Problem& p, void* stream);
void backward(const Problem& p, void* stream);

}  // namespace cuda

}  // namespace bn_swish
}  // namespace lsgm
