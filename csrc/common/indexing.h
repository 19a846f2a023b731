// How a tensor is cut into pieces of work. Everything counts elements in int64: tensors may exceed 2^31 elements.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace lsgm {

LSGM_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

LSGM_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

LSGM_HD int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

// `outer` runs of `length` consecutive units, each cut into `per_run` segments of at most `limit` units. The cut
// depends on the shape alone, never on the number of threads: sums over segments are then the same on every machine.
struct Segments {
  int64_t outer;
  int64_t length;
  int64_t limit;
  int64_t per_run;
  int64_t count;
};

struct Segment {
  int64_t run;
  int64_t piece;
  int64_t begin;  // within the run
  int64_t size;
};

LSGM_HD Segments make_segments(int64_t outer, int64_t length, int64_t limit) {
  Segments s;
  s.outer = outer;
  s.length = length;
  s.limit = limit;
  s.per_run = ceil_div(length, limit);
  s.count = outer * s.per_run;
  return s;
}

LSGM_HD Segment segment_at(const Segments& segments, int64_t index) {
  Segment s;
  s.run = index / segments.per_run;
  s.piece = index - s.run * segments.per_run;
  s.begin = s.piece * segments.limit;
  s.size = smaller(segments.limit, segments.length - s.begin);
  return s;
}

// The two orders of memory that kernels understand, over a tensor (B, C, spatial...).
//   planes: B, C, spatial (contiguous). A plane of `spatial` elements shares its sample and its channel.
//   rows:   B, spatial, C (channels_last). A row holds the C channels of one position.
// The order of the spatial axes among themselves is irrelevant, as long as they are dense.
enum class Order : int32_t { planes, rows, unsupported };

// Classifies strides. Axes of size 1 are ignored; a tensor of two axes is a list of rows.
static inline Order order_of(int64_t dims, const int64_t* sizes, const int64_t* strides) {
  if (dims < 2 || dims > 8) return Order::unsupported;
  int64_t spatial = 1;
  for (int64_t d = 2; d < dims; ++d) spatial *= sizes[d];
  const int64_t channels = sizes[1];
  if (sizes[0] > 1 && strides[0] != channels * spatial) return Order::unsupported;

  // The spatial axes, with distances counted in `unit` elements, must fill 0 ... spatial - 1.
  const auto dense_in = [&](int64_t unit) {
    bool used[8] = {};
    int64_t expected = unit;
    for (int64_t step = 2; step < dims; ++step) {
      int64_t found = -1;
      for (int64_t d = 2; d < dims; ++d) {
        if (!used[d] && sizes[d] > 1 && strides[d] == expected) found = d;
      }
      if (found < 0) break;
      used[found] = true;
      expected *= sizes[found];
    }
    return expected == unit * spatial;
  };
  if ((channels == 1 || strides[1] == 1) && dense_in(channels) && (channels > 1 || spatial == 1)) return Order::rows;
  if ((channels == 1 || strides[1] == spatial) && dense_in(1)) return Order::planes;
  return Order::unsupported;
}

}  // namespace lsgm
