// The CPU kernels of mixture_logistic, of every instruction set, against long double and its differences.
#include <cmath>
#include <vector>

#include "common/cpu.h"
#include "mixture_logistic/mixture_logistic.h"
#include "tests/buffer.h"
#include "tests/check.h"

namespace {

using namespace lsgm;
using namespace lsgm::mixture_logistic;
using lsgm::testing::Buffer;
using lsgm::testing::Random;
using lsgm::testing::unit_roundoff;

using Kernel = void (*)(const Problem&, int64_t, int64_t);
using Number = long double;

struct Kernels {
  const char* name;
  Kernel log_prob, backward, mean;
};

// A kernel of one instruction set, with the memory that cpu:: would give it.
template <void (*kernel)(const Problem&, int64_t, int64_t, float*)>
void alone(const Problem& p, int64_t begin, int64_t end) {
  std::vector<float> scratch(static_cast<size_t>(channels_of(p) * p.segments.limit));
  kernel(p, begin, end, scratch.data());
}

std::vector<Kernels> kernels() {
  std::vector<Kernels> list = {
      {"scalar", &alone<scalar::log_prob>, &alone<scalar::log_prob_backward>, &alone<scalar::mean>},
      {"chosen at run time", &cpu::log_prob, &cpu::log_prob_backward, &cpu::mean}};
  LSGM_IF_AVX2(if (has_avx2()) {
    list.push_back({"avx2", &alone<avx2::log_prob>, &alone<avx2::log_prob_backward>, &alone<avx2::mean>});
  })
  LSGM_IF_AVX512(if (has_avx512()) {
    list.push_back({"avx512", &alone<avx512::log_prob>, &alone<avx512::log_prob_backward>, &alone<avx512::mean>});
  })
  return list;
}

struct Example {
  int64_t batch, mixtures, spatial, bits;
  DType dtype;
  Order order, x_order;
  bool narrow;     // small scales: bins of no mass, and log scales that are clamped
  int64_t offset;  // of every tensor, in elements: 0 is aligned
};

std::vector<Example> examples() {
  const Order planes = Order::planes, rows = Order::rows;
  return {
      {1, 10, 1, 8, DType::float32, planes, planes, false, 0},
      {2, 1, 5, 5, DType::float32, planes, rows, true, 1},
      {2, 1, 9, 8, DType::float32, rows, planes, false, 1},
      {1, 3, 48, 6, DType::float32, planes, planes, false, 0},
      {1, 2, 272, 8, DType::float32, planes, planes, true, 3},
      {1, 2, 259, 7, DType::float32, planes, rows, false, 0},
      {2, 10, 18, 8, DType::float32, rows, rows, true, 0},
      {1, 3, 67, 8, DType::float32, rows, rows, false, 0},
      {1, 3, 67, 8, DType::bfloat16, rows, planes, false, 1},
      {1, 3, 71, 8, DType::bfloat16, planes, planes, false, 0},
      {1, 3, 32, 5, DType::float16, rows, rows, false, 0},
      {1, 3, 19, 8, DType::float16, planes, planes, true, 1},
  };
}

Number log_sigmoid(Number v) { return v < 0 ? v - std::log1p(std::exp(v)) : -std::log1p(std::exp(-v)); }
Number sigmoid(Number v) { return std::exp(log_sigmoid(v)); }

// Of one pixel, as the reference in Python has it.
Number log_prob_of(const std::vector<Number>& logits, const Number* x, int64_t levels) {
  const size_t mixtures = logits.size() / 10;
  const auto joined = [](const std::vector<Number>& terms) {
    Number top = terms[0], sum = 0;
    for (Number t : terms) top = std::fmax(top, t);
    for (Number t : terms) sum += std::exp(t - top);
    return top + std::log(sum);
  };
  std::vector<Number> prior, joint;
  for (size_t k = 0; k < mixtures; ++k) {
    const auto of = [&](size_t colour, size_t kind) { return logits[k + mixtures * (1 + 3 * colour + kind)]; };
    const Number shift[] = {0, std::tanh(of(0, 2)) * x[0], std::tanh(of(1, 2)) * x[0] + std::tanh(of(2, 2)) * x[1]};
    Number total = logits[k];
    for (size_t c = 0; c < 3; ++c) {
      const Number log_scale = std::fmax(of(c, 1), -7.0L), inverse = std::exp(-log_scale);
      const Number z = inverse * (x[c] - of(c, 0) - shift[c]), half = inverse / static_cast<Number>(levels);
      const Number delta = sigmoid(z + half) - sigmoid(z - half);
      if (x[c] < -0.999L) {
        total += log_sigmoid(z + half);
      } else if (x[c] > 0.999L) {
        total += log_sigmoid(half - z);
      } else if (delta > 1e-5L) {
        total += std::log(delta);
      } else {
        total += log_sigmoid(z) + log_sigmoid(-z) - log_scale - std::log(static_cast<Number>(levels) / 2);
      }
    }
    prior.push_back(logits[k]);
    joint.push_back(total);
  }
  return joined(joint) - joined(prior);
}

class Mixture {
 public:
  explicit Mixture(const Example& e)
      : example(e),
        pixels(e.batch * e.spatial),
        channels(10 * e.mixtures),
        logits(channels * pixels, e.dtype, e.offset),
        x(kColours * pixels, DType::float32, e.offset),
        log_prob(pixels, DType::float32, e.offset),
        parts(2 * pixels, DType::float32, e.offset),
        grad(pixels, DType::float32, e.offset),
        grad_logits(channels * pixels, e.dtype, e.offset),
        mean(kColours * pixels, e.dtype, e.offset) {
    Random random(static_cast<uint64_t>(pixels * 31 + channels));
    logits.randomize(random);
    grad.randomize(random);
    const auto levels = static_cast<double>((int64_t{1} << e.bits) - 1);
    for (int64_t i = 0; i < x.count(); ++i) {
      const double value = std::floor(random.uniform(-0.25, 1.25) * levels);  // many in the first and the last bin
      x.set(i, 2 * std::fmin(std::fmax(value, 0), levels) / levels - 1);
    }
    for (int64_t i = 0; e.narrow && i < pixels; ++i) {
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t kind = c / e.mixtures;
        if (kind > 0 && kind % 3 == 2) logits.set(logit_at(i, c), logits.at(logit_at(i, c)) * 1.5 - 5);
      }
    }
    p = Problem{};
    p.batch = e.batch;
    p.mixtures = e.mixtures;
    p.spatial = e.spatial;
    p.dtype = p.mean_dtype = e.dtype;
    p.order = e.order;
    p.x_order = e.x_order;
    p.levels = (int64_t{1} << e.bits) - 1;
    p.logits = logits.data();
    p.x = static_cast<const float*>(x.data());
    p.log_prob = static_cast<float*>(log_prob.data());
    p.parts = static_cast<float*>(parts.data());
    p.grad = static_cast<const float*>(grad.data());
    p.grad_logits = grad_logits.data();
    p.mean = mean.data();
    cpu::plan(p);
  }

