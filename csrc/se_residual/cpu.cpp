// CPU kernels of se_residual, compiled once per instruction set (LSGM_ISA; see common/cpu.h). No torch.
#include "common/cpu.h"

#include "common/math.h"
#include "common/vec_math.h"
#include "common/vector_loop.h"
#include "se_residual/se_residual.h"

namespace lsgm {
namespace se_residual {
namespace LSGM_ISA {
namespace {

using namespace lsgm::LSGM_ISA;

using V = Vec<float>;
constexpr int64_t kWidth = V::width;

constexpr int64_t kFlush = 4096;        // elements of a plane after which a float32 sum joins the float64 one
constexpr int64_t kBlock = 512;         // elements after which one joins that
constexpr int64_t kSmallPlane = 512;    // elements
constexpr int64_t kRows = 8;            // rows that are added up before they join the sums of a segment
constexpr int64_t kChannelTile = 1024;  // channels whose sums stay in the first cache

template <class R>
R filled(float value) {
  R x;
  fill(x, value);
  return x;
}

// Sums of x, or of g x.
template <bool kProduct, class T>
struct Terms {
  const T* x;
  const T* grad;

  template <class R>
  R add_to(R total, int64_t i) const {
    R v;
    load(v, x + i);
    if constexpr (kProduct) {
      R g;
      load(g, grad + i);
      return fma(g, v, total);
    } else {
      return add(total, v);
    }
  }
};

template <bool kProduct, class T>
double plane_sum(const Terms<kProduct, T>& terms, int64_t at, int64_t n) {
  double total = 0;
  int64_t i = 0;
  while (i + kWidth <= n) {
    const int64_t end = smaller(n, i + kFlush);
    V part[4];
    for (V& v : part) v = filled<V>(0.0f);
    while (i + 4 * kWidth <= end) {
      const int64_t stop = smaller(end, i + kBlock);
      V block[4];
      for (V& v : block) v = filled<V>(0.0f);
      for (; i + 4 * kWidth <= stop; i += 4 * kWidth) {
        for (int k = 0; k < 4; ++k) block[k] = terms.add_to(block[k], at + i + k * kWidth);
      }
      for (int k = 0; k < 4; ++k) part[k] = add(part[k], block[k]);
    }
    for (; i + kWidth <= end; i += kWidth) part[0] = terms.add_to(part[0], at + i);
    total += static_cast<double>(sum(add(add(part[0], part[1]), add(part[2], part[3]))));
  }
  Lane<float> rest{0.0f};
  for (; i < n; ++i) rest = terms.add_to(rest, at + i);
  return total + static_cast<double>(rest.v);
}

#if LSGM_VEC_AVX2

// The sums of eight registers.
V sums(const V (&total)[8]) {
  __m256 pairs[4];
  for (int k = 0; k < 4; ++k) pairs[k] = _mm256_hadd_ps(total[2 * k].v, total[2 * k + 1].v);
  const __m256 first = _mm256_hadd_ps(pairs[0], pairs[1]), second = _mm256_hadd_ps(pairs[2], pairs[3]);
  return {_mm256_add_ps(_mm256_permute2f128_ps(first, second, 0x20), _mm256_permute2f128_ps(first, second, 0x31))};
}

// The sums of eight planes, one after the other in memory. Their sums across lanes are made together: in small planes
// these are most of the work.
template <bool kProduct, class T>
void eight_plane_sums(const Terms<kProduct, T>& terms, int64_t at, int64_t n, double* out) {
  V total[8];
  for (V& t : total) t = filled<V>(0.0f);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    for (int k = 0; k < 8; ++k) total[k] = terms.add_to(total[k], at + k * n + i);
  }
  float all[8];
  store(sums(total), all);
  for (int k = 0; k < 8; ++k) {
    Lane<float> rest{0.0f};
    for (int64_t j = i; j < n; ++j) rest = terms.add_to(rest, at + k * n + j);
    out[k] = static_cast<double>(all[k]) + static_cast<double>(rest.v);
  }
}

#endif

// `count` channels from `at` on, of `rows` rows that lie p.channels elements apart.
template <bool kProduct, class T>
void row_sums(const Problem& p, const Terms<kProduct, T>& terms, int64_t at, int64_t rows, int64_t count, double* out) {
  alignas(64) float sums[kChannelTile];
  for (int64_t c = 0; c < count; ++c) sums[c] = 0;
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
    const int64_t here = at + row * p.channels;
    const auto step = [&](auto kind, int64_t c) {
      using R = decltype(kind);
      R even = filled<R>(0.0f), odd = even, total;
      for (int64_t k = 0; k < kRows; k += 2) {
        even = terms.add_to(even, here + k * p.channels + c);
        odd = terms.add_to(odd, here + (k + 1) * p.channels + c);
      }
      load(total, sums + c);
      store(add(total, add(even, odd)), sums + c);
    };
    int64_t c = 0;
    for (; c + kWidth <= count; c += kWidth) step(V{}, c);
    for (; c < count; ++c) step(Lane<float>{}, c);
  }
  for (; row < rows; ++row) {
    for (int64_t c = 0; c < count; ++c) {
      sums[c] = terms.add_to(Lane<float>{sums[c]}, at + row * p.channels + c).v;
    }
  }
  for (int64_t c = 0; c < count; ++c) out[c] = static_cast<double>(sums[c]);
}

template <bool kProduct, class T>
void reduce_segments(const Problem& p, int64_t begin, int64_t end) {
  const Terms<kProduct, T> terms{static_cast<const T*>(p.x), static_cast<const T*>(p.grad)};
  for (int64_t s = begin; s < end; ++s) {
    const Segment segment = segment_at(p.segments, s);
    if (p.order == Order::planes) {
      const int64_t first = segment.run * p.channels + segment.begin;
      int64_t plane = first;
#if LSGM_VEC_AVX2
      if (p.spatial <= kSmallPlane) {
        for (; plane + 8 <= first + segment.size; plane += 8) {
          eight_plane_sums(terms, plane * p.spatial, p.spatial, p.partials + plane);
        }
      }
#endif
      for (; plane < first + segment.size; ++plane) {
        p.partials[plane] = plane_sum(terms, plane * p.spatial, p.spatial);
      }
    } else {
      const int64_t at = (segment.run * p.spatial + segment.begin) * p.channels;
      for (int64_t c = 0; c < p.channels; c += kChannelTile) {
        row_sums(p, terms, at + c, segment.size, smaller(kChannelTile, p.channels - c),
            p.partials + s * p.channels + c);
      }
    }
  }
}

// out = in factor + (skip, or offset per channel): both the result and grad_x.
template <bool kBackward, class T>
void apply_segments(const Problem& p, int64_t begin, int64_t end) {
  const auto* in = static_cast<const T*>(kBackward ? p.grad : p.x);
  const auto* skip = static_cast<const T*>(p.skip);
  auto* out = static_cast<T*>(kBackward ? p.grad_x : p.y);
  for (int64_t s = begin; s < end; ++s) {
    const Segment segment = segment_at(p.segments, s);
    const float* gate = state_at(p, p.state, segment.run).gate;
    const float* offset = kBackward ? state_at(p, p.deltas, segment.run).pooled : nullptr;
    if (p.order == Order::planes) {
      for (int64_t c = segment.begin; c < segment.begin + segment.size; ++c) {
        const int64_t at = (segment.run * p.channels + c) * p.spatial;
        const float factor = p.scale * gate[c], constant = kBackward ? offset[c] : 0.0f;
        for_each_register<float>(p.spatial, [=](auto kind, int64_t i) {
          using R = decltype(kind);
          R v, base = filled<R>(constant);
          load(v, in + at + i);
          if constexpr (!kBackward) load(base, skip + at + i);
          store(fma(v, filled<R>(factor), base), out + at + i);
        });
      }
    } else {
      for (int64_t row = segment.begin; row < segment.begin + segment.size; ++row) {
        const int64_t at = (segment.run * p.spatial + row) * p.channels;
        for_each_register<float>(p.channels, [=, &p](auto kind, int64_t c) {
          using R = decltype(kind);
          R v, factor, base;
          load(v, in + at + c);
          load(factor, gate + c);
          if constexpr (kBackward) {
            load(base, offset + c);
          } else {
            load(base, skip + at + c);
          }
          store(fma(v, mul(filled<R>(p.scale), factor), base), out + at + c);
        });
      }
    }
  }
}

float dot(const float* a, const float* b, int64_t n) {
  V even = filled<V>(0.0f), odd = even, x, y;
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
    load(x, a + i);
    load(y, b + i);
    even = fma(x, y, even);
    load(x, a + i + kWidth);
    load(y, b + i + kWidth);
    odd = fma(x, y, odd);
  }
  for (; i + kWidth <= n; i += kWidth) {
    load(x, a + i);
    load(y, b + i);
    even = fma(x, y, even);
  }
  float total = sum(add(even, odd));
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

Lane<float> sigmoid(Lane<float> u) { return {mix_of(u.v).network}; }

#if LSGM_VEC_AVX2

// The products of eight rows of `matrix`, n long and dense, with v.
V eight_dots(const float* matrix, const float* v, int64_t n) {
  V total[8];
  for (V& t : total) t = filled<V>(0.0f);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const V y{_mm256_loadu_ps(v + i)};
    for (int k = 0; k < 8; ++k) total[k] = fma({_mm256_loadu_ps(matrix + k * n + i)}, y, total[k]);
  }
  if (i < n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n - i)), lane);
    const V y{_mm256_maskload_ps(v + i, mask)};
    for (int k = 0; k < 8; ++k) total[k] = fma({_mm256_maskload_ps(matrix + k * n + i, mask)}, y, total[k]);
  }
  return sums(total);
}

