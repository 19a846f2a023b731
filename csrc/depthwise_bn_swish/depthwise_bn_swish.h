// depthwise_bn_swish: y = post(conv(pre(x))), a 5x5 depthwise convolution of stride 1 or 2 that pads with 2 zeros, and
// pre(x) = swish(x * scale + shift) per channel, post alike; either may be absent.
//
// Backward is that of the convolution alone:
//   grad_x[i, j]      = sum over y, x, with i = stride y + a - 2 and j = stride x + b - 2, of grad[y, x] weight[a, b]
//   grad_weight[a, b] = sum over samples, y, x of grad[y, x] x[stride y + a - 2, stride x + b - 2]
//
// No torch.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/indexing.h"
#include "common/macros.h"

namespace lsgm {
namespace depthwise_bn_swish {

constexpr int64_t kTaps = 25;
constexpr int64_t kRowChannels = 16;  // of a unit of rows: float32 fills a cache line with them
constexpr int64_t kMostBlocks = 8;

// One call. x and out (in backward: grad and grad_x too) are dense, in one order of memory, and have one type.
struct Problem {
  Order order;
  int64_t batch, channels, height, width, stride;
  int64_t out_height, out_width;
  DType dtype, weight_dtype;
  const void* x;
  void* out;
  // Per channel, of type `dtype`, dense; null where that side is the identity.
  const void* pre_scale;
  const void* pre_shift;
  const void* post_scale;
  const void* post_shift;
  const void* weight;
  const void* grad;
  void* grad_x;
  void* grad_weight;  // of type weight_dtype
  const float* table;  // the weights in the order in which the kernels read them
  double* partials;    // CPU: [sample_runs][channels][kTaps]; CUDA: [chunks][channels][26]
  int64_t lanes;        // CPU: what is handled side by side, 16 by the AVX-512 kernels and 8 by the others
  int64_t bands;        // pieces of a plane, of band_rows rows of the output
  int64_t band_rows;
  int64_t blocks;       // of a unit: channels (planes) or groups of `lanes` channels (rows)
  int64_t groups;       // of `blocks`, over all channels
  int64_t run_samples;  // backward: samples of a unit
  int64_t sample_runs;
};

LSGM_HD int64_t out_size(int64_t size, int64_t stride) { return (size + stride - 1) / stride; }

// CPU. `plan` chooses `lanes`, unless it is set, by the processor, and cuts the work by them and the shape. A caller gives `table` (table_size floats, filled by fill_table), and
// scratch_size floats to every thread. `forward` and `backward` do the units [begin, end).
namespace cpu {

void plan(Problem& p);
int64_t table_size(const Problem& p);
int64_t scratch_size(const Problem& p, bool backward);
int64_t forward_units(const Problem& p);
int64_t backward_units(const Problem& p);
int64_t forward_grain(const Problem& p);
int64_t backward_grain(const Problem& p);
void fill_table(const Problem& p, float* table);
void forward(const Problem& p, int64_t begin, int64_t end, float* scratch);
void backward(const Problem& p, int64_t begin, int64_t end, float* scratch);
void finish(const Problem& p);

}  // namespace cpu

// CUDA, on `stream` (a cudaStream_t). The weights have the type of x. For `backward` a caller gives `partials`.
namespace cuda {

int64_t partial_count(const Problem& p);
void forward(const Problem& p, void* stream);
void backward(const Problem& p, void* stream);

}  // namespace cuda

#define LSGM_DEPTHWISE_CPU_KERNELS                                            \
  void forward(const Problem& p, int64_t begin, int64_t end, float* scratch); \
  void backward(const Problem& p, int64_t begin, int64_t end, float* scratch);

namespace scalar {
LSGM_DEPTHWISE_CPU_KERNELS
}
namespace avx2 {
LSGM_DEPTHWISE_CPU_KERNELS
}
namespace avx512 {
LSGM_DEPTHWISE_CPU_KERNELS
}
#undef LSGM_DEPTHWISE_CPU_KERNELS

}  // namespace depthwise_bn_swish
}  // namespace lsgm
