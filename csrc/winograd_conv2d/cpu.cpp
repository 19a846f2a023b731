// CPU kernels of winograd_conv2d, compiled once per instruction set (LSGM_ISA; see common/cpu.h). No torch.
//
// V and M lie so that whatever is read together is one run in memory. A product of a position and a panel keeps the
// sums of kMostRows tiles in registers for all channels; while it runs, the panel of the next one is fetched: there are
// up to four times as many weights as the convolution has, and they come from far.
#include "common/cpu.h"

#include <utility>

#include "common/registers.h"
#include "winograd_conv2d/winograd_conv2d.h"

namespace lsgm {
namespace winograd_conv2d {
namespace LSGM_ISA {
namespace {

using namespace lsgm::LSGM_ISA;

// ---- the matrices, for one axis ----

// The points of m = 4: 0, a, -a, b, -b and infinity. A is a^2, B is b^2; every constant here is exact in float32.
constexpr float kA1 = 0.625f, kA2 = kA1 * kA1, kA3 = kA2 * kA1;
constexpr float kB1 = 1.5f, kB2 = kB1 * kB1, kB3 = kB2 * kB1;

inline V times(float factor, V x) { return mul(filled<V>(factor), x); }
inline V plus(V x, float factor, V y) { return fma(filled<V>(factor), y, x); }
#if LSGM_VEC_AVX2
inline V minus(V x, V y) { return sub(x, y); }
#else
inline V minus(V x, V y) { return {x.v - y.v}; }
#endif

// B d for n pixels in a row; d is overwritten.
inline void to_points(V (&d)[4]) {
  const V v[4] = {minus(d[2], d[0]), add(d[2], d[1]), minus(d[2], d[1]), minus(d[3], d[1])};
  for (int i = 0; i < 4; ++i) d[i] = v[i];
}
inline void to_points(V (&d)[6]) {
  const V even_a = plus(d[4], -kB2, d[2]), odd_a = times(kA1, plus(d[3], -kB2, d[1]));
  const V even_b = plus(d[4], -kA2, d[2]), odd_b = times(kB1, plus(d[3], -kA2, d[1]));
  const V first = plus(plus(d[4], -(kA2 + kB2), d[2]), kA2 * kB2, d[0]);
  const V last = plus(plus(d[5], -(kA2 + kB2), d[3]), kA2 * kB2, d[1]);
  const V v[6] = {first, add(even_a, odd_a), minus(even_a, odd_a), add(even_b, odd_b), minus(even_b, odd_b), last};
  for (int i = 0; i < 6; ++i) d[i] = v[i];
}

// A^T m.
inline void from_points(const V (&m)[4], V (&y)[2]) {
  y[0] = add(m[0], add(m[1], m[2]));
  y[1] = add(minus(m[1], m[2]), m[3]);
}
inline void from_points(const V (&m)[6], V (&y)[4]) {
  const V sum_a = add(m[1], m[2]), sum_b = add(m[3], m[4]);
  const V difference_a = minus(m[1], m[2]), difference_b = minus(m[3], m[4]);
  y[0] = add(m[0], add(sum_a, sum_b));
  y[1] = plus(times(kA1, difference_a), kB1, difference_b);
  y[2] = plus(times(kA2, sum_a), kB2, sum_b);
  y[3] = add(plus(times(kA3, difference_a), kB3, difference_b), m[5]);
}

// ---- tiles ----

struct Place {
  int64_t sample, row, column;  // of the first result
};

inline Place place_of(const Problem& p, int64_t tile) {
  const int64_t line = tile / p.columns, sample = line / p.rows;
  return {sample, (line - sample * p.rows) * p.tile, (tile - line * p.columns) * p.tile};
}

// The first `count` elements, at most a register of them, then zeros.
inline V load_up_to(const float* from, int64_t count) {
  return count >= kWidth ? load_all(from) : load_part(from, count, 0.0f);
}
inline void store_up_to(V x, float* to, int64_t count) {
  if (count >= kWidth) return store(x, to);
  float parts[kWidth];
  store(x, parts);
  for (int64_t i = 0; i < count; ++i) to[i] = parts[i];
}

template <int kTile>
void transform_input_of(const Problem& p, const Block& b, int64_t tile) {
  constexpr int kSize = kTile + 2;
  const Place at = place_of(p, b.first + tile);
  const int64_t line = p.width * p.channels;
  const float* from[kSize][kSize];
  for (int i = 0; i < kSize; ++i) {
    for (int j = 0; j < kSize; ++j) {
      const int64_t y = at.row + i - 1, x = at.column + j - 1;
      const bool inside = y >= 0 && y < p.height && x >= 0 && x < p.width;
      from[i][j] = inside ? p.x + (at.sample * p.height + y) * line + x * p.channels : p.zeros;
    }
  }
  float* const to = p.v + tile * kGroup;
  for (int64_t c = 0; c < p.groups * kGroup; c += kWidth) {
    const int64_t left_over = p.channels - c;
    V half[kSize][kSize];  // B d
    for (int j = 0; j < kSize; ++j) {
      V d[kSize];
      for (int i = 0; i < kSize; ++i) d[i] = load_up_to(from[i][j] + c, left_over);
      to_points(d);
      for (int i = 0; i < kSize; ++i) half[i][j] = d[i];
    }
    float* const group = to + c / kGroup * b.count * kGroup + c % kGroup;
    for (int i = 0; i < kSize; ++i) {
      to_points(half[i]);
      for (int j = 0; j < kSize; ++j) store(half[i][j], group + (i * kSize + j) * p.v_stride);
    }
  }
}

template <int kTile>
void transform_output_of(const Problem& p, const Block& b, int64_t tile) {
  constexpr int kSize = kTile + 2;
  const Place at = place_of(p, b.first + tile);
  const int64_t rows = smaller(kTile, p.height - at.row), columns = smaller(kTile, p.width - at.column);
  float* const out = p.out + ((at.sample * p.height + at.row) * p.width + at.column) * p.filters;
  for (int64_t k = 0; k < p.filters; k += kWidth) {
    const int64_t left_over = p.filters - k;
    const float* const from = p.m + k / kPanel * b.count * kPanel + tile * kPanel + k % kPanel;
    V half[kTile][kSize];  // A^T M
    for (int j = 0; j < kSize; ++j) {
      V m[kSize], y[kTile];
      for (int i = 0; i < kSize; ++i) m[i] = load_all(from + (i * kSize + j) * p.m_stride);
      from_points(m, y);
      for (int i = 0; i < kTile; ++i) half[i][j] = y[i];
    }
    const V bias = p.bias == nullptr ? filled<V>(0.0f) : load_up_to(p.bias + k, left_over);
    for (int i = 0; i < kTile; ++i) {
      V y[kTile];
      from_points(half[i], y);
      for (int j = 0; j < kTile; ++j) {
        if (i < rows && j < columns) store_up_to(add(y[j], bias), out + (i * p.width + j) * p.filters + k, left_over);
      }
    }
  }
}

// ---- products ----

// Registers of a panel, and tiles, whose sums are kept at once: as many as leave registers for what is multiplied.
constexpr int kParts = kWidth > 1 ? 2 : 8;
constexpr int kMostRows = kWidth == 16 ? 14 : kWidth == 8 ? 6 : 2;
constexpr int64_t kColumns = kParts * kWidth;
static_assert(kPanel % kColumns == 0 && kMostRows <= kGroup, "");

// Channels that are added up one after the other, before their sum joins the others: an error grows with the length.
constexpr int64_t kChain = 128;
static_assert(kChain % kGroup == 0, "");

// What is fetched while a product runs: `step` floats for each of its channels.
struct Ahead {
  const float* from;
  int64_t step;
};

inline void fetch(const float* from) { __builtin_prefetch(from, 0, 2); }

// kRows tiles of M, for all filters of a panel. `groups` floats lie between the channels' groups of V.
template <int kRows>
void multiply_rows(const float* v, int64_t groups, const float* weight, int64_t channels, Ahead ahead, float* out) {
  for (int64_t column = 0; column < kPanel; column += kColumns) {
    const float* from = v;
    const float* w = weight + column;
    const float* next = ahead.from;
    for (int64_t first = 0; first < channels; first += kChain) {
      const int64_t end = smaller(channels, first + kChain);
      V sums[kRows][kParts];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
        for (int i = 0; i < kParts; ++i) sums[r][i] = filled<V>(0.0f);
      }
      for (int64_t c = first; c < end; c += kGroup, from += groups) {
        const int64_t count = smaller(kGroup, end - c);
        for (int64_t k = 0; k < count; ++k, w += kPanel, next += ahead.step) {
          if (column == 0) {
            fetch(next);
            if (ahead.step == kPanel) fetch(next + kPanel / 2);
          }
          V factors[kParts];
#pragma GCC unroll 16
          for (int i = 0; i < kParts; ++i) factors[i] = load_all(w + i * kWidth);
#pragma GCC unroll 16
          for (int r = 0; r < kRows; ++r) {
            const V value = filled<V>(from[r * kGroup + k]);
#pragma GCC unroll 16
            for (int i = 0; i < kParts; ++i) sums[r][i] = fma(value, factors[i], sums[r][i]);
          }
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
        for (int i = 0; i < kParts; ++i) {
          float* const to = out + r * kPanel + column + i * kWidth;
          store(first == 0 ? sums[r][i] : add(load_all(to), sums[r][i]), to);
        }
      }
    }
  }
}

using MultiplyRows = void (*)(const float*, int64_t, const float*, int64_t, Ahead, float*);

template <int... kRows>
MultiplyRows multiply_rows_of(int64_t rows, std::integer_sequence<int, kRows...>) {
  constexpr MultiplyRows all[] = {&multiply_rows<kRows + 1>...};
  return all[rows - 1];
}

void multiply_one(const Problem& p, const Block& b, int64_t index) {
  if (b.count == 0) return;
  const int64_t position = index / p.panels, panel = index - position * p.panels;
  const int64_t weights = p.channels * kPanel;
  const float* const weight = p.weight + index * weights;
  const bool last = index + 1 == positions(p) * p.panels;
  const float* const v = p.v + position * p.v_stride;
  float* const m = p.m + position * p.m_stride + panel * b.count * kPanel;
  // Rows in equal parts, as far as that goes.
  const int64_t parts = ceil_div(b.count, kMostRows), share = b.count / parts, larger_ones = b.count - parts * share;
  const int64_t step = last ? 0 : ceil_div(kPanel, parts);
  int64_t tile = 0;
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t rows = share + (i < larger_ones ? 1 : 0);
    const int64_t skipped = smaller(i * step * p.channels, weights);
    const Ahead ahead = {last ? weight : weight + weights + skipped, step};
    multiply_rows_of(rows, std::make_integer_sequence<int, kMostRows>{})(
        v + tile * kGroup, b.count * kGroup, weight, p.channels, ahead, m + tile * kPanel);
    tile += rows;
  }
}

}  // namespace

void transform_input(const Problem& p, const Block& b, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    p.tile == 2 ? transform_input_of<2>(p, b, i) : transform_input_of<4>(p, b, i);
  }
}

void multiply(const Problem& p, const Block& b, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) multiply_one(p, b, i);
}

