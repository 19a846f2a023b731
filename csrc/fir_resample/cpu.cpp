// CPU kernels of fir_resample, compiled once per instruction set (LSGM_ISA; see common/cpu.h). No torch.
//
// A step reads the lines that it needs where they lie, adds them up along the columns in registers, and then these sums
// along the line. With factor and shift the lines are activated first, into scratch memory: all those of a unit
// (planes), or each when it is needed, in place of one that is needed no longer (rows). Lines beside the image are read
// from zeros.
//   planes: registers hold neighbours of a line; the neighbour of each lane is shifted in from the register beside it,
//           and the even and the odd columns of the larger image are interleaved or split in registers.
//           Where lines are half a register of AVX-512 long, it holds two of them.
//   rows:   registers hold channels of a pixel. On the way down, what two columns give for the next result too is kept
//           in scratch memory.
#include <cmath>
#include <cstring>

#include "common/cpu.h"
#include "common/vec_math.h"
#include "common/vector_loop.h"
#include "fir_resample/fir_resample.h"

namespace lsgm {
namespace fir_resample {

namespace {

constexpr int64_t kRing = 4;  // activated lines of rows: what a step reads at most

// Scratch memory, in floats: zeros, what is kept from pixel to pixel (rows), and then the activated lines.
struct Layout {
  int64_t pixel;  // activated: from one column to the next
  int64_t line;
  int64_t zeros, kept, activated;
};

// Lines that the steps of a band read.
int64_t lines_of(const Problem& p, int64_t steps) {
  return smaller(p.height, (p.up ? 1 : 2) * steps + (p.fir ? 2 : 0));
}

Layout layout_of(const Problem& p) {
  const bool planes = p.order == Order::planes;
  const int64_t pixel = planes ? 1 : p.group;
  const int64_t line = p.width * pixel, lines = planes ? lines_of(p, p.band_steps) : kRing;
  return {pixel, line, planes ? p.width : p.group, planes ? 0 : p.group, p.factor == nullptr ? 0 : lines * line};
}

}  // namespace

namespace LSGM_ISA {
namespace {

using namespace lsgm::LSGM_ISA;

using Register = Vec<float>;
constexpr int64_t kLanes = Register::width;

inline Register filled(float v) {
  Register x;
  fill(x, v);
  return x;
}

// ---- registers of neighbours ----

// The lanes of `here`, moved up by one; the first is the last of `before`.
inline Register from_left(Register before, Register here) {
#if LSGM_VEC_AVX512
  return {_mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(here.v), _mm512_castps_si512(before.v), 15))};
#elif LSGM_VEC_AVX2
  const __m256i between = _mm256_castps_si256(_mm256_permute2f128_ps(before.v, here.v, 0x21));
  return {_mm256_castsi256_ps(_mm256_alignr_epi8(_mm256_castps_si256(here.v), between, 12))};
#else
  static_cast<void>(here);
  return before;
#endif
}

// Moved down by one; the last is the first of `after`.
inline Register from_right(Register here, Register after) {
#if LSGM_VEC_AVX512
  return {_mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(after.v), _mm512_castps_si512(here.v), 1))};
#elif LSGM_VEC_AVX2
  const __m256i between = _mm256_castps_si256(_mm256_permute2f128_ps(here.v, after.v, 0x21));
  return {_mm256_castsi256_ps(_mm256_alignr_epi8(between, _mm256_castps_si256(here.v), 4))};
#else
  static_cast<void>(here);
  return after;
#endif
}

struct Two {
  Register first, second;
};

// even[0], odd[0], even[1], ... in two registers.
inline Two interleave(Register even, Register odd) {
#if LSGM_VEC_AVX512
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  return {{_mm512_permutex2var_ps(even.v, low, odd.v)}, {_mm512_permutex2var_ps(even.v, high, odd.v)}};
#elif LSGM_VEC_AVX2
  const __m256 low = _mm256_unpacklo_ps(even.v, odd.v), high = _mm256_unpackhi_ps(even.v, odd.v);
  return {{_mm256_permute2f128_ps(low, high, 0x20)}, {_mm256_permute2f128_ps(low, high, 0x31)}};
#else
  return {even, odd};
#endif
}

