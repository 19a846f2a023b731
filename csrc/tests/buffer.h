// Guarded memory for the tests of kernels.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "common/dtypes.h"
#include "tests/check.h"

namespace lsgm {
namespace testing {

// `count` elements of `dtype` that begin `offset` elements beyond a multiple of 64 bytes. Allocated to the byte, so
// that AddressSanitizer sees the first access beyond either end.
class Buffer {
 public:
  Buffer(int64_t count, DType dtype, int64_t offset)
      : dtype_(dtype),
        count_(count) {
    const auto bytes = static_cast<size_t>((count + offset) * size_of(dtype));
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, std::max<size_t>(bytes, 1)) != 0) std::abort();
    memory_ = static_cast<unsigned char*>(memory);
    std::memset(memory_, 0xff, bytes);  // NaN in every type
    data_ = memory_ + offset * size_of(dtype);
  }
  ~Buffer() { std::free(memory_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() const { return data_; }
  int64_t count() const { return count_; }

  double at(int64_t i) const {
    return visit(dtype_, [&](auto type) -> double {
      using T = typename decltype(type)::type;
      T x;
      std::memcpy(&x, data_ + static_cast<size_t>(i) * sizeof(T), sizeof x);
      return widen<double>(x);
    });
  }
  void set(int64_t i, double v) {
    visit(dtype_, [&](auto type) {
      using T = typename decltype(type)::type;
      T x;
      narrow(v, x);
      std::memcpy(data_ + static_cast<size_t>(i) * sizeof(T), &x, sizeof x);
    });
  }
  void randomize(Random& random) {
    for (int64_t i = 0; i < count_; ++i) set(i, random.uniform(-2, 2));
  }

 private:
  DType dtype_;
  int64_t count_;
  unsigned char* memory_;
  unsigned char* data_;
};

inline double unit_roundoff(DType dtype) {
  switch (dtype) {
    case DType::float64:
      return 0x1p-53;
    case DType::float16:
      return 0x1p-11;
    case DType::bfloat16:
      return 0x1p-8;
    default:
      return 0x1p-24;
  }
}

}  // namespace testing
}  // namespace lsgm
