// CPU kernels of depthwise_bn_swish, compiled once per instruction set (LSGM_ISA; see common/cpu.h). No torch.
//
// A plane (or a band of its rows) is copied into padded float32 scratch memory that the first caches hold, on the way
// through pre(); what the convolution writes there goes to the result through post(). So the convolution itself knows
// neither borders nor types: it computes a block of outputs in registers from vectors of 8 or 16 lanes, which hold
//   planes: neighbours of a line of the image. Blocks extend down the lines. With stride 2 the scratch memory holds
//           the even columns of a line, then the odd ones, so that the inputs of neighbours are neighbours too.
//   rows:   channels of a pixel. Blocks extend along the line.
// In both cases the taps of the axis along which a block extends (a) share loaded inputs; the other axis is b.
#include <cmath>
#include <cstring>

#include "common/cpu.h"
#include "common/vec_math.h"
#include "common/vector_loop.h"
#include "depthwise_bn_swish/depthwise_bn_swish.h"

namespace lsgm {
namespace depthwise_bn_swish {

// Places in scratch memory, the same for every instruction set. Lengths are in floats.
namespace {

struct Layout {
  int64_t pixel;     // from one column to the next; rows: the lanes
  int64_t half;      // planes with stride 2: from the even to the odd columns of the input
  int64_t in_line;   // from one line of the input to the next
  int64_t in_lines;  // of a band, with 2 lines of padding on both sides
  int64_t grad_line;  // the same of the padded gradient, by the output's size
  int64_t grad_lines;
  int64_t out_line;  // of what a convolution has computed
  int64_t out_lines;
};

int64_t up_to_vector(const Problem& p, int64_t n) { return ceil_div(n, p.lanes) * p.lanes; }

Layout layout_of(const Problem& p) {
  Layout l{};
  const bool planes = p.order == Order::planes;
  l.pixel = planes ? 1 : p.lanes;
  // Vectors of planes end up to 15 columns beyond the last output, and read 4 columns further.
  const int64_t padded = planes ? up_to_vector(p, p.out_width) + p.lanes : p.out_width + 4;
  l.half = planes && p.stride == 2 ? padded : 0;
  l.in_line = planes ? p.stride * padded : (p.width + 5) * p.lanes;
  l.in_lines = (p.band_rows - 1) * p.stride + 5;
  l.grad_line = padded * l.pixel;
  l.grad_lines = p.band_rows + 4;
  l.out_line = p.stride * padded * l.pixel;
  l.out_lines = p.stride * p.band_rows;
  return l;
}

// A band: the lines [first, last) of the output.
struct Band {
  int64_t first, last;
};

Band band_at(const Problem& p, int64_t i) {
  return {i * p.band_rows, smaller((i + 1) * p.band_rows, p.out_height)};
}

// What a unit works on: channels [channel, channel + lanes) of one sample.
struct Place {
  int64_t sample, channel, lanes;
};

// Elements before (line, 0) of an image of that size, in the order of memory of `p`.
int64_t line_at(const Problem& p, const Place& place, int64_t line, int64_t height, int64_t width) {
  if (p.order == Order::planes) return ((place.sample * p.channels + place.channel) * height + line) * width;
  return (place.sample * height + line) * width * p.channels + place.channel;
}

}  // namespace

namespace LSGM_ISA {
namespace {

using namespace lsgm::LSGM_ISA;

// ---- the lanes, in as many registers as it takes ----

#if LSGM_VEC_AVX512
constexpr int64_t kLanes = 16;
#else
constexpr int64_t kLanes = 8;
#endif

struct Lanes {
  static constexpr int parts = static_cast<int>(kLanes) / Vec<float>::width;
  Vec<float> part[parts];
};

template <class T>
inline Lanes load_lanes(const T* p) {
  Lanes x;
  for (int i = 0; i < Lanes::parts; ++i) load(x.part[i], p + i * Vec<float>::width);
  return x;
}
template <class T>
inline void store_lanes(const Lanes& x, T* p) {
  for (int i = 0; i < Lanes::parts; ++i) store(x.part[i], p + i * Vec<float>::width);
}
inline Lanes fill_lanes(float v) {
  Lanes x;
  for (int i = 0; i < Lanes::parts; ++i) fill(x.part[i], v);
  return x;
}
inline Lanes fma_lanes(const Lanes& a, const Lanes& b, const Lanes& c) {
  Lanes x;
  for (int i = 0; i < Lanes::parts; ++i) x.part[i] = fma(a.part[i], b.part[i], c.part[i]);
  return x;
}

// ---- swish ----

inline Lane<float> swish(Lane<float> u) { return {u.v / (1.0f + std::exp(-u.v))}; }

#if LSGM_VEC_AVX2
inline Vec<float> swish(Vec<float> u) { return div(u, one_plus_exp_minus(u)); }
#endif

inline Lanes swish_lanes(const Lanes& u) {
  Lanes y;
  for (int i = 0; i < Lanes::parts; ++i) y.part[i] = swish(u.part[i]);
  return y;
}

// ---- between tensors and scratch memory ----

// swish(x * scale + shift), or x itself.
struct Affine {
  bool active;
  Lanes scale, shift;
};

template <class T>
Affine affine_of(const Problem& p, const void* scale, const void* shift, const Place& place) {
  Affine affine{};
  affine.active = scale != nullptr;
  if (!affine.active) return affine;
  float values[2][kLanes] = {};
  const auto* s = static_cast<const T*>(scale) + place.channel;
  const auto* t = static_cast<const T*>(shift) + place.channel;
  const bool planes = p.order == Order::planes;
  for (int64_t i = 0; i < (planes ? kLanes : place.lanes); ++i) {
    values[0][i] = widen<float>(s[planes ? 0 : i]);
    values[1][i] = widen<float>(t[planes ? 0 : i]);
  }
  affine.scale = load_lanes(values[0]);
  affine.shift = load_lanes(values[1]);
  return affine;
}

template <bool kActive>
inline Lanes through(const Affine& affine, const Lanes& x) {
  return kActive ? swish_lanes(fma_lanes(x, affine.scale, affine.shift)) : x;
}

// The first `n` < kLanes elements; the others are 0.
template <class T>
inline Lanes load_some(const T* from, int64_t n) {
  T some[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) some[i] = from[i];
  return load_lanes(some);
}
template <class T>
inline void store_some(const Lanes& x, T* to, int64_t n) {
  T some[kLanes];
  store_lanes(x, some);
  for (int64_t i = 0; i < n; ++i) to[i] = some[i];
}

#if LSGM_VEC_AVX512
inline Lanes load_some(const float* from, int64_t n) {
  return {{{_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), from)}}};
}
inline void store_some(const Lanes& x, float* to, int64_t n) {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << n) - 1), x.part[0].v);
}
#endif

