// Cutting tensors into segments, also beyond 2^31 elements, and telling the orders of memory apart.
#include "common/indexing.h"

#include <vector>

#include "tests/check.h"

namespace {

using namespace lsgm;

CASE("segments cover every run once") {
  for (int64_t outer : {1, 3, 7}) {
    for (int64_t length : {1, 2, 15, 16, 17, 64, 100}) {
      for (int64_t limit : {1, 4, 16, 1000}) {
        const Segments segments = make_segments(outer, length, limit);
        std::vector<int> seen(static_cast<size_t>(outer * length));
        for (int64_t s = 0; s < segments.count; ++s) {
          const Segment segment = segment_at(segments, s);
          CHECK(segment.size >= 1 && segment.size <= limit) << outer << " " << length << " " << limit;
          for (int64_t i = 0; i < segment.size; ++i) {
            ++seen[static_cast<size_t>(segment.run * length + segment.begin + i)];
          }
        }
        for (int n : seen) CHECK(n == 1) << outer << " " << length << " " << limit;
      }
    }
  }
}

CASE("segments beyond 2^31 elements") {
  const int64_t length = (int64_t(1) << 33) + 5, limit = 16384;
  const Segments segments = make_segments(3, length, limit);
  CHECK(segments.count == 3 * ((int64_t(1) << 19) + 1));
  const Segment last = segment_at(segments, segments.count - 1);
  CHECK(last.run == 2 && last.begin == int64_t(1) << 33 && last.size == 5) << last.begin;
  const Segments many = make_segments((int64_t(1) << 32) + 1, 7, 4);
  const Segment end = segment_at(many, many.count - 1);
  CHECK(end.run == int64_t(1) << 32 && end.piece == 1 && end.begin == 4 && end.size == 3) << end.run;
}

CASE("orders of memory") {
  struct Example {
    std::vector<int64_t> sizes, strides;
    Order order;
  };
  const Example examples[] = {
      {{2, 3, 4, 5}, {60, 20, 5, 1}, Order::planes},
      {{2, 3, 4, 5}, {60, 1, 15, 3}, Order::rows},
      {{2, 3, 4, 5}, {60, 20, 1, 4}, Order::planes},  // spatial axes transposed
      {{2, 3, 4, 5}, {60, 1, 3, 12}, Order::rows},
      {{2, 3, 4, 5}, {20, 40, 5, 1}, Order::unsupported},    // channels outermost
      {{2, 3, 4, 5}, {120, 40, 10, 2}, Order::unsupported},  // gaps
      {{2, 3, 4, 5}, {0, 20, 5, 1}, Order::unsupported},     // expanded
      {{2, 3, 4, 5}, {60, 20, 5, 0}, Order::unsupported},
      {{1, 3, 4, 5}, {777, 20, 5, 1}, Order::planes},  // the stride of one sample means nothing
      {{2, 1, 4, 5}, {20, 999, 5, 1}, Order::planes},
      {{2, 3, 1, 1}, {3, 1, 1, 1}, Order::rows},
      {{2, 3, 1, 5}, {15, 5, 123, 1}, Order::planes},
      {{6, 7}, {7, 1}, Order::rows},
      {{6, 7}, {1, 6}, Order::unsupported},
      {{1, 1, 1, 1}, {9, 9, 9, 9}, Order::rows},
      {{2, 3, 5}, {15, 5, 1}, Order::planes},
      {{2, 3, 2, 2, 2}, {24, 1, 12, 6, 3}, Order::rows},
      {{2, 2, 2, 2}, {8, 4, 1, 1}, Order::unsupported},  // overlapping
      {{4}, {1}, Order::unsupported},
  };
  for (const Example& e : examples) {
    const Order found = order_of(static_cast<int64_t>(e.sizes.size()), e.sizes.data(), e.strides.data());
    CHECK(found == e.order) << "example " << &e - examples << ", found " << static_cast<int>(found);
  }
}

}  // namespace
