// What each thread of the CUDA kernels of mixed_score does. Compiled by nvcc into cuda.cu, and by the host compiler
// into csrc/tests/mixed_score_threads.cpp, which runs every thread of a launch on the CPU and so proves, on a machine
// without a GPU, that each element is computed once and rightly. Only the sums across threads remain to cuda.cu.
#pragma once

#include <type_traits>

#include "common/vector_io.h"
#include "mixed_score/mixed_score.h"

namespace lsgm {
namespace mixed_score {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int64_t kMaxBlocks = 1 << 16;    // a grid-stride loop does the rest
constexpr int64_t kMaxPartialRows = 1024;  // bounds the second stage of grad_logit
constexpr int64_t kPlaneSegment = 4096;    // elements
constexpr int64_t kRowsPerThread = 4;

// How many elements one thread moves at once: 16 bytes of the narrower operand, where every access is then aligned.
template <class E, class Z>
LSGM_HD constexpr int vector_width() {
  return 16 / static_cast<int>(sizeof(E) < sizeof(Z) ? sizeof(E) : sizeof(Z));
}

LSGM_HD bool can_vectorize(const Problem& p, int64_t width) {
  const int64_t inner = p.order == Order::planes ? p.spatial : p.channels;
  return inner % width == 0 && aligned(p.eps) && aligned(p.z) && aligned(p.out) && aligned(p.grad) &&
         aligned(p.grad_eps) && aligned(p.grad_z);
}

// Type mixtures with kernels of their own; the others share the kernels of type Any.
template <class E, class Z>
LSGM_HD constexpr bool is_common() {
  if (std::is_same<E, Z>::value) return true;
  if (std::is_same<Z, float>::value) return !std::is_same<E, double>::value;
  return std::is_same<Z, double>::value && std::is_same<E, float>::value;
}

// The elements per thread that `p` gets: its vector width, or 1.
LSGM_HD int64_t width_of(const Problem& p) {
  const int64_t narrower = smaller(size_of(p.eps_dtype), size_of(p.z_dtype));
  const bool common = p.eps_dtype == p.z_dtype || (p.z_dtype == DType::float32 && p.eps_dtype != DType::float64) ||
                      (p.z_dtype == DType::float64 && p.eps_dtype == DType::float32);
  return common && can_vectorize(p, 16 / narrower) ? 16 / narrower : 1;
}

struct Launch {
  int64_t blocks;         // over segments
  int64_t channel_tiles;  // rows only: blocks side by side over the channels
  int lanes;              // planes: threads that share one segment, a power of two up to a warp
  int columns;            // rows: threads side by side over the channels
  int lines;              // rows: rows that a block works on at once
};

LSGM_HD Launch launch_of(const Problem& p, int64_t width) {
  Launch l{};
  l.channel_tiles = 1;
  if (p.order == Order::planes) {
    const int64_t vectors = ceil_div(smaller(p.segments.limit, p.segments.length), width);
    l.lanes = 1;
    while (l.lanes < kWarp && l.lanes < vectors) l.lanes *= 2;
    l.blocks = ceil_div(p.segments.count * l.lanes, kThreads);
  } else {
    const int64_t vectors = p.channels / width;  // width divides the channels
    l.columns = static_cast<int>(smaller(vectors, kThreads));
    l.lines = kThreads / l.columns;
    l.channel_tiles = ceil_div(vectors, l.columns);
    l.blocks = p.segments.count;
  }
  l.blocks = smaller(l.blocks, kMaxBlocks);
  return l;
}

LSGM_HD void make_plan(Problem& p) {
  if (p.order == Order::planes) {
    p.segments = make_segments(p.batch * p.channels, p.spatial, kPlaneSegment);
    return;
  }
  const int64_t lines = larger(1, kThreads / larger(1, p.channels / width_of(p)));
  // Long enough for the rows of a block's threads, and so that the second stage has little to sum.
  const int64_t rows = larger(lines * kRowsPerThread, ceil_div(p.batch * p.spatial, kMaxPartialRows));
  p.segments = make_segments(p.batch, p.spatial, rows);
}

// Planes: the part of segment `s` that falls to one of the threads sharing it.

struct Plane {
  int64_t at;  // first element of the segment
  int64_t size;
  int64_t partial;  // where its sum belongs
  int64_t sample, channel;
};

LSGM_HD Plane plane_at(const Problem& p, int64_t s) {
  const Segment segment = segment_at(p.segments, s);
  Plane plane;
  plane.sample = segment.run / p.channels;
  plane.channel = segment.run - plane.sample * p.channels;
  plane.at = segment.run * p.spatial + segment.begin;
  plane.size = segment.size;
  plane.partial = (plane.sample * p.segments.per_run + segment.piece) * p.channels + plane.channel;
  return plane;
}

template <class C, class E, class Z, int N>
LSGM_HD void forward_plane(const Problem& p, int64_t s, int lane, int lanes) {
  const Plane plane = plane_at(p, s);
  const Mix<C> mix = mix_of(scalar_at<C>(p.logit, plane.channel));
  const C weight = mix.normal * scalar_at<C>(p.r, plane.sample);
  for (int64_t i = lane * N; i < plane.size; i += lanes * N) {
    C eps[N], z[N], out[N];
    load<E>(p.eps, p.eps_dtype, plane.at + i, eps);
    load<Z>(p.z, p.z_dtype, plane.at + i, z);
    for (int k = 0; k < N; ++k) out[k] = value(mix.network, weight, eps[k], z[k]);
    store<Z>(p.out, p.z_dtype, plane.at + i, out);
  }
}

// Returns the thread's part of the sum of g (eps - r z).
template <class C, class E, class Z, int N>
LSGM_HD C backward_plane(const Problem& p, int64_t s, int lane, int lanes) {
  const Plane plane = plane_at(p, s);
  const Mix<C> mix = mix_of(scalar_at<C>(p.logit, plane.channel));
  const C r = scalar_at<C>(p.r, plane.sample);
  const C weight = mix.normal * r;
  C sums[N];
  for (int k = 0; k < N; ++k) sums[k] = C(0);
  for (int64_t i = lane * N; i < plane.size; i += lanes * N) {
    C grad[N], eps[N], z[N], grad_eps[N], grad_z[N];
    load<Z>(p.grad, p.z_dtype, plane.at + i, grad);
    load<E>(p.eps, p.eps_dtype, plane.at + i, eps);
    load<Z>(p.z, p.z_dtype, plane.at + i, z);
    for (int k = 0; k < N; ++k) {
      sums[k] += logit_term(grad[k], r, eps[k], z[k]);
      grad_eps[k] = mix.network * grad[k];
      grad_z[k] = weight * grad[k];
    }
    store<E>(p.grad_eps, p.eps_dtype, plane.at + i, grad_eps);
    store<Z>(p.grad_z, p.z_dtype, plane.at + i, grad_z);
  }
  C total = sums[0];
  for (int k = 1; k < N; ++k) total += sums[k];
  return total;
}

// Rows: one thread keeps N channels and goes down the rows of a segment, `lines` at a time.

template <class C, int N>
struct Column {
  int64_t channel;
  int line;
  bool active;
  C network[N], normal[N];
};

template <class C, int N>
LSGM_HD Column<C, N> column_of(const Problem& p, const Launch& l, int64_t tile, int thread) {
  Column<C, N> column{};
  column.line = thread / l.columns;
  column.channel = (tile * l.columns + thread % l.columns) * N;
  column.active = column.line < l.lines && column.channel < p.channels;
  if (column.active) {
    for (int k = 0; k < N; ++k) {
      const Mix<C> mix = mix_of(scalar_at<C>(p.logit, column.channel + k));
      column.network[k] = mix.network;
      column.normal[k] = mix.normal;
    }
  }
  return column;
}

template <class C, class E, class Z, int N>
LSGM_HD void forward_rows(const Problem& p, const Launch& l, int64_t s, const Column<C, N>& column) {
  if (!column.active) return;
  const Segment segment = segment_at(p.segments, s);
  const C r = scalar_at<C>(p.r, segment.run);
  const int64_t first = segment.run * p.spatial + segment.begin;
  for (int64_t row = column.line; row < segment.size; row += l.lines) {
    const int64_t at = (first + row) * p.channels + column.channel;
    C eps[N], z[N], out[N];
    load<E>(p.eps, p.eps_dtype, at, eps);
    load<Z>(p.z, p.z_dtype, at, z);
    for (int k = 0; k < N; ++k) out[k] = value(column.network[k], column.normal[k] * r, eps[k], z[k]);
    store<Z>(p.out, p.z_dtype, at, out);
  }
}

template <class C, class E, class Z, int N>
LSGM_HD void backward_rows(const Problem& p, const Launch& l, int64_t s, const Column<C, N>& column, C (&sums)[N]) {
  for (int k = 0; k < N; ++k) sums[k] = C(0);
  if (!column.active) return;
  const Segment segment = segment_at(p.segments, s);
  const C r = scalar_at<C>(p.r, segment.run);
  const int64_t first = segment.run * p.spatial + segment.begin;
  for (int64_t row = column.line; row < segment.size; row += l.lines) {
    const int64_t at = (first + row) * p.channels + column.channel;
    C grad[N], eps[N], z[N], grad_eps[N], grad_z[N];
    load<Z>(p.grad, p.z_dtype, at, grad);
    load<E>(p.eps, p.eps_dtype, at, eps);
    load<Z>(p.z, p.z_dtype, at, z);
    for (int k = 0; k < N; ++k) {
      sums[k] += logit_term(grad[k], r, eps[k], z[k]);
      grad_eps[k] = column.network[k] * grad[k];
      grad_z[k] = column.normal[k] * r * grad[k];
    }
    store<E>(p.grad_eps, p.eps_dtype, at, grad_eps);
    store<Z>(p.grad_z, p.z_dtype, at, grad_z);
  }
}

// Where the sum of segment `s` over channel `channel` belongs.
LSGM_HD int64_t row_partial(const Problem& p, int64_t s, int64_t channel) { return s * p.channels + channel; }

// Calls Kernel::run<C, E, Z, N>(p, argument) with the types and the width that `p` gets. (Plain templates: g++ 12
// rejects constants of a generic lambda inside another.)

template <class Kernel, class E, class Z, class Argument>
static void run_types(const Problem& p, Argument argument) {
  using C = typename Compute<E, Z>::type;
  if constexpr (is_common<E, Z>()) {
    if (width_of(p) == vector_width<E, Z>()) {
      Kernel::template run<C, E, Z, vector_width<E, Z>()>(p, argument);
      return;
    }
  }
  Kernel::template run<C, Any, Any, 1>(p, argument);
}

template <class Kernel, class E, class Argument>
static void run_eps(const Problem& p, Argument argument) {
  switch (p.z_dtype) {
    case DType::float32:
      return run_types<Kernel, E, float>(p, argument);
    case DType::float64:
      return run_types<Kernel, E, double>(p, argument);
    case DType::float16:
      return run_types<Kernel, E, Half>(p, argument);
    case DType::bfloat16:
      return run_types<Kernel, E, BFloat16>(p, argument);
  }
}

template <class Kernel, class Argument>
static void run_kernel(const Problem& p, Argument argument) {
  switch (p.eps_dtype) {
    case DType::float32:
      return run_eps<Kernel, float>(p, argument);
    case DType::float64:
      return run_eps<Kernel, double>(p, argument);
    case DType::float16:
      return run_eps<Kernel, Half>(p, argument);
    case DType::bfloat16:
      return run_eps<Kernel, BFloat16>(p, argument);
  }
}

}  // namespace mixed_score
}  // namespace lsgm
