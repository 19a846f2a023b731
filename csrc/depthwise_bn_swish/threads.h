// What each thread of the CUDA kernels of depthwise_bn_swish does. Compiled by nvcc into cuda.cu, and by the host
// compiler into csrc/tests/depthwise_bn_swish_threads.cpp, which runs every thread of a launch on the CPU and so
// proves, on a machine without a GPU, that each element is computed once and rightly. Only the barriers remain to
// cuda.cu.
//
// A block has a tile of the result: some rows and columns of a few channels of one sample. Its threads
//   stage   what the tile depends on from global into shared memory, through pre(), as float32, with zeros around the
//           image; in vectors of 16 bytes where everything is aligned;
//   compute a strip of 4 x 4 results each, of one channel, with its 25 weights in registers;
//   put     the strips into shared memory, where the tile was, and
//   flush   that to global memory, through post(), in vectors again.
// For grad_weight they stage the input and the gradient of several tiles of the same channels, one after the other, and
// keep 25 sums each.
#pragma once

#include "common/math.h"
#include "common/vector_io.h"
#include "depthwise_bn_swish/depthwise_bn_swish.h"

// What a thread keeps in arrays must end up in registers.
#if defined(__CUDACC__)
#define LSGM_UNROLL _Pragma("unroll")
#else
#define LSGM_UNROLL
#endif

