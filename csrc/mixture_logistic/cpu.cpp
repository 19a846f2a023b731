// CPU kernels of mixture_logistic, compiled once per instruction set (LSGM_ISA; see common/cpu.h). No torch.
//
// A register holds as many pixels, and nothing is ever shuffled between them: pixels that are not beside each other in
// memory (channels_last), of another type or fewer than fill the last register are copied to a scratch of planes first.
#include "common/cpu.h"

#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "mixture_logistic/functions.h"
#include "mixture_logistic/mixture_logistic.h"

namespace lsgm {
namespace mixture_logistic {
namespace {

// Most pixels of a tile. In place, what a channel has of it should be long enough to be fetched ahead of its use; in the
// scratch, all of its channels should fit into the first-level cache.
constexpr int64_t kPlanesTile = 256, kScratchTile = 64;

constexpr float kLowest = -std::numeric_limits<float>::max();

}  // namespace

namespace LSGM_ISA {
namespace {

// -- one colour of one mixture --------------------------------------------------------------------------------------

struct Constants {
  R half_width;   // of a bin: 1 / levels
  R log_density;  // log(levels / 2)
};

Constants constants_of(const Problem& p) {
  const auto levels = static_cast<float>(p.levels);
  return {all(1.0f / levels), all(std::log(levels / 2.0f))};
}

// The mass of a bin is factor exp(exponent), with a factor from 1e-5 to 1.
struct Bin {
  R factor, exponent;
  R of_mean, of_log_scale;  // derivatives of its logarithm
};

template <bool kGradients>
inline Bin bin_of(const Constants& k, R x, R mean, R raw_log_scale) {
  const R zero = all(0.0f), one = all(1.0f), lowest_log_scale = all(-7.0f);
  const R log_scale = max(lowest_log_scale, raw_log_scale);  // NaN stays
  const R inverse = exponential(zero - log_scale).value;
  const R z = inverse * (x - mean), half = inverse * k.half_width;
  const R distance = abs(z);
  const Exponential h = exponential(zero - half), e = exponential(zero - distance);
  const R h2 = fma(h.value, h.value, one), e2 = fma(e.value, e.value, one);
  const R sinh = h.one_minus * (one + h.value);  // 2 h sinh(half), and h2 is 2 h cosh(half)

  // 2 h e (sinh(half), cosh(half) + cosh(z)), or where that is too small 1 / (1 + e)^2
  R numerator = sinh * e.value, denominator = fma(e.value, h2, h.value * e2);
  const Mask mass = greater(numerator, all(1e-5f) * denominator);
  const R above = one + e.value;
  numerator = select(mass, numerator, one);
  denominator = select(mass, denominator, above * above);
  R exponent = select(mass, zero, zero - distance - log_scale - k.log_density);
  R slope, spread;  // minus the derivative by |z|, times `denominator`; and the part of that by log s without z
  if constexpr (kGradients) {
    slope = select(mass, h.value * above, above) * e.one_minus;
    spread = one;  // the inner bins': below, once delta is known
  }

  const Mask edge = greater(abs(x), all(0.999f));
  if (any(edge)) {
    // F(half + |z|) where z points away from the bin's edge, else F(half - |z|)
    const Mask outward = negative(flip(z, x));
    const R product = h.value * e.value, sum = h.value + e.value;
    numerator = select(edge, select(outward, one, max(h.value, e.value)), numerator);
    denominator = select(edge, select(outward, one + product, sum), denominator);
    exponent = select(edge, select(outward, zero, min(zero, half - distance)), exponent);
    if constexpr (kGradients) {
      slope = select(edge, select(outward, zero - product, h.value), slope);
    }
  }

  Bin bin;
  const R reciprocal = one / denominator;
  bin.factor = numerator * reciprocal;
  bin.exponent = exponent;
  if constexpr (kGradients) {
    slope = slope * reciprocal;
    spread = select(mass, half * (h2 / sinh - bin.factor), spread);
    spread = select(edge, half * abs(slope), spread);
    bin.of_mean = inverse * flip(slope, z);
    bin.of_log_scale = select(greater(lowest_log_scale, raw_log_scale), zero, fma(distance, slope, zero - spread));
  }
  return bin;
}

struct Tanh {
  R value, derivative;
};

inline Tanh tanh_of(R x) {
  const R one = all(1.0f);
  const Exponential e = exponential(all(-2.0f) * abs(x));
  const R r = one / (one + e.value);
  return {flip(e.one_minus * r, x), all(4.0f) * e.value * r * r};
}

// sum exp(top) with one more term factor exp(exponent)
struct LogSum {
  R top, sum;
};

inline void join(LogSum& s, R exponent, R factor) {
  const R difference = exponent - s.top;
  const R shrink = exponential(all(0.0f) - abs(difference)).value;
  const Mask higher = greater(difference, all(0.0f));
  s.sum = fma(select(higher, s.sum, factor), shrink, select(higher, factor, s.sum));
  s.top = max(s.top, exponent);
}

// -- a tile of pixels: planes, `stride` apart, whole registers ------------------------------------------------------

struct Tile {
  const float* logits;
  float* grads;
  int64_t stride;
  int64_t mixtures;
  int64_t size;  // pixels, rounded up to whole registers
};

struct alignas(64) Row {
  float v[kPlanesTile];
};

inline R at(const float* row, int64_t i) {
  R x;
  load(x, row + i);
  return x;
}

inline const float* plane(const Tile& t, int64_t k, int64_t colour, int64_t kind) {
  return t.logits + (k + t.mixtures * (1 + 3 * colour + kind)) * t.stride;
}
inline float* grad_plane(const Tile& t, int64_t k, int64_t colour, int64_t kind) {
  return t.grads + (k + t.mixtures * (1 + 3 * colour + kind)) * t.stride;
}

struct Pixel {
  Bin red, green, blue;
  Tanh red_in_green, red_in_blue, green_in_blue;
};

template <bool kGradients>
inline Pixel pixel_of(const Tile& t, const Constants& c, int64_t k, int64_t i, R red, R green, R blue) {
  enum { means, log_scales, coefficients };
  Pixel pixel;
  pixel.red_in_green = tanh_of(at(plane(t, k, 0, coefficients), i));
  pixel.red_in_blue = tanh_of(at(plane(t, k, 1, coefficients), i));
  pixel.green_in_blue = tanh_of(at(plane(t, k, 2, coefficients), i));
  const R of_green = fma(pixel.red_in_green.value, red, at(plane(t, k, 1, means), i));
  const R of_blue = fma(
      pixel.green_in_blue.value, green, fma(pixel.red_in_blue.value, red, at(plane(t, k, 2, means), i)));
  pixel.red = bin_of<kGradients>(c, red, at(plane(t, k, 0, means), i), at(plane(t, k, 0, log_scales), i));
  pixel.green = bin_of<kGradients>(c, green, of_green, at(plane(t, k, 1, log_scales), i));
  pixel.blue = bin_of<kGradients>(c, blue, of_blue, at(plane(t, k, 2, log_scales), i));
  return pixel;
}

inline R factor_of(const Pixel& p) { return p.red.factor * p.green.factor * p.blue.factor; }
inline R exponent_of(const Pixel& p) { return p.red.exponent + p.green.exponent + p.blue.exponent; }

// What forward keeps: sum exp(top), over the mixtures, of a_k plus the bins' terms.
struct Parts {
  Row top, sum;
};

void log_prob_tile(const Tile& t, const Constants& c, const Row (&x)[kColours], Row& out, Parts& joint) {
  Parts prior;  // the same of a_k alone
  for (int64_t i = 0; i < t.size; i += R::width) {
    for (Parts* parts : {&joint, &prior}) {
      store(all(kLowest), parts->top.v + i);
      store(all(0.0f), parts->sum.v + i);
    }
  }
  const auto join_at = [](Parts& parts, int64_t i, R exponent, R factor) {
    LogSum s{at(parts.top.v, i), at(parts.sum.v, i)};
    join(s, exponent, factor);
    store(s.top, parts.top.v + i);
    store(s.sum, parts.sum.v + i);
  };
  for (int64_t k = 0; k < t.mixtures; ++k) {
    for (int64_t i = 0; i < t.size; i += R::width) {
      const Pixel pixel = pixel_of<false>(t, c, k, i, at(x[0].v, i), at(x[1].v, i), at(x[2].v, i));
      const R a = at(t.logits + k * t.stride, i);
      join_at(joint, i, a + exponent_of(pixel), factor_of(pixel));
      join_at(prior, i, a, all(1.0f));
    }
  }
  for (int64_t i = 0; i < t.size; i += R::width) {
    const R difference = at(joint.top.v, i) - at(prior.top.v, i);
    store(difference + logarithm(at(joint.sum.v, i) / at(prior.sum.v, i)), out.v + i);
  }
}

// The gradients may take the logits' place: the mixture logits are read once more, all else before it is overwritten.
// Weights of the mixtures are quotients of sums of the very terms, never exp of a difference of two logarithms: those
// are large where scales are narrow, and so are their roundings.
void log_prob_backward_tile(
    const Tile& t, const Constants& c, const Row (&x)[kColours], const Parts& joint, const Row& grad) {
  Parts prior;  // its sums inverted
  for (int64_t i = 0; i < t.size; i += R::width) {
    LogSum total{all(kLowest), all(0.0f)};
    for (int64_t k = 0; k < t.mixtures; ++k) join(total, at(t.logits + k * t.stride, i), all(1.0f));
    store(total.top, prior.top.v + i);
    store(all(1.0f) / total.sum, prior.sum.v + i);
  }
  for (int64_t k = 0; k < t.mixtures; ++k) {
    for (int64_t i = 0; i < t.size; i += R::width) {
      const R red = at(x[0].v, i), green = at(x[1].v, i), g = at(grad.v, i);
      const Pixel pixel = pixel_of<true>(t, c, k, i, red, green, at(x[2].v, i));
      const R a = at(t.logits + k * t.stride, i);
      const R term = factor_of(pixel) * exponential(a + exponent_of(pixel) - at(joint.top.v, i)).value;
      const R posterior = term / at(joint.sum.v, i);
      const R weight = exponential(a - at(prior.top.v, i)).value;
      const R share = g * posterior;
      store(g * fnma(weight, at(prior.sum.v, i), posterior), t.grads + k * t.stride + i);
      const R of_green = share * pixel.green.of_mean, of_blue = share * pixel.blue.of_mean;
      const R means[] = {share * pixel.red.of_mean, of_green, of_blue};
      const R log_scales[] = {
          share * pixel.red.of_log_scale, share * pixel.green.of_log_scale, share * pixel.blue.of_log_scale};
      const R coefficients[] = {of_green * red * pixel.red_in_green.derivative,
          of_blue * red * pixel.red_in_blue.derivative, of_blue * green * pixel.green_in_blue.derivative};
      for (int64_t colour = 0; colour < kColours; ++colour) {
        store(means[colour], grad_plane(t, k, colour, 0) + i);
        store(log_scales[colour], grad_plane(t, k, colour, 1) + i);
        store(coefficients[colour], grad_plane(t, k, colour, 2) + i);
      }
    }
  }
}

inline R clamp(R x) { return max(all(-1.0f), min(all(1.0f), x)); }  // NaN stays

void mean_tile(const Tile& t, Row (&out)[kColours]) {
  for (int64_t i = 0; i < t.size; i += R::width) {
    R top = all(kLowest);
    for (int64_t k = 0; k < t.mixtures; ++k) top = max(top, at(t.logits + k * t.stride, i));
    R total = all(0.0f), means[kColours] = {total, total, total}, coefficients[kColours] = {total, total, total};
    for (int64_t k = 0; k < t.mixtures; ++k) {
      const R weight = exponential(at(t.logits + k * t.stride, i) - top).value;
      total = total + weight;
      for (int64_t colour = 0; colour < kColours; ++colour) {
        means[colour] = fma(weight, at(plane(t, k, colour, 0), i), means[colour]);
        coefficients[colour] = fma(weight, tanh_of(at(plane(t, k, colour, 2), i)).value, coefficients[colour]);
      }
    }
    const R scale = all(1.0f) / total;
    const R red = clamp(scale * means[0]);
    const R green = clamp(scale * fma(coefficients[0], red, means[1]));
    const R blue = clamp(scale * fma(coefficients[2], green, fma(coefficients[1], red, means[2])));
    store(red, out[0].v + i);
    store(green, out[1].v + i);
    store(blue, out[2].v + i);
  }
}

// -- between tensors and tiles --------------------------------------------------------------------------------------

template <class From, class To>
void copy_run(const From* from, To* to, int64_t n) {
  int64_t i = 0;
  for (; i + R::width <= n; i += R::width) {
    R x;
    load(x, from + i);
    store(x, to + i);
  }
  for (; i < n; ++i) {
    Lane<float> x;
    load(x, from + i);
    store(x, to + i);
  }
}

#if LSGM_VEC_AVX2

inline __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
inline __m256 load8(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline __m256 load8(const BFloat16* p) { return widen8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void store8(__m256 x, float* p) { _mm256_storeu_ps(p, x); }
inline void store8(__m256 x, Half* p) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), f16x8(x)); }
inline void store8(__m256 x, BFloat16* p) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bf16x8(x)); }

// 8 rows of 8, `from_stride` apart, become 8 columns.
template <class From, class To>
inline void transpose8(const From* from, int64_t from_stride, To* to, int64_t to_stride) {
  __m256 a[8], b[8];
  for (int k = 0; k < 8; ++k) a[k] = load8(from + k * from_stride);
  for (int k = 0; k < 8; k += 2) {
    b[k] = _mm256_unpacklo_ps(a[k], a[k + 1]);
    b[k + 1] = _mm256_unpackhi_ps(a[k], a[k + 1]);
  }
  for (int k = 0; k < 8; k += 4) {
    for (int j = 0; j < 2; ++j) {
      a[k + 2 * j] = _mm256_shuffle_ps(b[k + j], b[k + j + 2], 0x44);
      a[k + 2 * j + 1] = _mm256_shuffle_ps(b[k + j], b[k + j + 2], 0xee);
    }
  }
  for (int k = 0; k < 4; ++k) {
    store8(_mm256_permute2f128_ps(a[k], a[k + 4], 0x20), to + k * to_stride);
    store8(_mm256_permute2f128_ps(a[k], a[k + 4], 0x31), to + (k + 4) * to_stride);
  }
}

#endif

// (rows, columns) to (columns, rows)
template <class From, class To>
void transpose(const From* from, int64_t from_stride, int64_t rows, int64_t columns, To* to, int64_t to_stride) {
  int64_t row = 0;
#if LSGM_VEC_AVX2
  for (; columns >= 8 && row + 8 <= rows; row += 8) {
    for (int64_t column = 0; column < columns; column += 8) {
      column = smaller(column, columns - 8);  // the last block overlaps the one before
      transpose8(from + row * from_stride + column, from_stride, to + column * to_stride + row, to_stride);
    }
  }
#endif
  for (; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      Lane<float> x;
      load(x, from + row * from_stride + column);
      store(x, to + column * to_stride + row);
    }
  }
}

