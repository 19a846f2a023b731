// The CUDA kernels of depthwise_bn_swish, thread by thread on the CPU: what threads.h computes is what the GPU
// computes. The loops below stand for the grid and its barriers. Shared memory is allocated to the byte, and full of
// NaN at first.
#include "depthwise_bn_swish/threads.h"

#include <cmath>
#include <memory>
#include <vector>

#include "tests/depthwise_bn_swish_problem.h"

namespace {

using namespace lsgm;
using namespace lsgm::depthwise_bn_swish;
using lsgm::testing::Buffer;
using lsgm::testing::depthwise::Depthwise;
using lsgm::testing::depthwise::Example;
using lsgm::testing::depthwise::examples;

// f(thread) for all threads between two barriers, last to first: their order must not matter.
template <class F>
void threads(const Launch& l, F&& f) {
  for (int thread = l.threads - 1; thread >= 0; --thread) f(thread);
}

struct Block {
  explicit Block(const Launch& l)
      : memory(l.shared, DType::float32, 0),
        shared(static_cast<float*>(memory.data())),
        strips(static_cast<size_t>(l.threads)),
        weights(static_cast<size_t>(l.threads)),
        sums(static_cast<size_t>(l.threads)) {}
  struct Results {
    Strip y;
  };
  struct Taps {
    float tap[kTaps] = {};
  };
  Buffer memory;
  float* shared;
  std::vector<Results> strips;
  std::vector<Taps> weights, sums;
};

template <class F>
void for_each_block(const Launch& l, F&& f) {
  for (int64_t i = 0; i < l.blocks; ++i) f(i / l.channel_tiles, i % l.channel_tiles);
}

template <Kind kKind>
struct Compute {
  template <class T, Order O, int N>
  static void run(const Problem& p, const Launch& l) {
    constexpr bool kSpread = kKind == Kind::spread;
    for_each_block(l, [&](int64_t tile, int64_t channel_tile) {
      Block block(l);
      const auto at = [](int thread) { return static_cast<size_t>(thread); };
      const Tile t = tile_at(l, tile, channel_tile);
      const Window source = source_of(p, l, kKind, t);
      threads(l, [&](int thread) {
        stage<T, O, N, !kSpread>(p, source, kSpread ? p.grad : p.x, thread, l.threads, block.shared);
        const Place place = place_of<O>(l, thread);
        load_weights<T>(p, l, place.active ? t.channel + place.channel : p.channels, block.weights[at(thread)].tap);
      });
      threads(l, [&](int thread) {
        const Place place = place_of<O>(l, thread);
        if (!place.active) return;
        const auto& weights = block.weights[at(thread)].tap;
        Strip& y = block.strips[at(thread)].y;
        if (kSpread) {
          spread<O>(source, place, block.shared, weights, y);
        } else if (p.stride == 1) {
          convolve<O, 1>(source, place, block.shared, weights, y);
        } else {
          convolve<O, 2>(source, place, block.shared, weights, y);
        }
      });
      const Window result =
          kSpread ? window_of(t, l, p.height, p.width) : window_of(t, l, p.out_height, p.out_width);
      threads(l, [&](int thread) {
        const Place place = place_of<O>(l, thread);
        if (place.active) put<O>(result, place, block.strips[at(thread)].y, block.shared);
      });
      threads(l, [&](int thread) {
        flush<T, O, N, !kSpread>(p, result, kSpread ? p.grad_x : p.out, thread, l.threads, block.shared);
      });
    });
  }
};

struct WeightGradient {
  template <class T, Order O, int N>
  static void run(const Problem& p, const Launch& l) {
    for_each_block(l, [&](int64_t chunk, int64_t channel_tile) {
      Block block(l);
      float* of_grad = block.shared + in_floats(l);
      for (int64_t i = chunk * l.per_chunk; i < smaller(l.tiles, (chunk + 1) * l.per_chunk); ++i) {
        const Tile t = tile_at(l, i, channel_tile);
        const Window source = source_of(p, l, Kind::weights, t), grad = window_of(t, l, p.out_height, p.out_width);
        threads(l, [&](int thread) {
          stage<T, O, N, false>(p, source, p.x, thread, l.threads, block.shared);
          stage<T, O, N, false>(p, grad, p.grad, thread, l.threads, of_grad);
        });
        threads(l, [&](int thread) {
          const Place place = place_of<O>(l, thread);
          auto& sums = block.sums[static_cast<size_t>(thread)].tap;
          if (!place.active) return;
          if (p.stride == 1) {
            add_products<O, 1>(source, grad, place, block.shared, of_grad, sums);
          } else {
            add_products<O, 2>(source, grad, place, block.shared, of_grad, sums);
          }
        });
      }
      threads(l, [&](int thread) { put_sums(l, thread, block.sums[static_cast<size_t>(thread)].tap, block.shared); });
      for (int left = l.strips; left > 1;) {
        const int half = (left + 1) / 2;
        threads(l, [&](int thread) { fold<O>(l, place_of<O>(l, thread), thread, half, left, block.shared); });
        left = half;
      }
      threads(l, [&](int thread) {
        store_sums<O>(p, l, tile_at(l, 0, channel_tile), chunk, thread, block.shared);
      });
    });
  }
};

class Threads : public Depthwise {
 public:
  using Depthwise::Depthwise;

