// What operators share that combine a network's output eps and a state z element by element, with a mixing logit per
// channel and coefficients per sample: the description of a call, how it is cut into pieces, and what each thread of a
// CUDA launch finds in its piece. No torch.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dtypes.h"
#include "common/indexing.h"
#include "common/macros.h"
#include "common/scalars.h"
#include "common/vector_io.h"

namespace lsgm {
namespace channelwise {

// eps, z and out lie in the same order of memory; out has z's type.
struct Operands {
  Order order;
  int64_t batch, channels, spatial;
  Segments segments;  // made by plan_for_cpu or plan_for_gpu
  DType eps_dtype, z_dtype;
  const void* eps;
  const void* z;
  Scalars logit;  // `channels` values
  Scalars r;      // `batch` values, or one with stride 0
  void* out;
};

LSGM_HD bool computes_in_double(const Operands& p) {
  return p.eps_dtype == DType::float64 || p.z_dtype == DType::float64;
}

LSGM_HD int64_t elements(const Operands& p) { return p.batch * p.channels * p.spatial; }

// A segment of a plane: it shares its sample and its channel.
struct Plane {
  int64_t at;  // first element
  int64_t size;
  int64_t sample, channel, piece;
};

LSGM_HD Plane plane_at(const Operands& p, int64_t s) {
  const Segment segment = segment_at(p.segments, s);
  Plane plane;
  plane.sample = segment.run / p.channels;
  plane.channel = segment.run - plane.sample * p.channels;
  plane.piece = segment.piece;
  plane.at = segment.run * p.spatial + segment.begin;
  plane.size = segment.size;
  return plane;
}

// From one segment to the next, without the divisions.
LSGM_HD void advance(const Operands& p, Plane& plane) {
  plane.at += plane.size;
  if (++plane.piece == p.segments.per_run) {
    plane.piece = 0;
    if (++plane.channel == p.channels) {
      plane.channel = 0;
      ++plane.sample;
    }
  }
  plane.size = smaller(p.segments.limit, p.segments.length - plane.piece * p.segments.limit);
}

// ---- CPU ----

static inline void plan_for_cpu(Operands& p) {
  constexpr int64_t kSegment = 16384;  // elements: long enough to hide its own set-up, short enough to share out
  if (p.order == Order::planes) {
    p.segments = make_segments(p.batch * p.channels, p.spatial, kSegment);
  } else {
    p.segments = make_segments(p.batch, p.spatial, larger(1, kSegment / p.channels));
  }
}

// Segments below which a second thread does not pay.
static inline int64_t grain(const Operands& p) {
  constexpr int64_t kElementsPerThread = 65536;  // some ten microseconds: what waking a second thread costs
  const int64_t units = smaller(p.segments.limit, p.segments.length);
  return larger(1, kElementsPerThread / (p.order == Order::planes ? units : units * p.channels));
}

// Calls f(Type<E>, Type<Z>) with the types of eps and z.
template <class F>
static inline void with_types(const Operands& p, F&& f) {
  visit(p.eps_dtype, [&](auto eps_type) { visit(p.z_dtype, [&](auto z_type) { f(eps_type, z_type); }); });
}

// ---- CUDA ----

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int64_t kMaxBlocks = 1 << 16;  // a grid-stride loop does the rest
constexpr int64_t kPlaneSegment = 4096;  // elements
constexpr int64_t kRowsPerThread = 4;

// How many elements one thread moves at once: 16 bytes of the narrower operand, where every access is then aligned.
template <class E, class Z>
LSGM_HD constexpr int vector_width() {
  return 16 / static_cast<int>(sizeof(E) < sizeof(Z) ? sizeof(E) : sizeof(Z));
}

// An operator with further tensors has an overload of its own.
LSGM_HD bool all_aligned(const Operands& p) { return aligned(p.eps) && aligned(p.z) && aligned(p.out); }

// Type mixtures with kernels of their own; the others share the kernels of type Any.
template <class E, class Z>
LSGM_HD constexpr bool is_common() {
  if (std::is_same<E, Z>::value) return true;
  if (std::is_same<Z, float>::value) return !std::is_same<E, double>::value;
  return std::is_same<Z, double>::value && std::is_same<E, float>::value;
}

// The elements per thread that `p` gets: its vector width, or 1.
template <class Problem>
LSGM_HD int64_t width_of(const Problem& p) {
  const int64_t width = 16 / smaller(size_of(p.eps_dtype), size_of(p.z_dtype));
  const bool common = p.eps_dtype == p.z_dtype || (p.z_dtype == DType::float32 && p.eps_dtype != DType::float64) ||
                      (p.z_dtype == DType::float64 && p.eps_dtype == DType::float32);
  const int64_t inner = p.order == Order::planes ? p.spatial : p.channels;
  return common && inner % width == 0 && all_aligned(p) ? width : 1;
}

struct Launch {
  int64_t blocks;         // over segments
  int64_t channel_tiles;  // rows only: blocks side by side over the channels
  int lanes;              // planes: threads that share one segment, a power of two up to a warp
  int columns;            // rows: threads side by side over the channels
  int lines;              // rows: rows that a block works on at once
};

LSGM_HD Launch launch_of(const Operands& p, int64_t width) {
  Launch l{};
  l.channel_tiles = 1;
  if (p.order == Order::planes) {
    const int64_t vectors = ceil_div(smaller(p.segments.limit, p.segments.length), width);
    l.lanes = 1;
    while (l.lanes < kWarp && l.lanes < vectors) l.lanes *= 2;
    l.blocks = ceil_div(p.segments.count * l.lanes, kThreads);
  } else {
    const int64_t vectors = p.channels / width;  // width divides the channels
    l.columns = static_cast<int>(smaller(vectors, kThreads));
    l.lines = kThreads / l.columns;
    l.channel_tiles = ceil_div(vectors, l.columns);
    l.blocks = p.segments.count;
  }
  l.blocks = smaller(l.blocks, kMaxBlocks);
  return l;
}

// `max_row_segments`: bound of the segments over all rows (but one per sample), where each costs something later.
template <class Problem>
LSGM_HD void plan_for_gpu(Problem& p, int64_t max_row_segments) {
  if (p.order == Order::planes) {
    p.segments = make_segments(p.batch * p.channels, p.spatial, kPlaneSegment);
    return;
  }
  const int64_t lines = larger(1, kThreads / larger(1, p.channels / width_of(p)));
  // Long enough for the rows of a block's threads.
  const int64_t rows = larger(lines * kRowsPerThread, ceil_div(p.batch * p.spatial, max_row_segments));
  p.segments = make_segments(p.batch, p.spatial, rows);
}

// The place of a thread in a launch over rows: it keeps the N channels from `channel` on and goes down the rows of a
// segment, from `line` on, `lines` at a time.
struct Place {
  int64_t channel;
  int line;
  bool active;
};

LSGM_HD Place place_of(const Operands& p, const Launch& l, int64_t tile, int thread, int width) {
  Place place;
  place.line = thread / l.columns;
  place.channel = (tile * l.columns + thread % l.columns) * width;
  place.active = place.line < l.lines && place.channel < p.channels;
  return place;
}

// Calls Kernel::run<C, E, Z, N>(p, argument) with the types and the width that `p` gets. (Plain templates: g++ 12
// rejects constants of a generic lambda inside another.)

template <class Kernel, class E, class Z, class Problem, class Argument>
static inline void run_types(const Problem& p, Argument argument) {
  using C = typename Compute<E, Z>::type;
  if constexpr (is_common<E, Z>()) {
    if (width_of(p) == vector_width<E, Z>()) {
      Kernel::template run<C, E, Z, vector_width<E, Z>()>(p, argument);
      return;
    }
  }
  Kernel::template run<C, Any, Any, 1>(p, argument);
}

template <class Kernel, class E, class Problem, class Argument>
static inline void run_eps(const Problem& p, Argument argument) {
  switch (p.z_dtype) {
    case DType::float32:
      return run_types<Kernel, E, float>(p, argument);
    case DType::float64:
      return run_types<Kernel, E, double>(p, argument);
    case DType::float16:
      return run_types<Kernel, E, Half>(p, argument);
    case DType::bfloat16:
      return run_types<Kernel, E, BFloat16>(p, argument);
  }
}

template <class Kernel, class Problem, class Argument>
static inline void run_kernel(const Problem& p, Argument argument) {
  switch (p.eps_dtype) {
    case DType::float32:
      return run_eps<Kernel, float>(p, argument);
    case DType::float64:
      return run_eps<Kernel, double>(p, argument);
    case DType::float16:
      return run_eps<Kernel, Half>(p, argument);
    case DType::bfloat16:
      return run_eps<Kernel, BFloat16>(p, argument);
  }
}

}  // namespace channelwise
}  // namespace lsgm