// f(tile, segment) for the tiles [begin, end): the logits are there before, and the gradients are brought back after.
template <bool kGradients, class F>
void for_each_tile(const Problem& p, int64_t begin, int64_t end, float* scratch, F&& f) {
  visit(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same<T, double>::value) {
      const int64_t channels = channels_of(p);
      const bool planes = p.order == Order::planes;
      for (int64_t s = begin; s < end; ++s) {
        const Segment segment = segment_at(p.segments, s);
        const int64_t base = segment.run * channels * p.spatial + segment.begin * (planes ? 1 : channels);
        const T* logits = static_cast<const T*>(p.logits) + base;
        T* grads = kGradients ? static_cast<T*>(p.grad_logits) + base : nullptr;
        Tile tile{nullptr, nullptr, 0, p.mixtures, ceil_div(segment.size, R::width) * R::width};
        if constexpr (std::is_same<T, float>::value) {
          if (planes && tile.size == segment.size) {
            tile.logits = logits;
            tile.grads = grads;
            tile.stride = p.spatial;
            f(tile, segment);
            continue;
          }
        }
        tile.logits = tile.grads = scratch;
        tile.stride = p.segments.limit;
        if (planes) {
          for (int64_t c = 0; c < channels; ++c) {
            copy_run(logits + c * p.spatial, scratch + c * tile.stride, segment.size);
          }
        } else {
          transpose(logits, channels, segment.size, channels, scratch, tile.stride);
        }
        f(tile, segment);
        if constexpr (kGradients) {
          if (planes) {
            for (int64_t c = 0; c < channels; ++c) {
              copy_run(scratch + c * tile.stride, grads + c * p.spatial, segment.size);
            }
          } else {
            transpose(scratch, tile.stride, channels, segment.size, grads, channels);
          }
        }
      }
    }
  });
}

