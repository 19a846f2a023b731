// The CPU kernels of depthwise_bn_swish, baseline and AVX2, against long double.
#include "depthwise_bn_swish/depthwise_bn_swish.h"

#include <cmath>
#include <memory>
#include <vector>

#include "common/cpu.h"
#include "tests/buffer.h"

namespace {

using namespace lsgm;
using namespace lsgm::depthwise_bn_swish;
using lsgm::testing::Buffer;
using lsgm::testing::unit_roundoff;

using Kernel = void (*)(const Problem&, int64_t, int64_t, float*);

struct Example {
  Order order;
  int64_t batch, channels, height, width, stride;
  DType dtype;
  bool pre, post;
  int64_t offset;  // elements by which the tensors are out of alignment
};

std::vector<Example> examples() {
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

class Case {
 public:
  explicit Case(const Example& x)
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
    lsgm::testing::Random random(7);
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
    cpu::plan(p);
    table.resize(static_cast<size_t>(cpu::table_size(p)));
    cpu::fill_table(p, table.data());
    p.table = table.data();
  }

  // Every range in memory of its own, allocated to the byte; in three ranges, as three threads would.
  void run(Kernel kernel, int64_t units, bool backward) {
    const auto size = static_cast<size_t>(cpu::scratch_size(p, backward));
    const int64_t third = units / 3;
    for (const auto& [begin, end] :
        {std::pair<int64_t, int64_t>{2 * third, units}, {0, third}, {third, 2 * third}}) {
      if (begin == end) continue;
      const std::unique_ptr<float[]> scratch(new float[size]);
      for (size_t i = 0; i < size; ++i) scratch[i] = std::nanf("");
      kernel(p, begin, end, scratch.get());
    }
  }

  void forward(Kernel kernel) {
    p.out = out.data();
    if (e.pre) {
      p.pre_scale = affine[0]->data();
      p.pre_shift = affine[1]->data();
    }
    if (e.post) {
      p.post_scale = affine[2]->data();
      p.post_shift = affine[3]->data();
    }
    run(kernel, cpu::forward_units(p), false);
  }

  void backward(Kernel kernel) {
    p.pre_scale = p.pre_shift = p.post_scale = p.post_shift = nullptr;
    p.grad = grad.data();
    p.grad_x = grad_x.data();
    p.grad_weight = grad_weight.data();
    partials.assign(static_cast<size_t>(p.sample_runs * p.channels * kTaps), std::nan(""));
    p.partials = partials.data();
    run(kernel, cpu::backward_units(p), true);
    cpu::finish(p);
  }

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
  std::vector<float> table;
  std::vector<double> partials;
  Problem p{};
};

void check_kernels(const char* who, Kernel forward, Kernel backward) {
  for (const Example& example : examples()) {
    Case c(example);
    c.forward(forward);
    c.check_forward(who);
    c.backward(backward);
    c.check_backward(who);
  }
}

CASE("baseline kernels") { check_kernels("scalar", &scalar::forward, &scalar::backward); }

#if defined(LSGM_HAVE_AVX2)
CASE("AVX2 kernels") {
  if (has_avx2()) check_kernels("avx2", &avx2::forward, &avx2::backward);
}
#endif

CASE("the same bits wherever a range of units begins") {
  for (Order order : {Order::planes, Order::rows}) {
    Case c({order, 130, 20, 33, 31, 2, DType::float32, false, false, 0});
    c.backward(&cpu::backward);
    const std::vector<double> once = c.partials;
    const int64_t units = cpu::backward_units(c.p);
    CHECK(units > 3);
    std::vector<float> scratch(static_cast<size_t>(cpu::scratch_size(c.p, true)));
    c.partials.assign(once.size(), std::nan(""));
    c.p.partials = c.partials.data();
    for (int64_t i = units - 1; i >= 0; --i) cpu::backward(c.p, i, i + 1, scratch.data());
    CHECK(once == c.partials);
  }
}

CASE("swish of large, small and undefined values") {
  for (DType dtype : {DType::float32, DType::bfloat16}) {
    Case c({Order::planes, 1, 1, 1, 9, 1, dtype, true, false, 0});
    const double values[] = {-HUGE_VAL, -200, -88.5, -30, 0, 30, 200, HUGE_VAL, std::nan("")};
    c.affine[0]->set(0, 1);
    c.affine[1]->set(0, 0);
    for (int64_t i = 0; i < kTaps; ++i) c.weight.set(i, i == 12 ? 1 : 0);
    cpu::fill_table(c.p, c.table.data());
    for (double value : values) {
      for (int64_t i = 0; i < 9; ++i) c.x_.set(i, value);
      c.forward(&cpu::forward);
      const double u = c.x_.at(0), expected = u / (1 + std::exp(-u));
      for (int64_t i = 0; i < 9; ++i) {
        // 0 * infinity, beside the tap that is not 0, is undefined too.
        const bool right = std::isfinite(u) ? std::fabs(c.out.at(i) - expected) <= 4e-3 * std::fabs(expected) + 1e-30
                                            : std::isnan(c.out.at(i));
        CHECK(right) << value << " " << i << " " << c.out.at(i);
      }
    }
  }
}

}  // namespace