// n neighbours.
template <bool kActive, class T>
inline void read_run(const T* from, float* to, int64_t n, const Affine& affine) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_lanes(through<kActive>(affine, load_lanes(from + i)), to + i);
  if (i < n) store_some(through<kActive>(affine, load_some(from + i, n - i)), to + i, n - i);
}
template <bool kActive, class T>
inline void write_run(const float* from, T* to, int64_t n, const Affine& affine) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_lanes(through<kActive>(affine, load_lanes(from + i)), to + i);
  if (i < n) store_some(through<kActive>(affine, load_lanes(from + i)), to + i, n - i);
}

// `width` pixels of `lanes` channels each, `pitch` elements apart in the tensor.
template <bool kActive, class T>
void read_pixels(const T* from, float* to, int64_t width, int64_t pitch, int64_t lanes, const Affine& affine) {
  if (lanes == kLanes) {
    for (int64_t i = 0; i < width; ++i) {
      store_lanes(through<kActive>(affine, load_lanes(from + i * pitch)), to + i * kLanes);
    }
  } else {
    for (int64_t i = 0; i < width; ++i) {
      store_lanes(through<kActive>(affine, load_some(from + i * pitch, lanes)), to + i * kLanes);
    }
  }
}
template <bool kActive, class T>
void write_pixels(const float* from, T* to, int64_t width, int64_t pitch, int64_t lanes, const Affine& affine) {
  if (lanes == kLanes) {
    for (int64_t i = 0; i < width; ++i) {
      store_lanes(through<kActive>(affine, load_lanes(from + i * kLanes)), to + i * pitch);
    }
  } else {
    for (int64_t i = 0; i < width; ++i) {
      store_some(through<kActive>(affine, load_lanes(from + i * kLanes)), to + i * pitch, lanes);
    }
  }
}