  int64_t logit_at(int64_t pixel, int64_t channel) const { return at(pixel, channel, channels, example.order); }

  std::vector<Number> logits_of(int64_t pixel) const {
    std::vector<Number> values;
    for (int64_t c = 0; c < channels; ++c) values.push_back(logits.at(logit_at(pixel, c)));
    return values;
  }

  void check_log_prob(const char* who) const {
    for (int64_t i = 0; i < pixels; ++i) {
      const Number expected = exact(i, logits_of(i));
      CHECK(std::fabs(log_prob.at(i) - expected) <= 2e-5L * (1 + scale() * std::fabs(expected)))
          << who << ": log_prob[" << i << "] is " << log_prob.at(i) << ", expected " << static_cast<double>(expected)
          << text();
    }
  }

  void check_gradients(const char* who) const {
    constexpr Number step = 1e-6L;
    for (int64_t i = 0; i < pixels; ++i) {
      std::vector<Number> values = logits_of(i);
      for (int64_t c = 0; c < channels; ++c) {
        Number& value = values[static_cast<size_t>(c)];
        const Number here = value;
        value = here + step;
        const Number above = exact(i, values);
        value = here - step;
        const Number expected = grad.at(i) * (above - exact(i, values)) / (2 * step);
        value = here;
        const double got = grad_logits.at(logit_at(i, c));
        const Number allowed = 3e-5L * (1 + scale() * std::fabs(expected)) +
                               2 * unit_roundoff(example.dtype) * std::fabs(expected) + scale() * 2e-3L;
        CHECK(std::fabs(got - expected) <= allowed) << who << ": the gradient of channel " << c << " of pixel " << i
                                                    << " is " << got << ", expected " << static_cast<double>(expected)
                                                    << text();
      }
    }
  }