void read_pixels(const Problem& p, const Segment& segment, Row (&x)[kColours]) {
  const float* from = p.x + segment.run * kColours * p.spatial;
  for (int64_t colour = 0; colour < kColours; ++colour) {
    if (p.x_order == Order::planes) {
      copy_run(from + colour * p.spatial + segment.begin, x[colour].v, segment.size);
    } else {
      for (int64_t i = 0; i < segment.size; ++i) x[colour].v[i] = from[(segment.begin + i) * kColours + colour];
    }
  }
}

}  // namespace

void log_prob(const Problem& p, int64_t begin, int64_t end, float* scratch) {
  const Constants constants = constants_of(p);
  const int64_t pixels = p.batch * p.spatial;
  Row x[kColours] = {}, out;
  Parts parts;
  for_each_tile<false>(p, begin, end, scratch, [&](const Tile& tile, const Segment& segment) {
    const int64_t first = segment.run * p.spatial + segment.begin;
    read_pixels(p, segment, x);
    log_prob_tile(tile, constants, x, out, parts);
    copy_run(out.v, p.log_prob + first, segment.size);
    copy_run(parts.top.v, p.parts + first, segment.size);
    copy_run(parts.sum.v, p.parts + pixels + first, segment.size);
  });
}

void log_prob_backward(const Problem& p, int64_t begin, int64_t end, float* scratch) {
  const Constants constants = constants_of(p);
  const int64_t pixels = p.batch * p.spatial;
  Row x[kColours] = {}, grad = {};
  Parts parts = {};
  for_each_tile<true>(p, begin, end, scratch, [&](const Tile& tile, const Segment& segment) {
    const int64_t first = segment.run * p.spatial + segment.begin;
    read_pixels(p, segment, x);
    copy_run(p.parts + first, parts.top.v, segment.size);
    copy_run(p.parts + pixels + first, parts.sum.v, segment.size);
    copy_run(p.grad + first, grad.v, segment.size);
    log_prob_backward_tile(tile, constants, x, parts, grad);
  });
}

