// What each thread of the CUDA kernels of group_norm_swish does. Compiled by nvcc into cuda.cu, and by the host
// compiler into csrc/tests/group_norm_swish_threads.cpp, which runs every thread of a launch on the CPU and so proves,
// on a machine without a GPU, that each element is computed once and rightly. Only the sums across threads remain to
// cuda.cu.
//
//   u = (v - mean) rstd weight + bias,  y = u sigmoid(u), or y = u without Swish
//
//   with d = grad y'(u), h = (v - mean) rstd, and n elements in a group:
//   grad_v = rstd (weight d - A / n - h B / n),  A = sum of weight d, B = sum of weight d h, over the group
//
// planes: `columns` threads walk along the positions of a channel, `lines` channels at once. rows: `columns` threads
// hold `width` channels each, `lines` rows at once. Moments and sums are those of channels first, then of groups.
//
// Statistics of a channel: one pass about a pivot, the mean of what the threads load first. Channels, and then the
// pieces of a group, are combined about their common mean (Chan, Golub, LeVeque 1979), in float64. A mean is applied as
// two float32 numbers: one has no room for means many deviations from 0.
#pragma once

#include <cmath>
#include <type_traits>

#include "common/math.h"
#include "common/vector_io.h"
#include "group_norm_swish/device.h"

// What a thread keeps in arrays must end up in registers.
#if defined(__CUDACC__)
#define LSGM_UNROLL _Pragma("unroll")
#else
#define LSGM_UNROLL
#endif

