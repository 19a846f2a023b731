// The CUDA kernels of se_residual, thread by thread on the CPU: what threads.h computes is what the GPU computes. The
// loops below stand for the grid, for its barriers, and for the sums across threads that cuda.cu does with shuffles and
// shared memory.
#include "se_residual/threads.h"
#include "tests/se_residual_problem.h"

namespace {

using namespace lsgm;
using namespace lsgm::se_residual;
using lsgm::testing::Example;
using lsgm::testing::examples;
using lsgm::testing::SeResidual;

template <bool kProduct, class T, int N>
void reduce(const Problem& p, const Launch& l, int64_t sample, int64_t tile, int64_t blocks) {
  if (p.order == Order::planes) {
    const int lanes = 1 << l.lane_bits;
    const int64_t step = (blocks * kThreads) >> l.lane_bits;
    for (int64_t first = 0; first < step; ++first) {
      for (int64_t k = first; k < p.channels * p.pieces; k += step) {
        const Piece piece = plane_piece(p, sample, k);
        float total = 0;
        for (int lane = 0; lane < lanes; ++lane) total += reduce_plane<kProduct, T, N>(p, piece, lane, lanes);
        p.partials[static_cast<size_t>(partial_at(p, sample, piece.piece, piece.channel))] = total;
      }
    }
    return;
  }
  for (int64_t piece = 0; piece < p.pieces; ++piece) {
    std::vector<double> totals(static_cast<size_t>(p.channels), 0);
    std::vector<bool> seen(static_cast<size_t>(p.channels), false);
    for (int thread = 0; thread < kThreads; ++thread) {
      const Place place = place_of(p, l, tile, thread, N);
      float sums[N];
      reduce_rows<kProduct, T, N>(p, l, sample, piece, place, sums);
      for (int k = 0; k < N && place.active; ++k) {
        totals[static_cast<size_t>(place.channel + k)] += static_cast<double>(sums[k]);
        seen[static_cast<size_t>(place.channel + k)] = true;
      }
    }
    for (int64_t c = 0; c < p.channels; ++c) {
      if (seen[static_cast<size_t>(c)]) p.partials[partial_at(p, sample, piece, c)] = totals[static_cast<size_t>(c)];
    }
  }
}

template <bool kBackward>
struct Run {
  template <class T, int N>
  static void run(const Problem& p, int64_t max_blocks) {
    Launch l = launch_of(p, N);
    l.blocks = smaller(l.blocks, max_blocks);
    for (int64_t sample = 0; sample < p.batch; ++sample) {
      for (int64_t tile = 0; tile < l.tiles; ++tile) reduce<kBackward, T, N>(p, l, sample, tile, l.blocks);
      for (int64_t c = 0; c < p.channels; ++c) kBackward ? gate_delta(p, sample, c) : pool(p, sample, c);
      for (int64_t r = 0; r < p.hidden; ++r) {
        float sum = 0;
        for (int lane = 0; lane < kWarp; ++lane) {
          sum += kBackward ? hidden_delta_part(p, sample, r, lane) : hidden_part(p, sample, r, lane);
        }
        kBackward ? finish_hidden_delta(p, sample, r, sum) : finish_hidden(p, sample, r, sum);
      }
      for (int64_t c = 0; c < p.channels; ++c) kBackward ? pooled_delta(p, sample, c) : gate(p, sample, c);
      for (int64_t tile = 0; tile < l.tiles; ++tile) {
        for (int64_t block = 0; block < l.blocks; ++block) {
          for (int thread = 0; thread < kThreads; ++thread) apply<T, N>(p, l, sample, tile, block, thread);
        }
      }
    }
    if (kBackward) {
      for (int64_t i = 0; i < parameter_count(p); ++i) parameter_gradient(p, i);
    }
  }

  template <class T, int N>
  static void apply(const Problem& p, const Launch& l, int64_t sample, int64_t tile, int64_t block, int thread) {
    if (p.order == Order::planes) {
      const int lanes = 1 << l.lane_bits;
      const int64_t step = (l.blocks * kThreads) >> l.lane_bits;
      for (int64_t k = (block * kThreads + thread) >> l.lane_bits; k < p.channels * p.pieces; k += step) {
        apply_plane<kBackward, T, N>(p, sample, plane_piece(p, sample, k), thread & (lanes - 1), lanes);
      }
    } else {
      const Place place = place_of(p, l, tile, thread, N);
      for (int64_t piece = block; piece < p.pieces; piece += l.blocks) {
        apply_rows<kBackward, T, N>(p, l, sample, piece, place);
      }
    }
  }
};

CASE("every thread of a CUDA launch") {
  for (const Example& example : examples()) {
    for (int64_t max_blocks : {kMaxBlocks, int64_t(2)}) {  // with and without a loop over the grid
      SeResidual s(example);
      make_plan(s.p);
      s.allocate_partials();
      run_kernel<Run<false>>(s.p, max_blocks);
      run_kernel<Run<true>>(s.p, max_blocks);
      s.check("threads");
    }
  }
}

CASE("vectors only where every access is aligned") {
  SeResidual s({Order::planes, 2, 3, 64, 4, DType::float16, 0});
  CHECK(width_of(s.p) == 8);
  s.p.y = static_cast<uint16_t*>(s.y.data()) + 1;
  CHECK(width_of(s.p) == 1);
  s.p.y = s.y.data();
  s.p.spatial = 60;
  CHECK(width_of(s.p) == 1);
  s.p.spatial = 64;
  s.p.order = Order::rows;
  CHECK(width_of(s.p) == 1);
}

// Sizes no test machine can hold: the addresses that the last threads would use.
CASE("launches beyond 2^31 elements") {
  Problem p{};
  p.dtype = DType::bfloat16;
  p.batch = 1 << 12;
  p.channels = 256;
  p.spatial = 1 << 14;  // 2^34 elements
  p.hidden = 16;
  make_plan(p);
  CHECK(!is_small(p));
  const Piece last = plane_piece(p, p.batch - 1, p.channels * p.pieces - 1);
  CHECK(last.at + last.size == elements(p)) << last.at;
  CHECK(partial_at(p, p.batch - 1, last.piece, last.channel) == partial_count(p) - 1);
  const Launch planes = launch_of(p, 8);
  CHECK(planes.lane_bits == 5 && planes.samples == p.batch && planes.tiles == 1);

  p.order = Order::rows;
  make_plan(p);
  CHECK(p.pieces <= kMaxRowPieces);
  const Launch rows = launch_of(p, 8);
  CHECK(rows.columns * rows.lines <= kThreads && rows.columns * rows.tiles * 8 >= p.channels);
  int64_t end = 0;
  for (int thread = 0; thread < kThreads; ++thread) {
    const Place place = place_of(p, rows, rows.tiles - 1, thread, 8);
    for_rows(p, rows, p.batch - 1, p.pieces - 1, place, [&](int64_t at) { end = larger(end, at + 8); });
  }
  CHECK(end == elements(p)) << end;
}

}  // namespace