// The even and the odd ones of the numbers in two registers.
inline Two split(Register low, Register high) {
#if LSGM_VEC_AVX512
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return {{_mm512_permutex2var_ps(low.v, even, high.v)}, {_mm512_permutex2var_ps(low.v, odd, high.v)}};
#elif LSGM_VEC_AVX2
  const auto in_order = [](__m256 x) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(x), 0b11011000));
  };
  return {{in_order(_mm256_shuffle_ps(low.v, high.v, 0x88))}, {in_order(_mm256_shuffle_ps(low.v, high.v, 0xdd))}};
#else
  return {low, high};
#endif
}

// The first n elements, at most a register of them; the lanes beyond are 0, and nothing beyond is touched.
template <class T>
inline Register load_some(const T* p, int64_t n) {
  T some[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) some[i] = p[i];
  Register x;
  load(x, some);
  return x;
}
template <class T>
inline void store_some(Register x, T* p, int64_t n) {
  T some[kLanes];
  store(x, some);
  for (int64_t i = 0; i < n; ++i) p[i] = some[i];
}

#if LSGM_VEC_AVX512

inline __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
inline Register load_some(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
inline void store_some(Register x, float* p, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), x.v); }
inline Register load_some(const Half* p, int64_t n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p))};
}
inline Register load_some(const BFloat16* p, int64_t n) {
  return {widen16(_mm256_maskz_loadu_epi16(first_lanes(n), p))};
}
inline void store_some(Register x, Half* p, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), f16x16(x.v));
}
inline void store_some(Register x, BFloat16* p, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), bf16x16(x.v));
}

#elif LSGM_VEC_AVX2

inline __m256i first_lanes(int64_t n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane);
}
inline Register load_some(const float* p, int64_t n) { return {_mm256_maskload_ps(p, first_lanes(n))}; }
inline void store_some(Register x, float* p, int64_t n) { _mm256_maskstore_ps(p, first_lanes(n), x.v); }

#endif

template <class T>
inline Register load_up_to(const T* p, int64_t n) {
  if (n < kLanes) return n <= 0 ? filled(0) : load_some(p, n);
  Register x;
  load(x, p);
  return x;
}
template <class T>
inline void store_up_to(Register x, T* p, int64_t n) {
  if (n >= kLanes) return store(x, p);
  if (n > 0) store_some(x, p, n);
}

// ---- planes ----

// The lines that a step reads, in order, each `width` elements.
template <class S>
struct Lines {
  const S* line[4];
};

template <bool kFir, class S, class T>
inline void enlarge_line(const Lines<S>& x, int64_t width, float scale, T* upper, T* lower) {
  const Register one = filled(scale), three = filled(3 * scale), three_of_sums = filled(3);
  // Sums along the columns, for both lines of the result.
  const auto sums_at = [&](int64_t j) -> Two {
    const int64_t n = width - j;
    const Register here = load_up_to(x.line[1] + j, n), most = mul(three, here);
    return {fma(one, load_up_to(x.line[0] + j, n), most), fma(one, load_up_to(x.line[2] + j, n), most)};
  };
  const auto write = [](Register even, Register odd, T* to, int64_t n) {
    const Two both = interleave(even, odd);
    store_up_to(both.first, to, n);
    store_up_to(both.second, to + kLanes, n - kLanes);
  };
  if constexpr (!kFir) {
    for (int64_t j = 0; j < width; j += kLanes) {
      const Register value = mul(one, load_up_to(x.line[0] + j, width - j));
      write(value, value, upper + 2 * j, 2 * (width - j));
      write(value, value, lower + 2 * j, 2 * (width - j));
    }
  } else {
    Two before = {filled(0), filled(0)}, here = sums_at(0);
    for (int64_t j = 0; j < width; j += kLanes) {
      const Two after = sums_at(j + kLanes);
      const auto along = [&](Register left, Register middle, Register right, T* to) {
        const Register even = fma(three_of_sums, middle, from_left(left, middle));
        const Register odd = fma(three_of_sums, middle, from_right(middle, right));
        write(even, odd, to + 2 * j, 2 * (width - j));
      };
      along(before.first, here.first, after.first, upper);
      along(before.second, here.second, after.second, lower);
      before = here;
      here = after;
    }
  }
}