// 1 / (1 + exp(-u)), to about three units in the last place; NaN at NaN.
V sigmoid(V u) { return {_mm256_div_ps(_mm256_set1_ps(1.0f), one_plus_exp_minus(u).v)}; }

#endif

// out[i] = f(matrix[i] v + bias[i]) of `rows` rows, n long.
template <class F>
void layer(const float* matrix, const float* v, const float* bias, int64_t rows, int64_t n, float* out, F&& f) {
  int64_t i = 0;
#if LSGM_VEC_AVX2
  for (; i + kWidth <= rows; i += kWidth) {
    V b;
    load(b, bias + i);
    store(f(add(eight_dots(matrix + i * n, v, n), b)), out + i);
  }
#endif
  for (; i < rows; ++i) out[i] = f(Lane<float>{dot(matrix + i * n, v, n) + bias[i]}).v;
}

// out[i] = sum over k of matrix[k][i] v[k]; the rows of `matrix` are n long. Four partial sums, as each addition waits
// for the one before.
void transposed_product(const float* matrix, const float* v, int64_t rows, int64_t n, float* out) {
  for_each_register<float>(n, [=](auto kind, int64_t i) {
    using R = decltype(kind);
    R part[4], w;
    for (R& x : part) x = filled<R>(0.0f);
    int64_t k = 0;
    for (; k + 4 <= rows; k += 4) {
      for (int j = 0; j < 4; ++j) {
        load(w, matrix + (k + j) * n + i);
        part[j] = fma(w, filled<R>(v[k + j]), part[j]);
      }
    }
    for (; k < rows; ++k) {
      load(w, matrix + k * n + i);
      part[0] = fma(w, filled<R>(v[k]), part[0]);
    }
    store(add(add(part[0], part[1]), add(part[2], part[3])), out + i);
  });
}

