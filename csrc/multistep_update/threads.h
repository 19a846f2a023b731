// What each thread of the CUDA kernel of multistep_update does. Compiled by nvcc into cuda.cu, and by the host compiler
// into csrc/tests/multistep_update_threads.cpp, which runs every thread of a launch on the CPU and so proves, on a
// machine without a GPU, that each element is computed once and rightly.
//
// Elements that follow each other in memory and share what depends on the sample form a group: a sample, or the whole
// tensor. One thread computes N neighbours. Short groups lie side by side in a block.
#pragma once

#include <type_traits>

#include "common/vector_io.h"
#include "multistep_update/multistep_update.h"

namespace lsgm {
namespace multistep_update {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocksY = 65535;  // a loop over the groups does the rest

// What the coefficients of the elements of one group depend on: nothing, or the channel, in either order of memory.
enum class Variation : int32_t { none, planes, rows };

// The same at compile time.
struct Uniform {};
struct Planes {};
struct Rows {};

struct Launch {
  int64_t groups;
  int64_t size;            // of a group, in elements
  bool narrow;             // positions within a group fit in 32 bits
  bool packed[kMaxTerms];  // neighbouring channels of the factor may be read at once
  int columns;             // threads of a block along a group, a power of two
  int lines;               // groups of a block
  int64_t blocks_x;        // along a group
  int64_t blocks_y;        // over the groups
};

LSGM_HD Variation variation_of(const Problem& p) {
  if (!depends_on_channel(p)) return Variation::none;
  return p.order == Order::rows ? Variation::rows : Variation::planes;
}

// How many elements one thread moves at once: 16 bytes of the narrower operand, where every access is then aligned.
template <class Y, class H>
LSGM_HD constexpr int vector_width() {
  return 16 / static_cast<int>(sizeof(Y) < sizeof(H) ? sizeof(Y) : sizeof(H));
}

// Type mixtures with kernels of their own; the others share the kernels of type Any.
template <class Y, class H>
LSGM_HD constexpr bool is_common() {
  if (std::is_same<Y, H>::value) return true;
  if (std::is_same<Y, float>::value) return !std::is_same<H, double>::value;
  return std::is_same<Y, double>::value && std::is_same<H, float>::value;
}

LSGM_HD Launch groups_of(const Problem& p) {
  Launch l{};
  // In planes a channel is found by one division where a group is a sample; over several it would take two.
  l.groups = depends_on_sample(p) || variation_of(p) == Variation::planes ? p.batch : 1;
  l.size = elements(p) / l.groups;
  l.narrow = l.size < int64_t(1) << 31;
  return l;
}

LSGM_HD bool can_vectorize(const Problem& p, int64_t width) {
  const Variation variation = variation_of(p);
  const int64_t unit = variation == Variation::planes ? p.spatial
                       : variation == Variation::rows ? p.channels
                                                      : groups_of(p).size;
  bool all = unit % width == 0 && aligned(p.out);
  for (int t = 0; t < p.terms; ++t) all = all && aligned(p.inputs[t]);
  return all;
}

LSGM_HD Launch launch_of(const Problem& p, int64_t width) {
  Launch l = groups_of(p);
  for (int t = 0; t < p.terms; ++t) {
    const Coefficient& c = p.coefficients[t];
    l.packed[t] = c.channel_stride == 1 && aligned(c.factor) && c.sample_stride * size_of(c.dtype) % 16 == 0;
  }
  const int64_t vectors = ceil_div(l.size, width);
  l.columns = 1;
  while (l.columns < kThreads && l.columns < vectors) l.columns *= 2;
  l.lines = kThreads / l.columns;
  l.blocks_x = ceil_div(vectors, l.columns);
  l.blocks_y = smaller(ceil_div(l.groups, l.lines), kMaxBlocksY);
  return l;
}

// N elements as they lie in memory, or in the type of the arithmetic where theirs is known at run time only. All of a
// thread's loads are under way before the first is waited for.
template <class T, class C, int N>
using Held = Pack<typename std::conditional<std::is_same<T, Any>::value, C, T>::type, N>;

template <class T, class C, int N>
LSGM_HD void fetch(Held<T, C, N>& held, const void* base, DType dtype, int64_t i) {
  if constexpr (std::is_same<T, Any>::value) {
    load<Any>(base, dtype, i, held.v);
  } else {
    copy_aligned(held, static_cast<const T*>(base) + i);
  }
}

LSGM_HD int64_t quotient(int64_t a, int64_t b, bool narrow) {
  return narrow ? static_cast<int64_t>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b)) : a / b;
}