// even[k] = from[2 k], odd[k] = from[2 k + 1]
inline void split(const float* from, float* even, float* odd, int64_t n) {
  int64_t k = 0;
  for (; 2 * k + 1 < n; ++k) {
    even[k] = from[2 * k];
    odd[k] = from[2 * k + 1];
  }
  if (2 * k < n) even[k] = from[2 * k];
}
inline void join(const float* even, const float* odd, float* to, int64_t n) {
  for (int64_t k = 0; k < n; ++k) {
    to[2 * k] = even[k];
    to[2 * k + 1] = odd[k];
  }
}

// Lines [first, first + lines) of an image, which may begin and end outside of it, into scratch memory whose columns
// begin 2 before the image's. The columns beside the image are 0 already. `line`: room for a line of the image.
template <bool kActive, class T>
void read_lines(const Problem& p, const Place& place, const void* tensor, int64_t height, int64_t width, int64_t first,
    int64_t lines, int64_t half, float* to, int64_t to_line, float* line, const Affine& affine) {
  const int64_t begin = larger(first, 0), end = smaller(first + lines, height);
  const auto beside = [&](int64_t from, int64_t until) {
    // Of a single band these lines are never written.
    if (p.bands == 1 || from >= until) return;
    std::memset(to + (from - first) * to_line, 0, static_cast<size_t>((until - from) * to_line) * sizeof(float));
  };
  beside(first, begin);
  beside(end, first + lines);
  const T* here = static_cast<const T*>(tensor) + line_at(p, place, begin, height, width);
  to += (begin - first) * to_line;
  if (p.order == Order::rows) {
    for (int64_t y = begin; y < end; ++y, here += width * p.channels, to += to_line) {
      read_pixels<kActive>(here, to + 2 * kLanes, width, p.channels, place.lanes, affine);
    }
  } else if (half == 0) {
    for (int64_t y = begin; y < end; ++y, here += width, to += to_line) {
      read_run<kActive>(here, to + 2, width, affine);
    }
  } else {
    for (int64_t y = begin; y < end; ++y, here += width, to += to_line) {
      read_run<kActive>(here, line, width, affine);
      split(line, to + 1, to + half + 1, width);
    }
  }
}

template <bool kActive, class T>
void write_lines(const Problem& p, const Place& place, void* tensor, int64_t height, int64_t width, int64_t first,
    int64_t lines, const float* from, int64_t from_line, const Affine& affine) {
  T* here = static_cast<T*>(tensor) + line_at(p, place, first, height, width);
  if (p.order == Order::rows) {
    for (int64_t i = 0; i < lines; ++i, here += width * p.channels, from += from_line) {
      write_pixels<kActive>(from, here, width, p.channels, place.lanes, affine);
    }
  } else {
    for (int64_t i = 0; i < lines; ++i, here += width, from += from_line) {
      write_run<kActive>(from, here, width, affine);
    }
  }
}

// ---- the convolution in registers ----

struct Correlation {
  const float* in;
  int64_t in_a;  // from one input to the next along a
  int64_t in_v;  // from one vector's inputs to the next vector's: along b (rows), or kLanes columns (planes)
  int64_t taps[5];  // along b
  const float* weight;
  int64_t weight_a, weight_b;
  float* out;
  int64_t out_a, out_v;
  int64_t count_a, count_v;
};

// R outputs along a: out[i] = sum over a, b of in[kStride i + a, b] weight[a, b].
template <bool kPerLane, int kA, int kB, int kStride, int R>
inline void correlate_block(const Correlation& c, const float* in, float* out) {
  Lanes sums[R];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) sums[i] = fill_lanes(0);
