// CPU kernel of residual_add, compiled once per instruction set (LSGM_ISA; see common/cpu.h). No torch.
#include "common/cpu.h"

#include "common/vector_loop.h"
#include "residual_add/residual_add.h"

namespace lsgm {
namespace residual_add {
namespace LSGM_ISA {
namespace {

using namespace lsgm::LSGM_ISA;

template <class C, class T>
void sum(const T* x, const T* h, T* out, int64_t n, C scale) {
  for_each_register<C>(n, [=](auto kind, int64_t i) {
    decltype(kind) s, a, b;
    fill(s, scale);
    load(a, x + i);
    load(b, h + i);
    store(mul(add(a, b), s), out + i);
  });
}

template <class C, class T>
void scaled(const T* x, T* out, int64_t n, C scale) {
  for_each_register<C>(n, [=](auto kind, int64_t i) {
    decltype(kind) s, a;
    fill(s, scale);
    load(a, x + i);
    store(mul(a, s), out + i);
  });
}

}  // namespace

void run(const Problem& p, int64_t begin, int64_t end) {
  const Segments segments = cpu::segments(p);
  const int64_t at = begin * segments.limit;
  const int64_t n = smaller(end * segments.limit, p.count) - at;
  visit(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using C = typename Compute<T, T>::type;
    const auto* x = static_cast<const T*>(p.x) + at;
    auto* out = static_cast<T*>(p.out) + at;
    if (p.h == nullptr) {
      scaled(x, out, n, scale_of(p, C()));
    } else {
      sum(x, static_cast<const T*>(p.h) + at, out, n, scale_of(p, C()));
    }
  });
}

}  // namespace LSGM_ISA

#if !LSGM_VEC_AVX2  // what exists once, compiled for every processor
namespace cpu {

constexpr int64_t kSegment = 16384;  // elements

Segments segments(const Problem& p) { return make_segments(1, p.count, kSegment); }

int64_t grain(const Problem&) {
  constexpr int64_t kElementsPerThread = 65536;  // some ten microseconds: what waking a second thread costs
  return kElementsPerThread / kSegment;
}

void run(const Problem& p, int64_t begin, int64_t end) {
#if defined(LSGM_HAVE_AVX2)
  if (has_avx2()) return avx2::run(p, begin, end);
#endif
  scalar::run(p, begin, end);
}

}  // namespace cpu
#endif

}  // namespace residual_add
}  // namespace lsgm
