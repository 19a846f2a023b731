// A call of fir_resample in guarded memory, and what must come out of it, in long double.
#pragma once

#include <cmath>
#include <vector>

#include "fir_resample/fir_resample.h"
#include "tests/buffer.h"

namespace lsgm {
namespace testing {

namespace resampling {

using namespace lsgm::fir_resample;

struct Example {
  Order order;
  bool up, fir, active;
  int64_t batch, channels, height, width;  // the last two of the smaller image
  DType dtype;
  int64_t offset;  // elements by which the tensors are out of alignment
};

// Every way, with the sizes in which the kernels differ.
inline std::vector<Example> examples() {
  std::vector<Example> all;
  struct Size {
    int64_t batch, channels, height, width;
  };
  const Size sizes[] = {{1, 1, 1, 1}, {2, 19, 3, 5}, {1, 3, 5, 8}, {2, 2, 8, 8}, {1, 5, 1, 8}, {1, 17, 2, 16},
      {1, 2, 4, 21}, {1, 3, 7, 33}, {3, 16, 4, 4}, {1, 33, 1, 3}};
  for (Order order : {Order::planes, Order::rows}) {
    for (bool up : {true, false}) {
      for (bool fir : {true, false}) {
        for (bool active : {false, true}) {
          for (const Size& s : sizes) {
            all.push_back(
                {order, up, fir, active, s.batch, s.channels, s.height, s.width, DType::float32, s.channels % 2});
          }
          for (DType dtype : {DType::bfloat16, DType::float16}) {
            all.push_back({order, up, fir, active, 1, 3, 5, 8, dtype, 0});
            all.push_back({order, up, fir, active, 2, 24, 3, 9, dtype, 1});
          }
          all.push_back({order, up, fir, active, 1, 2, 150, 120, DType::float32, 0});  // several bands
          all.push_back({order, up, fir, active, 1, 1, 1100, 8, DType::float32, 0});
        }
      }
    }
  }
  return all;
}

class Resampling {
 public:
  explicit Resampling(const Example& x)
      : e(x),
        height(x.up ? x.height : 2 * x.height),
        width(x.up ? x.width : 2 * x.width),
        planes(x.batch * x.channels),
        x_(planes * height * width, x.dtype, x.offset),
        factor(planes, DType::float32, x.offset),
        shift(planes, DType::float32, x.offset),
        out(planes * x.height * x.width * (x.up ? 4 : 1), x.dtype, x.offset) {
    Random random(7);
    for (Buffer* b : {&x_, &factor, &shift}) b->randomize(random);
    p.order = x.order;
    p.up = x.up;
    p.fir = x.fir;
    p.batch = x.batch;
    p.channels = x.channels;
    p.height = height;
    p.width = width;
    p.dtype = x.dtype;
    p.scale = scale_of(x.up, x.fir);
    p.x = x_.data();
    p.out = out.data();
    if (x.active) {
      p.factor = static_cast<const float*>(factor.data());
      p.shift = static_cast<const float*>(shift.data());
    }
  }

  int64_t at(int64_t plane, int64_t y, int64_t x, int64_t lines, int64_t columns) const {
    if (e.order == Order::planes) return (plane * lines + y) * columns + x;
    return ((plane / e.channels * lines + y) * columns + x) * e.channels + plane % e.channels;
  }

  // What element (y, x) counts for the sums.
  long double value(int64_t plane, int64_t y, int64_t x) const {
    if (y < 0 || y >= height || x < 0 || x >= width) return 0;
    const long double v = x_.at(at(plane, y, x, height, width));
    if (!e.active) return v;
    const long double u = v * factor.at(plane) + shift.at(plane);
    return u / (1 + std::exp(-u));
  }

  // How often element `from` of an axis counts for element `to` of the result.
  int weight(int64_t to, int64_t from) const {
    const int64_t d = e.up ? to - 2 * from : from - 2 * to;
    if (!e.fir) return d == 0 || d == 1 ? 1 : 0;
    return d == 0 || d == 1 ? 3 : d == -1 || d == 2 ? 1 : 0;
  }

  void check(const char* who) const {
    const int64_t lines = out_height(p), columns = out_width(p);
    for (int64_t plane = 0; plane < planes; ++plane) {
      for (int64_t y = 0; y < lines; ++y) {
        for (int64_t x = 0; x < columns; ++x) {
          long double total = 0, size = 0;
          const int64_t row = e.up ? y / 2 - 1 : 2 * y - 1, column = e.up ? x / 2 - 1 : 2 * x - 1;
          for (int64_t a = row; a < row + 4; ++a) {
            for (int64_t b = column; b < column + 4; ++b) {
              const long double term = p.scale * weight(y, a) * weight(x, b) * value(plane, a, b);
              total += term;
              size += std::fabs(term);
            }
          }
          const int64_t i = at(plane, y, x, lines, columns);
          const long double allowed = unit_roundoff(e.dtype) * std::fabs(total) + 1e-6L * size + 1e-7L;
          CHECK(std::fabs(out.at(i) - total) <= allowed)
              << who << " at " << plane << " " << y << " " << x << ": " << out.at(i) << ", expected "
              << static_cast<double>(total) << "; " << e.batch << "x" << e.channels << "x" << height << "x" << width
              << (e.up ? " up" : " down") << " fir " << e.fir << " active " << e.active << " order "
              << static_cast<int>(e.order) << " dtype " << static_cast<int>(e.dtype);
        }
      }
    }
  }

  Example e;
  int64_t height, width, planes;
  Buffer x_, factor, shift, out;
  Problem p{};
};

}  // namespace resampling
}  // namespace testing
}  // namespace lsgm
