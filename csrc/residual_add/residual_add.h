// residual_add: out = (x + h) scale, and its gradient for both of them, grad scale: the same without an h.
//
// This header is what the CPU and the CUDA code share: the arithmetic, and the description of one call. No torch.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/indexing.h"
#include "common/macros.h"

namespace lsgm {
namespace residual_add {

// One call over `count` elements of dense memory, in whatever order; all tensors have one type and order.
struct Problem {
  int64_t count;
  DType dtype;
  const void* x;  // or the incoming gradient
  const void* h;  // null for the gradient
  void* out;
  double scale;
  float scale32;  // the same, rounded: few GPUs are quick at that
};

LSGM_HD float scale_of(const Problem& p, float) { return p.scale32; }
LSGM_HD double scale_of(const Problem& p, double) { return p.scale; }

// CPU: `run` does the segments [begin, end) and may run in several threads.
namespace cpu {

Segments segments(const Problem& p);
int64_t grain(const Problem& p);  // segments below which a second thread does not pay
void run(const Problem& p, int64_t begin, int64_t end);

}  // namespace cpu

namespace scalar {
void run(const Problem& p, int64_t begin, int64_t end);
}
namespace avx2 {
void run(const Problem& p, int64_t begin, int64_t end);
}

// CUDA: on `stream` (a cudaStream_t) of the current device. A failed launch throws std::runtime_error.
namespace cuda {

void run(const Problem& p, void* stream);

}  // namespace cuda

}  // namespace residual_add
}  // namespace lsgm
