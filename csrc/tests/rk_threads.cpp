// The CUDA kernels of the Runge-Kutta family, thread by thread on the CPU: what threads.h computes is what the GPU
// computes. The loops below stand for the grid, and for the sums across threads that cuda.cu does with shuffles and
// shared memory. The results are compared with long double.
#include "rk/threads.h"

#include <array>
#include <cmath>
#include <vector>

#include "tests/buffer.h"
#include "tests/check.h"

namespace {

using namespace lsgm;
using namespace lsgm::rk;
using lsgm::testing::Buffer;
using lsgm::testing::Random;
using lsgm::testing::unit_roundoff;

enum class Norm { none, joint, per_sample };

struct Example {
  int64_t batch, channels, spatial;
  DType dtype;
  bool drift;
  DType eps_dtype;
  bool mixed;
  Norm norm;
  int stages;
  uint32_t used;      // bit i: stage i has coefficients
  int slot;           // of the new stage, where there is a drift
  int64_t stride;     // of h and, with a drift, p, q and r: 0 is one for all
  DType scalars;      // their type
  int64_t offset;     // of every tensor, in elements: 0 is aligned
  int64_t turns = 0;  // of a block; 0: as planned
  int64_t grid = 1 << 30;
};

int64_t scalar_count(const Example& x) { return x.stride == 0 ? 1 : (x.batch - 1) * x.stride + 1; }

class Step {
 public:
  explicit Step(const Example& x)
      : example(x),
        count(x.batch * x.channels * x.spatial),
        eps(x.drift ? count : 0, x.eps_dtype, x.offset),
        z(count, x.dtype, x.offset),
        y(count, x.dtype, x.offset),
        k(count * x.stages, x.dtype, x.offset),
        logit(x.channels, x.scalars, 0),
        p(scalar_count(x), x.scalars, 0),
        q(scalar_count(x), x.scalars, 0),
        r(scalar_count(x), x.scalars, 0),
        h(scalar_count(x), x.scalars, 0),
        norm(x.norm == Norm::per_sample ? x.batch : 1, norm_dtype(x), 0) {
    Random random(static_cast<uint64_t>(count * 31 + x.channels + x.stages));
    for (Buffer* b : {&eps, &y, &logit, &p, &q, &r, &h}) b->randomize(random);
    if (x.drift) z.randomize(random);  // otherwise NaN, which has to be overwritten
    problem = Problem{};
    problem.batch = x.batch;
    problem.channels = x.channels;
    problem.spatial = x.spatial;
    problem.dtype = x.dtype;
    problem.slot = -1;
    problem.y = y.data();
    problem.z = z.data();
    problem.k = k.data();
    problem.h = {h.data(), x.scalars, x.stride};
    if (x.drift) {
      problem.eps_dtype = x.eps_dtype;
      problem.eps = eps.data();
      if (x.mixed) problem.logit = {logit.data(), x.scalars, 1};
      problem.p = {p.data(), x.scalars, x.stride};
      problem.q = {q.data(), x.scalars, x.stride};
      problem.r = {r.data(), x.scalars, x.stride};
      problem.slot = x.slot;
    }
    for (int i = 0; i < x.stages; ++i) {
      if ((x.used >> i & 1) == 0) continue;  // its coefficients stay 0, the stage NaN
      const auto at = static_cast<size_t>(i);
      a[at] = i % 4 == 3 ? 0 : random.uniform(-1, 1);
      e[at] = x.norm == Norm::none ? 0 : i % 4 == 2 ? 0 : random.uniform(-1, 1);
      if (a[at] == 0 && e[at] == 0) a[at] = 0.5;
      if (x.drift && i == x.slot) {
        problem.a_new = a[at];
        problem.e_new = e[at];
        continue;
      }
      for (int64_t j = 0; j < count; ++j) k.set(i * count + j, random.uniform(-2, 2));
      Row& row = problem.row;
      row.slot[row.count] = i;
      row.a[row.count] = a[at];
      row.e[row.count] = e[at];
      ++row.count;
    }
    if (x.norm != Norm::none) {
      problem.norm = norm.data();
      problem.per_sample = x.norm == Norm::per_sample;
      problem.rtol = 0.25;
      problem.atol = 0.0625;
    }
    for (int64_t i = 0; i < count; ++i) z_before.push_back(z.at(i));
    for (int64_t i = 0; i < k.count(); ++i) k_before.push_back(k.at(i));
  }

