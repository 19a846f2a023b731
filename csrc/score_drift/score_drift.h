// score_drift: out = p z + a q (eps - r z), a = sigmoid(logit) per channel, or 1 without a logit; p, q and r shared or
// per sample.
//
// At small times q is large and a q (eps - r z) a small difference times a large number: the difference is formed
// first, with one rounding where the processor has a fused multiply-add.
//
// This header is what the CPU and the CUDA code share: the arithmetic, and the description of one call. No torch.
#pragma once

#include <cstdint>

#include "common/channelwise.h"
#include "common/macros.h"
#include "common/math.h"
#include "common/scalars.h"

namespace lsgm {
namespace score_drift {

using namespace channelwise;

// One call. The logit's data is null where there is none.
struct Problem : Operands {
  Scalars p, q;       // as r: `batch` values, or one with stride 0
  const void* table;  // CPU: a of every channel, in the type of the arithmetic
};

// Without a logit the channels of a sample are alike: one run in either order of memory.
LSGM_HD void join_channels(Problem& problem) {
  if (problem.logit.data != nullptr) return;
  problem.order = Order::planes;
  problem.spatial *= problem.channels;
  problem.channels = 1;
}

template <class C>
LSGM_HD C network_at(const Problem& problem, int64_t channel) {
  return problem.logit.data == nullptr ? C(1) : mix_of(scalar_at<C>(problem.logit, channel)).network;
}

template <class C>
struct Coefficients {
  C p, q, r;
};

template <class C>
LSGM_HD Coefficients<C> coefficients_at(const Problem& problem, int64_t sample) {
  return {scalar_at<C>(problem.p, sample), scalar_at<C>(problem.q, sample), scalar_at<C>(problem.r, sample)};
}

// `weight` is a q.
template <class C>
LSGM_HD C value(C p, C weight, C r, C eps, C z) {
  return p * z + weight * (eps - r * z);
}

// CPU. `fill_table` wants room for `channels` doubles; `forward` does the segments [begin, end) that plan_for_cpu made
// and may run in several threads.
namespace cpu {

void fill_table(const Problem& problem, void* table);
void forward(const Problem& problem, int64_t begin, int64_t end);

}  // namespace cpu

namespace scalar {
void forward(const Problem& problem, int64_t begin, int64_t end);
}
namespace avx2 {
void forward(const Problem& problem, int64_t begin, int64_t end);
}

// CUDA: on `stream` (a cudaStream_t) of the current device. A failed launch throws std::runtime_error.
namespace cuda {

void plan(Problem& problem);
void forward(const Problem& problem, void* stream);

}  // namespace cuda

}  // namespace score_drift
}  // namespace lsgm
