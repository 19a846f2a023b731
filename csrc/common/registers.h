// Registers as the CPU kernels of normalisations take them: one filled, loaded in part, several side by side. Compiled
// once per instruction set. No torch.
#pragma once

#include "common/cpu.h"
#include "common/math.h"
#include "common/vec_math.h"
#include "common/vector_loop.h"

namespace lsgm {
namespace LSGM_ISA {
namespace {

using V = Vec<float>;
constexpr int64_t kWidth = V::width;

template <class R>
R filled(float value) {
  R x;
  fill(x, value);
  return x;
}

// 1 + exp(-u)
#if LSGM_VEC_AVX2
inline V denominator(V u) { return one_plus_exp_minus(u); }
inline Lane<float> denominator(Lane<float> u) { return {first_of(denominator(filled<V>(u.v)))}; }
#else
inline V denominator(V u) { return {1.0f + exp_of(-u.v)}; }
#endif

template <class T>
V load_all(const T* p) {
  V x;
  load(x, p);
  return x;
}

// The first `count` elements at p, then `rest`.
template <class T>
V load_part(const T* p, int64_t count, float rest) {
  float parts[kWidth];
  for (int64_t i = 0; i < kWidth; ++i) parts[i] = i < count ? widen<float>(p[i]) : rest;
  V x;
  load(x, parts);
  return x;
}

// U registers of neighbouring channels.
template <class R, int U>
struct Group {
  R part[U];
  static constexpr int width = R::width;

  void clear() {
    for (R& r : part) fill(r, 0.0f);
  }
  template <class T>
  void read(const T* p) {
    for (int u = 0; u < U; ++u) load(part[u], p + u * width);
  }
  void write(float* p) const {
    for (int u = 0; u < U; ++u) store(part[u], p + u * width);
  }
  // Adds the channels from `skip` on to out[skip], ...
  void add_to(double* out, int64_t skip) const {
    float all[U * width];
    write(all);
    for (int64_t i = skip; i < U * width; ++i) out[i] += static_cast<double>(all[i]);
  }
};

// f(Group, first channel, skip) for all channels, U registers at a time while there are enough. The last group overlaps
// the one before, which has had the first `skip` of its channels.
template <int U, class F>
void for_each_group(int64_t channels, F&& f) {
  int64_t i = 0;
  for (; i + U * kWidth <= channels; i += U * kWidth) f(Group<V, U>{}, i, int64_t{0});
  for (; i + kWidth <= channels; i += kWidth) f(Group<V, 1>{}, i, int64_t{0});
  if (i < channels && channels >= kWidth) {
    f(Group<V, 1>{}, channels - kWidth, i + kWidth - channels);
    return;
  }
  for (; i < channels; ++i) f(Group<Lane<float>, 1>{}, i, int64_t{0});
}

}  // namespace
}  // namespace LSGM_ISA
}  // namespace lsgm