  static DType norm_dtype(const Example& x) { return x.dtype == DType::float64 ? DType::float64 : DType::float32; }

  void plan() {
    make_plan(problem);
    if (example.turns != 0) {
      const Segments& s = problem.segments;
      problem.segments = make_segments(s.outer, s.length, kThreads * width_of(problem) * example.turns);
    }
    partials.assign(static_cast<size_t>(problem.segments.count), std::nan(""));
    problem.partials = partials.data();
  }

  void check() const;

  Example example;
  int64_t count;
  Buffer eps, z, y, k, logit, p, q, r, h, norm;
  std::array<double, kMaxStages> a{}, e{};
  std::vector<double> z_before, k_before, partials;
  Problem problem;
};

// The launches of cuda.cu. `width` tells which kernel ran.
struct Emulate {
  struct Argument {
    int64_t grid;
    int* width;
  };

  template <class Z, class E, bool kNorm, int N>
  static void run(const Problem& p, Argument argument) {
    *argument.width = N;
    const auto call = call_of<ComputeOf<Z>>(p);
    const int64_t grid = smaller(p.segments.count, argument.grid);
    for (int64_t block = 0; block < grid; ++block) {
      for (int64_t s = block; s < p.segments.count; s += grid) {
        double total = 0;
        for (int thread = 0; thread < kThreads; ++thread) total += step_segment<Z, E, kNorm, N>(call, s, thread);
        if (kNorm) p.partials[s] = total;
      }
    }
  }
};

int launch(const Problem& p, int64_t grid) {
  int width = 0;
  run_kernel<Emulate>(p, Emulate::Argument{grid, &width});
  if (p.norm == nullptr) return width;
  const int threads = sum_threads(p);
  CHECK(threads >= kWarp && threads <= kMaxSumThreads && threads % kWarp == 0) << threads;
  for (int64_t run = 0; run < p.segments.outer; ++run) {
    double total = 0;
    for (int thread = 0; thread < threads; ++thread) total += partial_sums(p, run, thread, threads);
    store_norm(p, run, total);
  }
  return width;
}

std::string describe(const Example& x) {
  std::ostringstream text;
  text << x.batch << "x" << x.channels << "x" << x.spatial << " dtype " << static_cast<int>(x.dtype) << " eps "
       << (x.drift ? static_cast<int>(x.eps_dtype) : -1) << " mixed " << x.mixed << " norm "
       << static_cast<int>(x.norm) << " stages " << x.stages << " used " << x.used << " slot " << x.slot << " stride "
       << x.stride << " offset " << x.offset << " turns " << x.turns;
  return text.str();
}

void check_close(const Example& x, const char* what, int64_t i, double got, long double expected, long double error) {
  CHECK(std::fabs(got - expected) <= error)
      << what << "[" << i << "] is " << got << ", expected " << static_cast<double>(expected) << "; " << describe(x);
}

void Step::check() const {
  const Example& x = example;
  const long double u = unit_roundoff(x.dtype == DType::float64 ? DType::float64 : DType::float32);
  const auto rounded = [&](long double value) {
    return unit_roundoff(x.dtype) * std::fabs(value) * 1.01L + 0x1p-25L * (x.dtype == DType::float16 ? 1 : 0);
  };
  const int64_t per_sample = x.channels * x.spatial;
  const auto runs = static_cast<size_t>(x.norm == Norm::per_sample ? x.batch : 1);
  std::vector<long double> squares(runs), spread(runs);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t sample = i / per_sample;
    const int64_t at = sample * x.stride;
    long double f = 0, f_scale = 0;
    if (x.drift) {
      const int64_t channel = i / x.spatial % x.channels;
      const long double alpha = x.mixed ? 1 / (1 + std::exp(-static_cast<long double>(logit.at(channel)))) : 1;
      const long double before = z_before[static_cast<size_t>(i)];
      const long double pz = p.at(at) * before, rz = r.at(at) * before, alpha_q = alpha * q.at(at);
      f = pz + alpha_q * (eps.at(i) - rz);
      f_scale = std::fabs(pz) + std::fabs(alpha_q) * (std::fabs(eps.at(i)) + std::fabs(rz));
      check_close(x, "k", i, k.at(x.slot * count + i), f, 8 * u * f_scale + rounded(f));
    }
    long double increment = 0, scale = 0, error = 0, error_scale = 0;
    for (int s = 0; s < x.stages; ++s) {
      const auto c = static_cast<size_t>(s);
      if (a[c] == 0 && e[c] == 0) continue;
      const bool made = x.drift && s == x.slot;
      const long double stage = made ? f : k.at(s * count + i);
      const long double size = made ? 8 * f_scale : std::fabs(stage);
      increment += a[c] * stage;
      scale += std::fabs(a[c]) * size;
      error += e[c] * stage;
      error_scale += std::fabs(e[c]) * size;
    }
    const long double step = h.at(at), y0 = y.at(i);
    const long double expected = y0 + step * increment;
    const long double allowed = (x.stages + 4) * u * (std::fabs(y0) + std::fabs(step) * scale);
    check_close(x, "z", i, z.at(i), expected, allowed + rounded(expected));
    if (x.norm == Norm::none) continue;
    // With the state as it was rounded, which is right, as has just been seen.
    const long double y1 = z.at(i);
    const long double tolerance = 0.0625L + 0.25L * std::fmax(std::fabs(y0), std::fabs(y1));
    const auto run = static_cast<size_t>(x.norm == Norm::per_sample ? sample : 0);
    squares[run] += std::pow(step * error / tolerance, 2);
    spread[run] += std::pow(step * error_scale / tolerance, 2);
  }
  // Nothing else has been written.
  for (int64_t i = 0; i < k.count(); ++i) {
    if (x.drift && i / count == x.slot) continue;
    const double before = k_before[static_cast<size_t>(i)];
    CHECK(before == k.at(i) || (std::isnan(before) && std::isnan(k.at(i)))) << "k[" << i << "]; " << describe(x);
  }
  if (x.norm == Norm::none) return;
  const auto size = static_cast<long double>(count) / static_cast<long double>(runs);
  for (size_t run = 0; run < runs; ++run) {
    const long double expected = std::sqrt(squares[run] / size);
    const long double allowed = (x.stages + 8) * u * (std::sqrt(spread[run] / size) + expected);
    check_close(x, "norm", static_cast<int64_t>(run), norm.at(static_cast<int64_t>(run)), expected, allowed);
  }
}