void transform_output(const Problem& p, const Block& b, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    p.tile == 2 ? transform_output_of<2>(p, b, i) : transform_output_of<4>(p, b, i);
  }
}

}  // namespace LSGM_ISA

#if !LSGM_VEC_AVX2  // what exists once, compiled for every processor
namespace cpu {

constexpr int64_t kScratchFloats = 4 << 20;  // of all V and M: they stay in the last cache, beside the weights
constexpr int64_t kFewestTiles = 48;         // of a block, where there are as many: each reads all weights
constexpr int64_t kFewestApart = 24;         // of a worker: with fewer, sharing the weights is worth more
constexpr int64_t kThreadFloats = 32768;     // of V or M that a thread writes
constexpr int64_t kThreadProducts = 1 << 19;

// The distance of positions: an odd number of cache lines, so that they do not share a few places in the first cache.
static int64_t spread(int64_t floats) { return (floats / 16 | 1) * 16; }

void plan(Problem& p, int64_t threads) {
  if (p.lanes == 0) p.lanes = has_avx512() ? 16 : 8;
  p.rows = ceil_div(p.height, p.tile);
  p.columns = ceil_div(p.width, p.tile);
  p.tiles = p.batch * p.rows * p.columns;
  p.groups = ceil_div(p.channels, kGroup);
  p.panels = ceil_div(p.filters, kPanel);
  // What a core has written, another one reads slowly: apart from each other they do not need to.
  if (p.workers == 0) p.workers = p.tiles >= threads * kFewestApart ? larger(1, threads) : 1;
  if (p.block == 0) {
    const int64_t per_tile = positions(p) * (p.groups * kGroup + p.panels * kPanel) * p.workers;
    const int64_t most = larger(kFewestTiles, kScratchFloats / per_tile), share = ceil_div(p.tiles, p.workers);
    p.block = share == 0 ? 0 : ceil_div(share, ceil_div(share, most));
  }
  p.v_stride = spread(p.block * p.groups * kGroup);
  p.m_stride = spread(p.block * p.panels * kPanel);
}

int64_t scratch_size(const Problem& p) { return positions(p) * (p.v_stride + p.m_stride) + p.channels; }

void place(Problem& p, float* scratch) {
  p.v = scratch;
  p.m = p.v + positions(p) * p.v_stride;
  float* const zeros = p.m + positions(p) * p.m_stride;
  for (int64_t c = 0; c < p.channels; ++c) zeros[c] = 0.0f;
  p.zeros = zeros;
}

int64_t blocks(const Problem& p) { return p.tiles == 0 ? 0 : ceil_div(ceil_div(p.tiles, p.workers), p.block); }

Block block_at(const Problem& p, int64_t worker, int64_t index) {
  const int64_t begin = worker * p.tiles / p.workers, end = (worker + 1) * p.tiles / p.workers;
  const int64_t first = smaller(end, begin + index * p.block);
  return {first, smaller(p.block, end - first)};
}

int64_t products(const Problem& p) { return positions(p) * p.panels; }

int64_t tile_grain(const Problem& p) {
  return larger(1, kThreadFloats / (positions(p) * larger(p.groups * kGroup, p.panels * kPanel)));
}

int64_t product_grain(const Problem& p, const Block& b) {
  return larger(1, kThreadProducts / larger(1, b.count * p.channels * kPanel));
}

#define LSGM_CHOOSE(step)                                                                     \
  void step(const Problem& p, const Block& b, int64_t begin, int64_t end) {                   \
    LSGM_IF_AVX512(if (p.lanes == 16) return avx512::step(p, b, begin, end);)                 \
    LSGM_IF_AVX2(if (has_avx2()) return avx2::step(p, b, begin, end);)                        \
    scalar::step(p, b, begin, end);                                                           \
  }
LSGM_CHOOSE(transform_input)
LSGM_CHOOSE(multiply)
LSGM_CHOOSE(transform_output)
#undef LSGM_CHOOSE

}  // namespace cpu
#endif

}  // namespace winograd_conv2d
}  // namespace lsgm
