// What each thread of the CUDA kernels of fir_resample does. Compiled by nvcc into cuda.cu, and by the host compiler
// into csrc/tests/fir_resample_threads.cpp, which runs every thread of a launch on the CPU and so proves, on a machine
// without a GPU, that each element is computed once and rightly.
//
// Nothing is shared between threads: what neighbours both need, both read, the second time from the cache. All sizes of
// a launch are those of the smaller image. An item is one of its lines (planes), or a short run of pixels of a line
// (rows), and threads side by side have vectors of
//   planes: columns. On the way up a thread makes one vector of each of two lines, from half a vector of columns; it
//           loads the whole one, which holds a neighbour too. On the way down it makes one of two vectors.
//   rows:   channels.
// First come the sums along the columns of the image, then those along its lines.
#pragma once

#include "common/math.h"
#include "common/vector_io.h"
#include "fir_resample/fir_resample.h"

// What a thread keeps in arrays must end up in registers.
#if defined(__CUDACC__)
#define LSGM_UNROLL _Pragma("unroll")
#else
#define LSGM_UNROLL
#endif

namespace lsgm {
namespace fir_resample {

constexpr int kThreads = 256;
constexpr int kRunUp = 4;  // pixels of a run; two (up) or one or two (down) more are read
constexpr int kRunDown = 2;

// The elements per thread and access that `p` gets: 16 bytes, or 1.
LSGM_HD int width_of(const Problem& p) {
  const int64_t width = 16 / size_of(p.dtype);
  const int64_t inner = p.order == Order::rows ? p.channels : p.up ? p.width : p.width / 2;
  const bool all = aligned(p.x) && aligned(p.out) && aligned(p.factor) && aligned(p.shift);
  return inner % width == 0 && all ? static_cast<int>(width) : 1;
}

// Planes, up: columns of a thread.
LSGM_HD constexpr int columns_of(int width) { return width == 1 ? 1 : width / 2; }

struct Launch {
  int64_t height, width;  // of the smaller image
  int64_t vectors;        // side by side
  int64_t runs;           // of a line
  int64_t items;
  int64_t tiles;  // blocks side by side
  int columns;    // threads side by side
  int lines;      // items that a block works on at once
  int64_t blocks;
};

LSGM_HD Launch launch_of(const Problem& p) {
  Launch l{};
  const int width = width_of(p);
  l.height = p.up ? p.height : p.height / 2;
  l.width = p.up ? p.width : p.width / 2;
  l.runs = 1;
  if (p.order == Order::planes) {
    l.vectors = l.width / (p.up ? columns_of(width) : width);
    l.items = p.batch * p.channels * l.height;
  } else {
    l.vectors = p.channels / width;
    l.runs = ceil_div(l.width, p.up ? kRunUp : kRunDown);
    l.items = p.batch * l.height * l.runs;
  }
  l.tiles = ceil_div(l.vectors, kThreads);
  l.columns = static_cast<int>(ceil_div(l.vectors, l.tiles));
  l.lines = kThreads / l.columns;
  l.blocks = l.tiles * ceil_div(l.items, l.lines);
  return l;
}

// a / b, in 32 bits where they suffice.
LSGM_HD int64_t divided(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

struct Place {
  int64_t image;  // planes: of all samples and channels; rows: of the samples
  int64_t row;    // line of the smaller image
  int64_t run;
  int64_t vector;
  bool active;
};

LSGM_HD Place place_of(const Launch& l, int64_t block, int thread) {
  Place place;
  const int64_t group = divided(block, l.tiles);
  const int line = thread / l.columns;
  const int64_t item = group * l.lines + line;
  place.vector = (block - group * l.tiles) * l.columns + (thread - line * l.columns);
  place.active = line < l.lines && item < l.items && place.vector < l.vectors;
  const int64_t lines = divided(item, l.runs);
  place.run = item - lines * l.runs;
  place.image = divided(lines, l.height);
  place.row = lines - place.image * l.height;
  return place;
}

// ---- reading ----

// To about two units in the last place; 0 where b is beyond 2^126.
LSGM_HD float quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdividef(a, b);
#else
  return a / b;
#endif
}

// swish(x factor + shift) of N elements, with one factor for all (K = 1) or one for each.
template <int K>
struct Affine {
  bool active;
  float factor[K], shift[K];
};

template <int K>
LSGM_HD Affine<K> affine_at(const Problem& p, int64_t i) {
  Affine<K> affine;
  affine.active = p.factor != nullptr;
  if (affine.active) {
    load<float>(p.factor, DType::float32, i, affine.factor);
    load<float>(p.shift, DType::float32, i, affine.shift);
  }
  return affine;
}

template <int K, int N>
LSGM_HD void activate(const Affine<K>& affine, float (&x)[N]) {
  if (!affine.active) return;
  LSGM_UNROLL
  for (int k = 0; k < N; ++k) {
    const float u = x[k] * affine.factor[k % K] + affine.shift[k % K];
    x[k] = quotient(u, 1.0f + exp_of(-u));
  }
}

template <int N>
LSGM_HD void clear(float (&x)[N]) {
  LSGM_UNROLL
  for (int k = 0; k < N; ++k) x[k] = 0;
}

template <int N>
LSGM_HD void add(float weight, const float (&x)[N], float (&sums)[N]) {
  LSGM_UNROLL
  for (int k = 0; k < N; ++k) sums[k] += weight * x[k];
}

template <class T, int N>
LSGM_HD void store_vector(const Problem& p, int64_t at, const float (&y)[N]) {
#if defined(__CUDA_ARCH__)
  if constexpr (N > 1) {
    Pack<T, N> pack;
    LSGM_UNROLL
    for (int k = 0; k < N; ++k) narrow(y[k], pack.v[k]);
    // Of an assignment, nvcc 13.0 makes stores of 4 bytes here.
    uint4 bits;
    static_assert(sizeof bits == sizeof pack, "a vector has 16 bytes");
    __builtin_memcpy(&bits, &pack, sizeof bits);
    __stwb(reinterpret_cast<uint4*>(static_cast<T*>(p.out) + at), bits);
    return;
  }
#endif
  store<T>(p.out, p.dtype, at, y);
}

// Calls line(y, x) for the lines of x that a result needs, to fill x, and makes the sums of them: one (down), or one
// for the upper and one for the lower line (up).
template <bool kUp, bool kFir, int N, class Line>
LSGM_HD void sum_lines(const Problem& p, int64_t row, float (&sums)[2][N], Line&& line) {
  clear(sums[0]);
  clear(sums[1]);
  float x[N];
  const int64_t first = kUp ? row : 2 * row;
  line(first, x);
  add((kFir ? 3 : 1) * p.scale, x, sums[0]);
  if (kUp) add((kFir ? 3 : 1) * p.scale, x, sums[1]);
  if (!kUp) {
    line(first + 1, x);
    add((kFir ? 3 : 1) * p.scale, x, sums[0]);
  }
  if (!kFir) return;
  if (first > 0) {
    line(first - 1, x);
    add(p.scale, x, sums[0]);
  }
  const int64_t last = first + (kUp ? 1 : 2);
  if (last < p.height) {
    line(last, x);
    add(p.scale, x, sums[kUp ? 1 : 0]);
  }
}

// ---- planes ----

// Columns of a thread.
template <bool kUp, int N>
LSGM_HD constexpr int own_columns() {
  return kUp ? columns_of(N) : 2 * N;
}

// The thread's own columns, from `first` on, in the line of x that begins at `line`; and one on either side, which is 0
// outside of the image, and used by the filter alone.
template <bool kUp, bool kFir, class T, int N, int M>
LSGM_HD void load_columns(const Problem& p, const Affine<1>& affine, int64_t line, int64_t first, float (&x)[M]) {
  constexpr int own = M - 2;
  bool left = kFir && first > 0, right = kFir && first + own < p.width;
  const bool has_left = left, has_right = right;
  x[0] = x[M - 1] = 0;
  if constexpr (kUp && N > 1) {
    float both[N];
    const bool upper = (first / own) % 2 != 0;
    load<T>(p.x, p.dtype, line + first - (upper ? own : 0), both);
    LSGM_UNROLL
    for (int k = 0; k < own; ++k) x[k + 1] = upper ? both[own + k] : both[k];
    // A neighbour is in the vector already.
    if (upper) {
      x[0] = both[own - 1];
      left = false;
    } else {
      x[M - 1] = both[own];
      right = false;
    }
  } else {
    LSGM_UNROLL
    for (int i = 0; i < own / N; ++i) {
      float vector[N];
      load<T>(p.x, p.dtype, line + first + i * N, vector);
      LSGM_UNROLL
      for (int k = 0; k < N; ++k) x[1 + i * N + k] = vector[k];
    }
  }
  float one[1];
  if (left) {
    load<T>(p.x, p.dtype, line + first - 1, one);
    x[0] = one[0];
  }
  if (right) {
    load<T>(p.x, p.dtype, line + first + own, one);
    x[M - 1] = one[0];
  }
  activate(affine, x);
  if (!has_left) x[0] = 0;
  if (!has_right) x[M - 1] = 0;
}

template <class T, int N, int M>
LSGM_HD void store_all(const Problem& p, int64_t at, const float (&y)[M]) {
  LSGM_UNROLL
  for (int i = 0; i < M / N; ++i) {
    float vector[N];
    LSGM_UNROLL
    for (int k = 0; k < N; ++k) vector[k] = y[i * N + k];
    store_vector<T>(p, at + i * N, vector);
  }
}

template <bool kUp, bool kFir, class T, int N>
LSGM_HD void resample_plane(const Problem& p, const Launch& l, const Place& place) {
  constexpr int own = own_columns<kUp, N>(), M = own + 2;
  const int64_t first = place.vector * own, plane = place.image * p.height;
  const Affine<1> affine = affine_at<1>(p, place.image);
  float sums[2][M];
  sum_lines<kUp, kFir>(p, place.row, sums, [&](int64_t y, float(&x)[M]) {
    load_columns<kUp, kFir, T, N>(p, affine, (plane + y) * p.width, first, x);
  });
  if constexpr (kUp) {
    LSGM_UNROLL
    for (int lower = 0; lower < 2; ++lower) {
      const float(&s)[M] = sums[lower];
      float y[2 * own];
      LSGM_UNROLL
      for (int k = 0; k < own; ++k) {
        y[2 * k] = kFir ? s[k] + 3 * s[k + 1] : s[k + 1];
        y[2 * k + 1] = kFir ? 3 * s[k + 1] + s[k + 2] : s[k + 1];
      }
      store_all<T, N>(p, (2 * (plane + place.row) + lower) * 2 * l.width + 2 * first, y);
    }
  } else {
    const float(&s)[M] = sums[0];
    float y[N];
    LSGM_UNROLL
    for (int k = 0; k < N; ++k) {
      const float inner = s[2 * k + 1] + s[2 * k + 2];
      y[k] = kFir ? s[2 * k] + 3 * inner + s[2 * k + 3] : inner;
    }
    store_all<T, N>(p, (place.image * l.height + place.row) * l.width + place.vector * N, y);
  }
}

// ---- rows ----

// The sums of one column of x, 0 outside of the image.
template <bool kUp, bool kFir, class T, int N>
LSGM_HD void sum_pixels(const Problem& p, const Affine<N>& affine, const Place& place, int64_t column,
    float (&sums)[2][N]) {
  if (column < 0 || column >= p.width) {
    clear(sums[0]);
    clear(sums[1]);
    return;
  }
  sum_lines<kUp, kFir>(p, place.row, sums, [&](int64_t y, float(&x)[N]) {
    const int64_t pixel = (place.image * p.height + y) * p.width + column;
    load<T>(p.x, p.dtype, pixel * p.channels + place.vector * N, x);
    activate(affine, x);
  });
}

// a x + b y
template <int N>
LSGM_HD void combine(float a, const float (&x)[N], float b, const float (&y)[N], float (&result)[N]) {
  LSGM_UNROLL
  for (int k = 0; k < N; ++k) result[k] = a * x[k] + b * y[k];
}

template <bool kFir, class T, int N>
LSGM_HD void enlarge_run(const Problem& p, const Launch& l, const Place& place, const Affine<N>& affine) {
  const int64_t first = place.run * kRunUp, line = 2 * (place.image * p.height + place.row);
  const auto put = [&](int lower, int64_t column, const float(&y)[N]) {
    const int64_t pixel = (line + lower) * 2 * l.width + column;
    store_vector<T>(p, pixel * p.channels + place.vector * N, y);
  };
  float last[2][N], sums[2][N], y[N];
  if (kFir) sum_pixels<true, kFir, T>(p, affine, place, first - 1, last);
  LSGM_UNROLL
  for (int k = 0; k < kRunUp + (kFir ? 1 : 0); ++k) {
    // The last run may end outside of the image; the filter completes its last result there.
    if (first + k > l.width || (!kFir && first + k == l.width)) break;
    sum_pixels<true, kFir, T>(p, affine, place, first + k, sums);
    const int64_t column = 2 * (first + k);
    LSGM_UNROLL
    for (int lower = 0; lower < 2; ++lower) {
      if (!kFir) {
        put(lower, column, sums[lower]);
        put(lower, column + 1, sums[lower]);
        continue;
      }
      if (k > 0) {
        combine(3, last[lower], 1, sums[lower], y);
        put(lower, column - 1, y);
      }
      if (k < kRunUp && first + k < l.width) {
        combine(1, last[lower], 3, sums[lower], y);
        put(lower, column, y);
      }
      LSGM_UNROLL
      for (int i = 0; i < N; ++i) last[lower][i] = sums[lower][i];
    }
  }
}

template <bool kFir, class T, int N>
LSGM_HD void reduce_run(const Problem& p, const Launch& l, const Place& place, const Affine<N>& affine) {
  const int64_t first = place.run * kRunDown, line = place.image * l.height + place.row;
  // What the columns before have of the next result.
  float sums[2][N], before[N];
  clear(before);
  if (kFir) {
    sum_pixels<false, kFir, T>(p, affine, place, 2 * first - 1, sums);
    add(1, sums[0], before);
    sum_pixels<false, kFir, T>(p, affine, place, 2 * first, sums);
    add(3, sums[0], before);
  }
  LSGM_UNROLL
  for (int k = 0; k < kRunDown; ++k) {
    const int64_t column = first + k;
    if (column >= l.width) break;
    float y[N], far[2][N];
    sum_pixels<false, kFir, T>(p, affine, place, 2 * column + 1, sums);
    sum_pixels<false, kFir, T>(p, affine, place, 2 * column + (kFir ? 2 : 0), far);
    combine(kFir ? 3 : 1, sums[0], 1, far[0], y);
    if (kFir) {
      add(1, before, y);
      combine(1, sums[0], 3, far[0], before);
    }
    store_vector<T>(p, (line * l.width + column) * p.channels + place.vector * N, y);
  }
}

template <bool kUp, bool kFir, class T, Order O, int N>
LSGM_HD void resample(const Problem& p, const Launch& l, int64_t block, int thread) {
  const Place place = place_of(l, block, thread);
  if (!place.active) return;
  if constexpr (O == Order::planes) {
    resample_plane<kUp, kFir, T, N>(p, l, place);
  } else {
    const Affine<N> affine = affine_at<N>(p, place.image * p.channels + place.vector * N);
    if constexpr (kUp) {
      enlarge_run<kFir, T>(p, l, place, affine);
    } else {
      reduce_run<kFir, T>(p, l, place, affine);
    }
  }
}

// Calls Kernel::run<kUp, kFir, T, O, N>(p, argument) for what `p` is.

template <class Kernel, class T, Order O, int N, class Argument>
static inline void run_way(const Problem& p, Argument argument) {
  if (p.up) {
    if (p.fir) return Kernel::template run<true, true, T, O, N>(p, argument);
    return Kernel::template run<true, false, T, O, N>(p, argument);
  }
  if (p.fir) return Kernel::template run<false, true, T, O, N>(p, argument);
  return Kernel::template run<false, false, T, O, N>(p, argument);
}

template <class Kernel, class T, int N, class Argument>
static inline void run_order(const Problem& p, Argument argument) {
  if (p.order == Order::planes) return run_way<Kernel, T, Order::planes, N>(p, argument);
  return run_way<Kernel, T, Order::rows, N>(p, argument);
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

}  // namespace fir_resample
}  // namespace lsgm
