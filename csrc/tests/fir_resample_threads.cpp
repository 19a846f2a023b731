// The CUDA kernels of fir_resample, thread by thread on the CPU: what threads.h computes is what the GPU computes. The
// loops below stand for the grid.
#include "fir_resample/threads.h"

#include <vector>

#include "tests/fir_resample_problem.h"

namespace {

using namespace lsgm;
using namespace lsgm::fir_resample;
using lsgm::testing::resampling::Example;
using lsgm::testing::resampling::examples;
using lsgm::testing::resampling::Resampling;

// Every thread, the last one first: their order must not matter.
struct Grid {
  template <bool kUp, bool kFir, class T, Order O, int N>
  static void run(const Problem& p, const Launch& l) {
    for (int64_t block = l.blocks - 1; block >= 0; --block) {
      for (int thread = kThreads - 1; thread >= 0; --thread) resample<kUp, kFir, T, O, N>(p, l, block, thread);
    }
  }
};

void check(const Example& example) {
  Resampling r(example);
  run_kernel<Grid>(r.p, launch_of(r.p));
  r.check("threads");
}

CASE("every thread of a CUDA launch") {
  for (const Example& example : examples()) check(example);
}

CASE("vectors") {
  for (bool up : {true, false}) {
    for (bool fir : {true, false}) {
      for (bool active : {true, false}) {
        for (DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
          check({Order::planes, up, fir, active, 2, 4, 3, 8, dtype, 0});
          check({Order::planes, up, fir, active, 1, 8, 2, 48, dtype, 0});
          check({Order::rows, up, fir, active, 2, 16, 3, 5, dtype, 0});
          check({Order::rows, up, fir, active, 1, 40, 2, 8, dtype, 0});
        }
        check({Order::planes, up, fir, active, 1, 4, 2, 2056, DType::float32, 0});  // several blocks side by side
        check({Order::rows, up, fir, active, 1, 1048, 2, 3, DType::float32, 0});
      }
    }
  }
}

CASE("vectors only where every access is aligned") {
  Resampling r({Order::planes, true, true, true, 2, 2, 4, 16, DType::float16, 0});
  CHECK(width_of(r.p) == 8);
  r.p.out = static_cast<uint16_t*>(r.out.data()) + 1;
  CHECK(width_of(r.p) == 1);
  r.p.out = r.out.data();
  ++r.p.shift;
  CHECK(width_of(r.p) == 1);
  --r.p.shift;
  r.p.up = false;  // to 2 x 8
  CHECK(width_of(r.p) == 8);
  r.p.width = 8;
  CHECK(width_of(r.p) == 1);
  r.p.order = Order::rows;
  CHECK(width_of(r.p) == 1);
  r.p.channels = 24;
  CHECK(width_of(r.p) == 8);
}

// Sizes no test machine can hold, and all others: what the launches promise.
CASE("launches of all sizes") {
  for (Order order : {Order::planes, Order::rows}) {
    for (bool up : {true, false}) {
      for (int64_t channels : {1, 3, 24, 512, 4096}) {
        for (const auto& [height, width] : {std::pair<int64_t, int64_t>{2, 2}, {4, 50}, {16, 16}, {64, 64}, {18, 1000},
                 {1000, 8}, {1 << 12, 1 << 12}}) {
          Resampling r({order, up, true, false, 1, 1, 1, 1, DType::bfloat16, 0});
          Problem p = r.p;
          p.batch = 64;
          p.channels = channels;
          p.height = height;
          p.width = width;
          const Launch l = launch_of(p);
          // More than a terabyte aside.
          CHECK(l.blocks < (int64_t(1) << 31) || p.batch * channels * height * width > (int64_t(1) << 40));
          CHECK(l.columns >= 1 && l.columns * l.lines <= kThreads);
          CHECK(l.tiles * l.columns >= l.vectors && (l.tiles - 1) * l.columns < l.vectors);
          // The last thread that works has the last line, run and vector.
          int thread = kThreads - 1;
          while (thread > 0 && !place_of(l, l.blocks - 1, thread).active) --thread;
          const Place last = place_of(l, l.blocks - 1, thread);
          CHECK(last.active && last.vector == l.vectors - 1 && last.row == l.height - 1 && last.run == l.runs - 1);
          CHECK(last.image == (order == Order::planes ? 64 * channels : 64) - 1);
        }
      }
    }
  }
}

}  // namespace
