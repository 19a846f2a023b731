// CPU kernels of score_matching_loss, compiled once per instruction set (LSGM_ISA; see common/cpu.h). No torch.
#include "common/cpu.h"

#include <type_traits>

#include "common/vec.h"
#include "score_matching_loss/score_matching_loss.h"

namespace lsgm {
namespace score_matching_loss {
namespace LSGM_ISA {
namespace {

using namespace lsgm::LSGM_ISA;

// Elements after which a float32 sum is added to the float64 total.
constexpr int64_t kFlush = 2048;

// R is Vec<C>, or Lane<C> for the elements of a tail.
template <class R, class C>
R filled(C value) {
  R x;
  fill(x, value);
  return x;
}

template <class R>
struct Forward {
  R one, weight_p, weight_q, constant;
};

template <class R, class C>
Forward<R> forward_constants(C weight_p, C weight_q, C constant) {
  return {filled<R>(C(1)), filled<R>(weight_p), filled<R>(weight_q), filled<R>(constant)};
}

template <bool kCrossEntropy, class R, class C, class P, class N>
inline void forward_step(const Forward<R>& k, const P* pred, const N* noise, C* cross_entropy, R& total) {
  R x, y;
  load(x, pred);
  load(y, noise);
  const R difference = fnma(k.one, y, x);
  const R square = mul(difference, difference);
  total = fma(k.weight_p, square, total);
  if constexpr (kCrossEntropy) store(fma(k.weight_q, square, k.constant), cross_entropy);
}

// n elements of one sample; returns their sum of weight_p d^2.
template <bool kCrossEntropy, class C, class P, class N>
double forward_run(const P* pred, const N* noise, C* cross_entropy, int64_t n, C weight_p, C weight_q, C constant) {
  constexpr int64_t width = Vec<C>::width;
  const auto k = forward_constants<Vec<C>>(weight_p, weight_q, constant);
  const auto k1 = forward_constants<Lane<C>>(weight_p, weight_q, constant);
  // Without a cross entropy there is nothing to point into.
  const auto at = [&](int64_t i) { return kCrossEntropy ? cross_entropy + i : nullptr; };
  double total = 0;
  int64_t i = 0;
  while (i + width <= n) {
    const int64_t end = smaller(n, i + kFlush);
    auto even = filled<Vec<C>>(C(0)), odd = even;
    for (; i + 2 * width <= end; i += 2 * width) {
      forward_step<kCrossEntropy>(k, pred + i, noise + i, at(i), even);
      forward_step<kCrossEntropy>(k, pred + i + width, noise + i + width, at(i + width), odd);
    }
    for (; i + width <= end; i += width) forward_step<kCrossEntropy>(k, pred + i, noise + i, at(i), even);
    total += static_cast<double>(sum(add(even, odd)));
  }
  auto rest = filled<Lane<C>>(C(0));
  for (; i < n; ++i) forward_step<kCrossEntropy>(k1, pred + i, noise + i, at(i), rest);
  return total + static_cast<double>(rest.v);
}

template <class R>
struct Backward {
  R one, minus_one, factor, scale;  // 2 d (factor + scale grad_ce), the 2 in both
};

template <bool kElements, class R, class C, class P, class N>
inline void backward_step(
    const Backward<R>& k, const P* pred, const N* noise, const C* grad_ce, P* grad_pred, N* grad_noise, int64_t i) {
  R x, y, factor = k.factor;
  load(x, pred + i);
  load(y, noise + i);
  if constexpr (kElements) {
    R g;
    load(g, grad_ce + i);
    factor = fma(k.scale, g, factor);
  }
  const R gradient = mul(fnma(k.one, y, x), factor);
  if (grad_pred != nullptr) store(gradient, grad_pred + i);
  if (grad_noise != nullptr) store(mul(k.minus_one, gradient), grad_noise + i);
}

// n elements of one sample. kElements: the gradient of the cross entropy is one value per element.
template <bool kElements, class C, class P, class N>
void backward_run(
    const P* pred, const N* noise, const C* grad_ce, P* grad_pred, N* grad_noise, int64_t n, C factor, C scale) {
  constexpr int64_t width = Vec<C>::width;
  const Backward<Vec<C>> k{filled<Vec<C>>(C(1)), filled<Vec<C>>(C(-1)), filled<Vec<C>>(factor), filled<Vec<C>>(scale)};
  int64_t i = 0;
  for (; i + width <= n; i += width) backward_step<kElements>(k, pred, noise, grad_ce, grad_pred, grad_noise, i);
  if (i == n) return;
  if (n >= width) {  // the last register overlaps the one before: same inputs, same values
    backward_step<kElements>(k, pred, noise, grad_ce, grad_pred, grad_noise, n - width);
    return;
  }
  const Backward<Lane<C>> k1{{C(1)}, {C(-1)}, {factor}, {scale}};
  for (; i < n; ++i) backward_step<kElements>(k1, pred, noise, grad_ce, grad_pred, grad_noise, i);
}

template <class T>
T* offset(T* p, int64_t i) {
  return p == nullptr ? nullptr : p + i;
}

// Calls f with pointers of the operands' types and one of the arithmetic's.
template <class F>
void with_types(const Problem& p, F&& f) {
  visit(p.pred_dtype, [&](auto pred_type) {
    visit(p.noise_dtype, [&](auto noise_type) {
      using P = typename decltype(pred_type)::type;
      using N = typename decltype(noise_type)::type;
      f(static_cast<const P*>(p.pred), static_cast<const N*>(p.noise), typename Compute<P, N>::type(0));
    });
  });
}

}  // namespace

void forward(const Problem& p, int64_t begin, int64_t end) {
  with_types(p, [&](const auto* pred, const auto* noise, auto zero) {
    using C = decltype(zero);
    auto* cross_entropy = static_cast<C*>(p.cross_entropy);
    const C constant = static_cast<C>(p.constant);
    for (int64_t s = begin; s < end; ++s) {
      const Segment segment = segment_at(p.segments, s);
      const int64_t at = segment.run * p.size + segment.begin;
      const C weight_p = scalar_at<C>(p.weight_p, segment.run);
      if (cross_entropy == nullptr) {
        p.partials[s] = forward_run<false, C>(pred + at, noise + at, nullptr, segment.size, weight_p, zero, zero);
      } else {
        const C weight_q = scalar_at<C>(p.weight_q, segment.run);
        p.partials[s] = forward_run<true>(
            pred + at, noise + at, cross_entropy + at, segment.size, weight_p, weight_q, constant);
      }
    }
  });
}

void backward(const Problem& p, int64_t begin, int64_t end) {
  with_types(p, [&](const auto* pred, const auto* noise, auto zero) {
    using C = decltype(zero);
    using P = std::remove_const_t<std::remove_pointer_t<decltype(pred)>>;
    using N = std::remove_const_t<std::remove_pointer_t<decltype(noise)>>;
    const auto* grad_ce = static_cast<const C*>(p.grad_ce);
    for (int64_t s = begin; s < end; ++s) {
      const Segment segment = segment_at(p.segments, s);
      const int64_t at = segment.run * p.size + segment.begin;
      auto* grad_pred = offset(static_cast<P*>(p.grad_pred), at);
      auto* grad_noise = offset(static_cast<N*>(p.grad_noise), at);
      const C factor = 2 * sample_factor<C>(p, segment.run);
      if (grad_ce == nullptr) {
        backward_run<false, C>(
            pred + at, noise + at, nullptr, grad_pred, grad_noise, segment.size, factor, zero);
      } else {
        backward_run<true>(pred + at, noise + at, grad_ce + at, grad_pred, grad_noise, segment.size, factor,
            2 * scalar_at<C>(p.weight_q, segment.run));
      }
    }
  });
}

}  // namespace LSGM_ISA

#if !LSGM_VEC_AVX2  // what exists once, compiled for every processor
namespace cpu {

void plan(Problem& p) {
  constexpr int64_t kSegment = 16384;  // elements: long enough to hide its own set-up, short enough to share out
  p.segments = make_segments(p.batch, p.size, kSegment);
}

int64_t grain(const Problem& p) {
  constexpr int64_t kElementsPerThread = 65536;  // some ten microseconds: what waking a second thread costs
  return larger(1, kElementsPerThread / smaller(p.segments.limit, p.segments.length));
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

void finish(const Problem& p) {
  const bool wide = computes_in_double(p);
  for (int64_t sample = 0; sample < p.batch; ++sample) {
    const double* partials = p.partials + sample * p.segments.per_run;
    double total = 0;
    for (int64_t i = 0; i < p.segments.per_run; ++i) total += partials[i];
    if (wide) {
      static_cast<double*>(p.p_loss)[sample] = total;
    } else {
      static_cast<float*>(p.p_loss)[sample] = static_cast<float>(total);
    }
  }
}

}  // namespace cpu
#endif

}  // namespace score_matching_loss
}  // namespace lsgm