  void check_mean(const char* who) const {
    for (int64_t i = 0; i < pixels; ++i) {
      const std::vector<Number> values = logits_of(i);
      const auto mixtures = static_cast<size_t>(example.mixtures);
      Number total = 0, means[3] = {}, coefficients[3] = {};
      for (size_t k = 0; k < mixtures; ++k) {
        const Number weight = std::exp(values[k]);
        total += weight;
        for (size_t c = 0; c < 3; ++c) {
          means[c] += weight * values[k + mixtures * (1 + 3 * c)];
          coefficients[c] += weight * std::tanh(values[k + mixtures * (3 + 3 * c)]);
        }
      }
      const auto clamp = [](Number v) { return std::fmin(std::fmax(v, -1.0L), 1.0L); };
      const Number red = clamp(means[0] / total);
      const Number green = clamp((means[1] + coefficients[0] * red) / total);
      const Number blue = clamp((means[2] + coefficients[1] * red + coefficients[2] * green) / total);
      const Number expected[] = {red, green, blue};
      for (int64_t c = 0; c < kColours; ++c) {
        const double got = mean.at(at(i, c, kColours, Order::planes));
        CHECK(std::fabs(got - expected[c]) <= 1e-6L + unit_roundoff(example.dtype))
            << who << ": colour " << c << " of the mean of pixel " << i << " is " << got << ", expected "
            << static_cast<double>(expected[c]) << text();
      }
    }
  }

  Example example;
  int64_t pixels, channels;
  Buffer logits, x, log_prob, parts, grad, grad_logits, mean;
  Problem p;

 private:
  int64_t at(int64_t pixel, int64_t channel, int64_t of, Order order) const {
    if (order == Order::rows) return pixel * of + channel;
    const int64_t sample = pixel / example.spatial;
    return (sample * of + channel) * example.spatial + pixel % example.spatial;
  }

  Number exact(int64_t pixel, const std::vector<Number>& values) const {
    Number colours[kColours];
    for (int64_t c = 0; c < kColours; ++c) colours[c] = x.at(at(pixel, c, kColours, example.x_order));
    return log_prob_of(values, colours, p.levels);
  }

  // Where scales are narrow, a rounding of z = (x - mean) / s is one of a large number.
  Number scale() const { return example.narrow ? 1 : 0; }

  std::string text() const {
    std::ostringstream out;
    out << "; " << example.batch << "x" << example.mixtures << "x" << example.spatial << ", " << example.bits
        << " bits, dtype " << static_cast<int>(example.dtype) << ", order " << static_cast<int>(example.order);
    return out.str();
  }
};

// In three ranges, as three threads would.
void in_ranges(const Problem& p, Kernel kernel) {
  const int64_t n = p.segments.count, third = n / 3;
  kernel(p, 2 * third, n);
  kernel(p, 0, third);
  kernel(p, third, 2 * third);
}

