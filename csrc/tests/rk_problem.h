// A Runge-Kutta problem on the host with guarded buffers, and its solution in long double.
#pragma once

#include <cmath>
#include <vector>

#include "rk/rk.h"
#include "tests/buffer.h"
#include "tests/check.h"

namespace lsgm {
namespace testing {
namespace {  // these names occur in several test files, which lsgm_fast._C links into one library

struct RkExample {
  int64_t batch, channels, spatial;
  DType dtype;  // of the state and the stages
  bool drift, mixing;
  DType eps;  // where there is a drift
  bool norm, per_sample;
  int shared;  // bits 0 to 3: h, p, q, r are one value for all samples
  std::vector<double> a, e;
  int slot;        // that the drift is stored in
  int64_t offset;  // of every tensor, in elements: 0 is aligned
};

class Rk {
 public:
  explicit Rk(const RkExample& x)
      : example(x),
        stages(static_cast<int64_t>(std::max(x.a.size(), x.e.size()))),
        count(x.batch * x.channels * x.spatial),
        y(count, x.dtype, x.offset),
        z(count, x.dtype, x.offset),
        z_before(count, x.dtype, x.offset),
        k(count * stages, x.dtype, x.offset),
        eps(x.drift ? count : 0, x.eps, x.offset),
        logit(x.channels, DType::float32, 0),
        scalars(4 * x.batch, DType::float64, 0),
        norm(x.per_sample ? x.batch : 1, arithmetic(), 0) {
    Random random(static_cast<uint64_t>(count * 31 + x.channels));
    for (Buffer* b : {&y, &eps, &logit, &scalars}) b->randomize(random);
    for (int64_t s = 0; s < stages; ++s) {
      if (!is_read(s)) continue;  // the others stay NaN
      for (int64_t i = 0; i < count; ++i) k.set(s * count + i, random.uniform(-2, 2));
    }
    if (x.drift) z.randomize(random);
    for (int64_t i = 0; i < count; ++i) z_before.set(i, z.at(i));
    p = lsgm::rk::Problem{};
    p.batch = x.batch;
    p.channels = x.channels;
    p.spatial = x.spatial;
    p.dtype = x.dtype;
    p.eps_dtype = x.eps;
    p.y = y.data();
    p.z = z.data();
    p.k = k.data();
    const auto scalar = [&](int64_t field) {
      return Scalars{static_cast<double*>(scalars.data()) + field, DType::float64, is_shared(field) ? 0 : 4};
    };
    p.h = scalar(0);
    p.slot = -1;
    if (x.drift) {
      p.eps = eps.data();
      if (x.mixing) p.logit = {logit.data(), DType::float32, 1};
      p.p = scalar(1);
      p.q = scalar(2);
      p.r = scalar(3);
      p.slot = x.slot;
      p.a_new = a(x.slot);
      p.e_new = e(x.slot);
    }
    for (int64_t s = 0; s < stages; ++s) {
      if (!is_read(s)) continue;
      p.row.slot[p.row.count] = static_cast<int>(s);
      p.row.a[p.row.count] = a(s);
      p.row.e[p.row.count] = e(s);
      ++p.row.count;
    }
    if (x.norm) {
      p.norm = norm.data();
      p.per_sample = x.per_sample;
      p.rtol = 1e-3;
      p.atol = 1e-2;
    }
  }

  double a(int64_t s) const { return value_at(example.a, s); }
  double e(int64_t s) const { return example.norm ? value_at(example.e, s) : 0.0; }
  bool is_read(int64_t s) const { return !(example.drift && s == example.slot) && (a(s) != 0 || e(s) != 0); }
  DType arithmetic() const { return example.dtype == DType::float64 ? DType::float64 : DType::float32; }
  bool is_shared(int64_t field) const { return (example.shared >> field & 1) != 0; }
  double scalar(int64_t field, int64_t sample) const {
    return scalars.at((is_shared(field) ? 0 : 4 * sample) + field);
  }

  void check(const char* who) const {
    const long double unit = unit_roundoff(arithmetic());
    std::vector<long double> squares(static_cast<size_t>(norm.count())), doubts(squares.size());
    const int64_t size = example.channels * example.spatial;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t sample = i / size, channel = i / example.spatial % example.channels;
      const long double h = scalar(0, sample);
      long double f = 0, f_scale = 0;
      if (example.drift) {
        const long double alpha = example.mixing ? 1 / (1 + std::exp(-static_cast<long double>(logit.at(channel)))) : 1;
        const long double pz = scalar(1, sample) * static_cast<long double>(z_before.at(i));
        const long double rz = scalar(3, sample) * static_cast<long double>(z_before.at(i));
        const long double aq = alpha * scalar(2, sample);
        f = pz + aq * (eps.at(i) - rz);
        f_scale = std::fabs(pz) + std::fabs(aq) * (std::fabs(eps.at(i)) + std::fabs(rz));
        compare(who, "k", i, k.at(example.slot * count + i), f, f_scale);
      }
      long double sum = 0, sum_scale = 0, error = 0, error_scale = 0;
      for (int64_t s = 0; s < stages; ++s) {
        const bool made = example.drift && s == example.slot;
        const long double value = made ? f : is_read(s) ? k.at(s * count + i) : 0;
        const long double scale = made ? f_scale : std::fabs(value);
        sum += a(s) * value;
        sum_scale += std::fabs(a(s)) * scale;
        error += e(s) * value;
        error_scale += std::fabs(e(s)) * scale;
      }
      compare(who, "z", i, z.at(i), y.at(i) + h * sum, std::fabs(y.at(i)) + std::fabs(h) * sum_scale);
      if (!example.norm) continue;
      // With the solution that was stored: the error of that is not the norm's.
      const double largest = std::max(std::fabs(y.at(i)), std::fabs(z.at(i)));
      const long double tolerance = static_cast<long double>(p.atol) + static_cast<long double>(p.rtol) * largest;
      const long double ratio = h * error / tolerance;
      const long double doubt = unit * (8 * std::fabs(h) * error_scale / tolerance + 8 * std::fabs(ratio));
      const auto n = static_cast<size_t>(example.per_sample ? sample : 0);
      squares[n] += ratio * ratio;
      doubts[n] += (2 * std::fabs(ratio) + doubt) * doubt;
    }
    for (size_t n = 0; example.norm && n < squares.size(); ++n) {
      const auto terms = static_cast<long double>(count / norm.count());
      const long double expected = std::sqrt(squares[n] / terms);
      // Up to a few hundred numbers are added in float32 before float64 takes over.
      const long double allowed = std::sqrt((squares[n] + doubts[n]) / terms) - expected + 128 * unit * expected;
      CHECK(std::fabs(norm.at(static_cast<int64_t>(n)) - expected) <= allowed)
          << describe(who) << ": norm[" << n << "] is " << norm.at(static_cast<int64_t>(n)) << ", expected "
          << static_cast<double>(expected);
    }
  }