namespace lsgm {
namespace depthwise_bn_swish {

constexpr int kThreads = 256;          // most of a block
constexpr int kFewThreads = 64;        // fewest that a block gets for the sake of more blocks
constexpr int kStrip = 4;              // rows and columns of a thread
constexpr int kTileRows = 64;          // planes: most rows and columns of a tile
constexpr int kTileColumns = 64;
constexpr int kPixelRows = 8;          // rows: the same, where a tile has kTileChannels channels
constexpr int kPixelColumns = 16;
constexpr int kTileChannels = 32;      // a constant, so that places in shared memory are too
constexpr int kBatch = 4;              // vectors of a thread that are loaded together
constexpr int kSharedFloats = 12288;   // the 48 KB that every block may have
constexpr int64_t kBlocks = 512;       // blocks up to which tiles have fewer channels
constexpr int64_t kReducingBlocks = 1024;
constexpr int64_t kMaxChunks = 256;    // of a channel, in grad_weight

// grad_x of stride 1: the convolution of the gradient with the kernel turned around, which Launch says.
LSGM_HD Problem turned_around(const Problem& p) {
  Problem q = p;
  q.x = p.grad;
  q.out = p.grad_x;
  q.grad = nullptr;
  q.grad_x = nullptr;
  return q;
}

// What the tiles of a launch are made of, and from.
enum class Kind {
  convolve,  // the result, from the input
  spread,    // grad_x of stride 2, from the gradient
  weights,   // tiles of the gradient, beside the input
};

// The elements per thread and access that `p` gets: 16 bytes, or 1.
LSGM_HD int width_of(const Problem& p) {
  const int64_t width = 16 / size_of(p.dtype);
  const bool fits = p.order == Order::planes ? p.width % width == 0 && p.out_width % width == 0
                                             : p.channels % width == 0;
  const bool all = aligned(p.x) && aligned(p.out) && aligned(p.grad) && aligned(p.grad_x) && aligned(p.pre_scale) &&
                   aligned(p.pre_shift) && aligned(p.post_scale) && aligned(p.post_shift);
  return fits && all ? static_cast<int>(width) : 1;
}

struct Launch {
  int rows, columns, channels;  // of a tile
  int strip_columns, strips;    // strips of a channel
  int threads;
  int in_rows, in_pitch;        // of what is staged, per channel
  int shared;                   // floats
  bool turned;                  // the kernel, for grad_x
  int64_t row_tiles, column_tiles, channel_tiles;
  int64_t tiles;                // over rows, columns and samples
  int64_t chunks, per_chunk;    // weights: of tiles
  int64_t blocks;
};

LSGM_HD int in_floats(const Launch& l) { return l.in_rows * l.in_pitch * l.channels; }
LSGM_HD int tile_floats(const Launch& l) { return l.rows * l.columns * l.channels; }

LSGM_HD void set_tile(Launch& l, const Problem& p, Kind kind, int rows, int columns, int channels) {
  l.rows = rows;
  l.columns = columns;
  l.channels = channels;
  l.strip_columns = columns / kStrip;
  l.strips = l.strip_columns * (rows / kStrip);
  const int stride = static_cast<int>(p.stride);
  l.in_rows = kind == Kind::spread ? rows / 2 + 2 : stride * (rows - 1) + 5;
  l.in_pitch = kind == Kind::spread ? columns / 2 + 2 : stride * columns + 4;
  l.threads = (l.strips * channels + 31) / 32 * 32;
  if (kind == Kind::weights) {
    l.shared = static_cast<int>(larger(in_floats(l) + tile_floats(l), kTaps * l.threads));
  } else {
    l.shared = static_cast<int>(larger(in_floats(l), tile_floats(l)));
  }
}

LSGM_HD bool fits(const Launch& l) { return l.strips * l.channels <= kThreads && l.shared <= kSharedFloats; }

LSGM_HD Launch launch_of(const Problem& p, Kind kind) {
  Launch l{};
  const int64_t height = kind == Kind::spread ? p.height : p.out_height;
  const int64_t width = kind == Kind::spread ? p.width : p.out_width;
  const bool planes = p.order == Order::planes;
  int rows = static_cast<int>(smaller(planes ? kTileRows : kPixelRows, ceil_div(height, kStrip) * kStrip));
  int columns = static_cast<int>(smaller(planes ? kTileColumns : kPixelColumns, ceil_div(width, kStrip) * kStrip));
  int channels = planes ? 1 : kTileChannels;
  for (set_tile(l, p, kind, rows, columns, channels); !fits(l); set_tile(l, p, kind, rows, columns, channels)) {
    if (rows >= columns) {
      rows = (rows / 2 + kStrip - 1) / kStrip * kStrip;
    } else {
      columns = (columns / 2 + 7) / 8 * 8;  // vectors stay aligned
    }
  }
  l.row_tiles = ceil_div(height, rows);
  l.column_tiles = ceil_div(width, columns);
  l.tiles = p.batch * l.row_tiles * l.column_tiles;
  if (planes) {
    const int64_t enough = larger(ceil_div(kFewThreads, l.strips), l.tiles * p.channels / kBlocks);
    const int64_t most = smaller(enough, smaller(p.channels, kThreads / l.strips));
    for (channels = static_cast<int>(larger(1, most));; --channels) {
      set_tile(l, p, kind, rows, columns, channels);
      if (fits(l)) break;
    }
  }
  l.channel_tiles = ceil_div(p.channels, l.channels);
  l.blocks = l.tiles * l.channel_tiles;
  l.chunks = l.tiles;
  l.per_chunk = 1;
  if (kind == Kind::weights) {
    const int64_t wanted = larger(1, smaller(kMaxChunks, ceil_div(kReducingBlocks, l.channel_tiles)));
    l.per_chunk = ceil_div(l.tiles, wanted);
    l.chunks = ceil_div(l.tiles, l.per_chunk);
    l.blocks = l.chunks * l.channel_tiles;
  }
  return l;
}

// Pairs of taps: a store of 16 bytes.
constexpr int64_t kTapPairs = 13;

LSGM_HD int64_t partial_count_of(const Problem& p) {
  return launch_of(p, Kind::weights).chunks * p.channels * 2 * kTapPairs;
}

struct Tile {
  int64_t sample, channel, row, column;  // the first ones
};

LSGM_HD Tile tile_at(const Launch& l, int64_t tile, int64_t channel_tile) {
  Tile t;
  const int64_t rest = tile / l.column_tiles;
  t.column = (tile - rest * l.column_tiles) * l.columns;
  t.sample = rest / l.row_tiles;
  t.row = (rest - t.sample * l.row_tiles) * l.rows;
  t.channel = channel_tile * l.channels;
  return t;
}

// Rows and columns of images, of the channels of a tile: from `row` and `column` on, which may be outside.
struct Window {
  int64_t sample, channel, row, column;
  int64_t height, width;  // of the images
  int rows, pitch, channels;
};

LSGM_HD Window window_of(const Tile& t, const Launch& l, int64_t height, int64_t width) {
  return {t.sample, t.channel, t.row, t.column, height, width, l.rows, l.columns, l.channels};
}

// What a tile depends on.
LSGM_HD Window source_of(const Problem& p, const Launch& l, Kind kind, const Tile& t) {
  if (kind == Kind::spread) {
    return {t.sample, t.channel, t.row / 2 - 1, t.column / 2 - 1, p.out_height, p.out_width, l.in_rows, l.in_pitch,
        l.channels};
  }
  return {t.sample, t.channel, t.row * p.stride - 2, t.column * p.stride - 2, p.height, p.width, l.in_rows,
      l.in_pitch, l.channels};
}

// Element (channel, row, column) of a window in shared memory.
template <Order O>
LSGM_HD int shared_at(const Window& w, int channel, int row, int column) {
  return O == Order::planes ? (channel * w.rows + row) * w.pitch + column
                            : (row * w.pitch + column) * kTileChannels + channel;
}

template <Order O>
LSGM_HD int64_t global_at(const Problem& p, const Window& w, int64_t channel, int64_t row, int64_t column) {
  return O == Order::planes ? ((w.sample * p.channels + channel) * w.height + row) * w.width + column
                            : ((w.sample * w.height + row) * w.width + column) * p.channels + channel;
}

// The vectors of a window that one thread moves, counted (inner, middle, outer) without divisions: along a row, rows,
// channels (planes), or channels, columns, rows.
struct Walk {
  int inner, middle, outer;
  int inners, middles, outers;
  int inner_step, middle_step, outer_step;
};

LSGM_HD Walk walk_of(int inners, int middles, int outers, int thread, int threads) {
  Walk w;
  w.inners = inners;
  w.middles = middles;
  w.outers = outers;
  int rest = thread / inners;
  w.inner = thread - rest * inners;
  w.outer = rest / middles;
  w.middle = rest - w.outer * middles;
  rest = threads / inners;
  w.inner_step = threads - rest * inners;
  w.outer_step = rest / middles;
  w.middle_step = rest - w.outer_step * middles;
  return w;
}

LSGM_HD void advance(Walk& w) {
  w.inner += w.inner_step;
  w.middle += w.middle_step;
  w.outer += w.outer_step;
  if (w.inner >= w.inners) {
    w.inner -= w.inners;
    ++w.middle;
  }
  if (w.middle >= w.middles) {
    w.middle -= w.middles;
    ++w.outer;
  }
}

// To about two units in the last place; 0 where b is beyond 2^126.
LSGM_HD float quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdividef(a, b);
#else
  return a / b;
#endif
}

// swish(x scale + shift) of N elements, from `channel` on (rows) or of it (planes).
template <class T, Order O, int N>
LSGM_HD void activate(const Problem& p, const void* scale, const void* shift, int64_t channel, float (&x)[N]) {
  constexpr int K = O == Order::planes ? 1 : N;
  float s[K], t[K];
  load<T>(scale, p.dtype, channel, s);
  load<T>(shift, p.dtype, channel, t);
  LSGM_UNROLL
  for (int k = 0; k < N; ++k) {
    const float u = x[k] * s[k % K] + t[k % K];
    x[k] = quotient(u, 1.0f + exp_of(-u));
  }
}

// ---- stage ----

// What a thread has under way together.
template <int N>
struct Batch {
  float x[kBatch][N];
  int64_t channel[kBatch];
  int to[kBatch], skipped[kBatch];  // where in shared memory, and how many columns before the window's first
  bool inside[kBatch];
  int count;
};

template <class T, Order O, int N>
LSGM_HD void take(const Problem& p, const Window& w, const void* data, int64_t start, int before, Walk& at,
    Batch<N>& b) {
  b.count = 0;
  LSGM_UNROLL
  for (int u = 0; u < kBatch; ++u) {
    if (at.outer < at.outers) {
      const int slot = O == Order::planes ? at.outer : at.inner * N, line = O == Order::planes ? at.middle : at.outer;
      const int place = O == Order::planes ? at.inner * N : at.middle;
      const int64_t channel = w.channel + slot, row = w.row + line, column = start + place;
      LSGM_UNROLL
      for (int k = 0; k < N; ++k) b.x[u][k] = 0;
      b.inside[u] = channel < p.channels && row >= 0 && row < w.height && column >= 0 && column < w.width;
      if (b.inside[u]) load<T>(data, p.dtype, global_at<O>(p, w, channel, row, column), b.x[u]);
      b.channel[u] = channel;
      b.to[u] = shared_at<O>(w, slot, line, O == Order::planes ? 0 : place);
      b.skipped[u] = before - place;
      b.count = u + 1;
      advance(at);
    }
  }
}

// `kActive`: through pre(), where there is one.
template <class T, Order O, int N, bool kActive>
LSGM_HD void stage(const Problem& p, const Window& w, const void* data, int thread, int threads, float* shared) {
  const bool active = kActive && p.pre_scale != nullptr;
  // Vectors of planes begin where the image's do: some elements at both ends of a row belong to neighbouring tiles.
  const int64_t start = O == Order::rows   ? w.column
                        : w.column >= 0 ? w.column / N * N
                                        : -((N - 1 - w.column) / N * N);
  const int before = static_cast<int>(w.column - start);
  Walk at = O == Order::planes ? walk_of((before + w.pitch + N - 1) / N, w.rows, w.channels, thread, threads)
                               : walk_of(kTileChannels / N, w.pitch, w.rows, thread, threads);
  Batch<N> b;
  for (take<T, O, N>(p, w, data, start, before, at, b); b.count != 0;
       take<T, O, N>(p, w, data, start, before, at, b)) {
    LSGM_UNROLL
    for (int u = 0; u < kBatch; ++u) {
      if (u < b.count) {
        if (active && b.inside[u]) activate<T, O, N>(p, p.pre_scale, p.pre_shift, b.channel[u], b.x[u]);
        float* to = shared + b.to[u];
        LSGM_UNROLL
        for (int k = 0; k < N; ++k) {
          const int i = O == Order::planes ? k - b.skipped[u] : k;
          if (O == Order::rows || (i >= 0 && i < w.pitch)) to[i] = b.x[u][k];
        }
      }
    }
  }
}

// ---- compute ----

// The strip of a thread.
struct Place {
  int channel, row, column, strip;  // within the tile
  bool active;
};

template <Order O>
LSGM_HD Place place_of(const Launch& l, int thread) {
  Place s;
  if (O == Order::planes) {
    s.channel = thread / l.strips;
    s.strip = thread - s.channel * l.strips;
  } else {
    s.strip = thread / kTileChannels;
    s.channel = thread % kTileChannels;
  }
  s.active = s.channel < l.channels && s.strip < l.strips;
  const int line = s.strip / l.strip_columns;
  s.row = line * kStrip;
  s.column = (s.strip - line * l.strip_columns) * kStrip;
  return s;
}

using Strip = float[kStrip][kStrip];

template <class T>
LSGM_HD void load_weights(const Problem& p, const Launch& l, int64_t channel, float (&weights)[kTaps]) {
  LSGM_UNROLL
  for (int k = 0; k < kTaps; ++k) {
    float one[1] = {0};
    if (channel < p.channels) {
      load<T>(p.weight, p.dtype, channel * kTaps + (l.turned ? static_cast<int>(kTaps) - 1 - k : k), one);
    }
    weights[k] = one[0];
  }
}

// K neighbours along a row of shared memory. Of planes they begin at a multiple of kVector floats.
template <Order O, int kVector, int K>
LSGM_HD void load_row(const float* from, float (&x)[K]) {
  if constexpr (O == Order::planes) {
    LSGM_UNROLL
    for (int i = 0; i < K; i += kVector) {
      Pack<float, kVector> pack;
      copy_aligned(pack, from + i);
      LSGM_UNROLL
      for (int k = 0; k < kVector; ++k) {
        if (i + k < K) x[i + k] = pack.v[k];
      }
    }
  } else {
    LSGM_UNROLL
    for (int i = 0; i < K; ++i) x[i] = from[i * kTileChannels];
  }
}

template <Order O, int S>
LSGM_HD void convolve(const Window& w, const Place& s, const float* shared, const float (&weights)[kTaps], Strip& y) {
  constexpr int K = S * (kStrip - 1) + 5;
  for (int o = 0; o < kStrip; ++o) {
    for (int c = 0; c < kStrip; ++c) y[o][c] = 0;
  }
  LSGM_UNROLL
  for (int r = 0; r < K; ++r) {
    float x[K];
    load_row<O, 4>(shared + shared_at<O>(w, s.channel, S * s.row + r, S * s.column), x);
    LSGM_UNROLL
    for (int o = 0; o < kStrip; ++o) {
      const int a = r - S * o;
      if (a < 0 || a >= 5) continue;
      LSGM_UNROLL
      for (int b = 0; b < 5; ++b) {
        LSGM_UNROLL
        for (int c = 0; c < kStrip; ++c) y[o][c] += weights[a * 5 + b] * x[S * c + b];
      }
    }
  }
}

// grad_x of stride 2: the gradients around a strip, of which every result takes those of the right parity.
template <Order O>
LSGM_HD void spread(const Window& w, const Place& s, const float* shared, const float (&weights)[kTaps], Strip& y) {
  constexpr int K = kStrip / 2 + 2;
  for (int o = 0; o < kStrip; ++o) {
    for (int c = 0; c < kStrip; ++c) y[o][c] = 0;
  }
  LSGM_UNROLL
  for (int r = 0; r < K; ++r) {
    float grad[K];
    load_row<O, 2>(shared + shared_at<O>(w, s.channel, s.row / 2 + r, s.column / 2), grad);
    LSGM_UNROLL
    for (int o = 0; o < kStrip; ++o) {
      const int a = o + 4 - 2 * r;
      if (a < 0 || a >= 5) continue;
      LSGM_UNROLL
      for (int c = 0; c < kStrip; ++c) {
        LSGM_UNROLL
        for (int i = 0; i < K; ++i) {
          const int b = c + 4 - 2 * i;
          if (b >= 0 && b < 5) y[o][c] += weights[a * 5 + b] * grad[i];
        }
      }
    }
  }
}

template <Order O>
LSGM_HD void put(const Window& w, const Place& s, const Strip& y, float* shared) {
  LSGM_UNROLL
  for (int o = 0; o < kStrip; ++o) {
    LSGM_UNROLL
    for (int c = 0; c < kStrip; ++c) shared[shared_at<O>(w, s.channel, s.row + o, s.column + c)] = y[o][c];
  }
}

// ---- flush ----

template <class T, Order O, int N, bool kActive>
LSGM_HD void flush(const Problem& p, const Window& w, void* data, int thread, int threads, const float* shared) {
  const bool active = kActive && p.post_scale != nullptr;
  const bool planes = O == Order::planes;
  Walk at = planes ? walk_of((w.pitch + N - 1) / N, w.rows, w.channels, thread, threads)
                   : walk_of(kTileChannels / N, w.pitch, w.rows, thread, threads);
  for (; at.outer < at.outers; advance(at)) {
    const int slot = planes ? at.outer : at.inner * N;
    const int line = planes ? at.middle : at.outer, place = planes ? at.inner * N : at.middle;
    const int64_t channel = w.channel + slot, row = w.row + line, column = w.column + place;
    if (channel >= p.channels || row >= w.height || column >= w.width) continue;
    const float* from = shared + shared_at<O>(w, slot, line, place);
    float y[N];
    LSGM_UNROLL
    for (int k = 0; k < N; ++k) y[k] = from[k];
    if (active) activate<T, O, N>(p, p.post_scale, p.post_shift, channel, y);
    store<T>(data, p.dtype, global_at<O>(p, w, channel, row, column), y);
  }
}

// ---- grad_weight ----

template <Order O, int S>
LSGM_HD void add_products(const Window& of_x, const Window& of_grad, const Place& s, const float* x_shared,
    const float* grad_shared, float (&sums)[kTaps]) {
  constexpr int K = S * (kStrip - 1) + 5;
  float grad[kStrip][kStrip];
  LSGM_UNROLL
  for (int o = 0; o < kStrip; ++o) {
    load_row<O, 4>(grad_shared + shared_at<O>(of_grad, s.channel, s.row + o, s.column), grad[o]);
  }
  LSGM_UNROLL
  for (int r = 0; r < K; ++r) {
    float x[K];
    load_row<O, 4>(x_shared + shared_at<O>(of_x, s.channel, S * s.row + r, S * s.column), x);
    LSGM_UNROLL
    for (int o = 0; o < kStrip; ++o) {
      const int a = r - S * o;
      if (a < 0 || a >= 5) continue;
      LSGM_UNROLL
      for (int b = 0; b < 5; ++b) {
        LSGM_UNROLL
        for (int c = 0; c < kStrip; ++c) sums[a * 5 + b] += grad[o][c] * x[S * c + b];
      }
    }
  }
}

LSGM_HD void put_sums(const Launch& l, int thread, const float (&sums)[kTaps], float* shared) {
  LSGM_UNROLL
  for (int k = 0; k < kTaps; ++k) shared[k * l.threads + thread] = sums[k];
}

// One step of adding up the strips of a channel: the first `half` of `left` take the others.
template <Order O>
LSGM_HD void fold(const Launch& l, const Place& s, int thread, int half, int left, float* shared) {
  if (!s.active || s.strip + half >= left) return;
  const int other = thread + (O == Order::planes ? half : half * kTileChannels);
  LSGM_UNROLL
  for (int k = 0; k < kTaps; ++k) shared[k * l.threads + thread] += shared[k * l.threads + other];
}

template <Order O>
LSGM_HD void store_sums(const Problem& p, const Launch& l, const Tile& t, int64_t chunk, int thread,
    const float* shared) {
  for (int i = thread; i < l.channels * static_cast<int>(kTapPairs); i += l.threads) {
    const int slot = i / static_cast<int>(kTapPairs), pair = i - slot * static_cast<int>(kTapPairs);
    const int64_t channel = t.channel + slot;
    if (channel >= p.channels) return;
    const float* sum = shared + 2 * pair * l.threads + (O == Order::planes ? slot * l.strips : slot);
    Pack<double, 2> both;
    both.v[0] = static_cast<double>(sum[0]);
    both.v[1] = 2 * pair + 1 < kTaps ? static_cast<double>(sum[l.threads]) : 0;
    copy_aligned(p.partials + ((chunk * p.channels + channel) * kTapPairs + pair) * 2, both);
  }
}

// One element of grad_weight.
LSGM_HD void combine(const Problem& p, int64_t chunks, int64_t i) {
  const int64_t channel = i / kTaps, tap = i - channel * kTaps;
  double total = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    total += p.partials[(chunk * p.channels + channel) * 2 * kTapPairs + tap];
  }
  const float result[1] = {static_cast<float>(total)};
  store<Any>(p.grad_weight, p.weight_dtype, i, result);
}

// Calls Kernel::run<T, O, N>(p, argument) with the type, the order and the width that `p` gets.
template <class Kernel, class T, int N, class Argument>
static inline void run_order(const Problem& p, Argument argument) {
  if (p.order == Order::planes) {
    Kernel::template run<T, Order::planes, N>(p, argument);
  } else {
    Kernel::template run<T, Order::rows, N>(p, argument);
  }
}

template <class Kernel, class Argument>
static inline void run_kernel(const Problem& p, Argument argument) {
  if (width_of(p) == 1) return run_order<Kernel, Any, 1>(p, argument);
  switch (p.dtype) {
    case DType::float16:
      return run_order<Kernel, Half, 8>(p, argument);
    case DType::bfloat16:
      return run_order<Kernel, BFloat16, 8>(p, argument);
    default:
      return run_order<Kernel, float, 4>(p, argument);
  }
}

}  // namespace depthwise_bn_swish
}  // namespace lsgm
