// Scalars in memory: per channel, per sample, or one for all.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/macros.h"

namespace lsgm {

// A strided vector of float32 or float64.
struct Scalars {
  const void* data;
  DType dtype;
  int64_t stride;
};

template <class C>
LSGM_HD C scalar_at(const Scalars& s, int64_t i) {
  i *= s.stride;
  return s.dtype == DType::float64 ? static_cast<C>(static_cast<const double*>(s.data)[i])
                                   : static_cast<C>(static_cast<const float*>(s.data)[i]);
}

}  // namespace lsgm
