// The CPU kernels of score_matching_loss, baseline and AVX2, against long double.
#include <cmath>
#include <vector>

#include "common/cpu.h"
#include "score_matching_loss/score_matching_loss.h"
#include "tests/buffer.h"
#include "tests/check.h"

namespace {

using namespace lsgm;
using namespace lsgm::score_matching_loss;
using lsgm::testing::Buffer;
using lsgm::testing::Random;
using lsgm::testing::unit_roundoff;

using Kernel = void (*)(const Problem&, int64_t, int64_t);

// Which gradient of the cross entropy arrives.
enum class Ce { none, sample, element };

struct Example {
  int64_t batch, size;
  DType pred, noise, scalar;
  bool shared;
  int64_t offset;  // of every tensor, in elements: 0 is aligned
};

DType arithmetic(const Example& x) {
  return x.pred == DType::float64 || x.noise == DType::float64 ? DType::float64 : DType::float32;
}

std::vector<Example> examples() {
  const DType all[] = {DType::float32, DType::float64, DType::float16, DType::bfloat16};
  struct Shape {
    int64_t batch, size;
  };
  const Shape small[] = {{1, 1}, {3, 7}, {2, 8}, {5, 9}, {300, 3}, {2, 260}, {2, 1031}};
  std::vector<Example> list;
  for (DType pred : all) {
    for (DType noise : all) {
      int64_t n = 0;
      for (const Shape& s : small) {
        const bool odd = n++ % 2 == 1;
        list.push_back(
            {s.batch, s.size, pred, noise, odd ? DType::float64 : DType::float32, n % 4 == 2, n % 3 == 2 ? 1 : 0});
      }
    }
    list.push_back({3, 16391, pred, DType::float32, DType::float32, false, 0});
    list.push_back({1, 40000, DType::float32, pred, DType::float64, true, 3});
  }
  return list;
}

class Loss {
 public:
  explicit Loss(const Example& x)
      : example(x),
        count(x.batch * x.size),
        pred(count, x.pred, x.offset),
        noise(count, x.noise, x.offset),
        weight_p(x.shared ? 1 : x.batch, x.scalar, 0),
        weight_q(x.shared ? 1 : x.batch, x.scalar, 0),
        p_loss(x.batch, arithmetic(x), 0),
        cross_entropy(count, arithmetic(x), x.offset),
        grad_p(x.batch, arithmetic(x), 0),
        grad_ce(count, arithmetic(x), x.offset),
        grad_pred(count, x.pred, x.offset),
        grad_noise(count, x.noise, x.offset) {
    Random random(static_cast<uint64_t>(count * 31 + x.batch));
    for (Buffer* b : {&pred, &noise, &weight_p, &weight_q, &grad_p, &grad_ce}) b->randomize(random);
    p = Problem{};
    p.batch = x.batch;
    p.size = x.size;
    p.pred_dtype = x.pred;
    p.noise_dtype = x.noise;
    p.pred = pred.data();
    p.noise = noise.data();
    p.weight_p = {weight_p.data(), x.scalar, x.shared ? 0 : 1};
    p.constant = -1.25;
    cpu::plan(p);
  }

  void bind_weight_q() { p.weight_q = {weight_q.data(), example.scalar, example.shared ? 0 : 1}; }

  void bind_forward(bool with_cross_entropy) {
    p.p_loss = p_loss.data();
    partials.assign(static_cast<size_t>(p.segments.count), std::nan(""));
    p.partials = partials.data();
    if (with_cross_entropy) {
      bind_weight_q();
      p.cross_entropy = cross_entropy.data();
    }
  }

  void bind_backward(bool of_p, Ce ce, bool for_pred, bool for_noise) {
    const DType dtype = arithmetic(example);
    if (of_p) p.grad_p = {grad_p.data(), dtype, 1};
    if (ce != Ce::none) bind_weight_q();
    if (ce == Ce::element) p.grad_ce = grad_ce.data();
    if (ce == Ce::sample) p.sample_grad_ce = {grad_ce.data(), dtype, 1};
    if (for_pred) p.grad_pred = grad_pred.data();
    if (for_noise) p.grad_noise = grad_noise.data();
  }

  void check_forward(const char* who) const {
    std::vector<long double> sums(static_cast<size_t>(example.batch)), scales(sums.size());
    for (int64_t i = 0; i < count; ++i) {
      const int64_t sample = i / example.size;
      const long double d = difference(i), size = scale(i);
      sums[static_cast<size_t>(sample)] += weight(weight_p, i) * d * d;
      scales[static_cast<size_t>(sample)] += std::fabs(weight(weight_p, i)) * d * d;
      if (p.cross_entropy != nullptr) {
        const long double squared = weight(weight_q, i) * d * d;
        check(who, "cross_entropy", i, cross_entropy.at(i), squared + p.constant,
            std::fabs(weight(weight_q, i)) * size * size + std::fabs(p.constant), arithmetic(example));
      } else {
        CHECK(std::isnan(cross_entropy.at(i))) << who << ": written at " << i;
      }
    }
    for (int64_t b = 0; b < example.batch; ++b) {
      const auto i = static_cast<size_t>(b);
      check(who, "p_loss", b, p_loss.at(b), sums[i], scales[i], arithmetic(example));
    }
  }

