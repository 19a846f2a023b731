// philox_normal: standard normals from Philox4x32-10 (Salmon et al. 2011, Random123) and Box-Muller.
//
//   (x0, x1, x2, x3) = philox(counter (block, stream, sample index, substream), key (seed's low word, high word))
//   u1 = float(x0) 2^-32 + 2^-33, u2 = float(x1) 2^-32, (n0, n1) = sqrt(-2 ln u1) (cos, sin)(2 pi u2)
//
// x2 and x3 give n2 and n3 likewise; block b holds elements 4b to 4b + 3 of a sample. u1 and u2 are float32 whatever
// the result's type; a float64 result evaluates logarithm, root, cosine and sine in float64.
//
// This header is what the CPU and the CUDA code share: the arithmetic, and the description of one call. No torch.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/dtypes.h"
#include "common/indexing.h"
#include "common/macros.h"

namespace lsgm {
namespace philox_normal {

constexpr int64_t kBlock = 4;  // elements that share a counter

// One call. The result is dense: `samples` times `elements`.
struct Problem {
  int64_t samples, elements;
  const int64_t* indices;  // of the samples, 0 to 2^32 - 1
  int64_t index_stride;
  uint32_t key0, key1, stream, substream;
  DType dtype;
  void* out;
  Segments segments;  // CPU: of blocks, one run for each sample
};

LSGM_HD int64_t blocks_of(const Problem& p) { return ceil_div(p.elements, kBlock); }

LSGM_HD uint32_t index_of(const Problem& p, int64_t sample) {
  return static_cast<uint32_t>(p.indices[sample * p.index_stride]);
}

constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
constexpr int kRounds = 10;

struct Words {
  uint32_t x[4];
};

LSGM_HD Words philox(Words c, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kMultiplier0) * c.x[0];
    const uint64_t p1 = static_cast<uint64_t>(kMultiplier1) * c.x[2];
    c.x[0] = static_cast<uint32_t>(p1 >> 32) ^ c.x[1] ^ key0;
    c.x[1] = static_cast<uint32_t>(p1);
    c.x[2] = static_cast<uint32_t>(p0 >> 32) ^ c.x[3] ^ key1;
    c.x[3] = static_cast<uint32_t>(p0);
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return c;
}

LSGM_HD Words words_of(const Problem& p, uint32_t index, int64_t block) {
  return philox({{static_cast<uint32_t>(block), p.stream, index, p.substream}}, p.key0, p.key1);
}

// uint32 to float32, to nearest: what the language leaves to the implementation.
LSGM_HD float float_of_word(uint32_t word) {
#if defined(__CUDA_ARCH__)
  return __uint2float_rn(word);
#else
  return static_cast<float>(word);
#endif
}

LSGM_HD float radius_uniform(uint32_t word) { return float_of_word(word) * 0x1p-32f + 0x1p-33f; }

LSGM_HD float angle_uniform(uint32_t word) { return float_of_word(word) * 0x1p-32f; }

LSGM_HD float log_of(float x) {
#if defined(__CUDA_ARCH__)
  return logf(x);
#else
  return std::log(x);
#endif
}
LSGM_HD double log_of(double x) {
#if defined(__CUDA_ARCH__)
  return log(x);
#else
  return std::log(x);
#endif
}

// Sine and cosine of `turns` full turns, from 0 to 1. Reduced in turns, where that is exact.
#if defined(__CUDA_ARCH__)
LSGM_HD void sincos_of(float turns, float& sine, float& cosine) { sincospif(2.0f * turns, &sine, &cosine); }
LSGM_HD void sincos_of(double turns, double& sine, double& cosine) { sincospi(2.0 * turns, &sine, &cosine); }
#else
template <class C>
LSGM_HD void sincos_of(C turns, C& sine, C& cosine) {
  const int quarter = static_cast<int>(C(4) * turns + C(0.5));
  const C angle = (C(4) * turns - static_cast<C>(quarter)) * static_cast<C>(1.57079632679489661923);
  const C s = std::sin(angle), c = std::cos(angle);
  sine = quarter & 1 ? c : s;
  cosine = quarter & 1 ? s : c;
  if (quarter & 2) sine = -sine;
  if ((quarter + 1) & 2) cosine = -cosine;
}
#endif

template <class C>
LSGM_HD C root_of(C x) {
#if defined(__CUDA_ARCH__)
  return sqrt(x);
#else
  return std::sqrt(x);
#endif
}

template <class C>
LSGM_HD void box_muller(uint32_t first, uint32_t second, C& n0, C& n1) {
  const C radius = root_of(C(-2) * log_of(static_cast<C>(radius_uniform(first))));
  C sine, cosine;
  sincos_of(static_cast<C>(angle_uniform(second)), sine, cosine);
  n0 = radius * cosine;
  n1 = radius * sine;
}

template <class C>
LSGM_HD void normals_of(const Words& words, C (&n)[4]) {
  box_muller(words.x[0], words.x[1], n[0], n[1]);
  box_muller(words.x[2], words.x[3], n[2], n[3]);
}

// CPU. `plan` makes the segments; `forward` does the segments [begin, end) and may run in several threads.
namespace cpu {

void plan(Problem& p);
int64_t grain(const Problem& p);  // segments below which a second thread does not pay
void forward(const Problem& p, int64_t begin, int64_t end);

}  // namespace cpu

#define LSGM_PHILOX_NORMAL_CPU_KERNELS void forward(const Problem& p, int64_t begin, int64_t end);

namespace scalar {
LSGM_PHILOX_NORMAL_CPU_KERNELS
}
namespace avx2 {
LSGM_PHILOX_NORMAL_CPU_KERNELS
}
#undef LSGM_PHILOX_NORMAL_CPU_KERNELS

// CUDA: on `stream` (a cudaStream_t) of the current device. A failed launch throws std::runtime_error.
namespace cuda {

void forward(const Problem& p, void* stream);

}  // namespace cuda

}  // namespace philox_normal
}  // namespace lsgm
