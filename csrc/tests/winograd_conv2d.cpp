// The CPU kernels of winograd_conv2d for every instruction set, against the convolution itself in double.
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "common/cpu.h"
#include "tests/buffer.h"
#include "tests/check.h"
#include "winograd_conv2d/winograd_conv2d.h"

namespace {

using namespace lsgm;
using namespace lsgm::winograd_conv2d;
using lsgm::testing::Buffer;
using lsgm::testing::Random;

using Step = void (*)(const Problem&, const Block&, int64_t, int64_t);
struct Kernels {
  const char* name;
  int64_t lanes;
  Step transform_input, multiply, transform_output;
};

struct Shape {
  int64_t batch, channels, height, width, filters;
};

// Registers and groups of channels that are full, and not; panels likewise; tiles that the image does not fill; more
// tiles than the registers hold at once; more channels than are added up in one go.
const std::vector<Shape> kShapes = {{1, 1, 1, 1, 1}, {2, 3, 5, 7, 5}, {1, 16, 4, 4, 32}, {3, 17, 2, 9, 33},
    {1, 37, 13, 6, 70}, {5, 8, 9, 8, 40}, {2, 64, 12, 12, 64}, {1, 300, 6, 5, 34}};

// A convolution with guarded buffers. `whole`: of small whole numbers, with which F(2) makes no error at all.
class Convolution {
 public:
  Convolution(const Shape& s, int64_t tile, int64_t offset, bool bias, bool whole, int64_t block = 0,
      int64_t workers = 1)
      : shape(s),
        x(s.batch * s.channels * s.height * s.width, DType::float32, offset),
        b(s.filters, DType::float32, offset),
        out(s.batch * s.filters * s.height * s.width, DType::float32, offset),
        prepared((tile + 2) * (tile + 2) * ceil_div(s.filters, kPanel) * s.channels * kPanel, DType::float32, offset),
        weight(static_cast<size_t>(s.filters * s.channels * 9)) {
    Random random(static_cast<uint64_t>(s.channels * 100 + s.filters + tile));
    const auto draw = [&](double unit) {
      const double value = random.uniform(-2, 2);
      return whole ? unit * std::floor(2 * value) : value;
    };
    for (int64_t i = 0; i < x.count(); ++i) x.set(i, draw(1));
    for (int64_t i = 0; i < b.count(); ++i) b.set(i, draw(1));
    for (double& w : weight) w = draw(4);
    p = Problem{};
    p.batch = s.batch;
    p.channels = s.channels;
    p.height = s.height;
    p.width = s.width;
    p.filters = s.filters;
    p.tile = tile;
    p.x = static_cast<const float*>(x.data());
    p.weight = static_cast<const float*>(prepared.data());
    p.bias = bias ? static_cast<const float*>(b.data()) : nullptr;
    p.out = static_cast<float*>(out.data());
    p.block = block;
    p.workers = workers;
    prepare();
  }

  // Each step in three ranges, as three threads would.
  void run(const Kernels& k) {
    p.lanes = k.lanes;
    cpu::plan(p, 1);
    const auto in_ranges = [&](Step step, const Block& block, int64_t n) {
      step(p, block, 2 * n / 3, n);
      step(p, block, 0, n / 3);
      step(p, block, n / 3, 2 * n / 3);
    };
    for (int64_t worker = p.workers - 1; worker >= 0; --worker) {
      const Buffer scratch(cpu::scratch_size(p), DType::float32, 0);
      cpu::place(p, static_cast<float*>(scratch.data()));
      for (int64_t i = 0; i < cpu::blocks(p); ++i) {
        const Block block = cpu::block_at(p, worker, i);
        in_ranges(k.transform_input, block, block.count);
        in_ranges(k.multiply, block, cpu::products(p));
        in_ranges(k.transform_output, block, block.count);
      }
    }
  }