CASE("every instruction set, layout and type") {
  for (const Example& e : examples()) {
    for (const Kernels& k : kernels()) {
      Mixture mixture(e);
      in_ranges(mixture.p, k.log_prob);
      mixture.check_log_prob(k.name);
      in_ranges(mixture.p, k.backward);
      mixture.check_gradients(k.name);
      in_ranges(mixture.p, k.mean);
      mixture.check_mean(k.name);
    }
  }
}

CASE("a pixel's value depends neither on its place nor on its layout") {
  const Example planes{1, 3, 83, 8, DType::float32, Order::planes, Order::planes, false, 0};
  Example rows = planes;
  rows.order = rows.x_order = Order::rows;
  Mixture a(planes), b(rows);
  for (int64_t i = 0; i < a.pixels; ++i) {
    for (int64_t c = 0; c < a.channels; ++c) b.logits.set(b.logit_at(i, c), a.logits.at(a.logit_at(i, c)));
    for (int64_t c = 0; c < kColours; ++c) b.x.set(i * kColours + c, a.x.at(c * a.pixels + i));
    b.grad.set(i, a.grad.at(i));
  }
  for (Mixture* m : {&a, &b}) {
    cpu::log_prob(m->p, 0, m->p.segments.count);
    cpu::log_prob_backward(m->p, 0, m->p.segments.count);
  }
  for (int64_t i = 0; i < a.pixels; ++i) {
    CHECK(a.log_prob.at(i) == b.log_prob.at(i)) << i;
    for (int64_t c = 0; c < a.channels; ++c) {
      CHECK(a.grad_logits.at(a.logit_at(i, c)) == b.grad_logits.at(b.logit_at(i, c))) << i << " " << c;
    }
  }
}

CASE("NaN stays in its pixel, and a mixture of weight 0 does not count") {
  for (const Kernels& k : kernels()) {
    Mixture mixture({1, 2, 16, 8, DType::float32, Order::planes, Order::planes, false, 0});
    for (int64_t channel = 0; channel < mixture.channels; channel += 3) {
      mixture.logits.set(mixture.logit_at(5, channel), std::nan(""));
    }
    mixture.logits.set(mixture.logit_at(7, 0), -HUGE_VAL);
    k.log_prob(mixture.p, 0, mixture.p.segments.count);
    k.backward(mixture.p, 0, mixture.p.segments.count);
    for (int64_t i = 0; i < mixture.pixels; ++i) {
      CHECK(std::isnan(mixture.log_prob.at(i)) == (i == 5)) << k.name << " " << i << " " << mixture.log_prob.at(i);
      for (int64_t c = 0; i != 5 && c < mixture.channels; ++c) {
        CHECK(std::isfinite(mixture.grad_logits.at(mixture.logit_at(i, c)))) << k.name << " " << i << " " << c;
      }
    }
    CHECK(std::fabs(mixture.grad_logits.at(mixture.logit_at(7, 2))) < 1e-30) << k.name;
  }
}

CASE("log scales below -7 have no gradient, and -7 has") {
  for (const Kernels& k : kernels()) {
    Mixture mixture({1, 1, 2, 8, DType::float32, Order::planes, Order::planes, false, 0});
    for (int64_t colour = 0; colour < kColours; ++colour) {
      const int64_t channel = 2 + 3 * colour;
      mixture.logits.set(mixture.logit_at(0, channel), -7.0);
      mixture.logits.set(mixture.logit_at(1, channel), std::nextafterf(-7.0f, -8.0f));
    }
    k.log_prob(mixture.p, 0, mixture.p.segments.count);
    k.backward(mixture.p, 0, mixture.p.segments.count);
    for (int64_t colour = 0; colour < kColours; ++colour) {
      const int64_t channel = 2 + 3 * colour;
      CHECK(mixture.grad_logits.at(mixture.logit_at(0, channel)) != 0) << k.name << " " << colour;
      CHECK(mixture.grad_logits.at(mixture.logit_at(1, channel)) == 0) << k.name << " " << colour;
    }
  }
}

}  // namespace