// Sums over the pieces of a sample, in their order.
double total_of(const Problem& p, int64_t sample, int64_t channel) {
  const double* partials = p.partials + sample * p.pieces * p.channels + channel;
  double total = 0;
  for (int64_t k = 0; k < p.pieces; ++k) total += partials[k * p.channels];
  return total;
}

// Calls f(Type<T>{}) with the type of the elements; float64 is the reference's.
template <class F>
void with_type(const Problem& p, F&& f) {
  switch (p.dtype) {
    case DType::float16:
      return f(Type<Half>{});
    case DType::bfloat16:
      return f(Type<BFloat16>{});
    default:
      return f(Type<float>{});
  }
}

}  // namespace

void reduce(const Problem& p, int64_t begin, int64_t end) {
  with_type(p, [&](auto type) { reduce_segments<false, typename decltype(type)::type>(p, begin, end); });
}

void gate(const Problem& p, int64_t begin, int64_t end) {
  const double share = 1 / static_cast<double>(p.spatial);
  for (int64_t sample = begin; sample < end; ++sample) {
    const State s = state_at(p, p.state, sample);
    for (int64_t c = 0; c < p.channels; ++c) {
      s.pooled[c] = static_cast<float>(total_of(p, sample, c) * share);
    }
    layer(p.reduce_weight, s.pooled, p.reduce_bias, p.hidden, p.channels, s.hidden,
        [](auto u) { return max(filled<decltype(u)>(0.0f), u); });  // NaN stays
    layer(p.expand_weight, s.hidden, p.expand_bias, p.channels, p.hidden, s.gate, [](auto u) { return sigmoid(u); });
  }
}

void apply(const Problem& p, int64_t begin, int64_t end) {
  with_type(p, [&](auto type) { apply_segments<false, typename decltype(type)::type>(p, begin, end); });
}

void backward_reduce(const Problem& p, int64_t begin, int64_t end) {
  with_type(p, [&](auto type) { reduce_segments<true, typename decltype(type)::type>(p, begin, end); });
}