  // `unit`: allowed error, in roundings of all terms' sizes together.
  void check(const char* who, double unit) const {
    for (int64_t i = 0; i < out.count(); ++i) {
      const int64_t k = i % p.filters, at = i / p.filters;
      double expected = p.bias == nullptr ? 0 : b.at(k), size = std::fabs(expected);
      each_pixel(at, [&](int64_t pixel, int64_t tap) {
        for (int64_t c = 0; c < p.channels; ++c) {
          const double term = x.at(pixel * p.channels + c) * weight_at(k, c, tap);
          expected += term;
          size += std::fabs(term);
        }
      });
      CHECK(std::fabs(out.at(i) - expected) <= unit * 0x1p-24 * size)
          << who << ": F(" << p.tile << ") " << p.batch << "x" << p.channels << "x" << p.height << "x" << p.width
          << " to " << p.filters << " at " << i << " is " << out.at(i) << ", expected " << expected;
    }
  }

  // f(pixel of x, tap) for the window of a result that lies in the image.
  template <class F>
  void each_pixel(int64_t at, F&& f) const {
    const int64_t line = at / p.width, column = at % p.width, row = line % p.height;
    for (int64_t i = 0; i < 3; ++i) {
      for (int64_t j = 0; j < 3; ++j) {
        const int64_t y = row + i - 1, z = column + j - 1;
        if (y >= 0 && y < p.height && z >= 0 && z < p.width) f((line + i - 1) * p.width + z, i * 3 + j);
      }
    }
  }

  Shape shape;
  Buffer x, b, out, prepared;
  std::vector<double> weight;  // [filters][channels][9]
  Problem p;

 private:
  double weight_at(int64_t k, int64_t c, int64_t tap) const {
    return weight[static_cast<size_t>((k * p.channels + c) * 9 + tap)];
  }

