// A philox_normal problem on the host with guarded buffers, and its solution in long double.
#pragma once

#include <cmath>
#include <vector>

#include "philox_normal/philox_normal.h"
#include "tests/buffer.h"
#include "tests/check.h"

namespace lsgm {
namespace testing {
namespace {  // these names occur in several test files, which lsgm_fast._C links into one library

using lsgm::philox_normal::kBlock;
using lsgm::philox_normal::Problem;
using lsgm::philox_normal::Words;

struct NormalExample {
  int64_t samples, elements;
  DType dtype;
  int64_t offset;  // of the result, in elements: 0 is aligned
};

class PhiloxNormal {
 public:
  explicit PhiloxNormal(const NormalExample& x)
      : example(x),
        count(x.samples * x.elements),
        out(count, x.dtype, x.offset),
        indices(static_cast<size_t>(2 * x.samples)) {
    Random random(static_cast<uint64_t>(count * 31 + x.samples));
    for (int64_t& index : indices) index = static_cast<int64_t>(random.bits() >> 32);
    if (x.samples > 1) indices[2] = UINT32_MAX;
    p = Problem{};
    p.samples = x.samples;
    p.elements = x.elements;
    p.indices = indices.data();
    p.index_stride = 2;
    p.key0 = 0xFFFFFFFFu;
    p.key1 = 0x80000001u;
    p.stream = 0xF000000Fu;
    p.substream = 3;
    p.dtype = x.dtype;
    p.out = out.data();
  }

  void check(const char* who) const {
    for (int64_t i = 0; i < count; ++i) check(who, i, out.at(i));
  }

  NormalExample example;
  int64_t count;
  Buffer out;
  std::vector<int64_t> indices;
  Problem p;

 private:
  void check(const char* who, int64_t i, double got) const {
    const int64_t sample = i / example.elements, at = i - sample * example.elements;
    const Words words = philox_normal::words_of(p, philox_normal::index_of(p, sample), at / kBlock);
    const auto pair = static_cast<size_t>(at % kBlock / 2 * 2);
    const double first = static_cast<float>(words.x[pair]), second = static_cast<float>(words.x[pair + 1]);
    const long double u1 = static_cast<float>(first * 0x1p-32 + 0x1p-33);
    const long double u2 = second * 0x1p-32;
    const long double radius = std::sqrt(-2 * std::log(u1));
    const long double angle = 2 * 3.14159265358979323846264338327950288L * u2;
    const long double expected = radius * (at % 2 ? std::sin(angle) : std::cos(angle));
    // A few roundings of a radius of up to 6.8, then one to the result's type.
    const DType arithmetic = example.dtype == DType::float64 ? DType::float64 : DType::float32;
    const long double allowed = 6 * unit_roundoff(arithmetic) * radius +
                                unit_roundoff(example.dtype) * std::fabs(expected) * 1.01L +
                                0x1p-25L * (example.dtype == DType::float16 ? 1 : 0);
    CHECK(std::fabs(got - expected) <= allowed)
        << who << ": element " << at << " of sample " << sample << " is " << got << ", expected "
        << static_cast<double>(expected) << "; " << example.samples << "x" << example.elements << " dtype "
        << static_cast<int>(example.dtype) << " offset " << example.offset;
  }
};

// Sizes around those of a block, a register, a segment and a block of threads.
inline std::vector<NormalExample> normal_examples() {
  std::vector<NormalExample> list;
  for (DType dtype : {DType::float32, DType::float64, DType::float16, DType::bfloat16}) {
    for (int64_t elements : {1, 2, 3, 4, 5, 7, 8, 12, 31, 32, 33, 64, 100, 1000, 1024}) {
      list.push_back({3, elements, dtype, elements % 3 == 0 ? 1 : 0});
    }
    for (int64_t elements : {8191, 8192, 8193, 20000}) list.push_back({2, elements, dtype, 0});
    list.push_back({700, 3, dtype, 0});
  }
  return list;
}

}  // namespace
}  // namespace testing
}  // namespace lsgm
