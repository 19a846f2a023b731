// A call of depthwise_bn_swish in guarded memory, and what must come out of it, in long double.
#pragma once

#include <cmath>
#include <memory>
#include <vector>

#include "depthwise_bn_swish/depthwise_bn_swish.h"
#include "tests/buffer.h"

namespace lsgm {
namespace testing {

namespace depthwise {

using namespace lsgm::depthwise_bn_swish;

struct Example {
  Order order;
  int64_t batch, channels, height, width, stride;
  DType dtype;
  bool pre, post;
  int64_t offset;  // elements by which the tensors are out of alignment
};

inline std::vector<Example> examples() {
  std::vector<Example> all;
  const DType f32 = DType::float32;
  for (Order order : {Order::planes, Order::rows}) {
    for (int64_t stride : {1, 2}) {
      for (const auto& [height, width] : {std::pair<int64_t, int64_t>{8, 8}, {1, 1}, {5, 13}, {16, 17}, {2, 3}}) {
        all.push_back({order, 2, 19, height, width, stride, f32, false, false, 0});
        all.push_back({order, 3, 3, height, width, stride, f32, true, true, 1});
      }
      all.push_back({order, 1, 9, 6, 9, stride, DType::bfloat16, true, false, 1});
      all.push_back({order, 1, 9, 7, 8, stride, DType::float16, false, true, 0});
      all.push_back({order, 1, 3, 150, 120, stride, f32, true, false, 0});  // several bands
      all.push_back({order, 70, 2, 16, 17, stride, f32, false, false, 0});  // several runs of samples
    }
  }
  return all;
}

class Depthwise {
 public:
  explicit Depthwise(const Example& x)
      : e(x),
        out_height(out_size(x.height, x.stride)),
        out_width(out_size(x.width, x.stride)),
        in_count(x.batch * x.channels * x.height * x.width),
        out_count(x.batch * x.channels * out_height * out_width),
        x_(in_count, x.dtype, x.offset),
        weight(x.channels * kTaps, x.dtype, x.offset),
        out(out_count, x.dtype, x.offset),
        grad(out_count, x.dtype, x.offset),
        grad_x(in_count, x.dtype, x.offset),
        grad_weight(x.channels * kTaps, x.dtype, x.offset) {
    Random random(7);
    for (Buffer* b : {&x_, &weight, &grad}) b->randomize(random);
    for (auto& a : affine) {
      a = std::make_unique<Buffer>(x.channels, x.dtype, x.offset);
      a->randomize(random);
    }
    p.order = x.order;
    p.batch = x.batch;
    p.channels = x.channels;
    p.height = x.height;
    p.width = x.width;
    p.stride = x.stride;
    p.out_height = out_height;
    p.out_width = out_width;
    p.dtype = p.weight_dtype = x.dtype;
    p.x = x_.data();
    p.weight = weight.data();
    p.grad = grad.data();
    p.grad_x = grad_x.data();
    p.grad_weight = grad_weight.data();
    p.out = out.data();
  }

  void with_affines() {
    if (e.pre) {
      p.pre_scale = affine[0]->data();
      p.pre_shift = affine[1]->data();
    }
    if (e.post) {
      p.post_scale = affine[2]->data();
      p.post_shift = affine[3]->data();
    }
  }

  void without_affines() { p.pre_scale = p.pre_shift = p.post_scale = p.post_shift = nullptr; }

  int64_t at(int64_t n, int64_t c, int64_t y, int64_t x, int64_t height, int64_t width) const {
    return e.order == Order::planes ? ((n * e.channels + c) * height + y) * width + x
                                    : ((n * height + y) * width + x) * e.channels + c;
  }

  long double activated(long double v, int64_t side, int64_t c) const {
    const long double u = v * affine[static_cast<size_t>(side)]->at(c) + affine[static_cast<size_t>(side + 1)]->at(c);
    return u / (1 + std::exp(-u));
  }

  // The inputs within the image of output (y, x): f(place in memory of the input, tap).
  template <class F>
  void for_each_tap(int64_t n, int64_t c, int64_t y, int64_t x, F&& f) const {
    for (int64_t a = 0; a < 5; ++a) {
      for (int64_t b = 0; b < 5; ++b) {
        const int64_t i = e.stride * y + a - 2, j = e.stride * x + b - 2;
        if (i < 0 || i >= e.height || j < 0 || j >= e.width) continue;
        f(at(n, c, i, j, e.height, e.width), c * kTaps + a * 5 + b);
      }
    }
  }

  template <class F>
  void for_each_output(F&& f) const {
    for (int64_t n = 0; n < e.batch; ++n) {
      for (int64_t c = 0; c < e.channels; ++c) {
        for (int64_t y = 0; y < out_height; ++y) {
          for (int64_t x = 0; x < out_width; ++x) f(n, c, y, x);
        }
      }
    }
  }

  void check(const char* who, const char* what, int64_t i, double got, long double expected, long double scale) const {
    const long double allowed = unit_roundoff(e.dtype) * std::fabs(expected) + 1e-6L * scale + 1e-7L;
    CHECK(std::fabs(got - expected) <= allowed)
        << who << " " << what << " " << i << ": " << got << ", expected " << static_cast<double>(expected) << "; "
        << e.batch << "x" << e.channels << "x" << e.height << "x" << e.width << " stride " << e.stride << " order "
        << static_cast<int>(e.order);
  }

  void check_forward(const char* who) const {
    for_each_output([&](int64_t n, int64_t c, int64_t y, int64_t x) {
      long double total = 0, scale = 0;
      for_each_tap(n, c, y, x, [&](int64_t i, int64_t k) {
        const long double term = weight.at(k) * (e.pre ? activated(x_.at(i), 0, c) : x_.at(i));
        total += term;
        scale += std::fabs(term);
      });
      const int64_t i = at(n, c, y, x, out_height, out_width);
      check(who, "out", i, out.at(i), e.post ? activated(total, 2, c) : total, e.post ? 3 * scale + 3 : scale);
    });
  }

  void check_backward(const char* who) const {
    std::vector<long double> dx(static_cast<size_t>(in_count)), dx_scale(dx.size());
    std::vector<long double> dw(static_cast<size_t>(e.channels * kTaps)), dw_scale(dw.size());
    for_each_output([&](int64_t n, int64_t c, int64_t y, int64_t x) {
      const long double g = grad.at(at(n, c, y, x, out_height, out_width));
      for_each_tap(n, c, y, x, [&](int64_t i, int64_t k) {
        const auto s = static_cast<size_t>(i), t = static_cast<size_t>(k);
        dx[s] += g * weight.at(k);
        dx_scale[s] += std::fabs(g * weight.at(k));
        dw[t] += g * x_.at(i);
        dw_scale[t] += std::fabs(g * x_.at(i));
      });
    });
    for (size_t i = 0; i < dx.size(); ++i) {
      check(who, "grad_x", static_cast<int64_t>(i), grad_x.at(static_cast<int64_t>(i)), dx[i], dx_scale[i]);
    }
    for (size_t i = 0; i < dw.size(); ++i) {
      check(who, "grad_weight", static_cast<int64_t>(i), grad_weight.at(static_cast<int64_t>(i)), dw[i], dw_scale[i]);
    }
  }

  Example e;
  int64_t out_height, out_width, in_count, out_count;
  Buffer x_, weight, out, grad, grad_x, grad_weight;
  std::unique_ptr<Buffer> affine[4];
  std::vector<double> partials;
  Problem p{};
};

}  // namespace depthwise
}  // namespace testing
}  // namespace lsgm
