// The arithmetic of explicit Runge-Kutta methods, one element at a time:
//
//   f     = p z + alpha q (eps - r z), alpha = sigmoid(logit)     where there is a drift; stored as stage `slot`
//   y_new = y + h sum a_i k_i                                     f among the k_i, where it has a coefficient
//   error = h sum e_i k_i                                         where there is a norm
//   norm  = sqrt(mean((error / (atol + rtol max(|y|, |y_new|)))^2))
//
// and the control of the step size. This header is what the CPU and the CUDA code share. No torch.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/indexing.h"
#include "common/macros.h"
#include "common/math.h"
#include "common/scalars.h"

namespace lsgm {
namespace rk {

constexpr int kMaxStages = 16;

// Stages that are read, with their coefficients: those whose coefficients are all 0 are left out.
struct Row {
  int count;
  int slot[kMaxStages];
  double a[kMaxStages];  // of the solution
  double e[kMaxStages];  // of the error
};

// One call. Everything is contiguous: the state (batch, channels, spatial), stage i at k + i * elements.
struct Problem {
  int64_t batch, channels, spatial;
  DType dtype;  // of the state and the stages

  // The drift. Without one eps is null, and z is the result, which is only written.
  DType eps_dtype;
  const void* eps;
  Scalars logit;    // `channels` values; data is null where alpha = 1
  Scalars p, q, r;  // per sample
  int slot;         // the stage that f is stored in
  double a_new;     // its coefficients, which are not in `row`
  double e_new;

  const void* y;
  void* z;
  void* k;
  Row row;
  Scalars h;  // per sample

  // The norm; null without one. float64 for a float64 state, else float32: one value, or `batch` of them.
  void* norm;
  bool per_sample;
  double rtol, atol;

  Segments segments;  // made by cpu::plan or cuda::plan
  double* partials;   // [segments.count]: sums of squares
  const void* alpha;  // CPU: alpha of every channel, or of every element of a sample, in the type of the arithmetic
};

LSGM_HD int64_t elements(const Problem& p) { return p.batch * p.channels * p.spatial; }

// The arithmetic is in float64 for a float64 state, else in float32 (a float64 eps comes with a float64 state only).
template <class C>
LSGM_HD C drift(C eps, C z, C p, C alpha_q, C r) {
  return p * z + alpha_q * (eps - r * z);  // the difference first: at small times its terms nearly cancel
}

template <class C>
LSGM_HD C larger_magnitude(C a, C b) {
  const C x = a < C(0) ? -a : a;
  const C y = b < C(0) ? -b : b;
  return x > y || x != x ? x : y;  // NaN stays NaN
}

template <class C>
LSGM_HD C squared_ratio(C error, C y, C y_new, C rtol, C atol) {
  const C ratio = error / (atol + rtol * larger_magnitude(y, y_new));
  return ratio * ratio;
}

// -- step control -----------------------------------------------------------------------------------------------------

// One block of control per sample, or one for all: see rk_control in lsgm_fast/reference/rk.py.
enum Field { kT, kH, kTNext, kRetried, kSignal, kAccepted, kRejected, kNorm, kFields };

struct Control {
  int64_t count;
  const double* before;
  double* after;
  Scalars norm;
  double t_end, exponent, safety, min_factor, max_factor;
};

// The spacing of numbers next to x in direction `direction` (+1 or -1).
LSGM_HD double spacing(double x, double direction) {
  int64_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  if (x != x) return x;
  if (x == 0) {
    bits = 1;  // the smallest subnormal, whose sign does not matter
    double smallest;
    __builtin_memcpy(&smallest, &bits, sizeof smallest);
    return smallest;
  }
  bits += (x > 0) == (direction > 0) ? 1 : -1;
  double next;
  __builtin_memcpy(&next, &bits, sizeof next);
  return next > x ? next - x : x - next;
}

LSGM_HD double power(double base, double exponent) {
#if defined(__CUDA_ARCH__)
  return pow(base, exponent);
#else
  return std::pow(base, exponent);
#endif
}

LSGM_HD void advance(const Control& c, int64_t i) {
  const double* before = c.before + i * kFields;
  double* after = c.after + i * kFields;
  const double h = before[kH];
  if (h == 0) {  // arrived
    for (int field = 0; field < kFields; ++field) after[field] = before[field];
    return;
  }
  const double norm = scalar_at<double>(c.norm, i);
  const bool finite = norm - norm == 0;
  const bool accept = norm < 1;
  const double wanted = c.safety * power(norm, c.exponent);
  double factor;
  if (accept) {
    factor = wanted < c.max_factor ? wanted : c.max_factor;
    if (before[kRetried] > 0 && factor > 1) factor = 1;
  } else {
    factor = finite && wanted > c.min_factor ? wanted : c.min_factor;
  }
  const double direction = h > 0 ? 1 : h < 0 ? -1 : h;  // NaN stays NaN
  const double start = accept ? before[kTNext] : before[kT];
  const double smallest = 10 * spacing(start, direction);
  double size = (h < 0 ? -h : h) * factor;
  const bool too_small = !accept && size < smallest;
  if (accept && size < smallest) size = smallest;
  double end = start + direction * size;
  if (direction * (end - c.t_end) > 0) end = c.t_end;
  after[kT] = start;
  after[kH] = end - start;
  after[kTNext] = end;
  after[kRetried] = accept ? 0 : 1;
  after[kSignal] = !finite ? norm - norm : too_small ? HUGE_VAL : start;
  after[kAccepted] = before[kAccepted] + (accept ? 1 : 0);
  after[kRejected] = before[kRejected] + (accept ? 0 : 1);
  after[kNorm] = norm;
}

// CPU. `plan` makes the segments; `prepare` takes `scratch` bytes of memory, aligned as a double is, for the partial
// sums and for alpha, which it computes; `step` does the segments [begin, end) and may run in several threads; `finish`
// makes the norm from the partial sums, in a fixed order.
namespace cpu {

void plan(Problem& p);
int64_t scratch(const Problem& p);
void prepare(Problem& p, void* memory);
int64_t grain(const Problem& p);  // segments below which a second thread does not pay
void step(const Problem& p, int64_t begin, int64_t end);
void finish(const Problem& p);

}  // namespace cpu

namespace scalar {
void step(const Problem& p, int64_t begin, int64_t end);
}
namespace avx2 {
void step(const Problem& p, int64_t begin, int64_t end);
}

// CUDA: on `stream` (a cudaStream_t) of the current device. A failed launch throws std::runtime_error.
namespace cuda {

void plan(Problem& p);
void step(const Problem& p, void* stream);  // with the norm
void control(const Control& c, void* stream);

}  // namespace cuda

}  // namespace rk
}  // namespace lsgm