// Returns the width of the kernel that ran.
int check_example(const Example& x) {
  Step m(x);
  m.plan();
  const int width = launch(m.problem, x.grid);
  m.check();
  return width;
}

const DType kAll[] = {DType::float32, DType::float64, DType::float16, DType::bfloat16};

int full_width(DType dtype) { return static_cast<int>(16 / size_of(dtype)); }

bool is_valid(bool drift, DType dtype, DType eps) {
  if (!drift) return eps == DType::float32;  // one is enough
  return dtype == DType::float64 || (dtype == DType::float32 && eps != DType::float64);
}

CASE("every thread of a CUDA launch") {
  struct Shape {
    int64_t batch, channels, spatial;
  };
  const Shape shapes[] = {{1, 1, 1}, {2, 3, 7}, {3, 5, 16}, {2, 9, 64}, {5, 1, 1}, {4, 37, 1}, {3, 8, 1}, {1, 3, 1031},
      {2, 40, 64}};
  const uint32_t rows[] = {0x00, 0x01, 0x15, 0x2a, 0x3d, 0x40, 0x7d, 0x7f};
  Random random(1);
  const auto draw = [&random](uint64_t choices) { return static_cast<int>(random.bits() % choices); };
  for (DType dtype : kAll) {
    for (DType eps : kAll) {
      for (bool drift : {false, true}) {
        if (!is_valid(drift, dtype, eps)) continue;
        int64_t narrow = 0, wide = 0;
        for (const Shape& s : shapes) {
          for (Norm norm : {Norm::none, Norm::joint, Norm::per_sample}) {
            for (int64_t stride : {0, 1, 3}) {
              for (int64_t offset : {0, 1}) {
                const bool mixed = draw(3) != 0;
                const uint32_t used = rows[draw(8)];
                const int slot = draw(7);
                const DType scalars = draw(2) == 0 ? DType::float32 : DType::float64;
                const int64_t turns = draw(3), grid = draw(2) == 0 ? 2 : 1 << 30;
                const Example x{s.batch, s.channels, s.spatial, dtype, drift, eps, mixed, norm, 7, used, slot, stride,
                    scalars, offset, turns, grid};
                const int width = check_example(x);
                const bool alike = s.spatial % full_width(dtype) == 0;
                if (offset == 1) CHECK(width == 1) << describe(x);
                if (offset == 0 && alike) CHECK(width == full_width(dtype)) << describe(x);
                (width == 1 ? narrow : wide) += 1;
              }
            }
          }
        }
        CHECK(narrow > 20 && wide > 20) << narrow << " " << wide;
      }
    }
  }
}

