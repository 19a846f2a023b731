// The CUDA kernels of score_drift, thread by thread on the CPU: what threads.h computes is what the GPU computes. The
// loops below stand for the grid.
#include "score_drift/threads.h"

#include <vector>

#include "tests/score_drift_problem.h"

namespace {

using namespace lsgm;
using namespace lsgm::score_drift;
using lsgm::testing::Example;
using lsgm::testing::ScoreDrift;

struct Forward {
  template <class C, class E, class Z, int N>
  static void run(const Problem& problem, int64_t max_blocks) {
    Launch l = launch_of(problem, N);
    l.blocks = smaller(l.blocks, max_blocks);
    for (int64_t tile = 0; tile < l.channel_tiles; ++tile) {
      for (int64_t block = 0; block < l.blocks; ++block) {
        for (int thread = 0; thread < kThreads; ++thread) {
          if (problem.order == Order::planes) {
            const int64_t first = (block * kThreads + thread) / l.lanes, step = l.blocks * kThreads / l.lanes;
            for (int64_t s = first; s < problem.segments.count; s += step) {
              forward_plane<C, E, Z, N>(problem, s, thread % l.lanes, l.lanes);
            }
          } else {
            const auto column = column_of<C, N>(problem, l, tile, thread);
            for (int64_t s = block; s < problem.segments.count; s += l.blocks) {
              forward_rows<C, E, Z, N>(problem, l, s, column);
            }
          }
        }
      }
    }
  }
};

CASE("every thread of a CUDA launch") {
  for (const Example& example : lsgm::testing::examples()) {
    for (bool mixing : {true, false}) {
      for (int64_t max_blocks : {kMaxBlocks, int64_t(2)}) {  // with and without a grid-stride loop
        ScoreDrift d(example, mixing);
        make_plan(d.problem);
        run_kernel<Forward>(d.problem, max_blocks);
        d.check_forward("threads");
      }
    }
  }
}

CASE("vectors only where every access is aligned") {
  const Example aligned{
      Order::planes, 2, 3, 64, DType::float16, DType::float32, DType::float32, DType::float32, true, 0};
  ScoreDrift d(aligned);
  CHECK(width_of(d.problem) == 8);
  d.problem.out = static_cast<float*>(d.out.data()) + 1;
  CHECK(width_of(d.problem) == 1);
  d.problem.out = d.out.data();
  d.problem.spatial = 60;
  CHECK(width_of(d.problem) == 1);
  // Without a logit the channels of a sample are one run, of 3 x 64 elements.
  ScoreDrift unmixed(aligned, false);
  CHECK(unmixed.problem.spatial == 192 && width_of(unmixed.problem) == 8);
}

// Sizes no test machine can hold: the addresses that the last threads would use.
CASE("launches beyond 2^31 elements") {
  for (bool mixing : {true, false}) {
    for (Order order : {Order::planes, Order::rows}) {
      const float any = 0;
      Problem problem{};
      problem.order = order;
      problem.batch = 1 << 12;
      problem.channels = 256;
      problem.spatial = 1 << 14;  // 2^34 elements
      problem.logit.data = mixing ? &any : nullptr;
      join_channels(problem);
      make_plan(problem);
      const int64_t n = elements(problem), last = problem.segments.count - 1;
      CHECK(n == int64_t(1) << 34);
      const Launch l = launch_of(problem, 4);
      if (problem.order == Order::planes) {
        CHECK(l.blocks == kMaxBlocks && l.lanes == kWarp);
        const Plane plane = plane_at(problem, last);
        CHECK(plane.at + plane.size == n && plane.sample == problem.batch - 1) << plane.at;
        CHECK(plane.channel == problem.channels - 1);
      } else {
        const Segment end = segment_at(problem.segments, last);
        CHECK(end.run == problem.batch - 1);
        CHECK((end.run * problem.spatial + end.begin + end.size) * problem.channels == n);
        CHECK(l.columns * l.lines <= kThreads && l.columns * l.channel_tiles * 4 >= problem.channels);
      }
    }
  }
}

}  // namespace
