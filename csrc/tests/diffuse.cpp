// The CPU kernels of diffuse, baseline and AVX2, against long double.
#include <cmath>
#include <vector>

#include "common/cpu.h"
#include "diffuse/diffuse.h"
#include "tests/buffer.h"
#include "tests/check.h"

namespace {

using namespace lsgm;
using namespace lsgm::diffuse;
using lsgm::testing::Buffer;
using lsgm::testing::Random;
using lsgm::testing::unit_roundoff;

struct Example {
  int64_t batch, size;
  DType first, second, scalar;  // z0 and noise, or the gradient and its scaled one
  bool shared;
  int64_t offset;  // of every tensor, in elements: 0 is aligned
};

std::vector<Example> examples() {
  const DType all[] = {DType::float32, DType::float64, DType::float16, DType::bfloat16};
  struct Shape {
    int64_t batch, size;
  };
  const Shape small[] = {{1, 1}, {3, 7}, {2, 8}, {5, 9}, {300, 3}, {2, 260}, {2, 1031}};
  std::vector<Example> list;
  for (DType first : all) {
    for (DType second : all) {
      int64_t n = 0;
      for (const Shape& s : small) {
        const bool odd = n++ % 2 == 1;
        list.push_back(
            {s.batch, s.size, first, second, odd ? DType::float64 : DType::float32, n % 4 == 2, n % 3 == 2 ? 1 : 0});
      }
    }
    list.push_back({3, 16391, first, DType::float32, DType::float32, false, 0});
    list.push_back({1, 40000, DType::float32, first, DType::float64, true, 3});
  }
  return list;
}

// Runs kernel(begin, end) in three ranges, as three threads would.
template <class F>
void in_ranges(int64_t n, F&& kernel) {
  const int64_t third = n / 3;
  kernel(2 * third, n);
  kernel(0, third);
  kernel(third, 2 * third);
}

double arithmetic(const Example& x) {
  const bool wide = x.first == DType::float64 || x.second == DType::float64;
  return unit_roundoff(wide ? DType::float64 : DType::float32);
}

bool close(double got, long double expected, long double scale, double arithmetic, DType dtype) {
  const long double allowed = 4 * arithmetic * scale + unit_roundoff(dtype) * std::fabs(expected) * 1.01L +
                              0x1p-25L * (dtype == DType::float16 ? 1 : 0);
  return std::fabs(got - expected) <= allowed;
}

struct Forward {
  explicit Forward(const Example& x)
      : z0(x.batch * x.size, x.first, x.offset),
        noise(x.batch * x.size, x.second, x.offset),
        out(x.batch * x.size, x.first, x.offset),
        m(x.shared ? 1 : x.batch, x.scalar, 0),
        var(x.shared ? 1 : x.batch, x.scalar, 0) {
    Random random(static_cast<uint64_t>(x.batch * 31 + x.size));
    for (Buffer* b : {&z0, &noise, &m}) b->randomize(random);
    for (int64_t i = 0; i < var.count(); ++i) var.set(i, random.uniform(0, 1));
    p = Problem{};
    p.batch = x.batch;
    p.size = x.size;
    p.segments = cpu::plan(x.batch, x.size);
    p.z0_dtype = x.first;
    p.noise_dtype = x.second;
    p.z0 = z0.data();
    p.noise = noise.data();
    p.m = {m.data(), x.scalar, x.shared ? 0 : 1};
    p.var = {var.data(), x.scalar, x.shared ? 0 : 1};
    p.out = out.data();
  }
  Buffer z0, noise, out, m, var;
  Problem p;
};

void check_forward(const char* who, void (*kernel)(const Problem&, int64_t, int64_t)) {
  for (const Example& x : examples()) {
    const Forward f(x);
    in_ranges(f.p.segments.count, [&](int64_t begin, int64_t end) { kernel(f.p, begin, end); });
    for (int64_t i = 0; i < x.batch * x.size; ++i) {
      const int64_t sample = x.shared ? 0 : i / x.size;
      const long double mean = f.m.at(sample) * static_cast<long double>(f.z0.at(i));
      const long double spread = std::sqrt(static_cast<long double>(f.var.at(sample))) * f.noise.at(i);
      CHECK(close(f.out.at(i), mean + spread, std::fabs(mean) + std::fabs(spread), arithmetic(x), x.first))
          << who << ": out[" << i << "] is " << f.out.at(i) << ", expected " << static_cast<double>(mean + spread)
          << "; shape " << x.batch << "x" << x.size << " dtypes " << static_cast<int>(x.first)
          << static_cast<int>(x.second) << " offset " << x.offset;
    }
  }
}

void check_backward(const char* who, void (*kernel)(const Scaling&, int64_t, int64_t)) {
  for (const Example& x : examples()) {
    const int64_t n = x.batch * x.size;
    Buffer grad(n, x.first, x.offset), out(n, x.second, x.offset), factor(x.shared ? 1 : x.batch, x.scalar, 0);
    Random random(static_cast<uint64_t>(n));
    grad.randomize(random);
    factor.randomize(random);
    Scaling p{};
    p.batch = x.batch;
    p.size = x.size;
    p.segments = cpu::plan(x.batch, x.size);
    p.grad_dtype = x.first;
    p.out_dtype = x.second;
    p.grad = grad.data();
    p.factor = {factor.data(), x.scalar, x.shared ? 0 : 1};
    p.out = out.data();
    in_ranges(p.segments.count, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
    for (int64_t i = 0; i < n; ++i) {
      const long double expected = factor.at(x.shared ? 0 : i / x.size) * static_cast<long double>(grad.at(i));
      CHECK(close(out.at(i), expected, std::fabs(expected), arithmetic(x), x.second))
          << who << ": gradient[" << i << "] is " << out.at(i) << ", expected " << static_cast<double>(expected)
          << "; shape " << x.batch << "x" << x.size << " dtypes " << static_cast<int>(x.first)
          << static_cast<int>(x.second) << " offset " << x.offset;
    }
  }
}

CASE("baseline kernels") {
  check_forward("scalar", &scalar::forward);
  check_backward("scalar", &scalar::backward);
}

#if defined(LSGM_HAVE_AVX2)
CASE("AVX2 kernels") {
  if (!has_avx2()) return;
  check_forward("avx2", &avx2::forward);
  check_backward("avx2", &avx2::backward);
}
#endif

CASE("the kernels chosen at run time") {
  check_forward("cpu", &cpu::forward);
  check_backward("cpu", &cpu::backward);
}

CASE("the root is that of float64, rounded once") {
  float x = 0.1f;
  double y = 0.1;
  CHECK(deviation<float>({&x, DType::float32, 0}, 0) == static_cast<float>(std::sqrt(static_cast<double>(x))));
  CHECK(deviation<double>({&y, DType::float64, 0}, 0) == std::sqrt(y));
  y = 1e-60;  // less than float32 has, unlike its root
  CHECK(deviation<float>({&y, DType::float64, 0}, 0) == 1e-30f);
}

CASE("an element's value does not depend on its place") {
  // The same numbers at the start of a sample and in its tail.
  for (int64_t size : {5, 8, 9, 15, 16, 23}) {
    Forward f({1, size, DType::float32, DType::float32, DType::float32, true, 0});
    for (int64_t i = 0; i < size; ++i) {
      f.z0.set(i, 0.7);
      f.noise.set(i, -1.3);
    }
    cpu::forward(f.p, 0, f.p.segments.count);
    for (int64_t i = 1; i < size; ++i) CHECK(f.out.at(i) == f.out.at(0)) << size << " " << i;
  }
}

CASE("NaN and infinity stay in their elements") {
  for (DType dtype : {DType::float32, DType::float64, DType::float16, DType::bfloat16}) {
    Forward f({2, 20, dtype, dtype, DType::float32, true, 0});
    f.m.set(0, 1);
    f.var.set(0, 4);
    for (int64_t i = 0; i < 40; ++i) {
      f.z0.set(i, 1);
      f.noise.set(i, i % 5 == 1 ? std::nan("") : i % 5 == 2 ? HUGE_VAL : i % 5 == 3 ? -HUGE_VAL : 3);
    }
    cpu::forward(f.p, 0, f.p.segments.count);
    for (int64_t i = 0; i < 40; ++i) {
      const double v = f.out.at(i);
      const bool right = i % 5 == 1 ? std::isnan(v) : i % 5 == 2 ? v == HUGE_VAL : i % 5 == 3 ? v == -HUGE_VAL : v == 7;
      CHECK(right) << static_cast<int>(dtype) << " " << i << " " << v;
    }
  }
}

}  // namespace
