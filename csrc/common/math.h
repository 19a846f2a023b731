// Functions of the arithmetic types that the CPU and the CUDA code share.
#pragma once

#include <cmath>

#include "common/macros.h"

namespace lsgm {

LSGM_HD float exp_of(float x) {
#if defined(__CUDA_ARCH__)
  return expf(x);
#else
  return std::exp(x);
#endif
}
LSGM_HD double exp_of(double x) {
#if defined(__CUDA_ARCH__)
  return exp(x);
#else
  return std::exp(x);
#endif
}

// a = sigmoid(logit) of the mixed score, and 1 - a.
template <class C>
struct Mix {
  C network;  // a
  C normal;   // 1 - a, without cancellation where a is close to 1
};

template <class C>
LSGM_HD Mix<C> mix_of(C logit) {
  const C e = exp_of(logit < C(0) ? logit : -logit);  // at most 1, so nothing overflows; NaN stays NaN
  const C large = C(1) / (C(1) + e);
  const C small = e / (C(1) + e);
  Mix<C> mix;
  mix.network = logit < C(0) ? small : large;
  mix.normal = logit < C(0) ? large : small;
  return mix;
}

}  // namespace lsgm