// Coefficients of N elements, which share the channel, or in rows have channels one after the other.
template <class C, class V, int N>
LSGM_HD void coefficients_at(const Coefficient& c, bool packed, int64_t sample, int64_t channel, C (&k)[N]) {
  if (std::is_same<V, Rows>::value && N > 1 && packed) {
    const int64_t at = sample * c.sample_stride + channel;
    const C scale = scale_of(c, C());
    if (c.dtype == DType::float64) {
      Pack<double, N> factors;
      copy_aligned(factors, static_cast<const double*>(c.factor) + at);
      for (int i = 0; i < N; ++i) k[i] = scale * static_cast<C>(factors.v[i]);
    } else {
      Pack<float, N> factors;
      copy_aligned(factors, static_cast<const float*>(c.factor) + at);
      for (int i = 0; i < N; ++i) k[i] = scale * static_cast<C>(factors.v[i]);
    }
    return;
  }
  k[0] = coefficient_at<C>(c, sample, channel);
  const bool differ = std::is_same<V, Rows>::value && c.channel_stride != 0;
  for (int i = 1; i < N; ++i) k[i] = differ ? coefficient_at<C>(c, sample, channel + i) : k[0];
}

// The elements from N * vector on of one group.
template <class C, class Y, class H, class V, int N>
LSGM_HD void combine(const Problem& p, const Launch& l, int64_t group, int64_t vector) {
  const int64_t within = vector * N;
  if (within >= l.size) return;
  const int64_t at = group * l.size + within;
  int64_t channel = 0;
  if (std::is_same<V, Planes>::value) channel = quotient(within, p.spatial, l.narrow);
  if (std::is_same<V, Rows>::value) channel = within - quotient(within, p.channels, l.narrow) * p.channels;
  Held<Y, C, N> state;
  Held<H, C, N> history[kMaxTerms - 1] = {};
  fetch<Y, C, N>(state, p.inputs[0], p.y_dtype, at);
  for (int t = 1; t < kMaxTerms; ++t) {
    if (t < p.terms) fetch<H, C, N>(history[t - 1], p.inputs[t], p.h_dtype, at);
  }
  C k[N], sums[N];
  coefficients_at<C, V, N>(p.coefficients[0], l.packed[0], group, channel, k);
  for (int i = 0; i < N; ++i) sums[i] = k[i] * widen<C>(state.v[i]);
  for (int t = 1; t < kMaxTerms; ++t) {
    if (t < p.terms) {
      coefficients_at<C, V, N>(p.coefficients[t], l.packed[t], group, channel, k);
      for (int i = 0; i < N; ++i) sums[i] += k[i] * widen<C>(history[t - 1].v[i]);
    }
  }
  store<Y>(p.out, p.y_dtype, at, sums);
}

// Calls Kernel::run<C, Y, H, V, N>(p, argument) with the types and the width that `p` gets.

template <class Kernel, class C, class Y, class H, int N, class Argument>
static void run_variation(const Problem& p, Argument argument) {
  switch (variation_of(p)) {
    case Variation::none:
      return Kernel::template run<C, Y, H, Uniform, N>(p, argument);
    case Variation::planes:
      return Kernel::template run<C, Y, H, Planes, N>(p, argument);
    case Variation::rows:
      return Kernel::template run<C, Y, H, Rows, N>(p, argument);
  }
}

template <class Kernel, class Y, class H, class Argument>
static void run_types(const Problem& p, Argument argument) {
  using C = typename Compute<Y, H>::type;
  if constexpr (is_common<Y, H>()) {
    if (can_vectorize(p, vector_width<Y, H>())) {
      return run_variation<Kernel, C, Y, H, vector_width<Y, H>()>(p, argument);
    }
  }
  run_variation<Kernel, C, Any, Any, 1>(p, argument);
}

template <class Kernel, class Argument>
static void run_kernel(const Problem& p, Argument argument) {
  visit(p.y_dtype, [&](auto y_type) {
    visit(p.h_dtype, [&](auto h_type) {
      run_types<Kernel, typename decltype(y_type)::type, typename decltype(h_type)::type>(p, argument);
    });
  });
}

}  // namespace multistep_update
}  // namespace lsgm
