// What each thread of the CUDA kernels of the Runge-Kutta family does. Compiled by nvcc into cuda.cu, and by the host
// compiler into csrc/tests/rk_threads.cpp, which runs every thread of a launch on the CPU and so proves, on a machine
// without a GPU, that each element is computed once and rightly. Only the sums across threads remain to cuda.cu.
#pragma once

#include <type_traits>

#include "common/vector_io.h"
#include "rk/rk.h"

namespace lsgm {
namespace rk {

constexpr int kThreads = 128;
constexpr int kWarp = 32;
constexpr int64_t kBlocks = 4096;  // beyond, a block takes several turns: bounds the partial sums to be summed
constexpr int kMaxSumThreads = 1024;
constexpr int kSumAhead = 4;  // partial sums that a thread loads at once: kBlocks of them need one turn

// Stages whose loads are issued together, before any arithmetic. Every row of a method of up to seven stages fits.
constexpr int kAhead = 6;
constexpr int kSlots = (kMaxStages + kAhead - 1) / kAhead * kAhead;

// In the place of eps' type, where there is no drift.
struct NoDrift {};

template <class Z>
using ComputeOf = typename Compute<Z, Z>::type;

// A launch's parameters: what its threads need of a Problem, with coefficients of the arithmetic's type.
template <class C>
struct Call {
  Segments segments;
  int64_t channels, spatial;
  const void* eps;
  bool mixed;  // else alpha = 1, and `logit` is some number that can be read
  Scalars logit, p, q, r, h;
  const void* y;
  void* z;
  void* stage_new;
  const void* stage[kSlots];
  int count;
  C a[kSlots], e[kSlots];  // 0 beyond `count`
  C a_new, e_new;
  C rtol, atol;
};

LSGM_HD unsigned char* stage_at(const Problem& p, int slot) {
  return static_cast<unsigned char*>(p.k) + slot * elements(p) * size_of(p.dtype);
}

template <class C>
LSGM_HD Call<C> call_of(const Problem& p) {
  Call<C> c{};
  c.segments = p.segments;
  c.channels = p.channels;
  c.spatial = p.spatial;
  c.eps = p.eps;
  c.mixed = p.logit.data != nullptr;
  c.logit = p.logit;
  if (!c.mixed) {
    c.logit = p.h;
    c.logit.stride = 0;
  }
  c.p = p.p;
  c.q = p.q;
  c.r = p.r;
  c.h = p.h;
  c.y = p.y;
  c.z = p.z;
  c.stage_new = p.eps == nullptr ? nullptr : stage_at(p, p.slot);
  c.count = p.row.count;
  for (int i = 0; i < p.row.count; ++i) {
    c.stage[i] = stage_at(p, p.row.slot[i]);
    c.a[i] = static_cast<C>(p.row.a[i]);
    c.e[i] = static_cast<C>(p.row.e[i]);
  }
  c.a_new = static_cast<C>(p.a_new);
  c.e_new = static_cast<C>(p.e_new);
  c.rtol = static_cast<C>(p.rtol);
  c.atol = static_cast<C>(p.atol);
  return c;
}

// How many elements one thread moves at once: 16 bytes of the state. An eps of a narrower type is then read 8 or 4
// bytes at a time, which costs less than holding twice as many elements of all stages in registers.
template <class Z>
LSGM_HD constexpr int vector_width() {
  return 16 / static_cast<int>(sizeof(Z));
}

// The elements per thread that `p` gets: its vector width where every access is then aligned, and its elements share
// sample and channel as far as those matter; else 1.
LSGM_HD int64_t width_of(const Problem& p) {
  const int64_t width = 16 / size_of(p.dtype);
  const bool drift = p.eps != nullptr;
  const bool per_sample = (p.norm != nullptr && p.per_sample) || p.h.stride != 0 ||
                          (drift && (p.p.stride != 0 || p.q.stride != 0 || p.r.stride != 0));
  const bool per_channel = drift && p.logit.data != nullptr;
  const int64_t alike = per_channel ? p.spatial : per_sample ? p.channels * p.spatial : elements(p);
  // The stages lie one behind the other: with the first, all are aligned.
  const bool wide = alike % width == 0 && aligned(p.y) && aligned(p.z) && aligned(p.k) && aligned(p.eps);
  return wide ? width : 1;
}

LSGM_HD void make_plan(Problem& p) {
  const int64_t turn = kThreads * width_of(p);
  const int64_t turns = larger(1, ceil_div(elements(p), turn * kBlocks));
  const int64_t runs = p.norm != nullptr && p.per_sample ? p.batch : 1;
  p.segments = make_segments(runs, elements(p) / runs, turn * turns);
}

struct Place {
  int64_t sample, channel;
};

// (Where the operands fit 32 bits, the code that nvcc makes of a 64-bit division does with a 32-bit one.)
template <class C>
LSGM_HD Place place_of(const Call<C>& c, int64_t at) {
  const int64_t plane = at / c.spatial;
  Place place;
  place.sample = plane / c.channels;
  place.channel = plane - place.sample * c.channels;
  return place;
}

template <class Z, int N, class C>
LSGM_HD void load_stages(const Call<C>& c, int first, int64_t at, Pack<Z, N> (&stages)[kAhead]) {
  for (int i = 0; i < kAhead; ++i) {
    stages[i] = Pack<Z, N>{};
    if (first + i < c.count) copy_aligned(stages[i], static_cast<const Z*>(c.stage[first + i]) + at);
  }
}

template <bool kNorm, class Z, int N, class C>
LSGM_HD void add_stages(
    const Call<C>& c, int first, const Pack<Z, N> (&stages)[kAhead], C (&increment)[N], C (&error)[N]) {
  for (int i = 0; i < kAhead; ++i) {
    for (int n = 0; n < N; ++n) {
      const C k = widen<C>(stages[i].v[n]);
      // Zero times a stage that is not finite would spoil the sum. Without a norm no coefficient is 0.
      if (!kNorm || c.a[first + i] != C(0)) increment[n] += c.a[first + i] * k;
      if (kNorm && c.e[first + i] != C(0)) error[n] += c.e[first + i] * k;
    }
  }
}

// N elements from `at` on. Returns their part of the sum of squares, 0 without a norm.
template <class Z, class E, bool kNorm, int N>
LSGM_HD double step_at(const Call<ComputeOf<Z>>& c, int64_t at) {
  using C = ComputeOf<Z>;
  constexpr bool kDrift = !std::is_same<E, NoDrift>::value;

  // All loads come before the first use of what they bring.
  Pack<Z, N> stages[kAhead], y, z;
  Pack<E, N> eps;
  copy_aligned(y, static_cast<const Z*>(c.y) + at);
  if constexpr (kDrift) {
    copy_aligned(z, static_cast<const Z*>(c.z) + at);
    copy_aligned(eps, static_cast<const E*>(c.eps) + at);
  }
  load_stages(c, 0, at, stages);
  Place place{0, 0};
  if (kDrift || c.h.stride != 0) place = place_of(c, at);
  const C h = scalar_at<C>(c.h, place.sample);

  C increment[N], error[N], f[N];
  for (int n = 0; n < N; ++n) increment[n] = error[n] = C(0);
  if constexpr (kDrift) {
    const C p = scalar_at<C>(c.p, place.sample);
    const C q = scalar_at<C>(c.q, place.sample);
    const C r = scalar_at<C>(c.r, place.sample);
    const C logit = scalar_at<C>(c.logit, place.channel);
    const C alpha_q = c.mixed ? mix_of(logit).network * q : q;
    for (int n = 0; n < N; ++n) {
      f[n] = drift(widen<C>(eps.v[n]), widen<C>(z.v[n]), p, alpha_q, r);
      if (c.a_new != C(0)) increment[n] = c.a_new * f[n];
      if (kNorm && c.e_new != C(0)) error[n] = c.e_new * f[n];
    }
  }
  add_stages<kNorm>(c, 0, stages, increment, error);
  for (int first = kAhead; first < c.count; first += kAhead) {
    load_stages(c, first, at, stages);
    add_stages<kNorm>(c, first, stages, increment, error);
  }

  if constexpr (kDrift) store<Z>(c.stage_new, DType(), at, f);
  double squares = 0;
  Pack<Z, N> y_new;
  for (int n = 0; n < N; ++n) {
    const C before = widen<C>(y.v[n]);
    narrow(before + h * increment[n], y_new.v[n]);
    // The norm compares the states that the solver keeps: the new one as rounded.
    if (kNorm) {
      squares += static_cast<double>(squared_ratio(h * error[n], before, widen<C>(y_new.v[n]), c.rtol, c.atol));
    }
  }
  copy_aligned(static_cast<Z*>(c.z) + at, y_new);
  return squares;
}

// The part of segment `s` that falls to one of a block's threads.
template <class Z, class E, bool kNorm, int N>
LSGM_HD double step_segment(const Call<ComputeOf<Z>>& c, int64_t s, int thread) {
  const Segment segment = segment_at(c.segments, s);
  const int64_t begin = segment.run * c.segments.length + segment.begin;
  double squares = 0;
  for (int64_t i = thread * N; i < segment.size; i += kThreads * N) {
    squares += step_at<Z, E, kNorm, N>(c, begin + i);
  }
  return squares;
}

// The partial sums of a run (everything, or one sample) that fall to one of `threads` threads.
LSGM_HD double partial_sums(const Problem& p, int64_t run, int thread, int threads) {
  const double* partials = p.partials + run * p.segments.per_run;
  double total = 0;
  for (int64_t i = thread; i < p.segments.per_run; i += kSumAhead * threads) {
    double x[kSumAhead];
    for (int n = 0; n < kSumAhead; ++n) {
      const int64_t at = i + n * threads;
      x[n] = at < p.segments.per_run ? partials[at] : 0;
    }
    for (int n = 0; n < kSumAhead; ++n) total += x[n];
  }
  return total;
}

LSGM_HD void store_norm(const Problem& p, int64_t run, double total) {
  const double mean = total / static_cast<double>(p.segments.length);
#if defined(__CUDA_ARCH__)
  const double norm = sqrt(mean);
#else
  const double norm = std::sqrt(mean);
#endif
  if (p.dtype == DType::float64) {
    static_cast<double*>(p.norm)[run] = norm;
  } else {
    static_cast<float*>(p.norm)[run] = static_cast<float>(norm);
  }
}

// Threads that sum the partial sums of a run: a power of two from a warp on.
LSGM_HD int sum_threads(const Problem& p) {
  int threads = kWarp;
  while (threads < kMaxSumThreads && threads < p.segments.per_run) threads *= 2;
  return threads;
}

// Calls Kernel::run<Z, E, kNorm, N>(p, argument) with the types and the width that `p` gets. (Plain templates: g++ 12
// rejects constants of a generic lambda inside another.)

template <class Kernel, class Z, class E, int N, class Argument>
static void run_norm(const Problem& p, Argument argument) {
  if (p.norm != nullptr) {
    Kernel::template run<Z, E, true, N>(p, argument);
  } else {
    Kernel::template run<Z, E, false, N>(p, argument);
  }
}

template <class Kernel, class Z, class E, class Argument>
static void run_width(const Problem& p, Argument argument) {
  if (width_of(p) == 1) {
    run_norm<Kernel, Z, E, 1>(p, argument);
  } else {
    run_norm<Kernel, Z, E, vector_width<Z>()>(p, argument);
  }
}

template <class Kernel, class Z, class Argument>
static void run_eps(const Problem& p, Argument argument) {
  if (p.eps == nullptr) return run_width<Kernel, Z, NoDrift>(p, argument);
  switch (p.eps_dtype) {
    case DType::float32:
      return run_width<Kernel, Z, float>(p, argument);
    case DType::float16:
      return run_width<Kernel, Z, Half>(p, argument);
    case DType::bfloat16:
      return run_width<Kernel, Z, BFloat16>(p, argument);
    case DType::float64:  // comes with a float64 state only
      if constexpr (std::is_same<Z, double>::value) return run_width<Kernel, Z, double>(p, argument);
  }
}

template <class Kernel, class Argument>
static void run_kernel(const Problem& p, Argument argument) {
  switch (p.dtype) {
    case DType::float32:
      return run_eps<Kernel, float>(p, argument);
    case DType::float64:
      return run_eps<Kernel, double>(p, argument);
    case DType::float16:  // comes without a drift, as bfloat16 does
      return run_width<Kernel, Half, NoDrift>(p, argument);
    case DType::bfloat16:
      return run_width<Kernel, BFloat16, NoDrift>(p, argument);
  }
}

}  // namespace rk
}  // namespace lsgm
