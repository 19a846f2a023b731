// A multistep_update problem on the host with guarded buffers, and its solution in long double.
#pragma once

#include <cmath>
#include <memory>
#include <vector>

#include "multistep_update/multistep_update.h"
#include "tests/buffer.h"
#include "tests/check.h"

namespace lsgm {
namespace testing {
namespace {  // these names occur in several test files, which lsgm_fast._C links into one library

using lsgm::multistep_update::Coefficient;
using lsgm::multistep_update::kMaxTerms;
using lsgm::multistep_update::Problem;

// What a coefficient depends on.
enum class Kind { number, shared, sample, channel, both, channel_apart };

struct Example {
  Order order;
  int64_t batch, channels, spatial;
  DType y, h;
  std::vector<Kind> kinds;  // of the state's coefficient and of the history's
  DType factor;
  int64_t offset;  // of every tensor, in elements: 0 is aligned
};

class MultistepUpdate {
 public:
  explicit MultistepUpdate(const Example& x)
      : example(x),
        count(x.batch * x.channels * x.spatial),
        out(count, x.y, x.offset) {
    Random random(static_cast<uint64_t>(count * 31 + x.channels));
    p = Problem{};
    p.order = x.order;
    p.batch = x.batch;
    p.channels = x.channels;
    p.spatial = x.spatial;
    p.terms = static_cast<int>(x.kinds.size());
    p.y_dtype = x.y;
    p.h_dtype = p.terms > 1 ? x.h : x.y;
    for (int t = 0; t < p.terms; ++t) {
      inputs.push_back(std::make_unique<Buffer>(count, t == 0 ? p.y_dtype : p.h_dtype, x.offset));
      inputs.back()->randomize(random);
      p.inputs[t] = inputs.back()->data();
      describe(x.kinds[static_cast<size_t>(t)], random, p.coefficients[t]);
    }
    p.out = out.data();
  }

  int64_t sample_of(int64_t i) const { return i / (example.channels * example.spatial); }
  int64_t channel_of(int64_t i) const {
    return example.order == Order::planes ? i / example.spatial % example.channels : i % example.channels;
  }

  void check(const char* who) const {
    const bool wide = p.y_dtype == DType::float64 || p.h_dtype == DType::float64;
    for (int64_t i = 0; i < count; ++i) {
      long double expected = 0, scale = 0;
      for (int t = 0; t < p.terms; ++t) {
        const auto at = static_cast<size_t>(t);
        const Coefficient& c = p.coefficients[t];
        long double term = static_cast<long double>(c.scale) * inputs[at]->at(i);
        if (factors[at]) {
          const int64_t stride = example.kinds[at] == Kind::channel_apart ? 2 : 1;
          const int64_t channel = c.channel_stride == 0 ? 0 : channel_of(i);
          const int64_t sample = c.sample_stride == 0 ? 0 : sample_of(i);
          const int64_t row = example.kinds[at] == Kind::sample ? 1 : example.channels;
          term *= factors[at]->at(sample * row + channel * stride);
        }
        expected += term;
        scale += std::fabs(term);
      }
      const long double allowed = 8 * unit_roundoff(wide ? DType::float64 : DType::float32) * scale +
                                  unit_roundoff(example.y) * (std::fabs(expected) * 1.01L) +
                                  0x1p-25L * (example.y == DType::float16 ? 1 : 0);
      const double got = out.at(i);
      CHECK(std::fabs(got - expected) <= allowed)
          << who << ": out[" << i << "] is " << got << ", expected " << static_cast<double>(expected) << "; order "
          << static_cast<int>(example.order) << " shape " << example.batch << "x" << example.channels << "x"
          << example.spatial << " dtypes " << static_cast<int>(example.y) << static_cast<int>(example.h) << " kinds "
          << names() << " offset " << example.offset;
    }
  }

  Example example;
  int64_t count;
  Buffer out;
  std::vector<std::unique_ptr<Buffer>> inputs, factors;
  Problem p;

 private:
  void describe(Kind kind, Random& random, Coefficient& c) {
    c.scale = random.uniform(-2, 2);
    c.scale32 = static_cast<float>(c.scale);
    factors.emplace_back();
    if (kind == Kind::number) return;
    const bool by_channel = kind == Kind::channel || kind == Kind::both || kind == Kind::channel_apart;
    const bool by_sample = kind == Kind::sample || kind == Kind::both;
    const int64_t stride = kind == Kind::channel_apart ? 2 : 1;
    const int64_t size = (by_sample ? example.batch : 1) * (by_channel ? (example.channels - 1) * stride + 1 : 1);
    factors.back() = std::make_unique<Buffer>(size, example.factor, 0);
    factors.back()->randomize(random);
    c.factor = factors.back()->data();
    c.dtype = example.factor;
    c.channel_stride = by_channel && example.channels > 1 ? stride : 0;
    c.sample_stride = by_sample && example.batch > 1 ? (by_channel ? example.channels : 1) : 0;
  }

  std::string names() const {
    std::string text;
    for (Kind kind : example.kinds) text += std::to_string(static_cast<int>(kind));
    return text;
  }
};

// Every mixture of types in both orders, every kind of coefficient, with shapes around the widths of registers, warps,
// blocks, tables and segments.
inline std::vector<Example> examples() {
  const DType all[] = {DType::float32, DType::float64, DType::float16, DType::bfloat16};
  struct Shape {
    int64_t batch, channels, spatial;
  };
  const Shape small[] = {{1, 1, 1}, {2, 3, 7}, {2, 8, 16}, {3, 5, 64}, {2, 40, 33}, {30, 3, 4}};
  const Shape large[] = {{1, 2, 16391}, {2, 1, 4100}, {2, 270, 5}, {3, 257, 9}, {3, 16, 4096}, {700, 4, 8}, {5, 300, 1},
      {70, 255, 2}};
  using K = Kind;
  const std::vector<std::vector<Kind>> kinds = {
      {K::number},
      {K::number, K::number, K::shared},
      {K::sample, K::number},
      {K::channel, K::shared, K::channel},
      {K::channel, K::sample, K::number, K::channel_apart},
      {K::shared, K::both, K::number, K::channel, K::sample},
      {K::channel_apart, K::channel, K::channel, K::channel, K::channel},
  };
  std::vector<Example> list;
  for (Order order : {Order::planes, Order::rows}) {
    for (DType y : all) {
      for (DType h : all) {
        int64_t n = 0;
        for (const Shape& s : small) {
          for (const auto& k : kinds) {
            const bool odd = n++ % 2 == 1;
            list.push_back({order, s.batch, s.channels, s.spatial, y, h, k, odd ? DType::float64 : DType::float32,
                n % 3 == 2 ? 1 : 0});
          }
        }
      }
    }
    for (const Shape& s : large) {
      for (DType h : {DType::float32, DType::bfloat16}) {
        for (const auto& k : kinds) {
          list.push_back({order, s.batch, s.channels, s.spatial, DType::float32, h, k, DType::float32, 0});
        }
      }
    }
  }
  return list;
}

}  // namespace
}  // namespace testing
}  // namespace lsgm