  RkExample example;
  int64_t stages, count;
  Buffer y, z, z_before, k, eps, logit, scalars, norm;
  lsgm::rk::Problem p;

 private:
  static double value_at(const std::vector<double>& row, int64_t s) {
    return s < static_cast<int64_t>(row.size()) ? row[static_cast<size_t>(s)] : 0.0;
  }

  std::string describe(const char* who) const {
    std::ostringstream text;
    text << who << ", shape " << example.batch << "x" << example.channels << "x" << example.spatial << " dtypes "
         << static_cast<int>(example.dtype) << static_cast<int>(example.eps) << " drift " << example.drift
         << example.mixing << " norm " << example.norm << example.per_sample << " shared " << example.shared << " slot "
         << example.slot << " of " << stages << " offset " << example.offset;
    return text.str();
  }

  void compare(
      const char* who, const char* what, int64_t i, double got, long double expected, long double scale) const {
    const long double allowed = 8 * unit_roundoff(arithmetic()) * scale +
                                unit_roundoff(example.dtype) * std::fabs(expected) * 1.01L +
                                0x1p-25L * (example.dtype == DType::float16 ? 1 : 0);
    CHECK(std::fabs(got - expected) <= allowed) << describe(who) << ": " << what << "[" << i << "] is " << got
                                                << ", expected " << static_cast<double>(expected);
  }
};

// All types, with and without drift and norm, in shapes around the widths of registers, blocks, planes and segments.
inline std::vector<RkExample> rk_examples() {
  const DType all[] = {DType::float32, DType::float64, DType::float16, DType::bfloat16};
  const std::vector<double> b{35.0 / 384, 0, 500.0 / 1113, 125.0 / 192, -2187.0 / 6784, 11.0 / 84, 0};
  const std::vector<double> e{-71.0 / 57600, 0, 71.0 / 16695, -71.0 / 1920, 17253.0 / 339200, -22.0 / 525, 1.0 / 40};
  // (solution, error, slot of the drift): the slot has both coefficients, one of them, or none.
  struct Rows {
    std::vector<double> a, e;
    int slot;
  };
  const Rows rows[] = {{b, e, 6}, {{0.5, 0.25}, {-0.5, 0.5}, 0}, {{0, 0.75}, {0.1, 0}, 1}, {{0, 0.3}, {0, 0.2}, 0}};
  struct Shape {
    int64_t batch, channels, spatial;
  };
  const Shape small[] = {{1, 1, 1}, {2, 3, 7}, {3, 37, 1}, {2, 4, 64}, {3, 5, 67}, {1, 2, 260}, {2, 70, 9}};
  const Shape large[] = {{1, 2, 8193}, {2, 1, 4100}, {2, 270, 33}, {1, 9000, 1}, {2, 20, 1024}, {3, 30, 289}};
  std::vector<RkExample> list;
  int n = 0;
  const auto add = [&](const Shape& s, DType dtype, bool drift, DType eps, const Rows& row) {
    ++n;
    for (int norm = 0; norm < 3; ++norm) {  // none, one for all, one per sample
      list.push_back({s.batch, s.channels, s.spatial, dtype, drift, n % 4 != 0, eps, norm > 0, norm > 1,
          n % 3 == 0 ? 15 : 0, row.a, row.e, row.slot, n % 5 == 2 ? 1 : 0});
    }
  };
  for (DType dtype : all) {
    for (const Shape& s : small) {
      for (const Rows& row : rows) add(s, dtype, false, dtype, row);
    }
    if (dtype != DType::float32 && dtype != DType::float64) continue;
    for (DType eps : all) {
      if (dtype == DType::float32 && eps == DType::float64) continue;
      for (const Shape& s : small) {
        for (const Rows& row : rows) add(s, dtype, true, eps, row);
      }
    }
  }
  for (const Shape& s : large) {
    for (DType dtype : {DType::float32, DType::float64}) {
      for (bool drift : {false, true}) add(s, dtype, drift, DType::float32, rows[n % 2]);
    }
  }
  // Samples that differ in one scalar only.
  for (int field = 0; field < 4; ++field) {
    list.push_back({3, 4, 20, DType::float64, true, false, DType::float32, true, false, 15 ^ (1 << field), b, e, 6, 0});
  }
  return list;
}

}  // namespace
}  // namespace testing
}  // namespace lsgm
