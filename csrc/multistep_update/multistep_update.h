// multistep_update: out = c_0 y + c_1 history_1 + ... + c_n history_n, n from 0 to 4.
//
// A coefficient is a number times a factor that may depend on the sample, on the channel, on both or on neither.
//
// This header is what the CPU and the CUDA code share: the arithmetic, and the description of one call. No torch.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/indexing.h"
#include "common/macros.h"

namespace lsgm {
namespace multistep_update {

constexpr int kMaxTerms = 5;  // the state and up to four history entries

struct Coefficient {
  double scale;
  float scale32;       // the same, rounded: few GPUs are quick at that
  const void* factor;  // float32 or float64; null: 1
  DType dtype;         // of the factor
  int64_t sample_stride, channel_stride;
};

// One call. The state, the history and the result lie in the same order of memory, dense; the result has the state's
// type, all history entries have one type (without any: the state's).
struct Problem {
  Order order;
  int64_t batch, channels, spatial;
  int terms;  // 1 + history entries
  DType y_dtype, h_dtype;
  const void* inputs[kMaxTerms];  // the state, then the history
  Coefficient coefficients[kMaxTerms];
  void* out;
};

LSGM_HD float scale_of(const Coefficient& c, float) { return c.scale32; }
LSGM_HD double scale_of(const Coefficient& c, double) { return c.scale; }

template <class C>
LSGM_HD C coefficient_at(const Coefficient& c, int64_t sample, int64_t channel) {
  const C scale = scale_of(c, C());
  if (c.factor == nullptr) return scale;
  const int64_t i = sample * c.sample_stride + channel * c.channel_stride;
  return scale * (c.dtype == DType::float64 ? static_cast<C>(static_cast<const double*>(c.factor)[i])
                                            : static_cast<C>(static_cast<const float*>(c.factor)[i]));
}

LSGM_HD bool depends_on_sample(const Problem& p) {
  for (int t = 0; t < p.terms; ++t) {
    if (p.coefficients[t].sample_stride != 0) return true;
  }
  return false;
}

LSGM_HD bool depends_on_channel(const Problem& p) {
  for (int t = 0; t < p.terms; ++t) {
    if (p.coefficients[t].channel_stride != 0) return true;
  }
  return false;
}

LSGM_HD int64_t elements(const Problem& p) { return p.batch * p.channels * p.spatial; }

// CPU: `forward` does the segments [begin, end) of the plan and may run in several threads.
namespace cpu {

// `segments` cuts runs. columns = 0: a run's elements share their coefficients, and `runs_per_sample` runs make a
// sample, a channel each where there are several. Else a run is rows of `columns` elements; element j of every row has
// the coefficients of channel j / repeat.
struct Plan {
  Segments segments;
  int64_t runs_per_sample;
  int64_t columns, repeat;
  int64_t grain;  // segments below which a second thread does not pay
};

Plan plan(const Problem& p);
void forward(const Problem& p, const Plan& plan, int64_t begin, int64_t end);

}  // namespace cpu

namespace scalar {
void forward(const Problem& p, const cpu::Plan& plan, int64_t begin, int64_t end);
}
namespace avx2 {
void forward(const Problem& p, const cpu::Plan& plan, int64_t begin, int64_t end);
}

// CUDA: on `stream` (a cudaStream_t) of the current device. A failed launch throws std::runtime_error.
namespace cuda {

void forward(const Problem& p, void* stream);

}  // namespace cuda

}  // namespace multistep_update
}  // namespace lsgm
