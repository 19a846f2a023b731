// What each thread of the CUDA kernels of bn_swish does. Compiled by nvcc into cuda.cu, and by the host compiler into
// csrc/tests/bn_swish_threads.cpp, which runs every thread of a launch on the CPU and so proves, on a machine without a
// GPU, that each element is computed once and rightly. Only the sums across threads remain to cuda.cu.
//
// A block has one chunk of one channel (planes) or of a few neighbouring ones (rows). Its threads walk through the
// chunk in batches of vectors, whose loads are under way together.
#pragma once

#include "bn_swish/bn_swish.h"
#include "common/math.h"
#include "common/vector_io.h"

// What a thread keeps in arrays must end up in registers.
#if defined(__CUDACC__)
#define LSGM_UNROLL _Pragma("unroll")
#else
#define LSGM_UNROLL
#endif

namespace lsgm {
namespace bn_swish {

constexpr int kThreads = 256;
constexpr int64_t kPrograms = 4096;     // blocks up to which each has no more than one batch per thread
constexpr int64_t kMaxChunks = 1024;    // of a channel
constexpr int64_t kBatchElements = 16;  // of a thread, per tensor
// Elements of a channel up to which one block does all of it; more of them where there are channels enough.
constexpr int64_t kSmallChannel = 16384;
constexpr int64_t kLargeChannel = 65536;
constexpr int64_t kManyChannels = 256;
constexpr int64_t kSmallColumn = 4096;   // rows, where a block has the few channels of one sector of memory
constexpr int64_t kSectorBytes = 32;
constexpr int64_t kColumns = 32;         // rows: most threads side by side

constexpr int kLanes = 32;  // threads that combine the chunks of one channel

template <class T>
LSGM_HD constexpr int vector_width() {
  return 16 / static_cast<int>(sizeof(T));
}

// Vectors in a batch, and channels whose constants a thread keeps.
template <int N>
LSGM_HD constexpr int batch_of() {
  return N == 1 ? 4 : static_cast<int>(kBatchElements) / N;
}
template <Order O, int N>
LSGM_HD constexpr int channels_of() {
  return O == Order::rows ? N : 1;
}

// The elements per thread that `p` gets: its vector width, or 1.
LSGM_HD int width_of(const Problem& p) {
  const int64_t width = 16 / size_of(p.dtype);
  const int64_t inner = p.order == Order::planes ? p.spatial : p.channels;
  const bool all = aligned(p.x) && aligned(p.y) && aligned(p.grad) && aligned(p.grad_x);
  return inner % width == 0 && all ? static_cast<int>(width) : 1;
}

LSGM_HD bool one_launch(const Problem& p) {
  const int64_t n = p.batch * p.spatial;
  if (!p.batch_stats) return false;
  if (p.order == Order::rows) return n <= kSmallColumn;
  return n <= (p.channels >= kManyChannels ? kLargeChannel : kSmallChannel);
}

struct Launch {
  int64_t blocks;
  int64_t tiles;  // blocks side by side over the channels
  int columns;    // threads side by side: over the positions (planes) or channels (rows)
  int lines;      // samples (planes) or rows that a block works on at once
};

LSGM_HD Launch launch_of(const Problem& p) {
  const int64_t width = width_of(p);
  Launch l{};
  if (p.order == Order::planes) {
    const int64_t vectors = ceil_div(p.chunks.size, width);
    l.columns = 1;
    while (l.columns < kThreads && l.columns < vectors) l.columns *= 2;
    l.tiles = p.channels;
  } else {
    const int64_t vectors = p.channels / width;  // width divides the channels
    const int64_t most = one_launch(p) ? kSectorBytes / (width * size_of(p.dtype)) : kColumns;
    l.tiles = ceil_div(vectors, most);
    l.columns = static_cast<int>(ceil_div(vectors, l.tiles));
  }
  l.lines = kThreads / l.columns;
  l.blocks = l.tiles * p.chunks.per_channel;
  return l;
}

LSGM_HD void make_plan(Problem& p) {
  constexpr int64_t kAtOnce = kThreads * kBatchElements;
  const int64_t n = p.batch * p.spatial;
  Chunks& c = p.chunks;
  c = {1, 1, 1, 1, p.channels};
  p.count = static_cast<double>(n);
  if (n == 0) return;  // one empty chunk, which has the running statistics to hand on
  // Chunks grow with the tensor, so that a channel never has more than a block can combine.
  const int64_t elements_per_block = larger(kAtOnce, ceil_div(n * p.channels, kPrograms));
  if (p.order == Order::planes) {
    if (one_launch(p)) {
      c.samples = p.batch;
      c.size = p.spatial;
    } else {
      const int64_t limit = larger(elements_per_block, ceil_div(2 * n, kMaxChunks));
      c.pieces = ceil_div(p.spatial, limit);
      c.size = (ceil_div(p.spatial, c.pieces) + 7) / 8 * 8;  // vectors stay aligned
      c.pieces = ceil_div(p.spatial, c.size);
      c.size = smaller(c.size, p.spatial);
      c.samples = smaller(p.batch, larger(1, limit / c.size));
    }
    c.per_channel = ceil_div(p.batch, c.samples) * c.pieces;
    c.count = c.per_channel * p.channels;
    return;
  }
  c.size = n;
  c.per_channel = 1;
  if (!one_launch(p)) {
    const Launch l = launch_of(p);
    const int64_t side_by_side = l.columns * width_of(p);
    c.size = larger(ceil_div(elements_per_block, side_by_side), ceil_div(n, kMaxChunks));
    c.per_channel = ceil_div(n, c.size);
  }
  c.count = c.per_channel;
}

// The way of a thread through its chunk: along a plane and then to its next sample, or down the rows.
struct Walk {
  int64_t at;      // the vector's first element
  int64_t i, end;  // position, or row of the chunk
  int64_t first, step, stride;
  int64_t sample, samples, lines, jump;
};

// The place of a thread in its block: its line, and the first of its channels.
struct Place {
  int64_t chunk, channel;
  int line, column;
  bool active;
};

template <Order O, int N>
LSGM_HD Place place_of(const Problem& p, const Launch& l, int64_t block, int thread) {
  Place place;
  place.chunk = block / l.tiles;
  const int64_t tile = block - place.chunk * l.tiles;
  place.line = thread / l.columns;
  place.column = thread - place.line * l.columns;
  place.channel = O == Order::planes ? tile : (tile * l.columns + place.column) * N;
  place.active = place.line < l.lines && place.channel < p.channels;
  return place;
}

template <Order O, int N>
LSGM_HD Walk walk_of(const Problem& p, const Launch& l, const Place& place) {
  const Chunk c = chunk_at(p, place.chunk);
  Walk w;
  w.lines = l.lines;
  w.end = c.size;
  if (O == Order::planes) {
    w.first = int64_t(place.column) * N;
    w.step = w.stride = int64_t(l.columns) * N;
    w.sample = place.line;
    w.samples = c.samples;
    w.jump = w.lines * p.channels * p.spatial;
    w.at = ((c.sample + place.line) * p.channels + place.channel) * p.spatial + c.begin + w.first;
  } else {
    w.first = place.line;
    w.step = w.lines;
    w.stride = w.lines * p.channels;
    w.sample = 0;
    w.samples = 1;
    w.jump = 0;
    w.at = (c.begin + w.first) * p.channels + place.channel;
  }
  w.i = w.first;
  if (!place.active || w.first >= w.end) w.samples = 0;
  return w;
}

template <Order O>
LSGM_HD void advance(Walk& w) {
  w.i += w.step;
  w.at += w.stride;
  if (w.i >= w.end) {
    w.at += w.jump - (w.i - w.first);  // rows: there is no next sample
    w.i = w.first;
    w.sample += w.lines;
  }
}

// The next elements of a thread, `count` vectors, and where they are.
template <int N>
struct Batch {
  float x[batch_of<N>()][N], grad[batch_of<N>()][N];
  int64_t at[batch_of<N>()];
  int count;
};

template <class T, Order O, int N, bool kGrad>
LSGM_HD void take(const Problem& p, Walk& w, Batch<N>& b) {
  b.count = 0;
  LSGM_UNROLL
  for (int u = 0; u < batch_of<N>(); ++u) {
    if (w.sample < w.samples) {
      b.at[u] = w.at;
      load<T>(p.x, p.dtype, w.at, b.x[u]);
      if (kGrad) load<T>(p.grad, p.dtype, w.at, b.grad[u]);
      b.count = u + 1;
      advance<O>(w);
    }
  }
}

// ---- statistics ----

template <int K>
struct Differences {
  float first[K], second[K];
};

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

// The thread's differences from the pivot, beginning with the batch that the pivot was made of.
template <class T, Order O, int N>
LSGM_HD void differences(const Problem& p, Walk& w, Batch<N>& b, const float (&pivot)[channels_of<O, N>()],
    Differences<channels_of<O, N>()>& d) {
  constexpr int K = channels_of<O, N>();
  for (int k = 0; k < K; ++k) d.first[k] = d.second[k] = 0;
  while (b.count != 0) {
    LSGM_UNROLL
    for (int u = 0; u < batch_of<N>(); ++u) {
      if (u < b.count) {
        for (int k = 0; k < N; ++k) {
          const float difference = b.x[u][k] - pivot[k % K];
          d.first[k % K] += difference;
          d.second[k % K] += difference * difference;
        }
      }
    }
    take<T, O, N, false>(p, w, b);
  }
}

LSGM_HD Moments moments_of(float pivot, float first, float second, double n) {
  const double one = static_cast<double>(first);
  return {static_cast<double>(pivot) + one / n, static_cast<double>(second) - one * one / n};
}

// Two numbers of each of K channels, in pairs of 16 bytes.
template <Order O, int K>
LSGM_HD void store_partials(const Problem& p, const Place& place, const double (&one)[K], const double (&two)[K]) {
  if constexpr (K == 1) {
    if (O == Order::planes) {
      const Pack<double, 2> pair{{one[0], two[0]}};
      copy_aligned(p.partials + partial_at(p, place.chunk, 0, place.channel), pair);
    } else {
      p.partials[partial_at(p, place.chunk, 0, place.channel)] = one[0];
      p.partials[partial_at(p, place.chunk, 1, place.channel)] = two[0];
    }
  } else {
    // K divides the channels, and is even.
    for (int k = 0; k < K; k += 2) {
      const Pack<double, 2> ones{{one[k], one[k + 1]}}, twos{{two[k], two[k + 1]}};
      copy_aligned(p.partials + partial_at(p, place.chunk, 0, place.channel + k), ones);
      copy_aligned(p.partials + partial_at(p, place.chunk, 1, place.channel + k), twos);
    }
  }
}

// One of `kLanes` threads' part of what a channel's chunks are combined to.

LSGM_HD double mean_part(const Problem& p, int64_t channel, int lane) {
  double total = 0;
  for (int64_t k = lane; k < p.chunks.per_channel; k += kLanes) {
    const double share = static_cast<double>(chunk_elements(p, k)) / static_cast<double>(p.batch * p.spatial);
    total += share * p.partials[partial_at(p, k, 0, channel)];
  }
  return total;
}

LSGM_HD double m2_part(const Problem& p, int64_t channel, int lane, double mean) {
  double total = 0;
  for (int64_t k = lane; k < p.chunks.per_channel; k += kLanes) {
    const double distance = p.partials[partial_at(p, k, 0, channel)] - mean;
    const double n = static_cast<double>(chunk_elements(p, k));
    total += p.partials[partial_at(p, k, 1, channel)] + n * distance * distance;
  }
  return total;
}

LSGM_HD double sum_part(const Problem& p, int64_t channel, int lane, int which) {
  double total = 0;
  for (int64_t k = lane; k < p.chunks.per_channel; k += kLanes) total += p.partials[partial_at(p, k, which, channel)];
  return total;
}

LSGM_HD void store_sums(const Problem& p, int64_t channel, Sums sums) {
  p.grad_bias[channel] = static_cast<float>(sums.grad);
  p.grad_weight[channel] = static_cast<float>(sums.centred * static_cast<double>(p.rstd[channel]));
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

enum class Mode { reduce, apply, both };

template <int K>
struct Constants {
  float mean[K], scale[K], bias[K], slope[K], offset[K];
};

template <int K>
LSGM_HD Constants<K> constants_of(const Problem& p, const Place& place) {
  Constants<K> c{};
  if (!place.active) return c;
  LSGM_UNROLL
  for (int k = 0; k < K; ++k) {
    const int64_t channel = place.channel + k;
    c.mean[k] = p.mean[channel];
    c.scale[k] = p.weight[channel] * p.rstd[channel];
    c.bias[k] = p.bias[channel];
  }
  return c;
}

// With the running statistics, which the threads of the first chunk hand on.
template <int K>
LSGM_HD Constants<K> running_constants(const Problem& p, const Place& place, bool leads) {
  Constants<K> c{};
  if (!place.active) return c;
  LSGM_UNROLL
  for (int k = 0; k < K; ++k) {
    const int64_t channel = place.channel + k;
    const float mean = p.running_mean[channel], variance = p.running_var[channel];
    const float rstd = 1.0f / std::sqrt(variance + static_cast<float>(p.eps));
    c.mean[k] = mean;
    c.scale[k] = p.weight[channel] * rstd;
    c.bias[k] = p.bias[channel];
    if (leads) {
      p.mean[channel] = mean;
      p.var[channel] = variance;
      p.rstd[channel] = rstd;
    }
  }
  return c;
}

// What x does to the statistics of the batch.
template <int K>
LSGM_HD void correct(const Problem& p, const Place& place, Constants<K>& c) {
  if (!place.active) return;
  const float share = 1.0f / static_cast<float>(p.count);
  LSGM_UNROLL
  for (int k = 0; k < K; ++k) {
    const int64_t channel = place.channel + k;
    c.offset[k] = -c.scale[k] * p.grad_bias[channel] * share;
    c.slope[k] = -c.scale[k] * p.rstd[channel] * p.grad_weight[channel] * share;
  }
}

template <class T, Order O, int N>
LSGM_HD void apply_chunk(const Problem& p, Walk w, const Constants<channels_of<O, N>()>& c) {
  constexpr int K = channels_of<O, N>();
  Batch<N> b;
  for (take<T, O, N, false>(p, w, b); b.count != 0; take<T, O, N, false>(p, w, b)) {
    LSGM_UNROLL
    for (int u = 0; u < batch_of<N>(); ++u) {
      if (u < b.count) {
        float y[N];
        for (int k = 0; k < N; ++k) {
          // Centred first: x scale + shift would cancel far from 0.
          const float value = (b.x[u][k] - c.mean[k % K]) * c.scale[k % K] + c.bias[k % K];
          y[k] = p.swish ? quotient(value, 1.0f + exp_of(-value)) : value;
        }
        store<T>(p.y, p.dtype, b.at[u], y);
      }
    }
  }
}

// ---- backward ----

// Adds to the sums of d and d (x - mean), or stores grad_x, or both.
template <Mode kMode, class T, Order O, int N>
LSGM_HD void backward_chunk(const Problem& p, Walk w, const Constants<channels_of<O, N>()>& c,
    Differences<channels_of<O, N>()>& sums) {
  constexpr int K = channels_of<O, N>();
  for (int k = 0; k < K; ++k) sums.first[k] = sums.second[k] = 0;
  Batch<N> b;
  for (take<T, O, N, true>(p, w, b); b.count != 0; take<T, O, N, true>(p, w, b)) {
    LSGM_UNROLL
    for (int u = 0; u < batch_of<N>(); ++u) {
      if (u < b.count) {
        float result[N];
        for (int k = 0; k < N; ++k) {
          const float centred = b.x[u][k] - c.mean[k % K];
          float d = b.grad[u][k];
          if (p.swish) {
            const float value = centred * c.scale[k % K] + c.bias[k % K];
            const float s = quotient(1.0f, 1.0f + exp_of(-value));
            d *= s * (1.0f + value * (1.0f - s));
          }
          if (kMode != Mode::apply) {
            sums.first[k % K] += d;
            sums.second[k % K] += d * centred;
          }
          result[k] = c.scale[k % K] * d;
          if (kMode == Mode::apply) result[k] += c.slope[k % K] * centred + c.offset[k % K];
        }
        if (kMode != Mode::reduce) store<T>(p.grad_x, p.dtype, b.at[u], result);
      }
    }
  }
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

template <class Kernel, class T, class Argument>
static inline void run_type(const Problem& p, Argument argument) {
  if (width_of(p) == 1) return run_order<Kernel, Any, 1>(p, argument);
  run_order<Kernel, T, vector_width<T>()>(p, argument);
}

template <class Kernel, class Argument>
static inline void run_kernel(const Problem& p, Argument argument) {
  switch (p.dtype) {
    case DType::float16:
      return run_type<Kernel, Half>(p, argument);
    case DType::bfloat16:
      return run_type<Kernel, BFloat16>(p, argument);
    default:
      return run_type<Kernel, float>(p, argument);
  }
}

}  // namespace bn_swish
}  // namespace lsgm
