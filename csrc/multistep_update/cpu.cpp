// CPU kernels of multistep_update, compiled once per instruction set (LSGM_ISA; see common/cpu.h). No torch.
#include "common/cpu.h"

#include <type_traits>

#include "common/vec.h"
#include "multistep_update/multistep_update.h"

namespace lsgm {
namespace multistep_update {
namespace LSGM_ISA {
namespace {

using namespace lsgm::LSGM_ISA;

// Columns of the table of coefficients: kMaxTerms rows of it stay in the first cache beside the operands.
constexpr int64_t kTable = 256;
// Registers per step: their sums are independent of each other.
constexpr int kUnroll = 4;

template <class Y, class H>
struct Operands {
  const Y* y;
  const H* history[kMaxTerms - 1];
  Y* out;
  int terms;
};

template <class Y, class H>
Operands<Y, H> operands_at(const Problem& p, int64_t at) {
  Operands<Y, H> o;
  o.y = static_cast<const Y*>(p.inputs[0]) + at;
  for (int t = 1; t < p.terms; ++t) o.history[t - 1] = static_cast<const H*>(p.inputs[t]) + at;
  o.out = static_cast<Y*>(p.out) + at;
  o.terms = p.terms;
  return o;
}

// U registers of type V from element i on. `c` has one coefficient per term, or in a table kTable per term.
template <class V, int U, bool table, class C, class Y, class H>
inline void step(const Operands<Y, H>& o, const C* c, int64_t i) {
  V sums[U], k, x;
  if (!table) fill(k, c[0]);
  for (int u = 0; u < U; ++u) {
    if (table) load(k, c + i + u * V::width);
    load(x, o.y + i + u * V::width);
    sums[u] = mul(k, x);
  }
  for (int t = 1; t < o.terms; ++t) {
    const H* entry = o.history[t - 1] + i;
    if (!table) fill(k, c[t]);
    for (int u = 0; u < U; ++u) {
      if (table) load(k, c + t * kTable + i + u * V::width);
      load(x, entry + u * V::width);
      sums[u] = fma(k, x, sums[u]);
    }
  }
  for (int u = 0; u < U; ++u) store(sums[u], o.out + i + u * V::width);
}

#if LSGM_VEC_AVX2

// 16 neighbours in bfloat16 as those at even and those at odd places: taking them apart and putting them together takes
// half the instructions that their order would, and where all share their coefficients the order does not matter.
struct Split {
  __m256 even, odd;
};

inline Split split(const BFloat16* p) {
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)),
      _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
}

// Rounded to bfloat16 in the upper half of each element.
inline __m256i rounded(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  return _mm256_castps_si256(
      _mm256_blendv_ps(_mm256_castsi256_ps(sum), _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)), nan));
}

inline void join(Split x, BFloat16* p) {
  const __m256i pairs = _mm256_blend_epi16(_mm256_srli_epi32(rounded(x.even), 16), rounded(x.odd), 0xaa);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), pairs);
}

// 16 U elements from element i on.
template <int U>
inline void split_step(const Operands<BFloat16, BFloat16>& o, const float* c, int64_t i) {
  Split sums[U];
  __m256 k = _mm256_set1_ps(c[0]);
  for (int u = 0; u < U; ++u) {
    const Split x = split(o.y + i + 16 * u);
    sums[u] = {_mm256_mul_ps(k, x.even), _mm256_mul_ps(k, x.odd)};
  }
  for (int t = 1; t < o.terms; ++t) {
    k = _mm256_set1_ps(c[t]);
    for (int u = 0; u < U; ++u) {
      const Split x = split(o.history[t - 1] + i + 16 * u);
      sums[u] = {_mm256_fmadd_ps(k, x.even, sums[u].even), _mm256_fmadd_ps(k, x.odd, sums[u].odd)};
    }
  }
  for (int u = 0; u < U; ++u) join(sums[u], o.out + i + 16 * u);
}

#endif

template <bool table, class C, class Y, class H>
void combine(const Operands<Y, H>& o, const C* c, int64_t n) {
  constexpr int64_t width = Vec<C>::width;
  int64_t i = 0;
#if LSGM_VEC_AVX2
  if constexpr (!table && std::is_same<Y, BFloat16>::value && std::is_same<H, BFloat16>::value) {
    for (; i + 32 <= n; i += 32) split_step<2>(o, c, i);
    for (; i + 16 <= n; i += 16) split_step<1>(o, c, i);
  }
#endif
  for (; i + kUnroll * width <= n; i += kUnroll * width) step<Vec<C>, kUnroll, table>(o, c, i);
  for (; i + width <= n; i += width) step<Vec<C>, 1, table>(o, c, i);
  if (i == n) return;
  if (n >= width) {  // the last register overlaps the one before: same inputs, same values
    step<Vec<C>, 1, table>(o, c, n - width);
    return;
  }
  for (; i < n; ++i) step<Lane<C>, 1, table>(o, c, i);
}

