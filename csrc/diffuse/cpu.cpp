// CPU kernels of diffuse, compiled once per instruction set (LSGM_ISA; see common/cpu.h). No torch.
#include "common/cpu.h"

#include "common/vec.h"
#include "diffuse/diffuse.h"

namespace lsgm {
namespace diffuse {
namespace LSGM_ISA {
namespace {

using namespace lsgm::LSGM_ISA;

// n elements of one sample.
template <class C, class Z, class N>
void forward_run(const Z* z0, const N* noise, Z* out, int64_t n, C mean, C deviation) {
  Vec<C> m, s, x, e;
  fill(m, mean);
  fill(s, deviation);
  const auto step = [&](int64_t i) {
    load(x, z0 + i);
    load(e, noise + i);
    store(fma(m, x, mul(s, e)), out + i);
  };
  constexpr int64_t width = Vec<C>::width;
  int64_t i = 0;
  for (; i + width <= n; i += width) step(i);
  if (i == n) return;
  if (n >= width) {  // the last register overlaps the one before: same inputs, same values
    step(n - width);
    return;
  }
  Lane<C> m1{mean}, s1{deviation}, x1, e1;
  for (; i < n; ++i) {
    load(x1, z0 + i);
    load(e1, noise + i);
    store(fma(m1, x1, mul(s1, e1)), out + i);
  }
}

template <class C, class G, class T>
void backward_run(const G* grad, T* out, int64_t n, C factor) {
  Vec<C> f, g;
  fill(f, factor);
  const auto step = [&](int64_t i) {
    load(g, grad + i);
    store(mul(f, g), out + i);
  };
  constexpr int64_t width = Vec<C>::width;
  int64_t i = 0;
  for (; i + width <= n; i += width) step(i);
  if (i == n) return;
  if (n >= width) {
    step(n - width);
    return;
  }
  Lane<C> f1{factor}, g1;
  for (; i < n; ++i) {
    load(g1, grad + i);
    store(mul(f1, g1), out + i);
  }
}

}  // namespace

void forward(const Problem& p, int64_t begin, int64_t end) {
  visit(p.z0_dtype, [&](auto z0_type) {
    visit(p.noise_dtype, [&](auto noise_type) {
      using Z = typename decltype(z0_type)::type;
      using N = typename decltype(noise_type)::type;
      using C = typename Compute<Z, N>::type;
      for (int64_t s = begin; s < end; ++s) {
        const Segment segment = segment_at(p.segments, s);
        const int64_t at = segment.run * p.size + segment.begin;
        forward_run<C>(static_cast<const Z*>(p.z0) + at, static_cast<const N*>(p.noise) + at,
            static_cast<Z*>(p.out) + at, segment.size, scalar_at<C>(p.m, segment.run),
            deviation<C>(p.var, segment.run));
      }
    });
  });
}

void backward(const Scaling& p, int64_t begin, int64_t end) {
  visit(p.grad_dtype, [&](auto grad_type) {
    visit(p.out_dtype, [&](auto out_type) {
      using G = typename decltype(grad_type)::type;
      using T = typename decltype(out_type)::type;
      using C = typename Compute<G, T>::type;
      for (int64_t s = begin; s < end; ++s) {
        const Segment segment = segment_at(p.segments, s);
        const int64_t at = segment.run * p.size + segment.begin;
        backward_run<C>(static_cast<const G*>(p.grad) + at, static_cast<T*>(p.out) + at, segment.size,
            scalar_at<C>(p.factor, segment.run));
      }
    });
  });
}

}  // namespace LSGM_ISA

#if !LSGM_VEC_AVX2  // what exists once, compiled for every processor
namespace cpu {

Segments plan(int64_t batch, int64_t size) {
  constexpr int64_t kSegment = 16384;  // elements: long enough to hide its own set-up, short enough to share out
  return make_segments(batch, size, kSegment);
}

int64_t grain(const Segments& segments) {
  constexpr int64_t kElementsPerThread = 65536;  // some ten microseconds: what waking a second thread costs
  return larger(1, kElementsPerThread / smaller(segments.limit, segments.length));
}

void forward(const Problem& p, int64_t begin, int64_t end) {
#if defined(LSGM_HAVE_AVX2)
  if (has_avx2()) return avx2::forward(p, begin, end);
#endif
  scalar::forward(p, begin, end);
}

void backward(const Scaling& p, int64_t begin, int64_t end) {
#if defined(LSGM_HAVE_AVX2)
  if (has_avx2()) return avx2::backward(p, begin, end);
#endif
  scalar::backward(p, begin, end);
}

}  // namespace cpu
#endif

}  // namespace diffuse
}  // namespace lsgm
