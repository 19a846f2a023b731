// CPU kernels of weight_norm, compiled once per instruction set (LSGM_ISA; see common/cpu.h). No torch.
#include "common/cpu.h"

#include <cmath>

#include "common/vector_loop.h"
#include "weight_norm/weight_norm.h"

namespace lsgm {
namespace weight_norm {
namespace LSGM_ISA {
namespace {

using namespace lsgm::LSGM_ISA;

// Elements after which a float32 sum is added to the float64 total.
constexpr int64_t kFlush = 4096;
// Sums that grow side by side: one alone would wait for the addition before it.
constexpr int kSums = 4;

// Sum of a[i] b[i].
double product(const float* a, const float* b, int64_t n) {
  constexpr int64_t width = Vec<float>::width;
  double total = 0;
  int64_t i = 0;
  Vec<float> x, y;
  while (i + width <= n) {
    const int64_t end = smaller(n, i + kFlush);
    Vec<float> sums[kSums];
    for (auto& sum : sums) fill(sum, 0.0f);
    for (; i + kSums * width <= end; i += kSums * width) {
      for (int k = 0; k < kSums; ++k) {
        load(x, a + i + k * width);
        load(y, b + i + k * width);
        sums[k] = fma(x, y, sums[k]);
      }
    }
    for (; i + width <= end; i += width) {
      load(x, a + i);
      load(y, b + i);
      sums[0] = fma(x, y, sums[0]);
    }
    total += static_cast<double>(sum(add(add(sums[0], sums[1]), add(sums[2], sums[3]))));
  }
  float rest = 0;
  for (; i < n; ++i) rest += a[i] * b[i];
  return total + static_cast<double>(rest);
}

// f(weight, filter) for every filter of the pieces [begin, end).
template <class F>
void for_each_filter(const Problem& p, int64_t begin, int64_t end, F&& f) {
  int64_t low = 0, high = p.count - 1;  // the last weight that begins at or before piece `begin`
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (p.weights[middle].first_piece <= begin) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  for (int64_t piece = begin; low < p.count && piece < end; ++low) {
    const Weight& weight = p.weights[low];
    const int64_t next = low + 1 < p.count ? p.weights[low + 1].first_piece : p.pieces;
    const int64_t stop = smaller(end, next);
    const int64_t last = smaller(weight.filters, (stop - weight.first_piece) * weight.filters_per_piece);
    for (int64_t k = (piece - weight.first_piece) * weight.filters_per_piece; k < last; ++k) f(weight, k);
    piece = stop;
  }
}

}  // namespace

void forward(const Problem& p, int64_t begin, int64_t end) {
  for_each_filter(p, begin, end, [&p](const Weight& weight, int64_t k) {
    const float* v = weight.v + k * weight.length;
    float* out = weight.out + k * weight.length;
    const auto norm = static_cast<float>(std::sqrt(product(v, v, weight.length)));
    const float scale = scale_of(weight.log_norm[k], norm, p.eps);
    p.norms[weight.first + k] = norm;
    for_each_register<float>(weight.length, [=](auto kind, int64_t i) {
      decltype(kind) s, x;
      fill(s, scale);
      load(x, v + i);
      store(mul(s, x), out + i);
    });
  });
}

void backward(const Problem& p, int64_t begin, int64_t end) {
  for_each_filter(p, begin, end, [&p](const Weight& weight, int64_t k) {
    const float* v = weight.v + k * weight.length;
    const float* grad = weight.grad + k * weight.length;
    float* out = weight.out + k * weight.length;
    const float norm = p.saved_norms[weight.first + k];
    const float scale = scale_of(weight.log_norm[k], norm, p.eps);
    const auto along = static_cast<float>(product(grad, v, weight.length));
    const float projection = projection_of(scale, along, norm, p.eps);
    p.grad_log_norm[weight.first + k] = scale * along;
    for_each_register<float>(weight.length, [=](auto kind, int64_t i) {
      decltype(kind) s, c, x, g;
      fill(s, scale);
      fill(c, projection);
      load(x, v + i);
      load(g, grad + i);
      store(fnma(c, x, mul(s, g)), out + i);
    });
  });
}

}  // namespace LSGM_ISA

#if !LSGM_VEC_AVX2  // what exists once, compiled for every processor
namespace cpu {

constexpr int64_t kPiece = 16384;  // elements: long enough to hide its own set-up, short enough to share out

void plan(Problem& p) {
  p.pieces = 0;
  for (int64_t i = 0; i < p.count; ++i) {
    Weight& weight = p.weights[i];
    weight.first_piece = p.pieces;
    weight.filters_per_piece = larger(1, kPiece / larger(1, weight.length));
    p.pieces += ceil_div(weight.filters, weight.filters_per_piece);
  }
}

int64_t grain(const Problem& p) {
  constexpr int64_t kElementsPerThread = 65536;  // some ten microseconds: what waking a second thread costs
  int64_t elements = 0;
  for (int64_t i = 0; i < p.count; ++i) elements += p.weights[i].filters * p.weights[i].length;
  return larger(1, kElementsPerThread * p.pieces / larger(1, elements));
}

void forward(const Problem& p, int64_t begin, int64_t end) {
#if defined(LSGM_HAVE_AVX2)
  if (has_avx2()) return avx2::forward(p, begin, end);
#endif
  scalar::forward(p, begin, end);
}

void backward(const Problem& p, int64_t begin, int64_t end) {
#if defined(LSGM_HAVE_AVX2)
  if (has_avx2()) return avx2::backward(p, begin, end);
#endif
  scalar::backward(p, begin, end);
}

}  // namespace cpu
#endif

}  // namespace weight_norm
}  // namespace lsgm
