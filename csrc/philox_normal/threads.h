// What each thread of the CUDA kernel of philox_normal does. Compiled by nvcc into cuda.cu, and by the host compiler
// into csrc/tests/philox_normal_threads.cpp, which runs every thread of a launch on the CPU and so proves, on a machine
// without a GPU, that each element is computed once and rightly.
#pragma once

#include "common/vector_io.h"
#include "philox_normal/philox_normal.h"

namespace lsgm {
namespace philox_normal {

constexpr int kThreads = 256;
constexpr int64_t kGroupsPerThread = 4;  // enough to pay for finding out what to do; arithmetic is what takes the time
constexpr int64_t kMaxRows = 65535;      // of the grid; a loop does the rest

// Elements that one thread makes and stores at once: a multiple of a block that fills 16 bytes.
template <class T>
LSGM_HD constexpr int vector_width() {
  return sizeof(T) < 4 ? 8 : 4;
}

LSGM_HD bool can_vectorize(const Problem& p, int64_t width) { return p.elements % width == 0 && aligned(p.out); }

// A block of threads handles `rows` samples side by side, each by `lanes` threads, a power of two.
struct Launch {
  int64_t columns;  // of the grid: blocks of threads along a sample
  int64_t row_blocks;
  int lanes;
  int rows;
};

LSGM_HD Launch launch_of(const Problem& p, int64_t width) {
  const int64_t groups = ceil_div(p.elements, larger(width, kBlock));
  Launch l{};
  l.lanes = 1;
  while (l.lanes < kThreads && l.lanes < groups) l.lanes *= 2;
  l.rows = kThreads / l.lanes;
  l.columns = ceil_div(groups, l.lanes * kGroupsPerThread);
  l.row_blocks = smaller(ceil_div(p.samples, l.rows), kMaxRows);
  return l;
}

// The elements from `at` on: N of them, or with N = 1 those of one block, one by one.
template <class T, int N>
LSGM_HD void make_group(const Problem& p, uint32_t index, int64_t start, int64_t at) {
  using C = typename Compute<T, T>::type;
  if constexpr (N == 1) {
    C n[kBlock];
    normals_of(words_of(p, index, at / kBlock), n);
    for (int64_t k = 0; k < kBlock; ++k) {
      if (at + k < p.elements) narrow(n[k], static_cast<T*>(p.out)[start + at + k]);
    }
  } else {
    C all[N];
    for (int first = 0; first < N; first += kBlock) {
      C n[kBlock];
      normals_of(words_of(p, index, (at + first) / kBlock), n);
      for (int k = 0; k < kBlock; ++k) all[first + k] = n[k];
    }
    store<T>(p.out, p.dtype, start + at, all);
  }
}

template <class T, int N>
LSGM_HD void make_normals(const Problem& p, const Launch& l, int64_t column, int64_t row_block, int thread) {
  constexpr int64_t width = N == 1 ? kBlock : N;
  const int row = thread / l.lanes;
  const int64_t first = (column * l.lanes + thread % l.lanes) * width, step = l.columns * l.lanes * width;
  for (int64_t sample = row_block * l.rows + row; sample < p.samples; sample += l.row_blocks * l.rows) {
    const uint32_t index = index_of(p, sample);
    for (int64_t at = first; at < p.elements; at += step) make_group<T, N>(p, index, sample * p.elements, at);
  }
}

// Calls Kernel::run<T, N>(p, argument) with the type and the width that `p` gets.

template <class Kernel, class T, class Argument>
static void run_width(const Problem& p, Argument argument) {
  if (can_vectorize(p, vector_width<T>())) {
    Kernel::template run<T, vector_width<T>()>(p, argument);
  } else {
    Kernel::template run<T, 1>(p, argument);
  }
}

template <class Kernel, class Argument>
static void run_kernel(const Problem& p, Argument argument) {
  switch (p.dtype) {
    case DType::float32:
      return run_width<Kernel, float>(p, argument);
    case DType::float64:
      return run_width<Kernel, double>(p, argument);
    case DType::float16:
      return run_width<Kernel, Half>(p, argument);
    case DType::bfloat16:
      return run_width<Kernel, BFloat16>(p, argument);
  }
}

}  // namespace philox_normal
}  // namespace lsgm