// `width`: of the result.
template <bool kFir, class S, class T>
inline void reduce_line(const Lines<S>& x, int64_t width, float scale, T* to) {
  const Register one = filled(scale), three = filled(3 * scale), three_of_sums = filled(3);
  const auto sum_at = [&](int64_t i, int64_t n) {
    const Register a = load_up_to(x.line[0] + i, n), b = load_up_to(x.line[1] + i, n);
    if constexpr (!kFir) {
      return mul(one, add(a, b));
    } else {
      const Register outer = add(a, load_up_to(x.line[3] + i, n)), inner = add(b, load_up_to(x.line[2] + i, n));
      return fma(three, inner, mul(one, outer));
    }
  };
  // Sums along the columns, at even places and at odd ones.
  const auto sums_at = [&](int64_t j) {
    const int64_t i = 2 * j, n = 2 * (width - j);
    return split(sum_at(i, n), sum_at(i + kLanes, n - kLanes));
  };
  Two here = sums_at(0);
  Register before = filled(0);
  for (int64_t j = 0; j < width; j += kLanes) {
    const Two after = sums_at(j + kLanes);
    Register y = add(here.first, here.second);
    if constexpr (kFir) {
      y = fma(three_of_sums, y, add(from_left(before, here.second), from_right(here.first, after.first)));
    }
    store_up_to(y, to + j, width - j);
    before = here.second;
    here = after;
  }
}

// ---- rows ----

template <class R>
inline R constant(float v) {
  R x;
  fill(x, v);
  return x;
}

template <class R, class S>
inline R loaded(const S* p) {
  R x;
  load(x, p);
  return x;
}

// Calls step(Register{}, c), and step(Lane<float>{}, c) for what is left: no element twice, so that it may change what
// it reads.
template <class Step>
inline void for_each_channel(int64_t channels, Step&& step) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) step(Register{}, c);
  for (; c < channels; ++c) step(Lane<float>{}, c);
}

// The channels of one column of the lines of a step.
template <class S, int kCount>
struct Pixels {
  const S* line[kCount];
};

template <class R, class S>
inline R reduced_sum(const Pixels<S, 4>& x, float scale, int64_t c) {
  const R outer = add(loaded<R>(x.line[0] + c), loaded<R>(x.line[3] + c));
  const R inner = add(loaded<R>(x.line[1] + c), loaded<R>(x.line[2] + c));
  return fma(constant<R>(3 * scale), inner, mul(constant<R>(scale), outer));
}

// A pixel of the result, of the nearest one and those beside it: 9, 3, 3 and 1 parts.
template <class S, class T>
inline void enlarge_pixel(
    const S* nearest, const S* in_line, const S* in_column, const S* across, int64_t channels, float scale, T* to) {
  for_each_register<float>(channels, [&](auto type, int64_t c) {
    using R = decltype(type);
    const R three = constant<R>(3 * scale);
    const R far = fma(three, loaded<R>(in_line + c), mul(constant<R>(scale), loaded<R>(across + c)));
    store(fma(constant<R>(9 * scale), loaded<R>(nearest + c), fma(three, loaded<R>(in_column + c), far)), to + c);
  });
}

// Result j of `columns` needs the columns 2 j - 1 ... 2 j + 2. Kept is what the first two of them give.
template <class S, class T, class At>
inline void reduce_row(At&& at, int64_t columns, int64_t channels, int64_t pitch, float scale, float* kept, T* to) {
  const Pixels<S, 4> first = at(0);
  for_each_channel(channels, [&](auto type, int64_t c) {
    using R = decltype(type);
    store(mul(constant<R>(3), reduced_sum<R>(first, scale, c)), kept + c);
  });
  for (int64_t j = 0; j < columns; ++j) {
    const Pixels<S, 4> near = at(2 * j + 1), far = at(2 * j + 2);
    for_each_channel(channels, [&](auto type, int64_t c) {
      using R = decltype(type);
      const R a = reduced_sum<R>(near, scale, c), b = reduced_sum<R>(far, scale, c), three = constant<R>(3);
      store(add(fma(three, a, loaded<R>(kept + c)), b), to + j * pitch + c);
      store(fma(three, b, a), kept + c);
    });
  }
}

template <class S, class T>
inline void copy_pixel(const S* from, int64_t channels, float scale, T* to) {
  for_each_register<float>(channels, [&](auto type, int64_t c) {
    using R = decltype(type);
    store(mul(constant<R>(scale), loaded<R>(from + c)), to + c);
  });
}

