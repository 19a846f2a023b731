// CPU kernels of score_drift, compiled once per instruction set (LSGM_ISA; see common/cpu.h). No torch.
#include "common/cpu.h"

#include "common/vector_loop.h"
#include "score_drift/score_drift.h"

namespace lsgm {
namespace score_drift {
namespace LSGM_ISA {
namespace {

using namespace lsgm::LSGM_ISA;

// n elements of one plane: one sample, one channel.
template <class C, class E, class Z>
void forward_plane(const E* eps, const Z* z, Z* out, int64_t n, C network, Coefficients<C> c) {
  const C scale = network * c.q;
  for_each_register<C>(n, [=](auto kind, int64_t i) {
    decltype(kind) p, weight, r, e, x;
    fill(p, c.p);
    fill(weight, scale);
    fill(r, c.r);
    load(e, eps + i);
    load(x, z + i);
    store(fma(weight, fnma(r, x, e), mul(p, x)), out + i);
  });
}

// One row: the channels of one position.
template <class C, class E, class Z>
void forward_row(const E* eps, const Z* z, Z* out, int64_t channels, const C* network, Coefficients<C> c) {
  for_each_register<C>(channels, [=](auto kind, int64_t i) {
    decltype(kind) p, q, r, a, e, x;
    fill(p, c.p);
    fill(q, c.q);
    fill(r, c.r);
    load(a, network + i);
    load(e, eps + i);
    load(x, z + i);
    store(fma(mul(a, q), fnma(r, x, e), mul(p, x)), out + i);
  });
}

template <class C, class E, class Z>
void forward_segments(const Problem& problem, int64_t begin, int64_t end) {
  const auto* eps = static_cast<const E*>(problem.eps);
  const auto* z = static_cast<const Z*>(problem.z);
  auto* out = static_cast<Z*>(problem.out);
  const auto* network = static_cast<const C*>(problem.table);
  if (problem.order == Order::planes) {
    Plane plane = plane_at(problem, begin);
    for (int64_t s = begin; s < end; ++s, advance(problem, plane)) {
      forward_plane<C>(eps + plane.at, z + plane.at, out + plane.at, plane.size, network[plane.channel],
          coefficients_at<C>(problem, plane.sample));
    }
    return;
  }
  for (int64_t s = begin; s < end; ++s) {
    const Segment segment = segment_at(problem.segments, s);
    const Coefficients<C> c = coefficients_at<C>(problem, segment.run);
    for (int64_t row = 0; row < segment.size; ++row) {
      const int64_t at = (segment.run * problem.spatial + segment.begin + row) * problem.channels;
      forward_row<C>(eps + at, z + at, out + at, problem.channels, network, c);
    }
  }
}

}  // namespace

void forward(const Problem& problem, int64_t begin, int64_t end) {
  with_types(problem, [&](auto eps_type, auto z_type) {
    using E = typename decltype(eps_type)::type;
    using Z = typename decltype(z_type)::type;
    using C = typename Compute<E, Z>::type;
    forward_segments<C, E, Z>(problem, begin, end);
  });
}

}  // namespace LSGM_ISA

#if !LSGM_VEC_AVX2  // what exists once, compiled for every processor
namespace cpu {

template <class C>
static void fill_table_as(const Problem& problem, C* table) {
  for (int64_t c = 0; c < problem.channels; ++c) table[c] = network_at<C>(problem, c);
}

void fill_table(const Problem& problem, void* table) {
  if (computes_in_double(problem)) {
    fill_table_as(problem, static_cast<double*>(table));
  } else {
    fill_table_as(problem, static_cast<float*>(table));
  }
}

void forward(const Problem& problem, int64_t begin, int64_t end) {
#if defined(LSGM_HAVE_AVX2)
  if (has_avx2()) return avx2::forward(problem, begin, end);
#endif
  scalar::forward(problem, begin, end);
}

}  // namespace cpu
#endif

}  // namespace score_drift
}  // namespace lsgm
