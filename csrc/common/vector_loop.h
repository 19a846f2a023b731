// Loops over elements in registers, with what is left at the end.
#pragma once

#include <cstdint>

#include "common/vec.h"

namespace lsgm {
namespace LSGM_ISA {

// Calls step(Vec<C>{}, i) for all elements [0, n), Vec<C>::width of them at a time, or step(Lane<C>{}, i) where they
// are fewer than that. The last register overlaps the one before: `step` must not read what it has written.
template <class C, class Step>
static inline void for_each_register(int64_t n, Step&& step) {
  constexpr int64_t width = Vec<C>::width;
  int64_t i = 0;
  for (; i + width <= n; i += width) step(Vec<C>{}, i);
  if (i == n) return;
  if (n >= width) {
    step(Vec<C>{}, n - width);
    return;
  }
  for (; i < n; ++i) step(Lane<C>{}, i);
}

}  // namespace LSGM_ISA
}  // namespace lsgm
