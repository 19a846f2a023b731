// What each thread of the CUDA kernels of score_drift does. Compiled by nvcc into cuda.cu, and by the host compiler
// into csrc/tests/score_drift_threads.cpp, which runs every thread of a launch on the CPU and so proves, on a machine
// without a GPU, that each element is computed once and rightly.
#pragma once

#include "score_drift/score_drift.h"

namespace lsgm {
namespace score_drift {

// Segments over rows: enough for every multiprocessor, and each keeps its channels' a for many rows.
constexpr int64_t kMaxRowSegments = 1 << 14;

LSGM_HD void make_plan(Problem& problem) { plan_for_gpu(problem, kMaxRowSegments); }

// Planes: the part of segment `s` that falls to one of the threads sharing it.
template <class C, class E, class Z, int N>
LSGM_HD void forward_plane(const Problem& problem, int64_t s, int lane, int lanes) {
  const Plane plane = plane_at(problem, s);
  const Coefficients<C> c = coefficients_at<C>(problem, plane.sample);
  const C weight = network_at<C>(problem, plane.channel) * c.q;
  for (int64_t i = lane * N; i < plane.size; i += lanes * N) {
    C eps[N], z[N], out[N];
    load<E>(problem.eps, problem.eps_dtype, plane.at + i, eps);
    load<Z>(problem.z, problem.z_dtype, plane.at + i, z);
    for (int k = 0; k < N; ++k) out[k] = value(c.p, weight, c.r, eps[k], z[k]);
    store<Z>(problem.out, problem.z_dtype, plane.at + i, out);
  }
}

// Rows: one thread keeps N channels and goes down the rows of a segment.

template <class C, int N>
struct Column {
  Place place;
  C network[N];
};

template <class C, int N>
LSGM_HD Column<C, N> column_of(const Problem& problem, const Launch& l, int64_t tile, int thread) {
  Column<C, N> column{};
  column.place = place_of(problem, l, tile, thread, N);
  if (column.place.active) {
    for (int k = 0; k < N; ++k) column.network[k] = network_at<C>(problem, column.place.channel + k);
  }
  return column;
}

template <class C, class E, class Z, int N>
LSGM_HD void forward_rows(const Problem& problem, const Launch& l, int64_t s, const Column<C, N>& column) {
  if (!column.place.active) return;
  const Segment segment = segment_at(problem.segments, s);
  const Coefficients<C> c = coefficients_at<C>(problem, segment.run);
  const int64_t first = segment.run * problem.spatial + segment.begin;
  for (int64_t row = column.place.line; row < segment.size; row += l.lines) {
    const int64_t at = (first + row) * problem.channels + column.place.channel;
    C eps[N], z[N], out[N];
    load<E>(problem.eps, problem.eps_dtype, at, eps);
    load<Z>(problem.z, problem.z_dtype, at, z);
    for (int k = 0; k < N; ++k) out[k] = value(c.p, column.network[k] * c.q, c.r, eps[k], z[k]);
    store<Z>(problem.out, problem.z_dtype, at, out);
  }
}

}  // namespace score_drift
}  // namespace lsgm