template <class S, class T>
inline void average_pixel(
    const Pixels<S, 2>& left, const Pixels<S, 2>& right, int64_t channels, float scale, T* to) {
  for_each_register<float>(channels, [&](auto type, int64_t c) {
    using R = decltype(type);
    const R a = add(loaded<R>(left.line[0] + c), loaded<R>(left.line[1] + c));
    const R b = add(loaded<R>(right.line[0] + c), loaded<R>(right.line[1] + c));
    store(mul(constant<R>(scale), add(a, b)), to + c);
  });
}

// ---- activation ----

inline Lane<float> swish(Lane<float> u) { return {u.v / (1.0f + std::exp(-u.v))}; }
#if LSGM_VEC_AVX2
inline Register swish(Register u) { return div(u, one_plus_exp_minus(u)); }
#endif

// Lines of a plane.
template <class T>
inline void activate_run(const T* from, float* to, int64_t n, float factor, float shift) {
  for_each_register<float>(n, [&](auto type, int64_t j) {
    using R = decltype(type);
    store(swish(fma(loaded<R>(from + j), constant<R>(factor), constant<R>(shift))), to + j);
  });
}

// The channels of a pixel.
template <class T>
inline void activate_pixel(const T* from, float* to, int64_t channels, const float* factor, const float* shift) {
  for_each_register<float>(channels, [&](auto type, int64_t c) {
    using R = decltype(type);
    store(swish(fma(loaded<R>(from + c), loaded<R>(factor + c), loaded<R>(shift + c))), to + c);
  });
}

// ---- steps ----

// What a unit works on: channels [channel, channel + channels) of one sample, steps [first, last).
struct Unit {
  int64_t sample, channel, channels, first, last;
};

Unit unit_at(const Problem& p, int64_t i) {
  Unit u;
  // Groups are neighbours in memory where they are rows, bands where they are planes.
  const bool planes = p.order == Order::planes;
  const int64_t inner = planes ? p.bands : p.groups, outer = planes ? p.groups : p.bands;
  const int64_t rest = i / inner, in = i - rest * inner;
  u.sample = rest / outer;
  const int64_t out = rest - u.sample * outer;
  u.channel = (planes ? out : in) * p.group;
  u.channels = smaller(p.group, p.channels - u.channel);
  u.first = (planes ? in : out) * p.band_steps;
  u.last = smaller(u.first + p.band_steps, p.steps);
  return u;
}

// The first line that a step reads, and how many.
template <bool kUp, bool kFir>
struct Reach {
  static constexpr int lines = kFir ? (kUp ? 3 : 4) : (kUp ? 1 : 2);
  static int64_t first(int64_t step) { return (kUp ? step : 2 * step) - (kFir ? 1 : 0); }
};

// The lines of a unit: as they lie, or activated in scratch memory.
template <class T>
struct InPlace {
  using type = T;
  const Problem& p;
  const T* base;  // of the unit
  const T* zeros;
  int64_t line;   // from one to the next
  int64_t pixel;

  InPlace(const Problem& problem, const Unit& u, float* scratch)
      : p(problem),
        base(static_cast<const T*>(problem.x)),
        zeros(reinterpret_cast<const T*>(scratch)) {
    if (p.order == Order::planes) {
      base += (u.sample * p.channels + u.channel) * p.height * p.width;
      pixel = 1;
    } else {
      base += u.sample * p.height * p.width * p.channels + u.channel;
      pixel = p.channels;
    }
    line = p.width * pixel;
  }
  bool exists(int64_t y) const { return y >= 0 && y < p.height; }
  void need(int64_t) {}
  const T* at(int64_t y) const { return base + y * line; }
};

template <class T>
struct Activated {
  using type = float;
  const InPlace<T> source;
  const Problem& p;
  const float* factor;
  const float* shift;
  const float* zeros;
  float* lines;
  int64_t line, pixel, channels;
  int64_t first;     // line of the unit
  int64_t next = 0;  // rows: the first that is not yet activated