  // G w G^T, G of Toom and Cook's points.
  void prepare() {
    const std::vector<double> points =
        p.tile == 2 ? std::vector<double>{0, 1, -1} : std::vector<double>{0, 0.625, -0.625, 1.5, -1.5};
    const int64_t n = p.tile + 2, panels = ceil_div(p.filters, kPanel);
    std::vector<std::vector<double>> g(static_cast<size_t>(n), {0, 0, 1});
    for (size_t i = 0; i < points.size(); ++i) {
      double scale = 1;
      for (size_t j = 0; j < points.size(); ++j) scale *= i == j ? 1 : points[i] - points[j];
      for (size_t k = 0; k < 3; ++k) g[i][k] = std::pow(points[i], static_cast<double>(k)) / scale;
    }
    for (int64_t i = 0; i < prepared.count(); ++i) {
      const int64_t place = i % kPanel, c = i / kPanel % p.channels, rest = i / kPanel / p.channels;
      const int64_t k = rest % panels * kPanel + place, position = rest / panels;
      const auto &down = g[static_cast<size_t>(position / n)], &along = g[static_cast<size_t>(position % n)];
      double value = 0;
      for (int64_t tap = 0; tap < 9 && k < p.filters; ++tap) {
        value += down[static_cast<size_t>(tap / 3)] * along[static_cast<size_t>(tap % 3)] * weight_at(k, c, tap);
      }
      prepared.set(i, value);
    }
  }
};

std::vector<Kernels> all_kernels() {
  std::vector<Kernels> all = {{"scalar", 1, &scalar::transform_input, &scalar::multiply, &scalar::transform_output},
      {"cpu", 0, &cpu::transform_input, &cpu::multiply, &cpu::transform_output}};
  LSGM_IF_AVX2(
      if (has_avx2()) all.push_back({"avx2", 8, &avx2::transform_input, &avx2::multiply, &avx2::transform_output});)
  LSGM_IF_AVX512(if (has_avx512()) all.push_back(
      {"avx512", 16, &avx512::transform_input, &avx512::multiply, &avx512::transform_output});)
  return all;
}

CASE("every kernel, shape and tile") {
  for (const Kernels& k : all_kernels()) {
    for (const Shape& s : kShapes) {
      for (int64_t tile : {2, 4}) {
        for (int64_t offset : {0, 1}) {
          Convolution c(s, tile, offset, offset == 0, false);
          c.run(k);
          c.check(k.name, tile == 2 ? 8 : 40);
        }
      }
    }
  }
}

CASE("F(2) of whole numbers is exact") {
  for (const Kernels& k : all_kernels()) {
    for (const Shape& s : kShapes) {
      Convolution c(s, 2, 0, true, true);
      c.run(k);
      c.check(k.name, 0);
    }
  }
}

CASE("several blocks of tiles and workers, the same bits") {
  for (const Kernels& k : all_kernels()) {
    for (int64_t tile : {2, 4}) {
      for (int64_t workers : {1, 2, 5}) {
        const Shape s = {3, 20, 11, 9, 35};
        Convolution once(s, tile, 0, true, false), apart(s, tile, 0, true, false, workers == 5 ? 1 : 7, workers);
        once.run(k);
        apart.run(k);
        CHECK(cpu::blocks(once.p) == 1 && cpu::blocks(apart.p) * workers > 3);
        for (int64_t i = 0; i < once.out.count(); ++i) CHECK(once.out.at(i) == apart.out.at(i)) << k.name << " " << i;
      }
    }
  }
}

CASE("what is not finite reaches every result whose window has it, and none outside of its tiles") {
  for (const Kernels& k : all_kernels()) {
    for (int64_t tile : {2, 4}) {
      for (double bad : {std::nan(""), std::numeric_limits<double>::infinity()}) {
        for (int64_t pixel : {0, 17, 40, 143}) {
          Convolution c({1, 5, 12, 12, 3}, tile, 0, true, false);
          c.x.set(pixel * 5 + 2, bad);
          c.run(k);
          for (int64_t i = 0; i < c.out.count(); ++i) {
            bool has = false;
            c.each_pixel(i / 3, [&](int64_t q, int64_t) { has = has || q == pixel; });
            if (has) CHECK(!std::isfinite(c.out.at(i))) << k.name << " " << tile << " " << pixel << " " << i;
            const int64_t y = i / 3 / 12, x = i / 3 % 12;
            const bool far = std::abs(y - pixel / 12) > tile || std::abs(x - pixel % 12) > tile;
            if (far) CHECK(std::isfinite(c.out.at(i))) << k.name << " " << tile << " " << pixel << " " << i;
          }
        }
      }
    }
  }
}

CASE("plans beyond 2^31 elements") {
  Problem p{};
  p.batch = int64_t(1) << 20;
  p.channels = 513;
  p.height = p.width = 33;
  p.filters = 700;
  p.tile = 4;
  cpu::plan(p, 3);
  CHECK(p.tiles == p.batch * 81 && p.groups == 33 && p.panels == 22 && p.workers == 3 && p.block >= 48);
  int64_t next = 0;
  for (int64_t worker = 0; worker < 3; ++worker) {
    for (int64_t i = 0; i < cpu::blocks(p); ++i) {
      const Block b = cpu::block_at(p, worker, i);
      CHECK(b.first == next && b.count >= 0 && b.count <= p.block);
      next += b.count;
    }
  }
  CHECK(next == p.tiles);
  CHECK(cpu::scratch_size(p) < (int64_t(1) << 23) && p.v_stride / 16 % 2 == 1 && p.m_stride / 16 % 2 == 1);
}

CASE("few tiles, and none") {
  Problem p{};
  p.channels = 3;
  p.height = p.width = 4;
  p.filters = 2;
  p.tile = 2;
  Problem few = p;
  few.batch = 10;
  cpu::plan(few, 2);
  CHECK(few.workers == 1 && cpu::blocks(few) == 1 && few.block == 40);
  cpu::plan(p, 2);
  CHECK(cpu::blocks(p) == 0 && cpu::scratch_size(p) >= 3);
}

}  // namespace