void mean(const Problem& p, int64_t begin, int64_t end, float* scratch) {
  Row out[kColours];
  visit(p.mean_dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same<T, double>::value) {
      for_each_tile<false>(p, begin, end, scratch, [&](const Tile& tile, const Segment& segment) {
        mean_tile(tile, out);
        T* to = static_cast<T*>(p.mean) + segment.run * kColours * p.spatial + segment.begin;
        for (int64_t colour = 0; colour < kColours; ++colour) {
          copy_run(out[colour].v, to + colour * p.spatial, segment.size);
        }
      });
    }
  });
}

}  // namespace LSGM_ISA

#if !LSGM_VEC_AVX2  // what exists once, compiled for every processor
namespace cpu {

void plan(Problem& p) {
  const bool in_place = p.order == Order::planes && p.dtype == DType::float32;
  p.segments = make_segments(p.batch, p.spatial, in_place ? kPlanesTile : kScratchTile);
}

int64_t grain(const Problem& p) {
  constexpr int64_t kLogitsPerThread = 65536;  // some ten microseconds: what waking a second thread costs
  return larger(1, kLogitsPerThread / (channels_of(p) * smaller(p.segments.limit, p.segments.length)));
}

namespace {

using Kernel = void (*)(const Problem&, int64_t, int64_t, float*);

void run(const Problem& p, int64_t begin, int64_t end, Kernel kernel) {
  constexpr int64_t kWidest = 16;  // numbers in a register
  const bool in_place = p.segments.limit == kPlanesTile && p.spatial % kWidest == 0;
  // A tile's places beyond its last pixel are worked on, and thrown away: they hold numbers all the same.
  std::vector<float> scratch(static_cast<size_t>(in_place ? 0 : channels_of(p) * p.segments.limit));
  kernel(p, begin, end, scratch.data());
}

}  // namespace

#define LSGM_DISPATCH(name)                                                            \
  void name(const Problem& p, int64_t begin, int64_t end) {                            \
    LSGM_IF_AVX512(if (has_avx512()) return run(p, begin, end, &avx512::name);)        \
    LSGM_IF_AVX2(if (has_avx2()) return run(p, begin, end, &avx2::name);)              \
    run(p, begin, end, &scalar::name);                                                 \
  }
LSGM_DISPATCH(log_prob)
LSGM_DISPATCH(log_prob_backward)
LSGM_DISPATCH(mean)
#undef LSGM_DISPATCH

}  // namespace cpu
#endif

}  // namespace mixture_logistic
}  // namespace lsgm