  Activated(const Problem& problem, const Unit& u, float* scratch)
      : source(problem, u, scratch),
        p(problem),
        factor(problem.factor + u.sample * problem.channels + u.channel),
        shift(problem.shift + u.sample * problem.channels + u.channel),
        zeros(scratch),
        channels(u.channels) {
    const Layout l = layout_of(p);
    lines = scratch + l.zeros + l.kept;
    line = l.line;
    pixel = l.pixel;
    next = first = larger(0, (p.up ? u.first : 2 * u.first) - (p.fir ? 1 : 0));
    if (p.order == Order::planes) {
      const int64_t end = smaller(p.height, (p.up ? u.last : 2 * u.last) + (p.fir ? 1 : 0));
      activate_run(source.at(first), lines, (end - first) * line, *factor, *shift);
      next = end;
    }
  }
  bool exists(int64_t y) const { return source.exists(y); }
  const float* at(int64_t y) const { return lines + (p.order == Order::planes ? y - first : y % kRing) * line; }

  void need(int64_t y) {
    for (; next <= y; ++next) {
      const T* from = source.at(next);
      float* to = lines + next % kRing * line;
      for (int64_t j = 0; j < p.width; ++j) {
        activate_pixel(from + j * source.pixel, to + j * pixel, channels, factor, shift);
      }
    }
  }
};

template <bool kUp, bool kFir, class T, class Source>
void plane_steps(const Problem& p, const Unit& u, const Source& source) {
  using S = typename Source::type;
  using Range = Reach<kUp, kFir>;
  const int64_t wide = out_width(p);
  T* to = static_cast<T*>(p.out) + (u.sample * p.channels + u.channel) * out_height(p) * wide;
  for (int64_t i = u.first; i < u.last; ++i) {
    Lines<S> x;
    for (int k = 0; k < Range::lines; ++k) {
      const int64_t y = Range::first(i) + k;
      const bool exists = source.exists(y);
      x.line[k] = exists ? source.at(y) : source.zeros;
    }
    if constexpr (kUp) {
      T* upper = to + 2 * i * wide;
      enlarge_line<kFir>(x, p.width, p.scale, upper, upper + wide);
    } else {
      reduce_line<kFir>(x, wide, p.scale, to + i * wide);
    }
  }
}

#if LSGM_VEC_AVX512

// The same where a register holds two lines of 8, or one of 16. Lines are read once.
template <bool kUp, bool kFir, class T, class Source>
void plane_pairs(const Problem& p, const Unit& u, const Source& source) {
  constexpr int64_t kHalf = kLanes / 2;
  constexpr __mmask16 kNotFirst = 0xfefe, kNotLast = 0x7f7f;  // of each half
  const Register one = filled(p.scale), three = filled(3 * p.scale), three_of_sums = filled(3);
  const auto left_of = [](Register x) -> Register {
    const __m512i bits = _mm512_castps_si512(x.v);
    return {_mm512_castsi512_ps(_mm512_maskz_alignr_epi32(kNotFirst, bits, bits, 15))};
  };
  const auto right_of = [](Register x) -> Register {
    const __m512i bits = _mm512_castps_si512(x.v);
    return {_mm512_castsi512_ps(_mm512_maskz_alignr_epi32(kNotLast, bits, bits, 1))};
  };
  T* to = static_cast<T*>(p.out) + (u.sample * p.channels + u.channel) * out_height(p) * out_width(p);
  if constexpr (kUp) {
    const int64_t end = smaller(p.height, u.last + (kFir ? 1 : 0));
    const auto lines_at = [&](int64_t y) {
      return y < end ? load_up_to(source.at(y), (end - y) * kHalf) : filled(0);
    };
    // The second half of one and the first half of another.
    const auto between = [](Register a, Register b) -> Register { return {_mm512_shuffle_f32x4(a.v, b.v, 0x4e)}; };
    Register here = lines_at(u.first), before = filled(0);
    if (kFir && u.first > 0) before = between(before, load_up_to(source.at(u.first - 1), kHalf));
    for (int64_t i = u.first; i < u.last; i += 2) {
      const Register after = lines_at(i + 2);
      Register sums[2] = {mul(one, here), mul(one, here)};
      if constexpr (kFir) {
        const Register most = mul(three, here);
        sums[0] = fma(one, between(before, here), most);
        sums[1] = fma(one, between(here, after), most);
      }
      T* const four = to + 4 * i * kHalf;
      for (int k = 0; k < 2; ++k) {
        Two lines = {sums[k], sums[k]};
        if constexpr (kFir) {
          lines = {fma(three_of_sums, sums[k], left_of(sums[k])), fma(three_of_sums, sums[k], right_of(sums[k]))};
        }
        lines = interleave(lines.first, lines.second);
        store(lines.first, four + k * kLanes);
        if (i + 1 < u.last) store(lines.second, four + (k + 2) * kLanes);
      }
      before = here;
      here = after;
    }
  } else {
    const int64_t end = smaller(p.height, 2 * u.last + (kFir ? 1 : 0));
    const auto line_at = [&](int64_t y) { return y >= 0 && y < end ? load_up_to(source.at(y), kLanes) : filled(0); };
    // Lines 2 i - 1 and 2 i, of the pair of results i and i + 1.
    Register a = kFir ? line_at(2 * u.first - 1) : filled(0), b = line_at(2 * u.first);
    for (int64_t i = u.first; i < u.last; i += 2) {
      const Register c = line_at(2 * i + 1), d = line_at(2 * i + 2), e = line_at(2 * i + 3), f = line_at(2 * i + 4);
      Two sums;
      if constexpr (kFir) {
        sums = split(fma(three, add(b, c), mul(one, add(a, d))), fma(three, add(d, e), mul(one, add(c, f))));
      } else {
        sums = split(mul(one, add(b, c)), mul(one, add(d, e)));
      }
      Register y = add(sums.first, sums.second);
      if constexpr (kFir) y = fma(three_of_sums, y, add(left_of(sums.second), right_of(sums.first)));
      store_up_to(y, to + i * kHalf, (u.last - i) * kHalf);
      a = e;
      b = f;
    }
  }
}