template <class C, class Y, class H>
void shared_coefficients(const Problem& p, const cpu::Plan& plan, int64_t begin, int64_t end) {
  const Segments& segments = plan.segments;
  const bool by_sample = depends_on_sample(p), by_channel = plan.runs_per_sample > 1;
  // Counted on, not divided anew: runs may be shorter than a division takes.
  Segment at = segment_at(segments, begin);
  int64_t sample = at.run / plan.runs_per_sample;
  int64_t channel = at.run - sample * plan.runs_per_sample;
  C c[kMaxTerms];
  for (int t = 0; t < p.terms; ++t) c[t] = coefficient_at<C>(p.coefficients[t], sample, channel);
  for (int64_t s = begin; s < end; ++s) {
    const int64_t first = at.piece * segments.limit;
    combine<false>(operands_at<Y, H>(p, at.run * segments.length + first), c,
        smaller(segments.limit, segments.length - first));
    if (++at.piece < segments.per_run) continue;
    at.piece = 0;
    if (++at.run == segments.outer || !(by_sample || by_channel)) continue;
    if (++channel == plan.runs_per_sample) {
      channel = 0;
      ++sample;
    }
    for (int t = 0; t < p.terms; ++t) c[t] = coefficient_at<C>(p.coefficients[t], sample, channel);
  }
}

// Coefficients of the columns [first, first + count), and the same again up to `filled` columns.
template <class C>
void fill_table(const Problem& p, const cpu::Plan& plan, int64_t sample, int64_t first, int64_t count, int64_t filled,
    C* table) {
  for (int t = 0; t < p.terms; ++t) {
    const Coefficient& c = p.coefficients[t];
    C* row = table + t * kTable;
    int64_t channel = first / plan.repeat;
    int64_t left = plan.repeat - (first - channel * plan.repeat);
    C value = coefficient_at<C>(c, sample, channel);
    for (int64_t j = 0; j < count; ++j) {
      row[j] = value;
      if (c.channel_stride != 0 && --left == 0 && j + 1 < count) {
        left = plan.repeat;
        value = coefficient_at<C>(c, sample, ++channel);
      }
    }
    for (int64_t j = count; j < filled; ++j) row[j] = row[j - count];
  }
}

template <class C, class Y, class H>
void tabulated_coefficients(const Problem& p, const cpu::Plan& plan, int64_t begin, int64_t end) {
  const int64_t columns = plan.columns;
  const bool by_sample = depends_on_sample(p);
  alignas(64) C table[kMaxTerms * kTable];
  for (int64_t s = begin; s < end; ++s) {
    const Segment segment = segment_at(plan.segments, s);
    const int64_t sample = by_sample ? segment.run : 0;
    const int64_t at = (segment.run * plan.segments.length + segment.begin) * columns;
    if (columns <= kTable) {  // whole rows, several at a time
      const int64_t n = segment.size * columns;
      const int64_t filled = smaller(n, kTable / columns * columns);
      if (by_sample || s == begin || segment.size != plan.segments.limit) {
        fill_table(p, plan, sample, 0, columns, filled, table);
      }
      for (int64_t i = 0; i < n; i += filled) {
        combine<true>(operands_at<Y, H>(p, at + i), table, smaller(filled, n - i));
      }
    } else {
      for (int64_t j = 0; j < columns; j += kTable) {
        const int64_t count = smaller(kTable, columns - j);
        fill_table(p, plan, sample, j, count, count, table);
        for (int64_t row = 0; row < segment.size; ++row) {
          combine<true>(operands_at<Y, H>(p, at + row * columns + j), table, count);
        }
      }
    }
  }
}

}  // namespace

void forward(const Problem& p, const cpu::Plan& plan, int64_t begin, int64_t end) {
  if (begin == end) return;
  visit(p.y_dtype, [&](auto y_type) {
    visit(p.h_dtype, [&](auto h_type) {
      using Y = typename decltype(y_type)::type;
      using H = typename decltype(h_type)::type;
      using C = typename Compute<Y, H>::type;
      if (plan.columns == 0) {
        shared_coefficients<C, Y, H>(p, plan, begin, end);
      } else {
        tabulated_coefficients<C, Y, H>(p, plan, begin, end);
      }
    });
  });
}

}  // namespace LSGM_ISA

#if !LSGM_VEC_AVX2  // what exists once, compiled for every processor
namespace cpu {

Plan plan(const Problem& p) {
  constexpr int64_t kSegment = 16384;  // elements: long enough to hide its own set-up, short enough to share out
  constexpr int64_t kElementsPerThread = 65536;  // some ten microseconds: what waking a second thread costs
  constexpr int64_t kShortPlane = 64;  // a plane below this is cheaper from a table than on its own
  const bool by_sample = depends_on_sample(p);
  Plan plan{};
  plan.runs_per_sample = 1;
  if (!depends_on_channel(p)) {
    const int64_t runs = by_sample ? p.batch : 1;
    plan.segments = make_segments(runs, elements(p) / runs, kSegment);
  } else if (p.order == Order::planes && p.spatial >= kShortPlane) {
    plan.runs_per_sample = p.channels;
    plan.segments = make_segments(p.batch * p.channels, p.spatial, kSegment);
  } else {
    plan.repeat = p.order == Order::planes ? p.spatial : 1;
    plan.columns = p.channels * plan.repeat;
    const int64_t runs = by_sample ? p.batch : 1;
    plan.segments = make_segments(runs, elements(p) / plan.columns / runs, larger(1, kSegment / plan.columns));
  }
  const int64_t units = smaller(plan.segments.limit, plan.segments.length);
  plan.grain = larger(1, kElementsPerThread / (units * larger(1, plan.columns)));
  return plan;
}

void forward(const Problem& p, const Plan& plan, int64_t begin, int64_t end) {
#if defined(LSGM_HAVE_AVX2)
  if (has_avx2()) return avx2::forward(p, plan, begin, end);
#endif
  scalar::forward(p, plan, begin, end);
}

}  // namespace cpu
#endif

}  // namespace multistep_update
}  // namespace lsgm