void gate_backward(const Problem& p, int64_t begin, int64_t end) {
  const float per_position = 1.0f / static_cast<float>(p.spatial);
  for (int64_t sample = begin; sample < end; ++sample) {
    const State s = state_at(p, p.state, sample), d = state_at(p, p.deltas, sample);
    for (int64_t c = 0; c < p.channels; ++c) {
      d.gate[c] = p.scale * static_cast<float>(total_of(p, sample, c)) * (s.gate[c] * (1.0f - s.gate[c]));
    }
    transposed_product(p.expand_weight, d.gate, p.channels, p.hidden, d.hidden);
    for (int64_t r = 0; r < p.hidden; ++r) {
      if (s.hidden[r] <= 0) d.hidden[r] = 0;
    }
    transposed_product(p.reduce_weight, d.hidden, p.hidden, p.channels, d.pooled);
    for (int64_t c = 0; c < p.channels; ++c) d.pooled[c] *= per_position;
  }
}

void backward_apply(const Problem& p, int64_t begin, int64_t end) {
  with_type(p, [&](auto type) { apply_segments<true, typename decltype(type)::type>(p, begin, end); });
}

void parameters_backward(const Problem& p, int64_t begin, int64_t end) {
  const int64_t pitch = state_size(p);
  const State s = state_at(p, p.state, 0), d = state_at(p, p.deltas, 0);
  if (begin == 0) {
    for (int64_t r = 0; r < p.hidden; ++r) {
      float total = 0;
      for (int64_t sample = 0; sample < p.batch; ++sample) total += d.hidden[sample * pitch + r];
      p.grad_reduce_bias[r] = total;
    }
  }
  for_each_register<float>(end - begin, [&](auto kind, int64_t i) {
    using R = decltype(kind);
    const int64_t c = begin + i;
    R of_bias = filled<R>(0.0f), v;
    for (int64_t sample = 0; sample < p.batch; ++sample) {
      load(v, d.gate + sample * pitch + c);
      of_bias = add(of_bias, v);
    }
    store(of_bias, p.grad_expand_bias + c);
    for (int64_t r = 0; r < p.hidden; ++r) {
      R of_reduce = filled<R>(0.0f), of_expand = of_reduce;
      for (int64_t sample = 0; sample < p.batch; ++sample) {
        load(v, s.pooled + sample * pitch + c);
        of_reduce = fma(v, filled<R>(d.hidden[sample * pitch + r]), of_reduce);
        load(v, d.gate + sample * pitch + c);
        of_expand = fma(v, filled<R>(s.hidden[sample * pitch + r]), of_expand);
      }
      store(of_reduce, p.grad_reduce_weight + r * p.channels + c);
      float lanes[R::width];
      store(of_expand, lanes);
      for (int64_t k = 0; k < R::width; ++k) p.grad_expand_weight[(c + k) * p.hidden + r] = lanes[k];
    }
  });
}

}  // namespace LSGM_ISA

#if !LSGM_VEC_AVX2  // what exists once, compiled for every processor
namespace cpu {

void plan(Problem& p) {
  constexpr int64_t kSegment = 16384;  // elements: long enough to hide its own set-up, short enough to share out
  if (p.order == Order::planes) {
    p.segments = make_segments(p.batch, p.channels, larger(1, kSegment / p.spatial));
    p.pieces = 1;
  } else {
    constexpr int64_t kMostRows = 512;  // few enough for float32 sums
    p.segments = make_segments(p.batch, p.spatial, smaller(kMostRows, larger(1, kSegment / p.channels)));
    p.pieces = p.segments.per_run;
  }
}

int64_t grain(const Problem& p) {
  constexpr int64_t kElementsPerThread = 16384;  // some ten microseconds: what waking a second thread costs
  const int64_t other = p.order == Order::planes ? p.spatial : p.channels;
  return larger(1, kElementsPerThread / (smaller(p.segments.limit, p.segments.length) * other));
}

#if defined(LSGM_HAVE_AVX2)
#define LSGM_CHOOSE(kernel)                                   \
  void kernel(const Problem& p, int64_t begin, int64_t end) { \
    if (has_avx2()) return avx2::kernel(p, begin, end);       \
    scalar::kernel(p, begin, end);                            \
  }
#else
#define LSGM_CHOOSE(kernel) \
  void kernel(const Problem& p, int64_t begin, int64_t end) { scalar::kernel(p, begin, end); }
#endif
LSGM_CHOOSE(reduce)
LSGM_CHOOSE(gate)
LSGM_CHOOSE(apply)
LSGM_CHOOSE(backward_reduce)
LSGM_CHOOSE(gate_backward)
LSGM_CHOOSE(backward_apply)
LSGM_CHOOSE(parameters_backward)
#undef LSGM_CHOOSE

}  // namespace cpu
#endif

}  // namespace se_residual
}  // namespace lsgm