#endif

template <bool kUp, bool kFir, class T, class Source>
void row_steps(const Problem& p, const Unit& u, Source& source, float* kept) {
  using S = typename Source::type;
  using Range = Reach<kUp, kFir>;
  constexpr int kReach = Range::lines;
  const int64_t wide = out_width(p), pitch = p.channels, to_line = wide * pitch;
  T* const begin = static_cast<T*>(p.out) + u.sample * out_height(p) * to_line + u.channel;
  for (int64_t i = u.first; i < u.last; ++i) {
    const S* line[kReach];
    for (int k = 0; k < kReach; ++k) {
      const int64_t y = Range::first(i) + k;
      if (source.exists(y)) source.need(y);
      line[k] = source.exists(y) ? source.at(y) : nullptr;
    }
    const auto pixel_of = [&](int k, int64_t column) {
      return line[k] != nullptr && column >= 0 && column < p.width ? line[k] + column * source.pixel : source.zeros;
    };
    const auto at = [&](int64_t column) {
      Pixels<S, kReach> x;
      for (int k = 0; k < kReach; ++k) x.line[k] = pixel_of(k, column);
      return x;
    };
    T* const to = begin + (kUp ? 2 * i : i) * to_line;
    if constexpr (kUp && kFir) {
      for (int lower = 0; lower < 2; ++lower) {
        const int other = 2 * lower;
        T* pixel = to + lower * to_line;
        for (int64_t j = 0; j < p.width; ++j) {
          for (int right = 0; right < 2; ++right, pixel += pitch) {
            const int64_t beside = j + (right == 0 ? -1 : 1);
            enlarge_pixel(pixel_of(1, j), pixel_of(1, beside), pixel_of(other, j), pixel_of(other, beside), u.channels,
                p.scale, pixel);
          }
        }
      }
    } else if constexpr (kFir) {
      reduce_row<S>(at, wide, u.channels, pitch, p.scale, kept, to);
    } else if constexpr (kUp) {
      for (int64_t j = 0; j < 2 * wide; ++j) {
        const int64_t column = j < wide ? j : j - wide;
        copy_pixel(pixel_of(0, column / 2), u.channels, p.scale, to + j * pitch);
      }
    } else {
      for (int64_t j = 0; j < wide; ++j) {
        average_pixel(at(2 * j), at(2 * j + 1), u.channels, p.scale, to + j * pitch);
      }
    }
  }
}

