// A problem of a channelwise operator on the host with guarded buffers, and what its tests compare with.
#pragma once

#include <cmath>
#include <vector>

#include "common/channelwise.h"
#include "tests/buffer.h"
#include "tests/check.h"

namespace lsgm {
namespace testing {
namespace {  // these names occur in several test files, which lsgm_fast._C links into one library

struct Example {
  Order order;
  int64_t batch, channels, spatial;
  DType eps, z, logit, r;
  bool shared_r;
  int64_t offset;  // of every tensor, in elements: 0 is aligned
};

// The tensors that all these operators have, filled with random numbers, and out with NaN.
class ChannelwiseProblem {
 public:
  explicit ChannelwiseProblem(const Example& x)
      : example(x),
        count(x.batch * x.channels * x.spatial),
        random(static_cast<uint64_t>(count * 31 + x.channels)),
        eps(count, x.eps, x.offset),
        z(count, x.z, x.offset),
        out(count, x.z, x.offset),
        logit(x.channels, x.logit, 0),
        r(x.shared_r ? 1 : x.batch, x.r, 0) {
    for (Buffer* b : {&eps, &z, &logit, &r}) b->randomize(random);
  }

  void describe(channelwise::Operands& operands) const {
    operands.order = example.order;
    operands.batch = example.batch;
    operands.channels = example.channels;
    operands.spatial = example.spatial;
    operands.eps_dtype = example.eps;
    operands.z_dtype = example.z;
    operands.eps = eps.data();
    operands.z = z.data();
    operands.logit = {logit.data(), example.logit, 1};
    operands.r = per_sample(r);
  }

  Scalars per_sample(const Buffer& values) const { return {values.data(), example.r, example.shared_r ? 0 : 1}; }

  Example example;
  int64_t count;
  Random random;
  Buffer eps, z, out, logit, r;

 protected:
  int64_t channel_of(int64_t i) const {
    return example.order == Order::planes ? i / example.spatial % example.channels : i % example.channels;
  }

  // The value of one of the buffers of values per sample at element i.
  long double sample_value(const Buffer& values, int64_t i) const {
    return values.at(example.shared_r ? 0 : i / (example.channels * example.spatial));
  }

  // sigmoid(logit) at element i.
  long double network(int64_t i) const {
    return 1 / (1 + std::exp(-static_cast<long double>(logit.at(channel_of(i)))));
  }

  // `scale`: the size of the terms that add up to `expected`.
  void check(const char* who, const char* what, int64_t i, double got, long double expected, long double scale,
      DType dtype) const {
    const bool wide = example.eps == DType::float64 || example.z == DType::float64;
    const DType arithmetic = wide ? DType::float64 : DType::float32;
    const long double allowed = 8 * unit_roundoff(arithmetic) * scale +
                                unit_roundoff(dtype) * (std::fabs(expected) * 1.01L) +
                                0x1p-25L * (dtype == DType::float16 ? 1 : 0);
    CHECK(std::fabs(got - expected) <= allowed)
        << who << ": " << what << "[" << i << "] is " << got << ", expected " << static_cast<double>(expected)
        << "; order " << static_cast<int>(example.order) << " shape " << example.batch << "x" << example.channels << "x"
        << example.spatial << " dtypes " << static_cast<int>(example.eps) << static_cast<int>(example.z) << " offset "
        << example.offset;
  }
};

// Every mixture of types in both orders, with shapes around the widths of registers, warps, blocks and segments.
inline std::vector<Example> examples() {
  const DType all[] = {DType::float32, DType::float64, DType::float16, DType::bfloat16};
  struct Shape {
    int64_t batch, channels, spatial;
  };
  const Shape small[] = {{1, 1, 1}, {2, 3, 7}, {2, 8, 16}, {3, 5, 64}, {2, 40, 33}, {1, 2, 260}};
  const Shape large[] = {{1, 2, 16391}, {2, 1, 4100}, {2, 270, 5}, {1, 2100, 3}, {3, 16, 4096}, {2, 180, 256}};
  std::vector<Example> list;
  for (Order order : {Order::planes, Order::rows}) {
    for (DType eps : all) {
      for (DType z : all) {
        int64_t n = 0;
        for (const Shape& s : small) {
          const bool odd = n++ % 2 == 1;
          list.push_back({order, s.batch, s.channels, s.spatial, eps, z, odd ? DType::float64 : DType::float32,
              odd ? DType::float32 : DType::float64, odd, n % 3 == 2 ? 1 : 0});
        }
      }
    }
    for (const Shape& s : large) {
      for (DType eps : {DType::float32, DType::bfloat16}) {
        list.push_back(
            {order, s.batch, s.channels, s.spatial, eps, DType::float32, DType::float32, DType::float32, false, 0});
      }
    }
  }
  return list;
}

}  // namespace
}  // namespace testing
}  // namespace lsgm
