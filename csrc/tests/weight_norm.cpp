// The CPU kernels of weight_norm, baseline and AVX2, against long double.
#include <cmath>
#include <memory>
#include <vector>

#include "common/cpu.h"
#include "tests/buffer.h"
#include "tests/check.h"
#include "weight_norm/weight_norm.h"

namespace {

using namespace lsgm;
using namespace lsgm::weight_norm;
using lsgm::testing::Buffer;
using lsgm::testing::Random;
using lsgm::testing::unit_roundoff;

using Kernel = void (*)(const Problem&, int64_t, int64_t);

struct Shape {
  int64_t filters, length;
};

// A list of weights with guarded buffers.
class Weights {
 public:
  Weights(const std::vector<Shape>& shapes, int64_t offset, float eps) {
    int64_t filters = 0;
    for (const Shape& s : shapes) {
      Weight w{};
      w.filters = s.filters;
      w.length = s.length;
      w.first = filters;
      w.v = buffer(v, s.filters * s.length, offset);
      w.log_norm = buffer(log_norm, s.filters, offset);
      w.grad = buffer(grad, s.filters * s.length, offset);
      w.out = buffer(out, s.filters * s.length, offset);
      filters += s.filters;
      list.push_back(w);
    }
    Random random(static_cast<uint64_t>(filters * 31 + offset));
    for (auto* group : {&v, &log_norm, &grad}) {
      for (auto& b : *group) b->randomize(random);
    }
    norms = std::make_unique<Buffer>(filters, DType::float32, 0);
    grad_log_norm = std::make_unique<Buffer>(filters, DType::float32, 0);
    p = Problem{};
    p.weights = list.data();
    p.count = static_cast<int64_t>(list.size());
    p.eps = eps;
    p.norms = static_cast<float*>(norms->data());
    p.saved_norms = p.norms;
    p.grad_log_norm = static_cast<float*>(grad_log_norm->data());
    cpu::plan(p);
  }

  void check_forward(const char* who) const {
    each_filter([&](size_t i, int64_t k) {
      const Filter f = filter(i, k);
      close(who, "norm", i, k, norms->at(list[i].first + k), f.norm, f.norm);
      for (int64_t j = k * list[i].length; j < (k + 1) * list[i].length; ++j) {
        const long double expected = f.scale * v[i]->at(j);
        close(who, "w", i, j, out[i]->at(j), expected, std::fabs(expected));
      }
    });
  }

  // With the norms that forward wrote.
  void check_backward(const char* who) const {
    each_filter([&](size_t i, int64_t k) {
      const Filter f = filter(i, k);
      close(who, "grad_g", i, k, grad_log_norm->at(list[i].first + k), f.scale * f.along, f.scale * f.along_size);
      for (int64_t j = k * list[i].length; j < (k + 1) * list[i].length; ++j) {
        const long double share = f.norm == 0 ? 0 : f.scale * v[i]->at(j) / ((f.norm + p.eps) * f.norm);
        const long double first = f.scale * grad[i]->at(j);
        close(who, "grad_v", i, j, out[i]->at(j), first - share * f.along,
            std::fabs(first) + std::fabs(share) * f.along_size);
      }
    });
  }

  std::vector<Weight> list;
  std::vector<std::unique_ptr<Buffer>> v, log_norm, grad, out;
  std::unique_ptr<Buffer> norms, grad_log_norm;
  Problem p;

 private:
  struct Filter {
    long double norm, scale, along, along_size;
  };

  static float* buffer(std::vector<std::unique_ptr<Buffer>>& group, int64_t count, int64_t offset) {
    group.push_back(std::make_unique<Buffer>(count, DType::float32, offset));
    return static_cast<float*>(group.back()->data());
  }

  template <class F>
  void each_filter(F&& f) const {
    for (size_t i = 0; i < list.size(); ++i) {
      for (int64_t k = 0; k < list[i].filters; ++k) f(i, k);
    }
  }

  Filter filter(size_t i, int64_t k) const {
    Filter f{};
    for (int64_t j = k * list[i].length; j < (k + 1) * list[i].length; ++j) {
      const long double x = v[i]->at(j), g = grad[i]->at(j);
      f.norm += x * x;
      f.along += x * g;
      f.along_size += std::fabs(x * g);
    }
    f.norm = std::sqrt(f.norm);
    f.scale = std::exp(static_cast<long double>(log_norm[i]->at(k))) / (f.norm + p.eps);
    return f;
  }

