// What each thread of the CUDA kernel of residual_add does. Compiled by nvcc into cuda.cu, and by the host compiler into
// csrc/tests/residual_add_threads.cpp, which runs every thread of a launch on the CPU and so proves, on a machine
// without a GPU, that each element is computed once and rightly.
//
// One thread computes N neighbours; the last one computes what is left, element by element.
#pragma once

#include "common/vector_io.h"
#include "residual_add/residual_add.h"

namespace lsgm {
namespace residual_add {

constexpr int kThreads = 256;

LSGM_HD bool can_vectorize(const Problem& p) {
  return aligned(p.x) && aligned(p.out) && (p.h == nullptr || aligned(p.h));
}

LSGM_HD int64_t blocks_of(const Problem& p, int64_t width) { return ceil_div(p.count, width * kThreads); }

// The N elements from N * vector on. kSum: there is an h.
template <class T, bool kSum, int N>
LSGM_HD void combine(const Problem& p, int64_t vector) {
  using C = typename Compute<T, T>::type;
  const int64_t at = vector * N;
  const C scale = scale_of(p, C());
  const auto* x = static_cast<const T*>(p.x);
  const auto* h = static_cast<const T*>(p.h);
  auto* out = static_cast<T*>(p.out);
  if (at + N <= p.count) {
    // Both loads are under way before the first is waited for.
    Pack<T, N> a, b, result;
    copy_aligned(a, x + at);
    if (kSum) copy_aligned(b, h + at);
    for (int k = 0; k < N; ++k) {
      C value = widen<C>(a.v[k]);
      if (kSum) value += widen<C>(b.v[k]);
      narrow(value * scale, result.v[k]);
    }
    copy_aligned(out + at, result);
    return;
  }
  for (int64_t i = at; i < p.count; ++i) {
    C value = widen<C>(x[i]);
    if (kSum) value += widen<C>(h[i]);
    narrow(value * scale, out[i]);
  }
}

// Calls Kernel::run<T, kSum, N>(p, argument) with the type and the width that `p` gets.

template <class Kernel, class T, bool kSum, class Argument>
static void run_width(const Problem& p, Argument argument) {
  if (can_vectorize(p)) {
    Kernel::template run<T, kSum, 16 / static_cast<int>(sizeof(T))>(p, argument);
  } else {
    Kernel::template run<T, kSum, 1>(p, argument);
  }
}

template <class Kernel, class Argument>
static void run_kernel(const Problem& p, Argument argument) {
  visit(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (p.h == nullptr) {
      run_width<Kernel, T, false>(p, argument);
    } else {
      run_width<Kernel, T, true>(p, argument);
    }
  });
}

}  // namespace residual_add
}  // namespace lsgm