  void check_backward(const char* who, bool of_p, Ce ce) const {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t sample = i / example.size;
      const long double of_loss = of_p ? weight(weight_p, i) * grad_p.at(sample) : 0;
      const long double of_ce = ce == Ce::none ? 0 : weight(weight_q, i) * grad_ce.at(ce == Ce::sample ? sample : i);
      const long double expected = 2 * difference(i) * (of_loss + of_ce);
      const long double size = 2 * std::fabs(difference(i)) * (std::fabs(of_loss) + std::fabs(of_ce));
      if (p.grad_pred != nullptr) check(who, "grad_pred", i, grad_pred.at(i), expected, size, example.pred);
      if (p.grad_noise != nullptr) check(who, "grad_noise", i, grad_noise.at(i), -expected, size, example.noise);
      CHECK(p.grad_pred != nullptr || std::isnan(grad_pred.at(i))) << who << ": written at " << i;
      CHECK(p.grad_noise != nullptr || std::isnan(grad_noise.at(i))) << who << ": written at " << i;
    }
  }

  Example example;
  int64_t count;
  Buffer pred, noise, weight_p, weight_q, p_loss, cross_entropy, grad_p, grad_ce, grad_pred, grad_noise;
  std::vector<double> partials;
  Problem p;

 private:
  long double weight(const Buffer& w, int64_t i) const { return w.at(example.shared ? 0 : i / example.size); }
  long double difference(int64_t i) const { return static_cast<long double>(pred.at(i)) - noise.at(i); }
  long double scale(int64_t i) const { return std::fabs(pred.at(i)) + std::fabs(noise.at(i)); }

  void check(const char* who, const char* what, int64_t i, double got, long double expected, long double scale,
      DType dtype) const {
    const long double allowed = 8 * unit_roundoff(arithmetic(example)) * scale +
                                unit_roundoff(dtype) * std::fabs(expected) * 1.01L +
                                0x1p-25L * (dtype == DType::float16 ? 1 : 0);
    CHECK(std::fabs(got - expected) <= allowed)
        << who << ": " << what << "[" << i << "] is " << got << ", expected " << static_cast<double>(expected)
        << "; shape " << example.batch << "x" << example.size << " dtypes " << static_cast<int>(example.pred)
        << static_cast<int>(example.noise) << " offset " << example.offset;
  }
};

// In three ranges, as three threads would.
void in_ranges(const Problem& p, Kernel kernel) {
  const int64_t n = p.segments.count, third = n / 3;
  kernel(p, 2 * third, n);
  kernel(p, 0, third);
  kernel(p, third, 2 * third);
}

void check_kernels(const char* who, Kernel forward, Kernel backward) {
  for (const Example& x : examples()) {
    for (bool with_cross_entropy : {false, true}) {
      Loss loss(x);
      loss.bind_forward(with_cross_entropy);
      in_ranges(loss.p, forward);
      cpu::finish(loss.p);
      loss.check_forward(who);
    }
    int64_t n = 0;
    for (bool of_p : {false, true}) {
      for (Ce ce : {Ce::none, Ce::sample, Ce::element}) {
        Loss loss(x);
        ++n;
        loss.bind_backward(of_p, ce, n % 3 != 0, n % 3 != 1);
        in_ranges(loss.p, backward);
        loss.check_backward(who, of_p, ce);
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

CASE("one thread or many, the same bits") {
  Loss loss({3, 50000, DType::float32, DType::float32, DType::float32, false, 0});
  loss.bind_forward(false);
  cpu::forward(loss.p, 0, loss.p.segments.count);
  const std::vector<double> once = loss.partials;
  loss.bind_forward(false);
  for (int64_t s = loss.p.segments.count - 1; s >= 0; --s) cpu::forward(loss.p, s, s + 1);
  CHECK(once == loss.partials);
}

CASE("a float32 sum of many small numbers beside a large one") {
  // Added up in float32 alone, what comes after the large number would be lost.
  Loss loss({1, 100000, DType::float32, DType::float32, DType::float32, true, 0});
  loss.weight_p.set(0, 1);
  for (int64_t i = 0; i < 100000; ++i) {
    loss.pred.set(i, i == 0 ? 4096 : 0.5);
    loss.noise.set(i, 0);
  }
  loss.bind_forward(false);
  cpu::forward(loss.p, 0, loss.p.segments.count);
  cpu::finish(loss.p);
  CHECK(std::fabs(loss.p_loss.at(0) - (16777216 + 99999 * 0.25)) < 256) << loss.p_loss.at(0);
}

CASE("NaN and infinity stay in their samples") {
  Loss loss({3, 11, DType::float32, DType::bfloat16, DType::float32, false, 0});
  loss.pred.set(11 + 4, std::nan(""));
  loss.noise.set(22 + 10, HUGE_VAL);
  for (int64_t b = 0; b < 3; ++b) loss.weight_p.set(b, 1);
  loss.bind_forward(true);
  cpu::forward(loss.p, 0, loss.p.segments.count);
  cpu::finish(loss.p);
  CHECK(std::isfinite(loss.p_loss.at(0)) && std::isnan(loss.p_loss.at(1)) && loss.p_loss.at(2) == HUGE_VAL);
  for (int64_t i = 0; i < 33; ++i) CHECK(std::isfinite(loss.cross_entropy.at(i)) == (i != 15 && i != 32)) << i;
}

CASE("an absent gradient is zero whatever the weight") {
  Loss loss({1, 9, DType::float32, DType::float32, DType::float32, true, 0});
  loss.weight_p.set(0, HUGE_VAL);
  loss.bind_backward(false, Ce::element, true, true);
  cpu::backward(loss.p, 0, loss.p.segments.count);
  loss.check_backward("cpu", false, Ce::element);
}

}  // namespace