// Rows of every length, so that the stages are read at once, and in two and three parts.
CASE("every number of stages") {
  for (DType dtype : {DType::float32, DType::float64, DType::bfloat16}) {
    for (int stages = 1; stages <= kMaxStages; ++stages) {
      const uint32_t all = (1u << stages) - 1;
      for (uint32_t used : {all, all & 0xaaaau, all & 0xfffeu, all & 0x9249u}) {
        for (Norm norm : {Norm::none, Norm::joint}) {
          for (int64_t offset : {0, 1}) {
            const Example x{2, 3, 16, dtype, false, DType::float32, false, norm, stages, used, 0, 0, DType::float64,
                offset};
            check_example(x);
            if (dtype == DType::bfloat16) continue;
            for (int slot : {0, stages / 2, stages - 1}) {  // with and without a coefficient
              Example y = x;
              y.drift = y.mixed = true;
              y.slot = slot;
              check_example(y);
            }
          }
        }
      }
    }
  }
}

// Many segments, each of several turns of its block, with a last one that is not full.
CASE("turns, segments and grids") {
  for (Norm norm : {Norm::none, Norm::joint, Norm::per_sample}) {
    for (int64_t spatial : {1028, 1031}) {
      for (int64_t turns : {0, 1, 2, 5}) {
        for (int64_t grid : {1, 3, 1 << 30}) {
          const Example x{3, 5, spatial, DType::float32, true, DType::bfloat16, true, norm, 7, 0x7d, 6, 1,
              DType::float64, 0, turns, grid};
          CHECK(check_example(x) == (spatial % 4 == 0 ? 4 : 1));
        }
      }
    }
  }
}

CASE("the partial sums of a launch are the same for every grid") {
  const Example x{3, 5, 1028, DType::float32, true, DType::bfloat16, true, Norm::per_sample, 7, 0x7d, 6, 1,
      DType::float64, 0, 1};
  Step once(x), again(x);
  for (Step* m : {&once, &again}) m->plan();
  launch(once.problem, 1);
  launch(again.problem, 7);
  CHECK(once.partials == again.partials);
  CHECK(once.partials.size() == 3 * 11) << once.partials.size();
}

