// fir_resample: resampling by two in height and width. Per axis, with zeros beside the image,
//
//   down: y[i]     = x[2i - 1] + 3 x[2i] + 3 x[2i + 1] + x[2i + 2]
//   up:   y[2i]    = x[i - 1] + 3 x[i],  y[2i + 1] = 3 x[i] + x[i + 1]
//
// or, without the filter, y[i] = x[2i] + x[2i + 1] and y[2i] = y[2i + 1] = x[i]; all of it times `scale`. As matrices
// the two are transposes of each other, so each is the other's backward, with the same scale. Optionally every x is
// swish(x factor + shift) first, per sample and channel.
//
// No torch.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/indexing.h"
#include "common/macros.h"

namespace lsgm {
namespace fir_resample {

// One call. x and out are dense, in one order of memory, and have one type.
struct Problem {
  Order order;
  bool up, fir;
  int64_t batch, channels, height, width;  // of x
  DType dtype;
  float scale;
  const void* x;
  void* out;
  const float* factor;  // [batch][channels]; null where x is taken as it is
  const float* shift;
  // CPU. A step makes two lines of the result (up), or one; a unit does `band_steps` of them, of a plane or of `group`
  // channels of a sample.
  int64_t lanes;  // of the registers: 16 for the AVX-512 kernels, 8 for the others
  int64_t steps, band_steps, bands;
  int64_t group, groups;
};

// What the result of the whole operation is scaled by; also that of its backward, where `up` is still its own.
LSGM_HD float scale_of(bool up, bool fir) { return fir ? (up ? 0.0625f : 0.015625f) : (up ? 1.0f : 0.25f); }

LSGM_HD int64_t out_height(const Problem& p) { return p.up ? 2 * p.height : p.height / 2; }
LSGM_HD int64_t out_width(const Problem& p) { return p.up ? 2 * p.width : p.width / 2; }

// CPU. `plan` chooses `lanes`, unless it is set, by the processor, and cuts the work by the shape. `run` does the units
// [begin, end) with scratch_size floats of its own.
namespace cpu {

void plan(Problem& p);
int64_t scratch_size(const Problem& p);
int64_t units(const Problem& p);
int64_t grain(const Problem& p);
void run(const Problem& p, int64_t begin, int64_t end, float* scratch);

}  // namespace cpu

// CUDA, on `stream` (a cudaStream_t).
namespace cuda {

void run(const Problem& p, void* stream);

}  // namespace cuda

#define LSGM_FIR_RESAMPLE_CPU_KERNELS void run(const Problem& p, int64_t begin, int64_t end, float* scratch);

namespace scalar {
LSGM_FIR_RESAMPLE_CPU_KERNELS
}
namespace avx2 {
LSGM_FIR_RESAMPLE_CPU_KERNELS
}
namespace avx512 {
LSGM_FIR_RESAMPLE_CPU_KERNELS
}
#undef LSGM_FIR_RESAMPLE_CPU_KERNELS

}  // namespace fir_resample
}  // namespace lsgm