template <bool kUp, bool kFir, class T, template <class> class Source>
void run_units(const Problem& p, int64_t begin, int64_t end, float* scratch) {
  std::memset(scratch, 0, static_cast<size_t>(layout_of(p).zeros) * sizeof(float));
  for (int64_t i = begin; i < end; ++i) {
    const Unit u = unit_at(p, i);
    Source<T> source(p, u, scratch);
    if (p.order == Order::rows) {
      row_steps<kUp, kFir, T>(p, u, source, scratch + layout_of(p).zeros);
#if LSGM_VEC_AVX512
    } else if (smaller(p.width, out_width(p)) == kLanes / 2) {
      plane_pairs<kUp, kFir, T>(p, u, source);
#endif
    } else {
      plane_steps<kUp, kFir, T>(p, u, source);
    }
  }
}

template <bool kUp, bool kFir, class T>
void run_as(const Problem& p, int64_t begin, int64_t end, float* scratch) {
  if (p.factor == nullptr) {
    run_units<kUp, kFir, T, InPlace>(p, begin, end, scratch);
  } else {
    run_units<kUp, kFir, T, Activated>(p, begin, end, scratch);
  }
}

template <class T>
void run_type(const Problem& p, int64_t begin, int64_t end, float* scratch) {
  if (p.up) {
    p.fir ? run_as<true, true, T>(p, begin, end, scratch) : run_as<true, false, T>(p, begin, end, scratch);
  } else {
    p.fir ? run_as<false, true, T>(p, begin, end, scratch) : run_as<false, false, T>(p, begin, end, scratch);
  }
}

}  // namespace

void run(const Problem& p, int64_t begin, int64_t end, float* scratch) {
  switch (p.dtype) {
    case DType::float16:
      return run_type<Half>(p, begin, end, scratch);
    case DType::bfloat16:
      return run_type<BFloat16>(p, begin, end, scratch);
    default:  // float64 is left to the reference
      return run_type<float>(p, begin, end, scratch);
  }
}

}  // namespace LSGM_ISA

#if !LSGM_VEC_AVX2  // what exists once, compiled for every processor
namespace cpu {

constexpr int64_t kUnitElements = 32768;  // of the larger image: long enough to hide its own set-up
constexpr int64_t kThreadElements = 32768;
constexpr int64_t kRingFloats = 98304;  // activated lines of rows: the second cache holds them
constexpr int64_t kPlaneFloats = 8192;  // activated lines of a plane: the first one does
constexpr int64_t kFewestSteps = 8;     // of a band that activates lines which the next one does again
constexpr int64_t kMostChannels = 2048;  // of a group

void plan(Problem& p) {
  const bool planes = p.order == Order::planes, active = p.factor != nullptr;
  p.steps = p.up ? p.height : p.height / 2;
  const int64_t row = planes ? (p.up ? p.width : p.width / 2) : p.channels;
  if (p.lanes == 0) p.lanes = has_avx512() && row >= (planes ? 8 : 16) ? 16 : 8;
  p.group = 1;
  if (!planes) {
    const int64_t most = active ? smaller(kMostChannels, kRingFloats / (kRing * p.width) / 64 * 64) : kMostChannels;
    p.group = smaller(p.channels, larger(64, most));
  }
  p.groups = ceil_div(p.channels, p.group);
  const int64_t in_step = larger(p.width, out_width(p)) * 2 * p.group;
  p.band_steps = kUnitElements / in_step;
  if (active && planes) p.band_steps = smaller(p.band_steps, kPlaneFloats / (p.width * (p.up ? 1 : 2)));
  p.band_steps = smaller(p.steps, larger(active ? kFewestSteps : 1, p.band_steps));
  p.bands = ceil_div(p.steps, p.band_steps);
}

int64_t scratch_size(const Problem& p) {
  const Layout l = layout_of(p);
  return l.zeros + l.kept + l.activated;
}

int64_t units(const Problem& p) { return p.batch * p.groups * p.bands; }

int64_t grain(const Problem& p) {
  const int64_t in_unit = larger(p.width, out_width(p)) * 2 * p.group * p.band_steps;
  return larger(1, kThreadElements / in_unit);
}

void run(const Problem& p, int64_t begin, int64_t end, float* scratch) {
  LSGM_IF_AVX512(if (p.lanes == 16) return avx512::run(p, begin, end, scratch);)
  LSGM_IF_AVX2(if (has_avx2()) return avx2::run(p, begin, end, scratch);)
  scalar::run(p, begin, end, scratch);
}

}  // namespace cpu
#endif

}  // namespace fir_resample
}  // namespace lsgm