#pragma GCC unroll 1
  for (int b = 0; b < kB; ++b) {
    Lanes weight[kA];
    const float* w = c.weight + b * c.weight_b;
#pragma GCC unroll 8
    for (int a = 0; a < kA; ++a) weight[a] = kPerLane ? load_lanes(w + a * c.weight_a) : fill_lanes(w[a * c.weight_a]);
    const float* from = in + c.taps[b];
#pragma GCC unroll 32
    for (int k = 0; k < (R - 1) * kStride + kA; ++k) {
      const Lanes x = load_lanes(from);
      from += c.in_a;
#pragma GCC unroll 8
      for (int a = 0; a < kA; ++a) {
        if (k >= a && (k - a) % kStride == 0 && (k - a) / kStride < R) {
          sums[(k - a) / kStride] = fma_lanes(weight[a], x, sums[(k - a) / kStride]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) store_lanes(sums[i], out + i * c.out_a);
}

template <bool kPerLane, int kA, int kB, int kStride>
void correlate(const Correlation& c) {
  for (int64_t v = 0; v < c.count_v; ++v) {
    const float* in = c.in + v * c.in_v;
    float* out = c.out + v * c.out_v;
    int64_t i = 0;
    for (; i + 8 <= c.count_a; i += 8, in += 8 * kStride * c.in_a, out += 8 * c.out_a) {
      correlate_block<kPerLane, kA, kB, kStride, 8>(c, in, out);
    }
    for (; i + 4 <= c.count_a; i += 4, in += 4 * kStride * c.in_a, out += 4 * c.out_a) {
      correlate_block<kPerLane, kA, kB, kStride, 4>(c, in, out);
    }
    for (; i < c.count_a; ++i, in += kStride * c.in_a, out += c.out_a) {
      correlate_block<kPerLane, kA, kB, kStride, 1>(c, in, out);
    }
  }
}

template <int kA, int kB, int kStride>
void correlate(const Problem& p, const Correlation& c) {
  if (p.order == Order::planes) {
    correlate<false, kA, kB, kStride>(c);
  } else {
    correlate<true, kA, kB, kStride>(c);
  }
}

// ---- the gradient of the weights ----

struct WeightSums {
  const float* in;
  int64_t in_a, in_v;
  int64_t taps[5];  // along b
  const float* grad;
  int64_t grad_a, grad_v;
  float* sums;  // [b][a][lane]
  int64_t count_a, count_v;
};

// The taps [b, b + kB) along b.
template <int kB, int kStride>
void weight_sums(const WeightSums& c, int b) {
  constexpr int R = 4;
  Lanes sums[kB][5];
#pragma GCC unroll 2
  for (int j = 0; j < kB; ++j) {
#pragma GCC unroll 5
    for (int a = 0; a < 5; ++a) sums[j][a] = load_lanes(c.sums + ((b + j) * 5 + a) * kLanes);
  }
  const int64_t first = c.taps[b];
  const int64_t second = c.taps[b + kB - 1];
  for (int64_t v = 0; v < c.count_v; ++v) {
    const float* in = c.in + v * c.in_v;
    const float* grad = c.grad + v * c.grad_v;
    int64_t i = 0;
    for (; i + R <= c.count_a; i += R, in += R * kStride * c.in_a, grad += R * c.grad_a) {
      Lanes g[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) g[r] = load_lanes(grad + r * c.grad_a);
      const float* from = in;
#pragma GCC unroll 16
      for (int k = 0; k < (R - 1) * kStride + 5; ++k, from += c.in_a) {
#pragma GCC unroll 2
        for (int j = 0; j < kB; ++j) {
          const Lanes x = load_lanes(from + (j == 0 ? first : second));
#pragma GCC unroll 5
          for (int a = 0; a < 5; ++a) {
            if (k >= a && (k - a) % kStride == 0 && (k - a) / kStride < R) {
              sums[j][a] = fma_lanes(g[(k - a) / kStride], x, sums[j][a]);
            }
          }
        }
      }
    }
    for (; i < c.count_a; ++i, in += kStride * c.in_a, grad += c.grad_a) {
      const Lanes g = load_lanes(grad);
#pragma GCC unroll 5
      for (int a = 0; a < 5; ++a) {
#pragma GCC unroll 2
        for (int j = 0; j < kB; ++j) {
          const Lanes x = load_lanes(in + a * c.in_a + (j == 0 ? first : second));
          sums[j][a] = fma_lanes(g, x, sums[j][a]);
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int j = 0; j < kB; ++j) {
#pragma GCC unroll 5
    for (int a = 0; a < 5; ++a) store_lanes(sums[j][a], c.sums + ((b + j) * 5 + a) * kLanes);
  }
}

template <int kStride>
void all_weight_sums(const WeightSums& c) {
  weight_sums<2, kStride>(c, 0);
  weight_sums<2, kStride>(c, 2);
  weight_sums<1, kStride>(c, 4);
}

// ---- bands ----

struct Scratch {
  float* in;
  float* grad;
  float* out;
  float* line;
};

// Scratch memory of block `block`.
Scratch scratch_of(const Problem& p, const Layout& l, float* memory, bool backward, int64_t block) {
  Scratch s{};
  const int64_t in = l.in_lines * l.in_line, grad = backward ? l.grad_lines * l.grad_line : 0;
  s.in = memory + block * (in + grad);
  s.grad = s.in + in;
  s.out = memory + p.blocks * (in + grad) + block * l.out_lines * l.out_line;
  s.line = memory + p.blocks * (in + grad + l.out_lines * l.out_line);
  return s;
}

// The columns and lines beside the image are never written again.
void clear(const Problem& p, const Layout& l, float* memory, bool backward) {
  const int64_t size = l.in_lines * l.in_line + (backward ? l.grad_lines * l.grad_line : 0);
  std::memset(memory, 0, static_cast<size_t>(p.blocks * size) * sizeof(float));
}

// Where tap (a, b) of the input of output (0, 0) lies, along the axis that is b.
void taps_of_input(const Problem& p, const Layout& l, int64_t (&taps)[5]) {
  for (int b = 0; b < 5; ++b) {
    taps[b] = p.order == Order::rows ? b * l.in_line : p.stride == 1 ? b : (b % 2) * l.half + b / 2;
  }
}

const float* weights_of(const Problem& p, int64_t channel) {
  return p.table + (p.order == Order::planes ? channel : channel / kLanes * kLanes) * kTaps;
}

template <class T>
void read_input(const Problem& p, const Layout& l, const Scratch& s, const Place& place, const Band& band,
    const void* x) {
  const Affine pre = affine_of<T>(p, p.pre_scale, p.pre_shift, place);
  const int64_t first = band.first * p.stride - 2, lines = (band.last - band.first - 1) * p.stride + 5;
  if (pre.active) {
    read_lines<true, T>(p, place, x, p.height, p.width, first, lines, l.half, s.in, l.in_line, s.line, pre);
  } else {
    read_lines<false, T>(p, place, x, p.height, p.width, first, lines, l.half, s.in, l.in_line, s.line, pre);
  }
}

void convolve(const Problem& p, const Layout& l, const Scratch& s, const Place& place, const Band& band) {
  const int64_t lines = band.last - band.first;
  const bool planes = p.order == Order::planes;
  Correlation c{};
  c.in = s.in;
  c.weight = weights_of(p, place.channel);
  c.out = s.out;
  taps_of_input(p, l, c.taps);
  c.in_a = planes ? l.in_line : kLanes;
  c.in_v = planes ? kLanes : p.stride * l.in_line;
  c.weight_a = planes ? 5 : kLanes;
  c.weight_b = planes ? 1 : 5 * kLanes;
  c.out_a = planes ? l.out_line : kLanes;
  c.out_v = planes ? kLanes : l.out_line;
  c.count_a = planes ? lines : p.out_width;
  c.count_v = planes ? ceil_div(p.out_width, kLanes) : lines;
  if (p.stride == 1) {
    correlate<5, 5, 1>(p, c);
  } else {
    correlate<5, 5, 2>(p, c);
  }
}

template <class T>
void write_output(const Problem& p, const Layout& l, const Scratch& s, const Place& place, const Band& band) {
  const int64_t lines = band.last - band.first;
  const Affine post = affine_of<T>(p, p.post_scale, p.post_shift, place);
  if (post.active) {
    write_lines<true, T>(
        p, place, p.out, p.out_height, p.out_width, band.first, lines, s.out, l.out_line, post);
  } else {
    write_lines<false, T>(
        p, place, p.out, p.out_height, p.out_width, band.first, lines, s.out, l.out_line, post);
  }
}

// The part of grad_x at lines and columns 2 k + (a or b's parity): a correlation of grad with every second weight,
// from the last to the first. An even place has 3 of them along its axis, an odd one 2.
template <int kOddA, int kOddB>
void grad_input_part(const Problem& p, const Layout& l, const Scratch& s, const Place& place, const Band& band) {
  const bool planes = p.order == Order::planes;
  const int64_t lines = band.last - band.first;
  const int64_t odd_y = planes ? kOddA : kOddB, odd_x = planes ? kOddB : kOddA;
  Correlation c{};
  // grad[k - 1] meets the last weight of an even place, grad[k] that of an odd one.
  c.in = s.grad + (1 + odd_y) * l.grad_line + (1 + odd_x) * l.pixel;
  c.in_a = planes ? l.grad_line : kLanes;
  c.in_v = planes ? kLanes : l.grad_line;
  for (int b = 0; b < 3; ++b) c.taps[b] = planes ? b : b * l.grad_line;
  const int64_t unit = planes ? 1 : kLanes;
  c.weight = weights_of(p, place.channel) + ((4 - odd_y) * 5 + (4 - odd_x)) * unit;
  c.weight_a = -2 * (planes ? 5 : kLanes);
  c.weight_b = -2 * (planes ? 1 : 5 * kLanes);
  if (planes) {  // even columns, then odd ones; they are joined on the way out
    c.out = s.out + odd_y * l.out_line + odd_x * (l.out_line / 2);
    c.out_a = 2 * l.out_line;
    c.out_v = kLanes;
  } else {
    c.out = s.out + odd_y * l.out_line + odd_x * kLanes;
    c.out_a = 2 * kLanes;
    c.out_v = 2 * l.out_line;
  }
  c.count_a = planes ? lines : p.out_width;
  c.count_v = planes ? ceil_div(p.out_width, kLanes) : lines;
  correlate<3 - kOddA, 3 - kOddB, 1>(p, c);
}

template <class T>
void read_gradient(const Problem& p, const Layout& l, const Scratch& s, const Place& place, const Band& band) {
  read_lines<false, T>(p, place, p.grad, p.out_height, p.out_width, band.first - 2, band.last - band.first + 4, 0,
      s.grad, l.grad_line, s.line, Affine{});
}

// Adds to `sums`, and leaves grad_x in s.out (planes with stride 2: the even and the odd columns apart).
void convolve_gradient(
    const Problem& p, const Layout& l, const Scratch& s, const Place& place, const Band& band, float* sums) {
  const bool planes = p.order == Order::planes;
  const int64_t lines = band.last - band.first;
  WeightSums w{};
  w.in = s.in;
  w.in_a = planes ? l.in_line : kLanes;
  w.in_v = planes ? kLanes : p.stride * l.in_line;
  taps_of_input(p, l, w.taps);
  w.grad = s.grad + 2 * l.grad_line + 2 * l.pixel;
  w.grad_a = planes ? l.grad_line : kLanes;
  w.grad_v = planes ? kLanes : l.grad_line;
  w.sums = sums;
  w.count_a = planes ? lines : p.out_width;
  w.count_v = planes ? ceil_div(p.out_width, kLanes) : lines;

  if (p.stride == 1) {
    all_weight_sums<1>(w);
    Correlation c{};
    c.in = s.grad;
    c.in_a = w.grad_a;
    c.in_v = w.grad_v;
    for (int b = 0; b < 5; ++b) c.taps[b] = planes ? b : b * l.grad_line;
    c.weight = weights_of(p, place.channel) + (kTaps - 1) * (planes ? 1 : kLanes);
    c.weight_a = planes ? -5 : -kLanes;
    c.weight_b = planes ? -1 : -5 * kLanes;
    c.out = s.out;
    c.out_a = planes ? l.out_line : kLanes;
    c.out_v = planes ? kLanes : l.out_line;
    c.count_a = w.count_a;
    c.count_v = w.count_v;
    correlate<5, 5, 1>(p, c);
  } else {
    all_weight_sums<2>(w);
    grad_input_part<0, 0>(p, l, s, place, band);
    grad_input_part<0, 1>(p, l, s, place, band);
    grad_input_part<1, 0>(p, l, s, place, band);
    grad_input_part<1, 1>(p, l, s, place, band);
  }
}

template <class T>
void write_gradient(const Problem& p, const Layout& l, const Scratch& s, const Place& place, const Band& band) {
  const int64_t first = band.first * p.stride, end = smaller(band.last * p.stride, p.height);
  const Affine none{};
  if (p.stride == 1 || p.order == Order::rows) {
    write_lines<false, T>(p, place, p.grad_x, p.height, p.width, first, end - first, s.out, l.out_line, none);
    return;
  }
  for (int64_t y = first; y < end; ++y) {
    const float* line = s.out + (y - first) * l.out_line;
    join(line, line + l.out_line / 2, s.line, p.out_width);
    write_lines<false, T>(p, place, p.grad_x, p.height, p.width, y, 1, s.line, 0, none);
  }
}

template <class F>
void for_each_block(const Problem& p, int64_t sample, int64_t group, F&& f) {
  const int64_t lanes = p.order == Order::planes ? 1 : kLanes;
  for (int64_t block = 0; block < p.blocks; ++block) {
    const int64_t channel = (group * p.blocks + block) * lanes;
    if (channel < p.channels) f(Place{sample, channel, smaller(lanes, p.channels - channel)}, block);
  }
}

// All blocks are read before the first is convolved: its loads straddle the stores, which must have left the store
// buffer by then.
template <class T>
void forward_as(const Problem& p, int64_t begin, int64_t end, float* memory) {
  const Layout l = layout_of(p);
  clear(p, l, memory, false);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t group = unit % p.groups, rest = unit / p.groups, sample = rest / p.bands;
    const Band band = band_at(p, rest % p.bands);
    for_each_block(p, sample, group, [&](const Place& place, int64_t block) {
      read_input<T>(p, l, scratch_of(p, l, memory, false, block), place, band, p.x);
    });
    for_each_block(p, sample, group, [&](const Place& place, int64_t block) {
      convolve(p, l, scratch_of(p, l, memory, false, block), place, band);
    });
    for_each_block(p, sample, group, [&](const Place& place, int64_t block) {
      write_output<T>(p, l, scratch_of(p, l, memory, false, block), place, band);
    });
  }
}

// Pixels after which float32 sums are added to the float64 ones. Of planes, all lanes share them.
constexpr int64_t kFlushPlanes = 8192, kFlushRows = 1024;

template <class T>
void backward_as(const Problem& p, int64_t begin, int64_t end, float* memory) {
  const Layout l = layout_of(p);
  clear(p, l, memory, true);
  const bool planes = p.order == Order::planes;
  const int64_t flush = planes ? kFlushPlanes : kFlushRows;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t group = unit % p.groups, run = unit / p.groups;
    float sums[kMostBlocks][kTaps * kLanes] = {};
    double totals[kMostBlocks][kTaps * kLanes] = {};
    int64_t pending = 0;
    const auto add_up = [&] {
      for (int64_t block = 0; block < p.blocks; ++block) {
        for (int64_t i = 0; i < kTaps * kLanes; ++i) {
          totals[block][i] += static_cast<double>(sums[block][i]);
          sums[block][i] = 0;
        }
      }
      pending = 0;
    };
    const int64_t last = smaller((run + 1) * p.run_samples, p.batch);
    for (int64_t sample = run * p.run_samples; sample < last; ++sample) {
      for (int64_t i = 0; i < p.bands; ++i) {
        const Band band = band_at(p, i);
        for_each_block(p, sample, group, [&](const Place& place, int64_t block) {
          const Scratch s = scratch_of(p, l, memory, true, block);
          read_input<T>(p, l, s, place, band, p.x);
          read_gradient<T>(p, l, s, place, band);
        });
        for_each_block(p, sample, group, [&](const Place& place, int64_t block) {
          convolve_gradient(p, l, scratch_of(p, l, memory, true, block), place, band, sums[block]);
        });
        for_each_block(p, sample, group, [&](const Place& place, int64_t block) {
          write_gradient<T>(p, l, scratch_of(p, l, memory, true, block), place, band);
        });
        pending += (band.last - band.first) * p.out_width;
        if (pending >= flush) add_up();
      }
    }
    add_up();
    // sums[b][a][lane] becomes partials[channel][line][column]: planes extend blocks down the lines, rows along them.
    for_each_block(p, 0, group, [&](const Place& place, int64_t block) {
      double* partial = p.partials + (run * p.channels + place.channel) * kTaps;
      for (int64_t b = 0; b < 5; ++b) {
        for (int64_t a = 0; a < 5; ++a) {
          const double* lanes = totals[block] + (b * 5 + a) * kLanes;
          if (planes) {
            double total = 0;
            for (int64_t lane = 0; lane < kLanes; ++lane) total += lanes[lane];
            partial[a * 5 + b] = total;
          } else {
            for (int64_t lane = 0; lane < place.lanes; ++lane) partial[lane * kTaps + b * 5 + a] = lanes[lane];
          }
        }
      }
    });
  }
}

// float64 is left to the reference.
template <class F>
void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float16:
      return f(Type<Half>{});
    case DType::bfloat16:
      return f(Type<BFloat16>{});
    default:
      return f(Type<float>{});
  }
}

}  // namespace

void forward(const Problem& p, int64_t begin, int64_t end, float* scratch) {
  with_type(p.dtype, [&](auto type) { forward_as<typename decltype(type)::type>(p, begin, end, scratch); });
}

void backward(const Problem& p, int64_t begin, int64_t end, float* scratch) {
  with_type(p.dtype, [&](auto type) { backward_as<typename decltype(type)::type>(p, begin, end, scratch); });
}

}  // namespace LSGM_ISA

