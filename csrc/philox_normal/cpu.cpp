// CPU kernels of philox_normal, compiled once per instruction set (LSGM_ISA; see common/cpu.h). No torch.
#include "common/cpu.h"

#include "common/vec_math.h"
#include "philox_normal/philox_normal.h"

namespace lsgm {
namespace philox_normal {
namespace LSGM_ISA {
namespace {

using namespace lsgm::LSGM_ISA;

#if LSGM_VEC_AVX2

constexpr int64_t kBlocks = 8;  // at once, one to a 32-bit lane
constexpr int64_t kStep = kBlocks * kBlock;

// The state of four counters: one word in the lower half of each 64-bit lane, which is where the multiplication looks
// and leaves its product. The upper halves hold what earlier products left there.
struct Counters {
  __m256i x[4];
};

struct Keys {
  __m256i left[kRounds], right[kRounds];
};

inline void round_keys(uint32_t key0, uint32_t key1, Keys& keys) {
  for (int round = 0; round < kRounds; ++round) {
    keys.left[round] = _mm256_set1_epi64x(key0);
    keys.right[round] = _mm256_set1_epi64x(key1);
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
}

inline void philox4(Counters& c, const Keys& keys) {
  const __m256i multiplier0 = _mm256_set1_epi64x(kMultiplier0);
  const __m256i multiplier1 = _mm256_set1_epi64x(kMultiplier1);
  for (int round = 0; round < kRounds; ++round) {
    const __m256i p0 = _mm256_mul_epu32(multiplier0, c.x[0]);
    const __m256i p1 = _mm256_mul_epu32(multiplier1, c.x[2]);
    const __m256i left = _mm256_xor_si256(c.x[1], keys.left[round]);
    const __m256i right = _mm256_xor_si256(c.x[3], keys.right[round]);
    c.x[0] = _mm256_xor_si256(_mm256_srli_epi64(p1, 32), left);
    c.x[1] = p1;
    c.x[2] = _mm256_xor_si256(_mm256_srli_epi64(p0, 32), right);
    c.x[3] = p0;
  }
}

// The words of eight consecutive blocks. Blocks 0, 2, 4, 6 are in the lower half of each register and 1, 3, 5, 7 in the
// upper one: the order in which interleaving within halves yields blocks in order.
struct Words8 {
  __m256i x[4];
};

inline void words8(const Problem& p, const Keys& keys, uint32_t index, int64_t block, Words8& words) {
  const __m256i base = _mm256_set1_epi64x(block);
  Counters even, odd;  // 32-bit lanes 0, 2, 4, 6 and 1, 3, 5, 7
  even.x[0] = _mm256_add_epi64(base, _mm256_setr_epi64x(0, 4, 1, 5));
  odd.x[0] = _mm256_add_epi64(base, _mm256_setr_epi64x(2, 6, 3, 7));
  even.x[1] = odd.x[1] = _mm256_set1_epi64x(p.stream);
  even.x[2] = odd.x[2] = _mm256_set1_epi64x(index);
  even.x[3] = odd.x[3] = _mm256_set1_epi64x(p.substream);
  philox4(even, keys);
  philox4(odd, keys);
  for (int k = 0; k < 4; ++k) {
    words.x[k] = _mm256_blend_epi32(even.x[k], _mm256_slli_epi64(odd.x[k], 32), 0xAA);
  }
}

template <class C>
inline void box_muller(Vec<C> u1, Vec<C> u2, Vec<C>& n0, Vec<C>& n1) {
  Vec<C> factor, sine, cosine;
  fill(factor, C(-2));
  const Vec<C> radius = square_root(mul(factor, log_positive(u1)));
  sincos_turns(u2, sine, cosine);
  n0 = mul(radius, cosine);
  n1 = mul(radius, sine);
}

inline void uniforms(const Words8& words, Vec<float> (&u)[4]) {
  Vec<float> scale, half;
  fill(scale, 0x1p-32f);
  fill(half, 0x1p-33f);
  for (int k = 0; k < 4; k += 2) {
    u[k] = fma(from_uint32(words.x[k]), scale, half);
    u[k + 1] = mul(from_uint32(words.x[k + 1]), scale);
  }
}

// The elements of eight blocks, in order.
inline void normals8(const Words8& words, Vec<float> (&out)[4]) {
  Vec<float> u[4], n[4];
  uniforms(words, u);
  box_muller(u[0], u[1], n[0], n[1]);
  box_muller(u[2], u[3], n[2], n[3]);
  const __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(n[0].v, n[1].v));
  const __m256d high01 = _mm256_castps_pd(_mm256_unpackhi_ps(n[0].v, n[1].v));
  const __m256d low23 = _mm256_castps_pd(_mm256_unpacklo_ps(n[2].v, n[3].v));
  const __m256d high23 = _mm256_castps_pd(_mm256_unpackhi_ps(n[2].v, n[3].v));
  out[0].v = _mm256_castpd_ps(_mm256_unpacklo_pd(low01, low23));
  out[1].v = _mm256_castpd_ps(_mm256_unpackhi_pd(low01, low23));
  out[2].v = _mm256_castpd_ps(_mm256_unpacklo_pd(high01, high23));
  out[3].v = _mm256_castpd_ps(_mm256_unpackhi_pd(high01, high23));
}

// Four of the eight blocks, every other one.
inline void normals4(Vec<double> u0, Vec<double> u1, Vec<double> u2, Vec<double> u3, Vec<double>* out) {
  Vec<double> n[4];
  box_muller(u0, u1, n[0], n[1]);
  box_muller(u2, u3, n[2], n[3]);
  const __m256d low01 = _mm256_unpacklo_pd(n[0].v, n[1].v), high01 = _mm256_unpackhi_pd(n[0].v, n[1].v);
  const __m256d low23 = _mm256_unpacklo_pd(n[2].v, n[3].v), high23 = _mm256_unpackhi_pd(n[2].v, n[3].v);
  out[0].v = _mm256_permute2f128_pd(low01, low23, 0x20);
  out[2].v = _mm256_permute2f128_pd(high01, high23, 0x20);
  out[4].v = _mm256_permute2f128_pd(low01, low23, 0x31);
  out[6].v = _mm256_permute2f128_pd(high01, high23, 0x31);
}

inline void normals8(const Words8& words, Vec<double> (&out)[8]) {
  Vec<float> u[4];
  uniforms(words, u);
  normals4(lower_half(u[0]), lower_half(u[1]), lower_half(u[2]), lower_half(u[3]), out);
  normals4(upper_half(u[0]), upper_half(u[1]), upper_half(u[2]), upper_half(u[3]), out + 1);
}

// `size` elements of one sample, from the first of `block`.
template <class C, class T>
void fill_run(const Problem& p, uint32_t index, int64_t block, T* out, int64_t size) {
  constexpr int64_t width = Vec<C>::width;
  Keys keys;
  round_keys(p.key0, p.key1, keys);
  const auto eight_blocks = [&](int64_t at, T* to) {
    Words8 words;
    Vec<C> n[kStep / width];
    words8(p, keys, index, at, words);
    normals8(words, n);
    for (int64_t k = 0; k < kStep / width; ++k) store(n[k], to + k * width);
  };
  int64_t i = 0;
  for (; i + kStep <= size; i += kStep) eight_blocks(block + i / kBlock, out + i);
  if (i == size) return;
  T rest[kStep];  // the end takes the same way, so that no element's value depends on its place
  eight_blocks(block + i / kBlock, rest);
  for (int64_t k = 0; i < size; ++i, ++k) out[i] = rest[k];
}

#else

template <class C, class T>
void fill_run(const Problem& p, uint32_t index, int64_t block, T* out, int64_t size) {
  for (int64_t i = 0; i < size; i += kBlock, ++block) {
    C n[kBlock];
    normals_of(words_of(p, index, block), n);
    for (int64_t k = 0; k < smaller(kBlock, size - i); ++k) narrow(n[k], out[i + k]);
  }
}

#endif

}  // namespace

void forward(const Problem& p, int64_t begin, int64_t end) {
  visit(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for (int64_t s = begin; s < end; ++s) {
      const Segment segment = segment_at(p.segments, s);
      const int64_t first = segment.begin * kBlock;
      fill_run<typename Compute<T, T>::type>(p, index_of(p, segment.run), segment.begin,
          static_cast<T*>(p.out) + segment.run * p.elements + first,
          smaller(segment.size * kBlock, p.elements - first));
    }
  });
}

}  // namespace LSGM_ISA

#if !LSGM_VEC_AVX2  // what exists once, compiled for every processor
namespace cpu {

void plan(Problem& p) {
  constexpr int64_t kSegment = 2048;  // blocks: 32 KiB of float32
  p.segments = make_segments(p.samples, blocks_of(p), kSegment);
}

int64_t grain(const Problem& p) {
  constexpr int64_t kElementsPerThread = 16384;  // some ten microseconds: what waking a second thread costs
  return larger(1, kElementsPerThread / (kBlock * smaller(p.segments.limit, p.segments.length)));
}

void forward(const Problem& p, int64_t begin, int64_t end) {
#if defined(LSGM_HAVE_AVX2)
  if (has_avx2()) return avx2::forward(p, begin, end);
#endif
  scalar::forward(p, begin, end);
}

}  // namespace cpu
#endif

}  // namespace philox_normal
}  // namespace lsgm