  void forward() {
    with_affines();
    run_kernel<Compute<Kind::convolve>>(p, launch_of(p, Kind::convolve));
  }

  void backward() {
    without_affines();
    if (p.stride == 1) {
      const Problem turned = turned_around(p);
      Launch l = launch_of(turned, Kind::convolve);
      l.turned = true;
      run_kernel<Compute<Kind::convolve>>(turned, l);
    } else {
      run_kernel<Compute<Kind::spread>>(p, launch_of(p, Kind::spread));
    }
    const Launch l = launch_of(p, Kind::weights);
    const int64_t count = partial_count_of(p);
    const Buffer memory(count, DType::float64, 0);
    p.partials = static_cast<double*>(memory.data());
    run_kernel<WeightGradient>(p, l);
    for (int64_t i = 0; i < count; ++i) CHECK(std::isfinite(p.partials[i])) << "partial " << i;
    for (int64_t i = 0; i < p.channels * kTaps; ++i) combine(p, l.chunks, i);
  }
};

void check(const Example& example) {
  Threads t(example);
  t.forward();
  t.check_forward("threads");
  t.backward();
  t.check_backward("threads");
}

CASE("every thread of a CUDA launch") {
  for (const Example& example : examples()) check(example);
}

CASE("vectors, and tiles that neither rows, columns nor channels fill") {
  for (int64_t stride : {1, 2}) {
    for (DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
      for (bool active : {false, true}) {
        check({Order::planes, 2, 5, 18, 16, stride, dtype, active, !active, 0});
        check({Order::planes, 1, 2, 70, 80, stride, dtype, active, active, 0});
        check({Order::rows, 2, 40, 9, 18, stride, dtype, active, !active, 0});
        check({Order::rows, 1, 16, 5, 35, stride, dtype, active, active, 0});
      }
    }
    check({Order::planes, 1, 1100, 4, 4, stride, DType::float32, true, true, 0});
    check({Order::planes, 300, 2, 8, 8, stride, DType::float32, false, false, 0});  // several tiles per chunk
    check({Order::rows, 300, 4, 4, 8, stride, DType::float32, false, false, 0});
  }
}

CASE("vectors only where every access is aligned") {
  Threads t({Order::planes, 2, 3, 16, 16, 2, DType::float16, true, true, 0});
  t.with_affines();
  CHECK(width_of(t.p) == 8);
  t.p.grad_x = static_cast<uint16_t*>(t.grad_x.data()) + 1;
  CHECK(width_of(t.p) == 1);
  t.p.grad_x = t.grad_x.data();
  t.p.out_width = 12;
  CHECK(width_of(t.p) == 1);
  t.p.out_width = 8;
  t.p.order = Order::rows;
  CHECK(width_of(t.p) == 1);
}

// Sizes no test machine can hold, and all others: what the launches promise.
CASE("launches of all sizes") {
  for (Order order : {Order::planes, Order::rows}) {
    for (int64_t stride : {1, 2}) {
      for (int64_t channels : {1, 3, 24, 384, 4096}) {
        for (const auto& [height, width] : {std::pair<int64_t, int64_t>{1, 1}, {3, 50}, {4, 4}, {16, 16}, {24, 24},
                 {64, 64}, {17, 1000}, {1000, 7}, {1 << 12, 1 << 12}}) {
          Problem p{};
          p.order = order;
          p.batch = 64;
          p.channels = channels;
          p.height = height;
          p.width = width;
          p.stride = stride;
          p.out_height = out_size(height, stride);
          p.out_width = out_size(width, stride);
          for (Kind kind : {Kind::convolve, Kind::spread, Kind::weights}) {
            if (kind == Kind::spread && stride == 1) continue;
            const Launch l = launch_of(p, kind);
            CHECK(l.threads <= kThreads && l.shared <= kSharedFloats && l.blocks < (int64_t(1) << 31));
            CHECK(l.columns % 4 == 0 && (l.columns % 8 == 0 || p.out_width % 8 != 0));
            CHECK(l.chunks * l.per_chunk >= l.tiles && (l.chunks - 1) * l.per_chunk < l.tiles);
            CHECK(kind != Kind::weights || l.chunks <= kMaxChunks);
            const Tile last = tile_at(l, l.tiles - 1, l.channel_tiles - 1);
            const int64_t rows = kind == Kind::spread ? height : p.out_height;
            const int64_t columns = kind == Kind::spread ? width : p.out_width;
            CHECK(last.sample == p.batch - 1 && last.channel < channels && last.channel + l.channels >= channels);
            CHECK(last.row < rows && last.row + l.rows >= rows);
            CHECK(last.column < columns && last.column + l.columns >= columns);
            const Window result = window_of(last, l, rows, columns);
            const int64_t end = order == Order::planes
                                    ? global_at<Order::planes>(p, result, channels - 1, rows - 1, columns - 1)
                                    : global_at<Order::rows>(p, result, channels - 1, rows - 1, columns - 1);
            CHECK(end == p.batch * channels * rows * columns - 1) << end;
          }
        }
      }
    }
  }
}

}  // namespace