namespace lsgm {
namespace group_norm_swish {
namespace cuda {

constexpr int kThreads = 256;
constexpr int kLanes = 32;               // threads that combine the pieces of one group
constexpr int kMost = 256;               // channels of a block, and groups of a cell
constexpr int64_t kBatchElements = 16;   // of a thread, per tensor
// Elements of a cell, up to which one block does all of it: the more, the more blocks there are.
constexpr int64_t kAlone = 2048;
constexpr int64_t kMany = 128, kSmallCell = 16384;
constexpr int64_t kVeryMany = 512, kLargeCell = 65536;
constexpr int64_t kSpread = 512;         // blocks for which a thread takes fewer elements
constexpr int64_t kPrograms = 4096;      // blocks up to which each has no more than one batch per thread
constexpr int64_t kPieces = 32;          // of a group, which every block of the second launch combines
constexpr int64_t kWidthBytes = 128;     // rows: bytes side by side; in one launch half or a quarter of it
constexpr int64_t kColumns = 32;         // rows: most threads side by side in two launches

template <class T>
LSGM_HD constexpr int vector_width() {
  return 16 / static_cast<int>(sizeof(T));
}

// Vectors in a batch: half as many backward, where there are two of each. And channels whose constants a thread keeps.
template <int N>
LSGM_HD constexpr int batch_of() {
  return N == 1 ? 4 : static_cast<int>(kBatchElements) / N;
}
template <int N>
LSGM_HD constexpr int pairs_of() {
  return batch_of<N>() / 2;
}
template <Order O, int N>
LSGM_HD constexpr int channels_of() {
  return O == Order::rows ? N : 1;
}

// ---- plan ----

LSGM_HD int64_t per_group(const Call& c) { return c.channels / c.groups; }

LSGM_HD int64_t power_from(int64_t least) {
  int64_t power = 1;
  while (power < least) power *= 2;
  return power;
}

// The elements per thread that `c` gets: its vector width, or 1.
LSGM_HD int width_of(const Call& c) {
  const int64_t width = 16 / size_of(c.dtype);
  const int64_t inner = c.order == Order::planes ? c.spatial : c.channels;
  const bool all = aligned(c.x) && aligned(c.residual) && aligned(c.v) && aligned(c.y) && aligned(c.grad) &&
                   aligned(c.grad_v) && aligned(c.grad_x);
  return inner % width == 0 && all ? static_cast<int>(width) : 1;
}

// Threads side by side that give each about `per_thread` elements of a plane; more where else lines would have no
// channel.
LSGM_HD int64_t plane_columns(const Call& c, int64_t width, int64_t per_thread, int64_t cell) {
  int64_t columns = smaller(kThreads, power_from(ceil_div(c.spatial, per_thread)));
  while (columns < kThreads && columns * width < c.spatial) {
    const int64_t lines = kThreads / columns;
    if (ceil_div(cell, lines) * lines * 7 <= cell * 8) break;
    columns *= 2;
  }
  return columns;
}

// Fewest groups whose channels are a whole number of vectors.
LSGM_HD int64_t unit_of(const Call& c, int64_t width) {
  int64_t groups = 1;
  while (groups * per_group(c) % width != 0 && groups < c.groups) ++groups;
  return groups;
}

LSGM_HD void set_cell(const Call& c, Plan& p, int64_t groups) {
  p.cell = smaller(groups, c.groups) * per_group(c);
  p.cells = ceil_div(c.channels, p.cell);
}

// Whether one block can do a cell, given its channels.
LSGM_HD bool fits(const Call& c, const Plan& p) {
  const int64_t blocks = c.batch * p.cells;
  const int64_t limit = blocks >= kVeryMany ? kLargeCell : blocks >= kMany ? kSmallCell : kAlone;
  return p.cell <= kMost && p.cell * c.spatial <= limit;
}

LSGM_HD bool make_whole(const Call& c, Plan& p) {
  p.whole = true;
  p.rounds = 1;
  p.splits = p.parts = 1;
  p.size = c.spatial;
  if (c.order == Order::planes) {
    // Several groups where planes are small, unless that leaves too few blocks.
    int64_t groups = larger(1, kThreads / power_from(ceil_div(c.spatial, kBatchElements)) / per_group(c));
    while (groups > 1 && c.batch * ceil_div(c.groups, groups) < kMany) groups /= 2;
    set_cell(c, p, groups);
    p.columns = static_cast<int>(plane_columns(c, p.width, kBatchElements, p.cell));
    p.lines = kThreads / p.columns;
    p.rounds = static_cast<int>(ceil_div(p.cell, p.lines));
    return fits(c, p);
  }
  const int64_t unit = unit_of(c, p.width);
  for (int64_t bytes = kWidthBytes / 2; bytes >= kWidthBytes / 4; bytes /= 2) {
    const int64_t groups = larger(1, bytes / size_of(c.dtype) / per_group(c));
    set_cell(c, p, ceil_div(groups, unit) * unit);
    if (!fits(c, p)) continue;
    p.columns = static_cast<int>(p.cell / p.width);
    p.lines = kThreads / p.columns;
    return true;
  }
  return false;
}

LSGM_HD void make_split(const Call& c, Plan& p) {
  const int64_t total = c.batch * c.channels * c.spatial;
  int64_t per_thread = kBatchElements;
  while (per_thread > 4 && per_thread > p.width && total < kSpread * kThreads * per_thread) per_thread /= 2;
  p.whole = false;
  p.rounds = 1;
  int64_t at_once;  // positions
  if (c.order == Order::planes) {
    set_cell(c, p, 1);
    p.columns = static_cast<int>(plane_columns(c, p.width, per_thread, p.cell));
    p.lines = kThreads / p.columns;
    p.splits = ceil_div(p.cell, p.lines);
    at_once = p.columns * larger(per_thread, p.width);
  } else {
    const int64_t unit = unit_of(c, p.width);
    const int64_t groups = larger(1, kWidthBytes / size_of(c.dtype) / per_group(c));
    set_cell(c, p, ceil_div(groups, unit) * unit);
    const int64_t vectors = p.cell / p.width;
    p.splits = ceil_div(vectors, kColumns);
    p.columns = static_cast<int>(ceil_div(vectors, p.splits));
    p.lines = kThreads / p.columns;
    at_once = p.lines * larger(1, per_thread / p.width);
  }
  const int64_t tiles = ceil_div(c.spatial, at_once);
  int64_t each = ceil_div(tiles, larger(1, kPieces / p.splits));
  each = larger(each, c.batch * p.cells * p.splits * tiles / kPrograms);
  p.size = at_once * larger(1, each);
  p.parts = ceil_div(c.spatial, p.size);
}

LSGM_HD void make_plan(Call& c) {
  Plan& p = c.plan;
  p.width = width_of(c);
  if (!make_whole(c, p)) make_split(c, p);
  p.blocks = c.batch * p.cells * p.splits * p.parts;
}

LSGM_HD int64_t pieces_of(const Call& c) { return c.plan.parts * c.plan.splits; }
LSGM_HD int64_t numbers_of_pieces(const Call& c) { return c.plan.whole ? 0 : 2 * c.batch * c.groups * pieces_of(c); }

// Channels of a block.
LSGM_HD int64_t breadth_of(const Call& c) {
  const Plan& p = c.plan;
  return c.order == Order::planes ? int64_t(p.lines) * p.rounds : int64_t(p.columns) * p.width;
}

// ---- places ----

// The part of a call that a block has.
struct Block {
  int64_t sample, part, split;
  int64_t cell_begin, cell_end;    // channels
  int64_t begin, end;              // of them, the block's
  int64_t first, last;             // positions
  int64_t first_group;
  int groups;                      // of the cell
};

// Neighbours in the grid are neighbours in memory. `backwards`: what the first launch has read last comes first, while
// it is in the cache.
LSGM_HD Block block_of(const Call& c, int64_t index, bool backwards = false) {
  const Plan& p = c.plan;
  if (backwards) index = p.blocks - 1 - index;
  const int64_t side = p.cells * p.splits;
  Block b;
  int64_t within;
  if (c.order == Order::planes) {
    const int64_t row = index / p.parts;
    b.part = index - row * p.parts;
    b.sample = row / side;
    within = row - b.sample * side;
  } else {
    const int64_t row = index / side;
    within = index - row * side;
    b.sample = row / p.parts;
    b.part = row - b.sample * p.parts;
  }
  const int64_t cell = within / p.splits;
  b.split = within - cell * p.splits;
  const int64_t breadth = breadth_of(c);
  b.cell_begin = cell * p.cell;
  b.cell_end = smaller(b.cell_begin + p.cell, c.channels);
  b.begin = b.cell_begin + b.split * breadth;
  b.end = smaller(b.begin + breadth, b.cell_end);
  b.first = b.part * p.size;
  b.last = smaller(b.first + p.size, c.spatial);
  b.first_group = b.cell_begin / per_group(c);
  b.groups = static_cast<int>((b.cell_end - b.cell_begin) / per_group(c));
  return b;
}

// A thread's first channel, and its place among those that share it: `turn` of `turns`, `apart` threads from the next.
struct Place {
  int64_t channel;
  int turn, turns, apart;
  bool active;
};

template <Order O, int N>
LSGM_HD Place place_of(const Call& c, const Block& b, int round, int thread) {
  const Plan& p = c.plan;
  const int line = thread / p.columns, column = thread - line * p.columns;
  Place place;
  if (O == Order::planes) {
    place.channel = b.begin + int64_t(round) * p.lines + line;
    place.turn = column;
    place.turns = p.columns;
    place.apart = 1;
  } else {
    place.channel = b.begin + int64_t(column) * N;
    place.turn = line;
    place.turns = p.lines;
    place.apart = p.columns;
  }
  place.active = line < p.lines && place.channel < b.end;
  return place;
}

// Whether the thread has what its channels' sums are.
LSGM_HD bool leads(const Place& place) { return place.active && place.turn == 0; }

// The way of a thread along a plane, or down the rows.
struct Walk {
  int64_t at, stride;
  int left;  // vectors: a thread's share of a part is far below 2^31
};

template <Order O, int N>
LSGM_HD Walk walk_of(const Call& c, const Block& b, const Place& place) {
  Walk w;
  int64_t first, step;
  if (O == Order::planes) {
    first = b.first + int64_t(place.turn) * N;
    step = w.stride = int64_t(place.turns) * N;
    w.at = (b.sample * c.channels + place.channel) * c.spatial + first;
  } else {
    first = b.first + place.turn;
    step = place.turns;
    w.stride = place.turns * c.channels;
    w.at = (b.sample * c.spatial + first) * c.channels + place.channel;
  }
  w.left = place.active && first < b.last ? static_cast<int>(ceil_div(b.last - first, step)) : 0;
  return w;
}

// The next elements of a thread, `count` vectors, and where they are.
template <int N, int U = batch_of<N>()>
struct Batch {
  float x[U][N], second[U][N];
  int64_t at[U];
  int count;
};

template <class T, bool kSecond, int N, int U>
LSGM_HD void take(const Call& c, const void* x, const void* second, Walk& w, Batch<N, U>& b) {
  b.count = 0;
  LSGM_UNROLL
  for (int u = 0; u < U; ++u) {
    if (w.left > 0) {
      b.at[u] = w.at;
      load<T>(x, c.dtype, w.at, b.x[u]);
      if (kSecond) load<T>(second, c.dtype, w.at, b.second[u]);
      b.count = u + 1;
      w.at += w.stride;
      --w.left;
    }
  }
}

// ---- statistics ----

template <class T>
LSGM_HD float rounded(DType dtype, float x) {
  if constexpr (std::is_same<T, Any>::value) {
    if (dtype == DType::float16) return rounded<Half>(dtype, x);
    return dtype == DType::bfloat16 ? rounded<BFloat16>(dtype, x) : x;
  } else {
    T stored;
    narrow(x, stored);
    return widen<float>(stored);
  }
}

// A batch of what statistics are of: x, or the sum with the residual, which is stored.
template <class T, int N, bool kSum>
LSGM_HD void take_v(const Call& c, Walk& w, Batch<N>& b) {
  take<T, kSum>(c, c.x, c.residual, w, b);
  if constexpr (kSum) {
    const float scale = static_cast<float>(c.scale);
    LSGM_UNROLL
    for (int u = 0; u < batch_of<N>(); ++u) {
      if (u < b.count) {
        for (int k = 0; k < N; ++k) b.x[u][k] = rounded<T>(c.dtype, (b.x[u][k] + b.second[u][k]) * scale);
        store<T>(c.v, c.dtype, b.at[u], b.x[u]);
      }
    }
  }
}

// The sums of a batch, for the pivot.
template <Order O, int N>
LSGM_HD void add_up(const Batch<N>& b, float (&sums)[channels_of<O, N>()]) {
  constexpr int K = channels_of<O, N>();
  for (int k = 0; k < K; ++k) sums[k] = 0;
  LSGM_UNROLL
  for (int u = 0; u < batch_of<N>(); ++u) {
    if (u < b.count) {
      for (int k = 0; k < N; ++k) sums[k % K] += b.x[u][k];
    }
  }
}

// The thread's differences from the pivot and their squares, K of each, from the batch that the pivot was made of on.
template <class T, Order O, int N, bool kSum>
LSGM_HD void differences(const Call& c, Walk& w, Batch<N>& b, const float (&pivot)[channels_of<O, N>()],
    float (&d)[2 * channels_of<O, N>()]) {
  constexpr int K = channels_of<O, N>();
  for (int k = 0; k < 2 * K; ++k) d[k] = 0;
  while (b.count != 0) {
    LSGM_UNROLL
    for (int u = 0; u < batch_of<N>(); ++u) {
      if (u < b.count) {
        for (int k = 0; k < N; ++k) {
          const float difference = b.x[u][k] - pivot[k % K];
          d[k % K] += difference;
          d[K + k % K] += difference * difference;
        }
      }
    }
    take_v<T, N, kSum>(c, w, b);
  }
}

struct Moments {
  double mean, m2;  // m2: the sum of the squared distances from the mean
};

// Of a channel of the block.
LSGM_HD Moments moments_of(const Call& c, const Block& b, int64_t channel, float pivot, float first, float second) {
  const double n = static_cast<double>(b.last - b.first), one = static_cast<double>(first);
  Moments m{static_cast<double>(pivot) + one / n, static_cast<double>(second) - one * one / n};
  if (c.channel_bias != nullptr) m.mean += static_cast<double>(c.channel_bias[b.sample * c.channels + channel]);
  return m;
}

// The channels of the cell's group g that the block has.
struct Range {
  int64_t begin, end;
};

LSGM_HD Range range_of(const Call& c, const Block& b, int g) {
  const int64_t begin = b.cell_begin + g * per_group(c);
  return {larger(begin, b.begin), smaller(begin + per_group(c), b.end)};
}

// Of `channels`, the moments of the block's channels.
LSGM_HD Moments piece_of(const Call& c, const Block& b, int g, const Moments* channels) {
  const Range r = range_of(c, b, g);
  const double positions = static_cast<double>(b.last - b.first), members = static_cast<double>(r.end - r.begin);
  Moments piece{0, 0};
  for (int64_t i = r.begin; i < r.end; ++i) piece.mean += channels[i - b.begin].mean / members;
  for (int64_t i = r.begin; i < r.end; ++i) {
    const double distance = channels[i - b.begin].mean - piece.mean;
    piece.m2 += channels[i - b.begin].m2 + positions * distance * distance;
  }
  return piece;
}

// Where the two numbers of a group's piece are: mean and m2, backward A and B.
LSGM_HD int64_t partial_at(const Call& c, const Block& b, int g, int64_t piece) {
  return 2 * ((b.sample * c.groups + b.first_group + g) * pieces_of(c) + piece);
}

LSGM_HD void store_partial(const Call& c, const Block& b, int g, double one, double two) {
  const Pack<double, 2> pair{{one, two}};
  copy_aligned(c.partials + partial_at(c, b, g, b.part * c.plan.splits + b.split), pair);
}

LSGM_HD Pack<double, 2> load_partial(const Call& c, const Block& b, int g, int64_t piece) {
  Pack<double, 2> pair;
  copy_aligned(pair, c.partials + partial_at(c, b, g, piece));
  return pair;
}

// Elements of a piece of the cell's group g.
LSGM_HD double piece_size(const Call& c, const Block& b, int g, int64_t piece) {
  const int64_t part = piece / c.plan.splits, split = piece - part * c.plan.splits;
  const int64_t begin = b.cell_begin + split * breadth_of(c), first = b.cell_begin + g * per_group(c);
  const int64_t members = smaller(begin + breadth_of(c), first + per_group(c)) - larger(begin, first);
  const int64_t positions = smaller(c.plan.size, c.spatial - part * c.plan.size);
  return static_cast<double>(larger(members, 0) * positions);
}

// One of `kLanes` threads' part of what a group's pieces are combined to.

LSGM_HD double group_size(const Call& c) { return static_cast<double>(per_group(c) * c.spatial); }

LSGM_HD double mean_part(const Call& c, const Block& b, int g, int lane) {
  double total = 0;
  for (int64_t k = lane; k < pieces_of(c); k += kLanes) {
    total += piece_size(c, b, g, k) / group_size(c) * load_partial(c, b, g, k).v[0];
  }
  return total;
}

LSGM_HD double m2_part(const Call& c, const Block& b, int g, int lane, double mean) {
  double total = 0;
  for (int64_t k = lane; k < pieces_of(c); k += kLanes) {
    const Pack<double, 2> pair = load_partial(c, b, g, k);
    const double distance = pair.v[0] - mean;
    total += pair.v[1] + piece_size(c, b, g, k) * distance * distance;
  }
  return total;
}

LSGM_HD Pack<double, 2> sums_part(const Call& c, const Block& b, int g, int lane) {
  Pack<double, 2> total{{0, 0}};
  for (int64_t k = lane; k < pieces_of(c); k += kLanes) {
    const Pack<double, 2> pair = load_partial(c, b, g, k);
    total.v[0] += pair.v[0];
    total.v[1] += pair.v[1];
  }
  return total;
}

// What a group's elements are normalised with.
struct Statistics {
  double mean;
  float rstd;
};

LSGM_HD Statistics statistics_of(const Call& c, double mean, double m2) {
  const double variance = m2 < 0 ? 0 : m2 / group_size(c);  // rounding may leave it a little below 0
  return {mean, static_cast<float>(1 / std::sqrt(variance + c.eps))};
}

LSGM_HD void store_statistics(const Call& c, const Block& b, int g, const Statistics& s) {
  const int64_t at = b.sample * c.groups + b.first_group + g;
  c.mean[at] = static_cast<float>(s.mean);
  c.rstd[at] = s.rstd;
}

// ---- apply ----

// To about two units in the last place; 0 where b is beyond 2^126, from where the quotients below vanish.
LSGM_HD float quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdividef(a, b);
#else
  return a / b;
#endif
}

LSGM_HD int64_t group_in_cell(const Call& c, const Block& b, int64_t channel) {
  return (channel - b.cell_begin) / per_group(c);
}

template <int K>
struct Constants {
  float high[K], low[K], scale[K], bias[K];  // x less high and low is v less the mean
};

template <int K>
LSGM_HD Constants<K> constants_of(const Call& c, const Block& b, const Place& place, const Statistics* groups) {
  Constants<K> constants{};
  if (!place.active) return constants;
  LSGM_UNROLL
  for (int k = 0; k < K; ++k) {
    const int64_t channel = place.channel + k;
    const Statistics s = groups[group_in_cell(c, b, channel)];
    double mean = s.mean;
    if (c.channel_bias != nullptr) mean -= static_cast<double>(c.channel_bias[b.sample * c.channels + channel]);
    constants.high[k] = static_cast<float>(mean);
    constants.low[k] = static_cast<float>(mean - static_cast<double>(constants.high[k]));
    constants.scale[k] = c.weight[channel] * s.rstd;
    constants.bias[k] = c.bias[channel];
  }
  return constants;
}

// `v`: x, or v where that was stored.
template <class T, Order O, int N>
LSGM_HD void apply_part(const Call& c, const void* v, Walk w, const Constants<channels_of<O, N>()>& constants) {
  constexpr int K = channels_of<O, N>();
  Batch<N> b;
  for (take<T, false>(c, v, nullptr, w, b); b.count != 0; take<T, false>(c, v, nullptr, w, b)) {
    LSGM_UNROLL
    for (int u = 0; u < batch_of<N>(); ++u) {
      if (u < b.count) {
        float y[N];
        for (int k = 0; k < N; ++k) {
          const float centred = (b.x[u][k] - constants.high[k % K]) - constants.low[k % K];
          const float value = centred * constants.scale[k % K] + constants.bias[k % K];
          y[k] = c.swish ? quotient(value, 1.0f + exp_of(-value)) : value;
        }
        store<T>(c.y, c.dtype, b.at[u], y);
      }
    }
  }
}

// Factor and shift of a channel.
LSGM_HD void store_affine(const Call& c, const Block& b, int64_t channel, const Statistics* groups) {
  const Statistics s = groups[group_in_cell(c, b, channel)];
  const float factor = c.weight[channel] * s.rstd;
  c.factor[b.sample * c.channels + channel] = factor;
  c.shift[b.sample * c.channels + channel] =
      static_cast<float>(static_cast<double>(c.bias[channel]) - s.mean * static_cast<double>(factor));
}

// ---- backward ----

// Of a channel over positions: of d, of d (v - mean), and of v - mean.
struct Sums {
  float grad, centred, distance;
};

// A and B of a group.
struct Correction {
  float a, b;
};

template <int K>
struct Slopes {
  float mean[K], scale[K], bias[K], slope[K], offset[K];
};

// rstd of a channel.
LSGM_HD float rstd_of(const Call& c, const Block& b, int64_t channel) {
  return c.rstd[b.sample * c.groups + b.first_group + group_in_cell(c, b, channel)];
}

LSGM_HD float offset_of(const Call& c, float rstd, const Correction& of) {
  return -rstd * of.a / static_cast<float>(group_size(c));
}

LSGM_HD float slope_of(const Call& c, float rstd, const Correction& of) {
  return -rstd * rstd * of.b / static_cast<float>(group_size(c));
}

// `groups`: null where they are not known yet.
template <int K>
LSGM_HD Slopes<K> slopes_of(const Call& c, const Block& b, const Place& place, const Correction* groups) {
  Slopes<K> s{};
  if (!place.active) return s;
  LSGM_UNROLL
  for (int k = 0; k < K; ++k) {
    const int64_t channel = place.channel + k, g = group_in_cell(c, b, channel);
    const float rstd = c.rstd[b.sample * c.groups + b.first_group + g];
    float mean = c.mean[b.sample * c.groups + b.first_group + g];
    if (c.channel_bias != nullptr) mean -= c.channel_bias[b.sample * c.channels + channel];
    s.mean[k] = mean;
    s.scale[k] = c.weight[channel] * rstd;
    s.bias[k] = c.bias[channel];
    if (groups != nullptr) {
      s.offset[k] = offset_of(c, rstd, groups[g]);
      s.slope[k] = slope_of(c, rstd, groups[g]);
    }
  }
  return s;
}

LSGM_HD float inner_gradient(const Call& c, float grad, float centred, float scale, float bias) {
  if (!c.swish) return grad;
  const float value = centred * scale + bias;
  const float s = quotient(1.0f, 1.0f + exp_of(-value));
  return grad * s * (1.0f + value * (1.0f - s));
}

// The thread's sums: K of each of those of Sums, the last for a channel bias only. With 8 channels they are more than
// the registers hold beside the rest: x is then read again from the cache.
template <class T, Order O, int N>
LSGM_HD void add_gradients(
    const Call& c, Walk w, const Slopes<channels_of<O, N>()>& s, float (&sums)[3 * channels_of<O, N>()]) {
  constexpr int K = channels_of<O, N>();
  constexpr bool kTwice = K == 8;
  for (int k = 0; k < 3 * K; ++k) sums[k] = 0;
  Batch<N, pairs_of<N>()> b;
  [[maybe_unused]] Walk again = w;
  for (take<T, true>(c, c.x, c.grad, w, b); b.count != 0; take<T, true>(c, c.x, c.grad, w, b)) {
    LSGM_UNROLL
    for (int u = 0; u < pairs_of<N>(); ++u) {
      if (u < b.count) {
        for (int k = 0; k < N; ++k) {
          const float centred = b.x[u][k] - s.mean[k % K];
          const float d = inner_gradient(c, b.second[u][k], centred, s.scale[k % K], s.bias[k % K]);
          sums[k % K] += d;
          sums[K + k % K] += d * centred;
          if (!kTwice) sums[2 * K + k % K] += centred;
        }
      }
    }
  }
  if constexpr (kTwice) {
    if (c.grad_channel == nullptr) return;
    for (take<T, false>(c, c.x, nullptr, again, b); b.count != 0; take<T, false>(c, c.x, nullptr, again, b)) {
      LSGM_UNROLL
      for (int u = 0; u < pairs_of<N>(); ++u) {
        if (u < b.count) {
          for (int k = 0; k < N; ++k) sums[2 * K + k % K] += b.x[u][k] - s.mean[k % K];
        }
      }
    }
  }
}

template <class T, Order O, int N>
LSGM_HD void apply_gradients(const Call& c, Walk w, const Slopes<channels_of<O, N>()>& s) {
  constexpr int K = channels_of<O, N>();
  const float scale = static_cast<float>(c.scale);
  Batch<N, pairs_of<N>()> b;
  for (take<T, true>(c, c.x, c.grad, w, b); b.count != 0; take<T, true>(c, c.x, c.grad, w, b)) {
    LSGM_UNROLL
    for (int u = 0; u < pairs_of<N>(); ++u) {
      if (u < b.count) {
        float result[N], own[N];
        for (int k = 0; k < N; ++k) own[k] = 0;
        if (c.grad_v != nullptr) load<T>(c.grad_v, c.dtype, b.at[u], own);
        for (int k = 0; k < N; ++k) {
          const float centred = b.x[u][k] - s.mean[k % K];
          const float d = inner_gradient(c, b.second[u][k], centred, s.scale[k % K], s.bias[k % K]);
          const float of_v = s.scale[k % K] * d + (s.slope[k % K] * centred + s.offset[k % K]);
          result[k] = (of_v + own[k]) * scale;
        }
        store<T>(c.grad_x, c.dtype, b.at[u], result);
      }
    }
  }
}

// Rows of sums: of each part of each sample, one value per channel. Those of weight and bias are the gradients
// themselves where there is one row.
LSGM_HD int64_t rows_of(const Call& c) { return c.batch * c.plan.parts; }
LSGM_HD int64_t numbers_of_rows(const Call& c) {
  return c.plan.whole && rows_of(c) == 1 ? 0 : 3 * rows_of(c) * c.channels;
}
LSGM_HD float* weight_sums(const Call& c) { return rows_of(c) == 1 ? c.grad_weight : c.sums; }
LSGM_HD float* bias_sums(const Call& c) { return rows_of(c) == 1 ? c.grad_bias : c.sums + rows_of(c) * c.channels; }
LSGM_HD float* distance_sums(const Call& c) { return c.sums + 2 * rows_of(c) * c.channels; }

// Stores the sums of a channel, and returns its share in A and B.
LSGM_HD Correction store_sums(const Call& c, const Block& b, int64_t channel, const Sums& sums) {
  const int64_t at = (b.sample * c.plan.parts + b.part) * c.channels + channel;
  const float of_weight = sums.centred * rstd_of(c, b, channel);
  weight_sums(c)[at] = of_weight;
  bias_sums(c)[at] = sums.grad;
  if (c.grad_channel != nullptr && !c.plan.whole) distance_sums(c)[at] = sums.distance;
  return {c.weight[channel] * sums.grad, c.weight[channel] * of_weight};
}

// Of `channels`, the shares of the block's channels.
LSGM_HD Correction correction_of(const Call& c, const Block& b, int g, const Correction* channels) {
  const Range r = range_of(c, b, g);
  Correction total{0, 0};
  for (int64_t i = r.begin; i < r.end; ++i) {
    total.a += channels[i - b.begin].a;
    total.b += channels[i - b.begin].b;
  }
  return total;
}

// The gradient of the channel bias from the channel's sums.
LSGM_HD void store_channel(const Call& c, const Block& b, int64_t channel, const Sums& sums, const Correction* groups) {
  const float rstd = rstd_of(c, b, channel);
  const Correction& of = groups[group_in_cell(c, b, channel)];
  c.grad_channel[b.sample * c.channels + channel] = c.weight[channel] * rstd * sums.grad +
      slope_of(c, rstd, of) * sums.distance + offset_of(c, rstd, of) * static_cast<float>(c.spatial);
}

// Those sums, from the rows of two launches.
LSGM_HD Sums channel_sums(const Call& c, const Block& b, int64_t channel) {
  Sums sums{0, 0, 0};
  for (int64_t part = 0; part < c.plan.parts; ++part) {
    const int64_t at = (b.sample * c.plan.parts + part) * c.channels + channel;
    sums.grad += bias_sums(c)[at];
    sums.distance += distance_sums(c)[at];
  }
  return sums;
}

// A lane's part of a column of rows.
LSGM_HD float row_part(const Call& c, const float* sums, int64_t channel, int lane) {
  float total = 0;
  for (int64_t row = lane; row < rows_of(c); row += kLanes) total += sums[row * c.channels + channel];
  return total;
}

// Calls Kernel::run<T, O, N>(c, argument) with the type, the order and the width that `c` gets.

template <class Kernel, class T, int N, class Argument>
static inline void run_order(const Call& c, Argument argument) {
  if (c.order == Order::planes) {
    Kernel::template run<T, Order::planes, N>(c, argument);
  } else {
    Kernel::template run<T, Order::rows, N>(c, argument);
  }
}

template <class Kernel, class T, class Argument>
static inline void run_type(const Call& c, Argument argument) {
  if (c.plan.width == 1) return run_order<Kernel, Any, 1>(c, argument);
  run_order<Kernel, T, vector_width<T>()>(c, argument);
}

template <class Kernel, class Argument>
static inline void run_kernel(const Call& c, Argument argument) {
  switch (c.dtype) {
    case DType::float16:
      return run_type<Kernel, Half>(c, argument);
    case DType::bfloat16:
      return run_type<Kernel, BFloat16>(c, argument);
    default:
      return run_type<Kernel, float>(c, argument);
  }
}

}  // namespace cuda
}  // namespace group_norm_swish
}  // namespace lsgm
