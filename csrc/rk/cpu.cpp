// CPU kernels of the Runge-Kutta methods, compiled once per instruction set (LSGM_ISA; see common/cpu.h). No torch.
#include "common/cpu.h"

#include <type_traits>

#include "common/vec.h"
#include "rk/rk.h"

namespace lsgm {
namespace rk {

// Planes below this size are not runs of their own: alpha is then tabulated for every element of a sample.
constexpr int64_t kSmallPlane = 64;

static inline bool alpha_per_element(const Problem& p) { return p.spatial < kSmallPlane; }

namespace LSGM_ISA {
namespace {

using namespace lsgm::LSGM_ISA;

// Elements after which a float32 sum is added to the float64 total.
constexpr int64_t kFlush = 2048;
// Registers of one stream that are handled together: for every pointer and coefficient that is loaded.
constexpr int kBlock = 4;

template <class C, class T>
struct Term {
  const T* k;
  C a, e;
};

// A call, as the inner loop wants it. Terms [0, both) count for the solution and the error, [both, solution) for the
// solution only, [solution, error) for the error only: a coefficient of 0 must not make NaN from infinity.
template <class C, class T, class E>
struct Operands {
  const E* eps;
  const T* y;
  T* z;
  T* k_new;
  Term<C, T> terms[kMaxStages];
  int both, solution, error;
  C a_new, e_new;
  C rtol, atol;
};

// What changes from sample to sample.
template <class C>
struct Coefficients {
  C h, p, q, r;
};

template <class C, class T, class E>
Operands<C, T, E> operands_of(const Problem& p) {
  Operands<C, T, E> o;
  const auto* k = static_cast<const T*>(p.k);
  const int64_t n = elements(p);
  o.eps = static_cast<const E*>(p.eps);
  o.y = static_cast<const T*>(p.y);
  o.z = static_cast<T*>(p.z);
  o.k_new = p.eps == nullptr ? nullptr : static_cast<T*>(p.k) + p.slot * n;
  int count = 0;
  const auto append = [&](bool a, bool e) {
    for (int i = 0; i < p.row.count; ++i) {
      if ((p.row.a[i] != 0) != a || (p.row.e[i] != 0) != e) continue;
      o.terms[count++] = {k + p.row.slot[i] * n, static_cast<C>(p.row.a[i]), static_cast<C>(p.row.e[i])};
    }
    return count;
  };
  o.both = append(true, true);
  o.solution = append(true, false);
  o.error = append(false, true);
  o.a_new = static_cast<C>(p.a_new);
  o.e_new = static_cast<C>(p.e_new);
  o.rtol = static_cast<C>(p.rtol);
  o.atol = static_cast<C>(p.atol);
  return o;
}

// Asks for what a block of n registers will read some blocks later. Processors follow a few streams by themselves; the
// end of a step reads nine.
template <class V, int n, class T>
inline void prefetch(const T* p) {
  constexpr int64_t kAhead = 2048, kLine = 64;  // bytes
  constexpr int64_t bytes = n * V::width * static_cast<int64_t>(sizeof(T));
  if (bytes < kLine) return;
  const auto* at = reinterpret_cast<const char*>(p) + kAhead;
  for (int64_t b = 0; b < bytes; b += kLine) __builtin_prefetch(at + b);
}

// Elements [begin, end), of one sample or of samples that share their coefficients. alpha of element begin + i is at
// alpha[i] where `alpha_varies`; else *alpha is that of all of them. Returns the sum of squares of the scaled errors.
template <bool kDrift, bool kNorm, class C, class T, class E>
double run(const Operands<C, T, E>& o, const Coefficients<C>& c, const C* alpha, bool alpha_varies, int64_t begin,
    int64_t end) {
  const E* eps = o.eps;
  const T* y = o.y;
  T* z = o.z;
  T* k_new = o.k_new;
  const bool a_new = o.a_new != C(0), e_new = o.e_new != C(0);
  C same[kBlock * Vec<C>::width];  // in the form in which it varies, so that the loop need not ask
  if (kDrift) {
    for (C& v : same) v = *alpha;
  }

  const auto block = [&](auto* part, auto count, int64_t i) {
    using V = std::remove_pointer_t<decltype(part)>;
    constexpr int n = decltype(count)::value;
    constexpr int64_t width = V::width;
    V sum[n], error[n], a, e, x;
    for (int u = 0; u < n; ++u) fill(sum[u], C(0));
    for (int u = 0; u < n; ++u) fill(error[u], C(0));
    // Not unrolled: the compiler would do so up to kMaxStages.
#pragma GCC unroll 1
    for (int s = 0; s < o.both; ++s) {
      const T* k = o.terms[s].k + i;
      prefetch<V, n>(k);
      fill(a, o.terms[s].a);
      fill(e, o.terms[s].e);
      for (int u = 0; u < n; ++u) {
        load(x, k + u * width);
        sum[u] = fma(a, x, sum[u]);
        error[u] = fma(e, x, error[u]);
      }
    }
#pragma GCC unroll 1
    for (int s = o.both; s < o.solution; ++s) {
      const T* k = o.terms[s].k + i;
      prefetch<V, n>(k);
      fill(a, o.terms[s].a);
      for (int u = 0; u < n; ++u) {
        load(x, k + u * width);
        sum[u] = fma(a, x, sum[u]);
      }
    }
#pragma GCC unroll 1
    for (int s = o.solution; s < o.error; ++s) {
      const T* k = o.terms[s].k + i;
      prefetch<V, n>(k);
      fill(e, o.terms[s].e);
      for (int u = 0; u < n; ++u) {
        load(x, k + u * width);
        error[u] = fma(e, x, error[u]);
      }
    }
    prefetch<V, n>(y + i);
    if (kDrift) {
      prefetch<V, n>(z + i);
      prefetch<V, n>(eps + i);
    }
    if (kDrift) {
      V f[n], p, q, r, state, network;
      fill(p, c.p);
      fill(q, c.q);
      fill(r, c.r);
      const C* alphas = alpha_varies ? alpha + (i - begin) : same;
      for (int u = 0; u < n; ++u) {
        const int64_t at = i + u * width;
        load(a, alphas + u * width);
        load(state, z + at);
        load(network, eps + at);
        f[u] = fma(mul(a, q), fnma(r, state, network), mul(p, state));
        store(f[u], k_new + at);
      }
      fill(a, o.a_new);
      fill(e, o.e_new);
      if (a_new) {
        for (int u = 0; u < n; ++u) sum[u] = fma(a, f[u], sum[u]);
      }
      if (e_new) {
        for (int u = 0; u < n; ++u) error[u] = fma(e, f[u], error[u]);
      }
    }
    for (int u = 0; u < n; ++u) {
      const int64_t at = i + u * width;
      V h, start;
      fill(h, c.h);
      load(start, y + at);
      const V next = fma(h, sum[u], start);
      store(next, z + at);
      if (kNorm) {
        V relative, absolute;
        fill(relative, o.rtol);
        fill(absolute, o.atol);
        // NaN in y is NaN in the result as well, so the second argument has whatever NaN there is.
        const V larger = max(abs(start), abs(rounded(next, Type<T>{})));
        const V ratio = div(mul(h, error[u]), fma(relative, larger, absolute));
        part[u] = fma(ratio, ratio, part[u]);
      }
    }
  };

  constexpr int64_t width = Vec<C>::width;
  Vec<C> part[kBlock];
  for (Vec<C>& v : part) fill(v, C(0));
  Lane<C> rest{C(0)};
  int64_t i = begin;
  for (; i + kBlock * width <= end; i += kBlock * width) block(part, std::integral_constant<int, kBlock>{}, i);
  for (; i + width <= end; i += width) block(part, std::integral_constant<int, 1>{}, i);
  for (; i < end; ++i) block(&rest, std::integral_constant<int, 1>{}, i);
  if (!kNorm) return 0;
  return static_cast<double>(sum(add(add(part[0], part[1]), add(part[2], part[3])))) + static_cast<double>(rest.v);
}

template <bool kDrift, bool kNorm, class C, class T, class E>
void segments(const Problem& p, int64_t begin, int64_t end) {
  const Operands<C, T, E> o = operands_of<C, T, E>(p);
  const auto* table = static_cast<const C*>(p.alpha);
  const C one = 1;
  const bool per_element = kDrift && p.logit.data != nullptr && alpha_per_element(p);
  const bool per_plane = kDrift && p.logit.data != nullptr && !per_element;
  for (int64_t s = begin; s < end; ++s) {
    const Segment segment = segment_at(p.segments, s);
    const int64_t first = segment.run * p.segments.length;
    Coefficients<C> c{scalar_at<C>(p.h, segment.run), C(0), C(0), C(0)};
    if (kDrift) {
      c.p = scalar_at<C>(p.p, segment.run);
      c.q = scalar_at<C>(p.q, segment.run);
      c.r = scalar_at<C>(p.r, segment.run);
    }
    double total = 0;
    const int64_t stop = segment.begin + segment.size;
    int64_t channel = per_plane ? segment.begin / p.spatial : 0;
    for (int64_t i = segment.begin; i < stop;) {
      int64_t until = smaller(stop, i + kFlush);
      const C* alpha = &one;
      if (per_element) alpha = table + i;
      if (per_plane) {
        alpha = table + channel;
        const int64_t plane = (channel + 1) * p.spatial;
        if (plane <= until) {
          until = plane;
          ++channel;
        }
      }
      total += run<kDrift, kNorm>(o, c, alpha, per_element, first + i, first + until);
      i = until;
    }
    if (kNorm) p.partials[s] = total;
  }
}

template <bool kDrift, class C, class T, class E>
void with_norm(const Problem& p, int64_t begin, int64_t end) {
  if (p.norm == nullptr) {
    segments<kDrift, false, C, T, E>(p, begin, end);
  } else {
    segments<kDrift, true, C, T, E>(p, begin, end);
  }
}

}  // namespace

void step(const Problem& p, int64_t begin, int64_t end) {
  visit(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using C = typename Compute<T, T>::type;
    if (p.eps == nullptr) return with_norm<false, C, T, T>(p, begin, end);
    if constexpr (std::is_same_v<C, T>) {  // with a drift the state is float32 or float64, and eps no wider
      visit(p.eps_dtype, [&](auto eps_type) {
        using E = typename decltype(eps_type)::type;
        if constexpr (std::is_same_v<typename Compute<T, E>::type, C>) with_norm<true, C, T, E>(p, begin, end);
      });
    }
  });
}

}  // namespace LSGM_ISA

#if !LSGM_VEC_AVX2  // what exists once, compiled for every processor
namespace cpu {

void plan(Problem& p) {
  constexpr int64_t kSegment = 8192;  // elements: long enough to hide its own set-up, short enough to share out
  const bool drift = p.eps != nullptr;
  const bool shared = p.h.stride == 0 && !(p.norm != nullptr && p.per_sample) &&
                      !(drift && (p.logit.data != nullptr || p.p.stride != 0 || p.q.stride != 0 || p.r.stride != 0));
  const int64_t runs = shared ? 1 : p.batch;
  p.segments = make_segments(runs, elements(p) / runs, kSegment);
}

static int64_t partials(const Problem& p) { return p.norm == nullptr ? 0 : p.segments.count; }

static int64_t alphas(const Problem& p) {
  if (p.eps == nullptr || p.logit.data == nullptr) return 0;
  return alpha_per_element(p) ? p.channels * p.spatial : p.channels;
}

int64_t scratch(const Problem& p) {
  return partials(p) * static_cast<int64_t>(sizeof(double)) + alphas(p) * size_of(p.dtype);
}

template <class C>
static void fill_alpha(const Problem& p, C* table) {
  const int64_t each = alpha_per_element(p) ? p.spatial : 1;
  for (int64_t c = 0; c < p.channels; ++c) {
    const C alpha = mix_of(scalar_at<C>(p.logit, c)).network;
    for (int64_t i = 0; i < each; ++i) *table++ = alpha;
  }
}

void prepare(Problem& p, void* memory) {
  p.partials = static_cast<double*>(memory);
  void* table = p.partials + partials(p);
  p.alpha = table;
  if (alphas(p) == 0) return;
  if (p.dtype == DType::float64) {
    fill_alpha(p, static_cast<double*>(table));
  } else {
    fill_alpha(p, static_cast<float*>(table));
  }
}

int64_t grain(const Problem& p) {
  constexpr int64_t kBytesPerThread = 768 * 1024;  // some ten microseconds: what waking a second thread costs
  int64_t bytes = (p.row.count + 2) * size_of(p.dtype);
  if (p.eps != nullptr) bytes += 2 * size_of(p.dtype) + size_of(p.eps_dtype);
  return larger(1, kBytesPerThread / (bytes * smaller(p.segments.limit, p.segments.length)));
}

void step(const Problem& p, int64_t begin, int64_t end) {
#if defined(LSGM_HAVE_AVX2)
  if (has_avx2()) return avx2::step(p, begin, end);
#endif
  scalar::step(p, begin, end);
}

void finish(const Problem& p) {
  const int64_t norms = p.per_sample ? p.batch : 1;
  const int64_t each = p.segments.count / norms;
  const double count = static_cast<double>(elements(p) / norms);
  for (int64_t i = 0; i < norms; ++i) {
    double total = 0;
    for (int64_t s = i * each; s < (i + 1) * each; ++s) total += p.partials[s];
    const double norm = std::sqrt(total / count);
    if (p.dtype == DType::float64) {
      static_cast<double*>(p.norm)[i] = norm;
    } else {
      static_cast<float*>(p.norm)[i] = static_cast<float>(norm);
    }
  }
}

}  // namespace cpu
#endif

}  // namespace rk
}  // namespace lsgm
