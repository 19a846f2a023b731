// A residual_add problem on the host with guarded buffers, and its solution in long double.
#pragma once

#include <cmath>
#include <vector>

#include "residual_add/residual_add.h"
#include "tests/buffer.h"
#include "tests/check.h"

namespace lsgm {
namespace testing {
namespace {  // these names occur in several test files, which lsgm_fast._C links into one library

using lsgm::residual_add::Problem;

struct Example {
  int64_t count;
  DType dtype;
  bool sum;        // with an h
  int64_t offset;  // of every tensor, in elements: 0 is aligned
};

class ResidualAdd {
 public:
  explicit ResidualAdd(const Example& e)
      : example(e),
        x(e.count, e.dtype, e.offset),
        h(e.count, e.dtype, e.offset),
        out(e.count, e.dtype, e.offset) {
    Random random(static_cast<uint64_t>(e.count * 31 + e.offset));
    x.randomize(random);
    h.randomize(random);
    p = Problem{};
    p.count = e.count;
    p.dtype = e.dtype;
    p.x = x.data();
    p.h = e.sum ? h.data() : nullptr;
    p.out = out.data();
    p.scale = 0.7071067811865476;
    p.scale32 = static_cast<float>(p.scale);
  }

  void check(const char* who) const {
    const DType arithmetic = example.dtype == DType::float64 ? DType::float64 : DType::float32;
    for (int64_t i = 0; i < example.count; ++i) {
      const long double a = x.at(i), b = example.sum ? h.at(i) : 0;
      const long double expected = (a + b) * p.scale;
      const long double allowed = 3 * unit_roundoff(arithmetic) * (std::fabs(a) + std::fabs(b)) +
                                  unit_roundoff(example.dtype) * std::fabs(expected) * 1.01L +
                                  0x1p-25L * (example.dtype == DType::float16 ? 1 : 0);
      const double got = out.at(i);
      CHECK(std::fabs(got - expected) <= allowed)
          << who << ": out[" << i << "] is " << got << ", expected " << static_cast<double>(expected) << "; count "
          << example.count << " dtype " << static_cast<int>(example.dtype) << " sum " << example.sum << " offset "
          << example.offset;
    }
  }

  Example example;
  Buffer x, h, out;
  Problem p;
};

// Every type, aligned or not, with counts around the widths of registers, vectors, blocks and segments.
inline std::vector<Example> examples() {
  std::vector<Example> list;
  for (DType dtype : {DType::float32, DType::float64, DType::float16, DType::bfloat16}) {
    for (int64_t count : {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 255, 256, 1023, 2049, 16383, 16384, 16391, 40001}) {
      for (int64_t offset : {0, 1}) {
        for (bool sum : {false, true}) list.push_back({count, dtype, sum, offset});
      }
    }
  }
  return list;
}

}  // namespace
}  // namespace testing
}  // namespace lsgm