  void close(const char* who, const char* what, size_t i, int64_t at, double got, long double expected,
      long double size) const {
    CHECK(std::fabs(got - expected) <= 12 * unit_roundoff(DType::float32) * size)
        << who << ": " << what << " of weight " << i << " (" << list[i].filters << "x" << list[i].length << ") at "
        << at << " is " << got << ", expected " << static_cast<double>(expected);
  }
};

// Filters around the widths of registers, unrolled loops, flushes and pieces; many small weights; empty ones.
std::vector<std::vector<Shape>> lists() {
  std::vector<std::vector<Shape>> all = {{{1, 1}}, {{3, 0}, {0, 7}, {2, 5}}, {{2, 20000}, {1, 16384}, {3, 16385}},
      {{5, 4096}, {5, 4100}, {7, 8199}}, {{700, 25}, {9, 405}, {1, 3}, {40, 1000}}};
  std::vector<Shape> many;
  for (int64_t length = 1; length < 140; ++length) many.push_back({length % 4 + 1, length});
  all.push_back(many);
  return all;
}

// In three ranges, as three threads would.
void in_ranges(const Problem& p, Kernel kernel) {
  const int64_t n = p.pieces, third = n / 3;
  kernel(p, 2 * third, n);
  kernel(p, 0, third);
  kernel(p, third, 2 * third);
}

void check_kernels(const char* who, Kernel forward, Kernel backward) {
  for (const auto& shapes : lists()) {
    for (int64_t offset : {0, 1}) {
      for (float eps : {1e-5f, 0.5f}) {
        Weights w(shapes, offset, eps);
        in_ranges(w.p, forward);
        w.check_forward(who);
        in_ranges(w.p, backward);
        w.check_backward(who);
      }
    }
  }
}

CASE("baseline kernels") { check_kernels("scalar", &scalar::forward, &scalar::backward); }

#if defined(LSGM_HAVE_AVX2)
CASE("AVX2 kernels") {
  if (has_avx2()) check_kernels("avx2", &avx2::forward, &avx2::backward);
}
#endif

CASE("the kernels chosen at run time") { check_kernels("cpu", &cpu::forward, &cpu::backward); }

CASE("one piece at a time, the same bits") {
  const std::vector<Shape> shapes = {{50, 1000}, {2, 3}, {0, 5}, {300, 130}, {1, 40000}};
  Weights once(shapes, 0, 1e-5f), apart(shapes, 0, 1e-5f);
  cpu::forward(once.p, 0, once.p.pieces);
  cpu::backward(once.p, 0, once.p.pieces);
  for (int64_t i = apart.p.pieces - 1; i >= 0; --i) cpu::forward(apart.p, i, i + 1);
  for (int64_t i = apart.p.pieces - 1; i >= 0; --i) cpu::backward(apart.p, i, i + 1);
  for (size_t i = 0; i < shapes.size(); ++i) {
    for (int64_t j = 0; j < shapes[i].filters * shapes[i].length; ++j) {
      CHECK(once.out[i]->at(j) == apart.out[i]->at(j)) << i << " " << j;
    }
  }
  for (int64_t k = 0; k < once.norms->count(); ++k) CHECK(once.grad_log_norm->at(k) == apart.grad_log_norm->at(k)) << k;
}

CASE("a filter of zeros is scaled, and so is its gradient") {
  Weights w({{3, 11}}, 0, 1e-5f);
  for (int64_t j = 11; j < 22; ++j) w.v[0]->set(j, 0);
  cpu::forward(w.p, 0, w.p.pieces);
  for (int64_t j = 11; j < 22; ++j) CHECK(w.out[0]->at(j) == 0) << j;
  cpu::backward(w.p, 0, w.p.pieces);
  w.check_backward("cpu");
  CHECK(w.grad_log_norm->at(1) == 0);
}

CASE("norms whose square is no float32") {
  Weights w({{2, 9}}, 0, 0.0f);
  for (int64_t j = 0; j < 18; ++j) w.v[0]->set(j, w.v[0]->at(j) * 1e-18);
  cpu::forward(w.p, 0, w.p.pieces);
  cpu::backward(w.p, 0, w.p.pieces);
  for (int64_t j = 0; j < 18; ++j) CHECK(std::isfinite(w.out[0]->at(j))) << j;
}

CASE("NaN stays in its filter") {
  Weights w({{2, 20}, {3, 20}}, 0, 1e-5f);
  w.v[1]->set(25, std::nan(""));
  cpu::forward(w.p, 0, w.p.pieces);
  for (int64_t j = 0; j < 40; ++j) CHECK(std::isfinite(w.out[0]->at(j))) << j;
  for (int64_t j = 0; j < 60; ++j) CHECK(std::isfinite(w.out[1]->at(j)) == (j / 20 != 1)) << j;
}

CASE("plans beyond 2^31 elements") {
  Weight list[2] = {};
  list[0].filters = int64_t(1) << 33;
  list[0].length = 9;
  list[1].filters = 3;
  list[1].length = int64_t(1) << 34;
  Problem p{};
  p.weights = list;
  p.count = 2;
  cpu::plan(p);
  CHECK(list[0].filters_per_piece == 16384 / 9 && list[1].first_piece == ceil_div(int64_t(1) << 33, 16384 / 9));
  CHECK(p.pieces == list[1].first_piece + 3 && cpu::grain(p) == 2);
}

}  // namespace
