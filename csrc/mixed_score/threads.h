// What each thread of the CUDA kernels of mixed_score does. Compiled by nvcc into cuda.cu, and by the host compiler
// into csrc/tests/mixed_score_threads.cpp, which runs every thread of a launch on the CPU and so proves, on a machine
// without a GPU, that each element is computed once and rightly. Only the sums across threads remain to cuda.cu.
#pragma once

#include "mixed_score/mixed_score.h"

namespace lsgm {
namespace mixed_score {

constexpr int64_t kMaxPartialRows = 1024;  // bounds the second stage of grad_logit

LSGM_HD bool all_aligned(const Problem& p) {
  return channelwise::all_aligned(p) && aligned(p.grad) && aligned(p.grad_eps) && aligned(p.grad_z);
}

LSGM_HD void make_plan(Problem& p) { plan_for_gpu(p, kMaxPartialRows); }

// Planes: the part of segment `s` that falls to one of the threads sharing it.

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

// Rows: one thread keeps N channels and goes down the rows of a segment.

template <class C, int N>
struct Column {
  Place place;
  C network[N], normal[N];
};

template <class C, int N>
LSGM_HD Column<C, N> column_of(const Problem& p, const Launch& l, int64_t tile, int thread) {
  Column<C, N> column{};
  column.place = place_of(p, l, tile, thread, N);
  if (column.place.active) {
    for (int k = 0; k < N; ++k) {
      const Mix<C> mix = mix_of(scalar_at<C>(p.logit, column.place.channel + k));
      column.network[k] = mix.network;
      column.normal[k] = mix.normal;
    }
  }
  return column;
}

template <class C, class E, class Z, int N>
LSGM_HD void forward_rows(const Problem& p, const Launch& l, int64_t s, const Column<C, N>& column) {
  if (!column.place.active) return;
  const Segment segment = segment_at(p.segments, s);
  const C r = scalar_at<C>(p.r, segment.run);
  const int64_t first = segment.run * p.spatial + segment.begin;
  for (int64_t row = column.place.line; row < segment.size; row += l.lines) {
    const int64_t at = (first + row) * p.channels + column.place.channel;
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
  if (!column.place.active) return;
  const Segment segment = segment_at(p.segments, s);
  const C r = scalar_at<C>(p.r, segment.run);
  const int64_t first = segment.run * p.spatial + segment.begin;
  for (int64_t row = column.place.line; row < segment.size; row += l.lines) {
    const int64_t at = (first + row) * p.channels + column.place.channel;
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

}  // namespace mixed_score
}  // namespace lsgm
