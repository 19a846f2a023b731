// What each thread of the CUDA kernels of se_residual does. Compiled by nvcc into cuda.cu, and by the host compiler into
// csrc/tests/se_residual_threads.cpp, which runs every thread of a launch on the CPU and so proves, on a machine without
// a GPU, that each element is computed once and rightly. Only the sums across threads remain to cuda.cu.
#pragma once

#include "common/math.h"
#include "common/vector_io.h"
#include "se_residual/se_residual.h"

namespace lsgm {
namespace se_residual {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int64_t kMaxBlocks = 1 << 16;  // along x; loops do the rest
constexpr int64_t kMaxSamples = 65535;   // along z; the same
constexpr int64_t kPlaneSegment = 4096;  // elements
constexpr int64_t kRowsPerThread = 4;
constexpr int64_t kMaxRowPieces = 64;     // of one sample: one block adds their sums
constexpr int64_t kSmallSample = 16384;  // elements that one block sums sooner than a further launch takes

// How many elements a thread moves at once: 16 bytes where every access is then aligned, or 1.
LSGM_HD int64_t width_of(const Problem& p) {
  const int64_t width = 16 / size_of(p.dtype), inner = p.order == Order::planes ? p.spatial : p.channels;
  const bool all_aligned =
      aligned(p.skip) && aligned(p.x) && aligned(p.y) && aligned(p.grad) && aligned(p.grad_x);
  return inner % width == 0 && all_aligned ? width : 1;
}

LSGM_HD bool is_small(const Problem& p) { return p.channels * p.spatial <= kSmallSample; }

LSGM_HD void make_plan(Problem& p) {
  if (p.order == Order::planes) {
    p.segments = make_segments(p.batch * p.channels, p.spatial, kPlaneSegment);
  } else {
    const int64_t lines = larger(1, kThreads / larger(1, p.channels / width_of(p)));
    p.segments = make_segments(p.batch, p.spatial, larger(lines * kRowsPerThread, ceil_div(p.spatial, kMaxRowPieces)));
  }
  p.pieces = p.segments.per_run;
}

// A launch over the pieces of all samples; blocks (x, y, z) lie over pieces, channels (rows only) and samples.
struct Launch {
  int64_t blocks, tiles, samples;
  int lane_bits;  // planes: 2^lane_bits threads share a segment, at most a warp
  int columns;    // rows: threads side by side over the channels
  int lines;      // rows: rows that a block works on at once
};

LSGM_HD Launch launch_of(const Problem& p, int64_t width) {
  Launch l{};
  l.tiles = 1;
  l.samples = smaller(p.batch, kMaxSamples);
  if (p.order == Order::planes) {
    const int64_t vectors = ceil_div(smaller(p.segments.limit, p.segments.length), width);
    // Two accesses per thread and tensor where there are so many: their latencies overlap.
    while (l.lane_bits < 5 && (int64_t(4) << l.lane_bits) <= vectors) ++l.lane_bits;
    l.blocks = ceil_div((p.channels * p.pieces) << l.lane_bits, kThreads);
  } else {
    const int64_t vectors = p.channels / width;  // width divides the channels
    l.columns = static_cast<int>(smaller(vectors, kThreads));
    l.lines = kThreads / l.columns;
    l.tiles = ceil_div(vectors, l.columns);
    l.blocks = p.pieces;
  }
  l.blocks = smaller(l.blocks, kMaxBlocks);
  return l;
}

LSGM_HD int64_t partial_at(const Problem& p, int64_t sample, int64_t piece, int64_t channel) {
  return (sample * p.pieces + piece) * p.channels + channel;
}

// A segment of a plane.
struct Piece {
  int64_t at, size;  // in elements
  int64_t channel, piece;
};

// Segment k of a sample.
LSGM_HD Piece plane_piece(const Problem& p, int64_t sample, int64_t k) {
  Piece piece;
  piece.channel = p.pieces == 1 ? k : k / p.pieces;
  piece.piece = k - piece.channel * p.pieces;
  const int64_t begin = piece.piece * p.segments.limit;
  piece.at = (sample * p.channels + piece.channel) * p.spatial + begin;
  piece.size = smaller(p.segments.limit, p.spatial - begin);
  return piece;
}

// N values of x, or of g x, to be summed.
template <bool kProduct, class T, int N>
LSGM_HD void terms(const Problem& p, int64_t at, float (&term)[N]) {
  load<T>(p.x, p.dtype, at, term);
  if constexpr (kProduct) {
    float grad[N];
    load<T>(p.grad, p.dtype, at, grad);
    for (int k = 0; k < N; ++k) term[k] *= grad[k];
  }
}

// The result at N elements, or grad_x.
template <bool kBackward, class T, int N>
LSGM_HD void apply(const Problem& p, int64_t at, const float (&factor)[N], const float (&offset)[N]) {
  float in[N], added[N], out[N];
  load<T>(kBackward ? p.grad : p.x, p.dtype, at, in);
  if constexpr (!kBackward) load<T>(p.skip, p.dtype, at, added);
  for (int k = 0; k < N; ++k) out[k] = in[k] * factor[k] + (kBackward ? offset[k] : added[k]);
  store<T>(kBackward ? p.grad_x : p.y, p.dtype, at, out);
}

// ---- planes: the part of a segment that falls to one of the `lanes` threads sharing it ----

template <bool kProduct, class T, int N>
LSGM_HD float reduce_plane(const Problem& p, const Piece& piece, int lane, int lanes) {
  float sums[N], term[N];
  for (int k = 0; k < N; ++k) sums[k] = 0;
  for (int64_t i = lane * N; i < piece.size; i += lanes * N) {
    terms<kProduct, T>(p, piece.at + i, term);
    for (int k = 0; k < N; ++k) sums[k] += term[k];
  }
  for (int k = 1; k < N; ++k) sums[0] += sums[k];
  return sums[0];
}

template <bool kBackward, class T, int N>
LSGM_HD void apply_plane(const Problem& p, int64_t sample, const Piece& piece, int lane, int lanes) {
  float factor[N], offset[N];
  const float scaled = p.scale * state_at(p, p.state, sample).gate[piece.channel];
  const float constant = kBackward ? state_at(p, p.deltas, sample).pooled[piece.channel] : 0.0f;
  for (int k = 0; k < N; ++k) {
    factor[k] = scaled;
    offset[k] = constant;
  }
  for (int64_t i = lane * N; i < piece.size; i += lanes * N) apply<kBackward, T>(p, piece.at + i, factor, offset);
}

// ---- rows: a thread keeps the N channels from `channel` on and goes down the rows, from `line` on ----

struct Place {
  int64_t channel;
  int line;
  bool active;
};

LSGM_HD Place place_of(const Problem& p, const Launch& l, int64_t tile, int thread, int width) {
  Place place;
  place.line = thread / l.columns;
  place.channel = (tile * l.columns + thread % l.columns) * width;
  place.active = place.line < l.lines && place.channel < p.channels;
  return place;
}

// Calls f(element) for the rows of a piece that fall to a thread.
template <class F>
LSGM_HD void for_rows(const Problem& p, const Launch& l, int64_t sample, int64_t piece, const Place& place, F&& f) {
  if (!place.active) return;
  const int64_t first = piece * p.segments.limit, end = smaller(first + p.segments.limit, p.spatial);
  for (int64_t row = first + place.line; row < end; row += l.lines) {
    f((sample * p.spatial + row) * p.channels + place.channel);
  }
}

template <bool kProduct, class T, int N>
LSGM_HD void reduce_rows(
    const Problem& p, const Launch& l, int64_t sample, int64_t piece, const Place& place, float (&sums)[N]) {
  for (int k = 0; k < N; ++k) sums[k] = 0;
  for_rows(p, l, sample, piece, place, [&](int64_t at) {
    float term[N];
    terms<kProduct, T>(p, at, term);
    for (int k = 0; k < N; ++k) sums[k] += term[k];
  });
}

template <bool kBackward, class T, int N>
LSGM_HD void apply_rows(const Problem& p, const Launch& l, int64_t sample, int64_t piece, const Place& place) {
  if (!place.active) return;
  float factor[N], offset[N];
  for (int k = 0; k < N; ++k) {
    factor[k] = p.scale * state_at(p, p.state, sample).gate[place.channel + k];
    offset[k] = kBackward ? state_at(p, p.deltas, sample).pooled[place.channel + k] : 0.0f;
  }
  for_rows(p, l, sample, piece, place, [&](int64_t at) { apply<kBackward, T>(p, at, factor, offset); });
}

// ---- the gate: one block per sample. Three steps each way, with a barrier between them. ----

LSGM_HD double total_of(const Problem& p, int64_t sample, int64_t channel) {
  double total = 0;
  for (int64_t k = 0; k < p.pieces; ++k) total += p.partials[partial_at(p, sample, k, channel)];
  return total;
}

LSGM_HD void pool(const Problem& p, int64_t sample, int64_t channel) {
  state_at(p, p.state, sample).pooled[channel] =
      static_cast<float>(total_of(p, sample, channel) / static_cast<double>(p.spatial));
}

// A lane's part of what the warp sums and gives to finish_hidden.
LSGM_HD float hidden_part(const Problem& p, int64_t sample, int64_t unit, int lane) {
  const float* pooled = state_at(p, p.state, sample).pooled;
  float sum = 0;
  for (int64_t c = lane; c < p.channels; c += kWarp) sum += p.reduce_weight[unit * p.channels + c] * pooled[c];
  return sum;
}

LSGM_HD void finish_hidden(const Problem& p, int64_t sample, int64_t unit, float sum) {
  const float u = sum + p.reduce_bias[unit];
  state_at(p, p.state, sample).hidden[unit] = u < 0 ? 0 : u;  // NaN stays
}

LSGM_HD void gate(const Problem& p, int64_t sample, int64_t channel) {
  const State s = state_at(p, p.state, sample);
  float sum = p.expand_bias[channel];
  for (int64_t r = 0; r < p.hidden; ++r) sum += p.expand_weight[channel * p.hidden + r] * s.hidden[r];
  s.gate[channel] = mix_of(sum).network;
}

LSGM_HD void gate_delta(const Problem& p, int64_t sample, int64_t channel) {
  const float gate = state_at(p, p.state, sample).gate[channel];
  state_at(p, p.deltas, sample).gate[channel] =
      p.scale * static_cast<float>(total_of(p, sample, channel)) * (gate * (1.0f - gate));
}

LSGM_HD float hidden_delta_part(const Problem& p, int64_t sample, int64_t unit, int lane) {
  const float* of_gate = state_at(p, p.deltas, sample).gate;
  float sum = 0;
  for (int64_t c = lane; c < p.channels; c += kWarp) sum += p.expand_weight[c * p.hidden + unit] * of_gate[c];
  return sum;
}

LSGM_HD void finish_hidden_delta(const Problem& p, int64_t sample, int64_t unit, float sum) {
  state_at(p, p.deltas, sample).hidden[unit] = state_at(p, p.state, sample).hidden[unit] <= 0 ? 0 : sum;
}

LSGM_HD void pooled_delta(const Problem& p, int64_t sample, int64_t channel) {
  const State d = state_at(p, p.deltas, sample);
  float sum = 0;
  for (int64_t r = 0; r < p.hidden; ++r) sum += p.reduce_weight[r * p.channels + channel] * d.hidden[r];
  d.pooled[channel] = sum / static_cast<float>(p.spatial);
}

// ---- gradients of the parameters: one thread for each ----

LSGM_HD int64_t parameter_count(const Problem& p) { return (2 * p.hidden + 1) * p.channels + p.hidden; }

LSGM_HD void parameter_gradient(const Problem& p, int64_t i) {
  const State s = state_at(p, p.state, 0), d = state_at(p, p.deltas, 0);
  const int64_t pitch = state_size(p), weights = p.hidden * p.channels;
  const float* left;
  const float* right = nullptr;  // 1
  float* out;
  if (i < weights) {
    const int64_t r = i / p.channels;
    left = d.hidden + r;
    right = s.pooled + (i - r * p.channels);
    out = p.grad_reduce_weight + i;
  } else if (i < 2 * weights) {
    i -= weights;
    const int64_t c = i / p.hidden;
    left = d.gate + c;
    right = s.hidden + (i - c * p.hidden);
    out = p.grad_expand_weight + i;
  } else if (i < 2 * weights + p.channels) {
    left = d.gate + (i - 2 * weights);
    out = p.grad_expand_bias + (i - 2 * weights);
  } else {
    i -= 2 * weights + p.channels;
    left = d.hidden + i;
    out = p.grad_reduce_bias + i;
  }
  float sum = 0;
  for (int64_t n = 0; n < p.batch; ++n) sum += left[n * pitch] * (right == nullptr ? 1.0f : right[n * pitch]);
  *out = sum;
}

// Calls Kernel::run<T, N>(p, argument) with the type and the width that `p` gets.
template <class Kernel, class T, class Argument>
static inline void run_type(const Problem& p, Argument argument) {
  if (width_of(p) == 1) return Kernel::template run<T, 1>(p, argument);
  Kernel::template run<T, 16 / static_cast<int>(sizeof(T))>(p, argument);
}

template <class Kernel, class Argument>
static inline void run_kernel(const Problem& p, Argument argument) {
  switch (p.dtype) {
    case DType::float16:
      return run_type<Kernel, Half>(p, argument);
    case DType::bfloat16:
      return run_type<Kernel, BFloat16>(p, argument);
    default:  // float64 is the reference's
      return run_type<Kernel, float>(p, argument);
  }
}

}  // namespace se_residual
}  // namespace lsgm