#if !LSGM_VEC_AVX2  // what exists once, compiled for every processor
namespace cpu {

constexpr int64_t kBandFloats = 16384;  // of the input, in scratch memory: the second cache holds it with the rest
constexpr int64_t kRunPixels = 16384;   // outputs per channel and unit of the backward pass
constexpr int64_t kElementsPerThread = 16384;
constexpr int64_t kGroupPixels = 2048;  // of planes that are handled together
constexpr int64_t kRowsAtOnce = 8;      // of the output, that stay in registers

void plan(Problem& p) {
  const bool planes = p.order == Order::planes;
  // Half of a wide vector would hold nothing in a narrow image.
  if (p.lanes == 0) p.lanes = has_avx512() && (!planes || p.out_width >= 16) ? 16 : 8;
  const int64_t line = p.stride * (planes ? up_to_vector(p, p.out_width) + p.lanes : (p.out_width + 4) * p.lanes);
  const int64_t most = larger(16, kBandFloats / (line * p.stride));
  p.bands = ceil_div(p.out_height, most);
  p.band_rows = smaller(p.out_height, ceil_div(ceil_div(p.out_height, p.bands), kRowsAtOnce) * kRowsAtOnce);
  p.bands = ceil_div(p.out_height, p.band_rows);
  p.blocks = planes ? larger(1, smaller(kMostBlocks, kGroupPixels / (p.height * p.width))) : kRowChannels / p.lanes;
  p.groups = ceil_div(p.channels, p.blocks * (planes ? 1 : p.lanes));
  p.run_samples = smaller(p.batch, larger(1, kRunPixels / (p.out_height * p.out_width)));
  p.sample_runs = ceil_div(p.batch, p.run_samples);
}

int64_t table_size(const Problem& p) { return up_to_vector(p, p.channels) * kTaps; }

int64_t scratch_size(const Problem& p, bool backward) {
  const Layout l = layout_of(p);
  const int64_t grad = backward ? l.grad_lines * l.grad_line : 0;
  const int64_t line = p.order == Order::planes ? up_to_vector(p, p.width) + 2 * p.lanes : 0;
  return p.blocks * (l.in_lines * l.in_line + grad + l.out_lines * l.out_line) + line;
}

int64_t forward_units(const Problem& p) { return p.batch * p.bands * p.groups; }
int64_t backward_units(const Problem& p) { return p.sample_runs * p.groups; }

static int64_t grain_of(const Problem& p, int64_t pixels) {
  return larger(1, kElementsPerThread / (pixels * smaller(p.channels, ceil_div(p.channels, p.groups))));
}
int64_t forward_grain(const Problem& p) { return grain_of(p, p.band_rows * p.out_width); }
int64_t backward_grain(const Problem& p) { return grain_of(p, p.run_samples * p.out_height * p.out_width); }

void fill_table(const Problem& p, float* table) {
  visit(p.weight_dtype, [&](auto type) {
    const auto* weight = static_cast<const typename decltype(type)::type*>(p.weight);
    if (p.order == Order::planes) {
      for (int64_t i = 0; i < p.channels * kTaps; ++i) table[i] = widen<float>(weight[i]);
      return;
    }
    for (int64_t c = 0; c < up_to_vector(p, p.channels); ++c) {
      float* lane = table + c / p.lanes * p.lanes * kTaps + c % p.lanes;
      for (int64_t k = 0; k < kTaps; ++k) {
        lane[k * p.lanes] = c < p.channels ? widen<float>(weight[c * kTaps + k]) : 0;
      }
    }
  });
}

#define LSGM_CHOOSE(kernel)                                                           \
  void kernel(const Problem& p, int64_t begin, int64_t end, float* scratch) {         \
    LSGM_IF_AVX512(if (p.lanes == 16) return avx512::kernel(p, begin, end, scratch);) \
    LSGM_IF_AVX2(if (has_avx2()) return avx2::kernel(p, begin, end, scratch);)        \
    scalar::kernel(p, begin, end, scratch);                                           \
  }
LSGM_CHOOSE(forward)
LSGM_CHOOSE(backward)
#undef LSGM_CHOOSE

void finish(const Problem& p) {
  visit(p.weight_dtype, [&](auto type) {
    auto* out = static_cast<typename decltype(type)::type*>(p.grad_weight);
    const int64_t count = p.channels * kTaps;
    for (int64_t i = 0; i < count; ++i) {
      double total = 0;
      for (int64_t run = 0; run < p.sample_runs; ++run) total += p.partials[run * count + i];
      narrow(total, out[i]);
    }
  });
}

}  // namespace cpu
#endif

}  // namespace depthwise_bn_swish
}  // namespace lsgm
