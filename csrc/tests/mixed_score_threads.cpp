// The CUDA kernels of mixed_score, thread by thread on the CPU: what threads.h computes is what the GPU computes. The
// loops below stand for the grid, and for the sums across threads that cuda.cu does with shuffles and shared memory.
#include "mixed_score/threads.h"
#include "tests/mixed_score_problem.h"

namespace {

using namespace lsgm;
using namespace lsgm::mixed_score;
using lsgm::testing::Example;
using lsgm::testing::MixedScore;

struct Forward {
  template <class C, class E, class Z, int N>
  static void run(const Problem& p, int64_t max_blocks) {
    Launch l = launch_of(p, N);
    l.blocks = smaller(l.blocks, max_blocks);
    for (int64_t tile = 0; tile < l.channel_tiles; ++tile) {
      for (int64_t block = 0; block < l.blocks; ++block) {
        for (int thread = 0; thread < kThreads; ++thread) {
          if (p.order == Order::planes) {
            const int64_t first = (block * kThreads + thread) / l.lanes, step = l.blocks * kThreads / l.lanes;
            for (int64_t s = first; s < p.segments.count; s += step) {
              forward_plane<C, E, Z, N>(p, s, thread % l.lanes, l.lanes);
            }
          } else {
            const auto column = column_of<C, N>(p, l, tile, thread);
            for (int64_t s = block; s < p.segments.count; s += l.blocks) forward_rows<C, E, Z, N>(p, l, s, column);
          }
        }
      }
    }
  }
};

struct Backward {
  template <class C, class E, class Z, int N>
  static void run(const Problem& p, int64_t max_blocks) {
    Launch l = launch_of(p, N);
    l.blocks = smaller(l.blocks, max_blocks);
    if (p.order == Order::planes) {
      for (int64_t s = 0; s < p.segments.count; ++s) {
        C total = 0;
        for (int lane = 0; lane < l.lanes; ++lane) total += backward_plane<C, E, Z, N>(p, s, lane, l.lanes);
        p.partials[plane_partial(p, plane_at(p, s))] = static_cast<double>(total);
      }
    } else {
      for (int64_t tile = 0; tile < l.channel_tiles; ++tile) {
        for (int64_t s = 0; s < p.segments.count; ++s) {
          std::vector<double> totals(static_cast<size_t>(p.channels));
          std::vector<bool> seen(static_cast<size_t>(p.channels));
          for (int thread = 0; thread < kThreads; ++thread) {
            const auto column = column_of<C, N>(p, l, tile, thread);
            C sums[N];
            backward_rows<C, E, Z, N>(p, l, s, column, sums);
            if (!column.place.active) continue;
            for (int k = 0; k < N; ++k) {
              totals[static_cast<size_t>(column.place.channel + k)] += static_cast<double>(sums[k]);
              seen[static_cast<size_t>(column.place.channel + k)] = true;
            }
          }
          for (int64_t c = 0; c < p.channels; ++c) {
            if (seen[static_cast<size_t>(c)]) p.partials[row_partial(p, s, c)] = totals[static_cast<size_t>(c)];
          }
        }
      }
    }
    for (int64_t c = 0; c < p.channels; ++c) {
      double total = 0;
      for (int64_t row = 0; row < partial_rows(p); ++row) total += p.partials[row * p.channels + c];
      store_logit_gradient(p, c, total);
    }
  }
};

CASE("every thread of a CUDA launch") {
  for (const Example& example : lsgm::testing::examples()) {
    for (int64_t max_blocks : {kMaxBlocks, int64_t(2)}) {  // with and without a grid-stride loop
      MixedScore m(example);
      m.bind_forward();
      make_plan(m.p);
      run_kernel<Forward>(m.p, max_blocks);
      m.check_forward("threads");
      m.p.out = nullptr;
      m.bind_backward();
      make_plan(m.p);
      m.allocate_partials();
      run_kernel<Backward>(m.p, max_blocks);
      m.check_backward("threads");
    }
  }
}

CASE("vectors only where every access is aligned") {
  const Example aligned{
      Order::planes, 2, 3, 64, DType::float16, DType::float32, DType::float32, DType::float32, true, 0};
  MixedScore m(aligned);
  m.bind_forward();
  CHECK(width_of(m.p) == 8);
  m.p.out = static_cast<float*>(m.out.data()) + 1;
  CHECK(width_of(m.p) == 1);
  m.bind_forward();
  m.p.spatial = 60;
  CHECK(width_of(m.p) == 1);
}

// Sizes no test machine can hold: the addresses that the first and the last threads would use.
CASE("launches beyond 2^31 elements") {
  Problem p{};
  p.order = Order::planes;
  p.batch = 1 << 12;
  p.channels = 256;
  p.spatial = 1 << 14;  // 2^34 elements
  make_plan(p);
  const int64_t n = elements(p);
  CHECK(n == int64_t(1) << 34);
  const Launch l = launch_of(p, 4);
  CHECK(l.blocks == kMaxBlocks && l.lanes == kWarp);
  // The threads of the whole grid step through all segments: the last is reached, and ends at the last element.
  const int64_t step = l.blocks * kThreads / l.lanes;
  const int64_t last = p.segments.count - 1;
  CHECK(last % step < step && last / step * step + last % step == last);
  const Plane plane = plane_at(p, last);
  CHECK(plane.at + plane.size == n) << plane.at;
  CHECK(plane.sample == p.batch - 1 && plane.channel == p.channels - 1);
  CHECK(plane_partial(p, plane) == partial_rows(p) * p.channels - 1);

  p.order = Order::rows;
  make_plan(p);
  CHECK(partial_rows(p) <= p.batch + kMaxPartialRows);
  const Launch rows = launch_of(p, 4);
  const auto& segments = p.segments;
  const Segment end = segment_at(segments, segments.count - 1);
  CHECK((end.run * p.spatial + end.begin + end.size) * p.channels == n);
  CHECK(rows.columns * rows.lines <= kThreads && rows.columns * rows.channel_tiles * 4 >= p.channels);
  CHECK(row_partial(p, segments.count - 1, p.channels - 1) == partial_rows(p) * p.channels - 1);
}

}  // namespace
