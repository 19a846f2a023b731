// CPU kernels of mixed_score, compiled once per instruction set (LSGM_ISA; see common/cpu.h). No torch.
#include "common/cpu.h"

#include "common/vector_loop.h"
#include "mixed_score/mixed_score.h"

namespace lsgm {
namespace mixed_score {
namespace LSGM_ISA {
namespace {

using namespace lsgm::LSGM_ISA;

// Channels whose sums are kept in registers' reach (the first cache) during one pass over the rows of a segment.
constexpr int64_t kChannelTile = 1024;
// Elements after which a float32 sum is added to the float64 total.
constexpr int64_t kFlush = 2048;

// n elements of one plane: one sample, one channel. Stores are ordinary ones: streaming stores, past the caches, gained
// nothing on outputs beyond the cache, where the pages of the new output are what takes time, and on smaller ones the
// operator that reads the output next would pay for them.
template <class C, class E, class Z>
void forward_plane(const E* eps, const Z* z, Z* out, int64_t n, C network, C weight) {
  for_each_register<C>(n, [=](auto kind, int64_t i) {
    decltype(kind) a, w, e, x;
    fill(a, network);
    fill(w, weight);
    load(e, eps + i);
    load(x, z + i);
    store(fma(a, e, mul(w, x)), out + i);
  });
}

// One row: the channels of one position.
template <class C, class E, class Z>
void forward_row(const E* eps, const Z* z, Z* out, int64_t channels, const C* network, const C* normal, C r) {
  for_each_register<C>(channels, [=](auto kind, int64_t i) {
    decltype(kind) a, w, e, x, scale;
    fill(scale, r);
    load(a, network + i);
    load(w, normal + i);
    load(e, eps + i);
    load(x, z + i);
    store(fma(a, e, mul(mul(w, scale), x)), out + i);
  });
}

template <class C, class E, class Z>
double backward_plane(
    const Z* grad, const E* eps, const Z* z, E* grad_eps, Z* grad_z, int64_t n, C network, C weight, C r) {
  constexpr int64_t width = Vec<C>::width;
  double total = 0;
  Vec<C> a, w, scale, g, e, x;
  fill(a, network);
  fill(w, weight);
  fill(scale, r);
  int64_t i = 0;
  while (i + width <= n) {
    const int64_t end = smaller(n, i + kFlush);
    Vec<C> even, odd;
    fill(even, C(0));
    fill(odd, C(0));
    const auto step = [&](int64_t j, Vec<C>& part) {
      load(g, grad + j);
      load(e, eps + j);
      load(x, z + j);
      part = fma(g, fnma(scale, x, e), part);
      store(mul(a, g), grad_eps + j);
      store(mul(w, g), grad_z + j);
    };
    for (; i + 2 * width <= end; i += 2 * width) {
      step(i, even);
      step(i + width, odd);
    }
    for (; i + width <= end; i += width) step(i, even);
    total += static_cast<double>(sum(add(even, odd)));
  }
  Lane<C> a1{network}, w1{weight}, scale1{r}, g1, e1, x1, part{C(0)};
  for (; i < n; ++i) {
    load(g1, grad + i);
    load(e1, eps + i);
    load(x1, z + i);
    part = fma(g1, fnma(scale1, x1, e1), part);
    store(mul(a1, g1), grad_eps + i);
    store(mul(w1, g1), grad_z + i);
  }
  return total + static_cast<double>(part.v);
}

// Channels [0, channels) of `rows` rows that lie `pitch` elements apart. Writes the sums to totals[0 ... channels).
template <class C, class E, class Z>
void backward_rows(const Z* grad, const E* eps, const Z* z, E* grad_eps, Z* grad_z, int64_t rows, int64_t pitch,
    int64_t channels, const C* network, const C* normal, C r, double* totals) {
  constexpr int64_t width = Vec<C>::width;
  alignas(64) C sums[kChannelTile];
  for (int64_t c = 0; c < channels; ++c) sums[c] = C(0);
  Vec<C> a, w, scale, g, e, x, part;
  fill(scale, r);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t base = row * pitch;
    int64_t c = 0;
    for (; c + width <= channels; c += width) {
      load(a, network + c);
      load(w, normal + c);
      load(g, grad + base + c);
      load(e, eps + base + c);
      load(x, z + base + c);
      load(part, sums + c);
      store(fma(g, fnma(scale, x, e), part), sums + c);
      store(mul(a, g), grad_eps + base + c);
      store(mul(mul(w, scale), g), grad_z + base + c);
    }
    Lane<C> a1, w1, scale1{r}, g1, e1, x1, part1;
    for (; c < channels; ++c) {
      load(a1, network + c);
      load(w1, normal + c);
      load(g1, grad + base + c);
      load(e1, eps + base + c);
      load(x1, z + base + c);
      load(part1, sums + c);
      store(fma(g1, fnma(scale1, x1, e1), part1), sums + c);
      store(mul(a1, g1), grad_eps + base + c);
      store(mul(mul(w1, scale1), g1), grad_z + base + c);
    }
  }
  for (int64_t c = 0; c < channels; ++c) totals[c] = static_cast<double>(sums[c]);
}

template <class C, class E, class Z>
void forward_segments(const Problem& p, int64_t begin, int64_t end) {
  const auto* eps = static_cast<const E*>(p.eps);
  const auto* z = static_cast<const Z*>(p.z);
  auto* out = static_cast<Z*>(p.out);
  const auto* network = static_cast<const C*>(p.table);
  const C* normal = network + p.channels;
  if (p.order == Order::planes) {
    Plane plane = plane_at(p, begin);
    for (int64_t s = begin; s < end; ++s, advance(p, plane)) {
      const C r = scalar_at<C>(p.r, plane.sample);
      forward_plane<C>(eps + plane.at, z + plane.at, out + plane.at, plane.size, network[plane.channel],
          normal[plane.channel] * r);
    }
    return;
  }
  for (int64_t s = begin; s < end; ++s) {
    const Segment segment = segment_at(p.segments, s);
    const C r = scalar_at<C>(p.r, segment.run);
    for (int64_t row = 0; row < segment.size; ++row) {
      const int64_t at = (segment.run * p.spatial + segment.begin + row) * p.channels;
      forward_row<C>(eps + at, z + at, out + at, p.channels, network, normal, r);
    }
  }
}

template <class C, class E, class Z>
void backward_segments(const Problem& p, int64_t begin, int64_t end) {
  const auto* grad = static_cast<const Z*>(p.grad);
  const auto* eps = static_cast<const E*>(p.eps);
  const auto* z = static_cast<const Z*>(p.z);
  auto* grad_eps = static_cast<E*>(p.grad_eps);
  auto* grad_z = static_cast<Z*>(p.grad_z);
  const auto* network = static_cast<const C*>(p.table);
  const C* normal = network + p.channels;
  if (p.order == Order::planes) {
    Plane plane = plane_at(p, begin);
    for (int64_t s = begin; s < end; ++s, advance(p, plane)) {
      const C r = scalar_at<C>(p.r, plane.sample);
      p.partials[plane_partial(p, plane)] =
          backward_plane<C>(grad + plane.at, eps + plane.at, z + plane.at, grad_eps + plane.at, grad_z + plane.at,
              plane.size, network[plane.channel], normal[plane.channel] * r, r);
    }
    return;
  }
  for (int64_t s = begin; s < end; ++s) {
    const Segment segment = segment_at(p.segments, s);
    const C r = scalar_at<C>(p.r, segment.run);
    double* totals = p.partials + (segment.run * p.segments.per_run + segment.piece) * p.channels;
    for (int64_t c = 0; c < p.channels; c += kChannelTile) {
      const int64_t at = (segment.run * p.spatial + segment.begin) * p.channels + c;
      backward_rows<C>(grad + at, eps + at, z + at, grad_eps + at, grad_z + at, segment.size, p.channels,
          smaller(kChannelTile, p.channels - c), network + c, normal + c, r, totals + c);
    }
  }
}

}  // namespace

void forward(const Problem& p, int64_t begin, int64_t end) {
  with_types(p, [&](auto eps_type, auto z_type) {
    using E = typename decltype(eps_type)::type;
    using Z = typename decltype(z_type)::type;
    using C = typename Compute<E, Z>::type;
    forward_segments<C, E, Z>(p, begin, end);
  });
}

void backward(const Problem& p, int64_t begin, int64_t end) {
  with_types(p, [&](auto eps_type, auto z_type) {
    using E = typename decltype(eps_type)::type;
    using Z = typename decltype(z_type)::type;
    using C = typename Compute<E, Z>::type;
    backward_segments<C, E, Z>(p, begin, end);
  });
}

}  // namespace LSGM_ISA

#if !LSGM_VEC_AVX2  // what exists once, compiled for every processor
namespace cpu {

template <class C>
static void fill_table_as(const Problem& p, C* table) {
  for (int64_t c = 0; c < p.channels; ++c) {
    const Mix<C> mix = mix_of(scalar_at<C>(p.logit, c));
    table[c] = mix.network;
    table[p.channels + c] = mix.normal;
  }
}

void fill_table(const Problem& p, void* table) {
  if (computes_in_double(p)) {
    fill_table_as(p, static_cast<double*>(table));
  } else {
    fill_table_as(p, static_cast<float*>(table));
  }
}

void forward(const Problem& p, int64_t begin, int64_t end) {
#if defined(LSGM_HAVE_AVX2)
  if (has_avx2()) return avx2::forward(p, begin, end);
#endif
  scalar::forward(p, begin, end);
}

void backward(const Problem& p, int64_t begin, int64_t end) {
#if defined(LSGM_HAVE_AVX2)
  if (has_avx2()) return avx2::backward(p, begin, end);
#endif
  scalar::backward(p, begin, end);
}

void finish(const Problem& p) {
  const int64_t rows = partial_rows(p);
  for (int64_t c = 0; c < p.channels; ++c) {
    double total = 0;
    for (int64_t row = 0; row < rows; ++row) total += p.partials[row * p.channels + c];
    store_logit_gradient(p, c, total);
  }
}

}  // namespace cpu
#endif

}  // namespace mixed_score
}  // namespace lsgm