CASE("vectors only where every access is aligned and elements share what they need") {
  const Example drift{
      2, 3, 64, DType::float32, true, DType::float16, true, Norm::none, 7, 0x7f, 6, 1, DType::float64, 0};
  Step m(drift);
  Problem& p = m.problem;
  CHECK(width_of(p) == 4);
  const auto beyond = [](const void* at) { return static_cast<const unsigned char*>(at) + 8; };
  for (const void** pointer : {&p.eps, &p.y}) {
    const void* kept = *pointer;
    *pointer = beyond(kept);
    CHECK(width_of(p) == 1);
    *pointer = kept;
  }
  for (void** pointer : {&p.z, &p.k}) {
    void* kept = *pointer;
    *pointer = const_cast<unsigned char*>(beyond(kept));
    CHECK(width_of(p) == 1);
    *pointer = kept;
  }
  p.spatial = 62;
  CHECK(width_of(p) == 1);
  p.channels = 2;  // a sample has a multiple of 4 elements: enough without channels
  CHECK(width_of(p) == 1);
  p.logit.data = nullptr;
  CHECK(width_of(p) == 4);
  p.channels = 3;  // the batch has: enough without samples
  CHECK(width_of(p) == 1);
  p.h.stride = p.p.stride = p.q.stride = p.r.stride = 0;
  CHECK(width_of(p) == 4);
  for (Scalars* s : {&p.h, &p.p, &p.q, &p.r}) {
    s->stride = 1;
    CHECK(width_of(p) == 1);
    s->stride = 0;
  }
  p.norm = m.norm.data();
  CHECK(width_of(p) == 4);
  p.per_sample = true;
  CHECK(width_of(p) == 1);
  p.per_sample = false;
  p.batch = 1;  // the second stage is not aligned
  CHECK(width_of(p) == 1);
}

CASE("NaN and infinity reach the norm, and the element itself, and nothing else") {
  for (double bad : {std::nan(""), static_cast<double>(HUGE_VAL)}) {
    for (int slot : {4, 3}) {  // with weights in both sums; in the error only
      const Norm norm = bad == bad ? Norm::per_sample : Norm::joint;
      const Example x{3, 2, 20, DType::float32, false, DType::float32, false, norm, 7, 0x7d, 0, 0, DType::float32, 0};
      Step m(x);
      m.plan();
      m.k.set(slot * m.count + 40 + 13, bad);  // the second sample
      launch(m.problem, x.grid);
      for (int64_t i = 0; i < m.count; ++i) CHECK(std::isfinite(m.z.at(i)) == (i != 53 || slot == 3)) << i;
      for (int64_t i = 0; i < m.norm.count(); ++i) {
        CHECK(std::isfinite(m.norm.at(i)) == (norm == Norm::per_sample && i != 1)) << i;
      }
    }
  }
}

// Sizes no test machine can hold: what the first and the last threads would do.
CASE("launches beyond 2^31 elements") {
  for (Norm norm : {Norm::none, Norm::joint, Norm::per_sample}) {
    Problem p{};
    p.batch = 1 << 12;
    p.channels = 256;
    p.spatial = 1 << 14;  // 2^34 elements
    p.dtype = DType::float32;
    p.h.stride = 1;
    float value = 0;  // of which only the address matters
    p.norm = norm == Norm::none ? nullptr : &value;
    p.per_sample = norm == Norm::per_sample;
    p.k = &value;
    p.row.count = 1;
    p.row.slot[0] = 14;
    make_plan(p);
    const int64_t n = elements(p);
    CHECK(n == int64_t(1) << 34);
    CHECK(p.segments.count <= kBlocks + p.batch) << p.segments.count;
    CHECK(sum_threads(p) <= kMaxSumThreads);
    const Segments& s = p.segments;
    const Segment last = segment_at(s, s.count - 1);
    CHECK(last.run * s.length + last.begin + last.size == n);
    const Call<float> call = call_of<float>(p);
    const Place place = place_of(call, n - 1);
    CHECK(place.sample == p.batch - 1 && place.channel == p.channels - 1) << place.sample << " " << place.channel;
    const auto first = reinterpret_cast<uintptr_t>(p.k);
    CHECK(reinterpret_cast<uintptr_t>(call.stage[0]) - first == static_cast<uintptr_t>(14 * n * 4));
  }
}

}  // namespace
