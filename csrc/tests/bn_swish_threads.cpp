// The CUDA kernels of bn_swish, thread by thread on the CPU: what threads.h computes is what the GPU computes. The
// loops below stand for the grid, and for the sums across threads that cuda.cu does in shared memory.
#include "bn_swish/threads.h"
#include "tests/bn_swish_problem.h"

namespace {

using namespace lsgm;
using namespace lsgm::bn_swish;
using lsgm::testing::BnSwish;
using lsgm::testing::Example;

// The sums over what one channel has in a block; `values[thread * K + k]`.
template <Order O, int K>
void over_channel(std::vector<float>& values, const Launch& l) {
  const int columns = O == Order::planes ? 1 : l.columns, lines = O == Order::planes ? kThreads : l.lines;
  for (int column = 0; column < columns; ++column) {
    for (int k = 0; k < K; ++k) {
      float total = 0;
      for (int line = 0; line < lines; ++line) total += values[static_cast<size_t>((line * columns + column) * K + k)];
      for (int thread = column; thread < kThreads; thread += columns) {
        values[static_cast<size_t>(thread * K + k)] = total;
      }
    }
  }
}

template <Order O>
bool leads(const Place& place) {
  return place.active && place.line == 0 && (O == Order::rows || place.column == 0);
}

// f(place, thread) for all threads of a block.
template <Order O, int N, class F>
void for_each_thread(const Problem& p, const Launch& l, int64_t block, F&& f) {
  for (int thread = 0; thread < kThreads; ++thread) f(place_of<O, N>(p, l, block, thread), thread);
}

struct Statistics {
  template <class T, Order O, int N>
  static void run(const Problem& p, bool whole) {
    constexpr int K = channels_of<O, N>();
    const Launch l = launch_of(p);
    for (int64_t block = 0; block < l.blocks; ++block) {
      std::vector<float> pivots(kThreads * K), seen(kThreads), first(kThreads * K), second(kThreads * K);
      const auto slot = [](int thread, int k) { return static_cast<size_t>(thread * K + k); };
      for_each_thread<O, N>(p, l, block, [&](const Place& place, int thread) {
        Walk w = walk_of<O, N>(p, l, place);
        Batch<N> b;
        take<T, O, N, false>(p, w, b);
        float sums[K];
        add_up<O, N>(b, sums);
        for (int k = 0; k < K; ++k) pivots[slot(thread, k)] = sums[k];
        seen[static_cast<size_t>(thread)] = static_cast<float>(b.count * (N / K));
      });
      over_channel<O, K>(pivots, l);
      over_channel<O, 1>(seen, l);
      for_each_thread<O, N>(p, l, block, [&](const Place& place, int thread) {
        Walk w = walk_of<O, N>(p, l, place);
        Batch<N> b;
        take<T, O, N, false>(p, w, b);
        float pivot[K];
        for (int k = 0; k < K; ++k) pivot[k] = pivots[slot(thread, k)] /= seen[static_cast<size_t>(thread)];
        Differences<K> d;
        differences<T, O, N>(p, w, b, pivot, d);
        for (int k = 0; k < K; ++k) {
          first[slot(thread, k)] = d.first[k];
          second[slot(thread, k)] = d.second[k];
        }
      });
      over_channel<O, K>(first, l);
      over_channel<O, K>(second, l);
      for_each_thread<O, N>(p, l, block, [&](const Place& place, int thread) {
        if (!leads<O>(place)) return;
        const double n = static_cast<double>(chunk_elements(p, place.chunk));
        double mean[K], m2[K];
        for (int k = 0; k < K; ++k) {
          const size_t i = slot(thread, k);
          const Moments m = moments_of(pivots[i], first[i], second[i], n);
          mean[k] = m.mean;
          m2[k] = m.m2;
          if (whole) store_moments(p, place.channel + k, m);
        }
        if (!whole) store_partials<O, K>(p, place, mean, m2);
      });
    }
  }
};

struct Apply {
  template <class T, Order O, int N>
  static void run(const Problem& p, bool) {
    constexpr int K = channels_of<O, N>();
    const Launch l = launch_of(p);
    for (int64_t block = 0; block < l.blocks; ++block) {
      for_each_thread<O, N>(p, l, block, [&](const Place& place, int) {
        const Constants<K> c = p.batch_stats
                                   ? constants_of<K>(p, place)
                                   : running_constants<K>(p, place, leads<O>(place) && place.chunk == 0);
        apply_chunk<T, O, N>(p, walk_of<O, N>(p, l, place), c);
      });
    }
  }
};

template <Mode kMode>
struct Backward {
  template <class T, Order O, int N>
  static void run(const Problem& p, bool whole) {
    constexpr int K = channels_of<O, N>();
    const Launch l = launch_of(p);
    for (int64_t block = 0; block < l.blocks; ++block) {
      std::vector<float> first(kThreads * K), second(kThreads * K);
      for_each_thread<O, N>(p, l, block, [&](const Place& place, int thread) {
        Constants<K> c = constants_of<K>(p, place);
        if (kMode == Mode::apply) correct(p, place, c);
        Differences<K> sums;
        backward_chunk<kMode, T, O, N>(p, walk_of<O, N>(p, l, place), c, sums);
        for (int k = 0; k < K; ++k) {
          first[static_cast<size_t>(thread * K + k)] = sums.first[k];
          second[static_cast<size_t>(thread * K + k)] = sums.second[k];
        }
      });
      if (kMode == Mode::apply) continue;
      over_channel<O, K>(first, l);
      over_channel<O, K>(second, l);
      for_each_thread<O, N>(p, l, block, [&](const Place& place, int thread) {
        if (!leads<O>(place)) return;
        double one[K], two[K];
        for (int k = 0; k < K; ++k) {
          one[k] = static_cast<double>(first[static_cast<size_t>(thread * K + k)]);
          two[k] = static_cast<double>(second[static_cast<size_t>(thread * K + k)]);
          if (whole) store_sums(p, place.channel + k, {one[k], two[k]});
        }
        if (!whole) store_partials<O, K>(p, place, one, two);
      });
    }
  }
};

void combine_moments(const Problem& p) {
  for (int64_t c = 0; c < p.channels; ++c) {
    Moments m{0, 0};
    for (int lane = 0; lane < kLanes; ++lane) m.mean += mean_part(p, c, lane);
    for (int lane = 0; lane < kLanes; ++lane) m.m2 += m2_part(p, c, lane, m.mean);
    store_moments(p, c, m);
  }
}

void combine_sums(const Problem& p) {
  for (int64_t c = 0; c < p.channels; ++c) {
    Sums sums{0, 0};
    for (int lane = 0; lane < kLanes; ++lane) {
      sums.grad += sum_part(p, c, lane, 0);
      sums.centred += sum_part(p, c, lane, 1);
    }
    store_sums(p, c, sums);
  }
}

void run_statistics(const Problem& p, bool whole) {
  run_kernel<Statistics>(p, whole);
  if (!whole) combine_moments(p);
}

void run_backward(const Problem& p, bool whole) {
  if (!p.batch_stats) {
    run_kernel<Backward<Mode::both>>(p, whole);
    return combine_sums(p);
  }
  run_kernel<Backward<Mode::reduce>>(p, whole);
  if (!whole) combine_sums(p);
  run_kernel<Backward<Mode::apply>>(p, whole);
}

void run_all(BnSwish& b, bool whole) {
  if (b.p.batch_stats) run_statistics(b.p, whole);
  run_kernel<Apply>(b.p, whole);
  run_backward(b.p, whole);
}

// Chunks so small that each channel has several, which else only large tensors have.
void cut(Problem& p) {
  Chunks& c = p.chunks;
  if (p.order == Order::planes) {
    c.size = smaller(p.spatial, 496);
    c.pieces = ceil_div(p.spatial, c.size);
    c.samples = larger(1, smaller(p.batch, 1000 / c.size));
    c.per_channel = ceil_div(p.batch, c.samples) * c.pieces;
    c.count = c.per_channel * p.channels;
  } else {
    c.size = 37;
    c.count = c.per_channel = ceil_div(p.batch * p.spatial, c.size);
  }
}

CASE("every thread of a CUDA launch") {
  std::vector<Example> all = lsgm::testing::examples();
  for (Order order : {Order::planes, Order::rows}) {  // sizes with wide accesses, in every type
    for (DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
      all.push_back({order, 3, 24, 64, dtype, true, true, 0, 0.5});
      all.push_back({order, 2, 8, 1032, dtype, false, false, 0, 0.5});
    }
  }
  all.push_back({Order::rows, 2, 300, 70, DType::float32, true, true, 0, 0.5});  // more than one block side by side
  all.push_back({Order::planes, 5, 2, 3600, DType::float32, true, true, 0, 100});
  for (const Example& example : all) {
    for (bool cut_up : {false, true}) {
      BnSwish b(example);
      make_plan(b.p);
      const bool whole = one_launch(b.p) && !cut_up;
      if (cut_up) cut(b.p);
      b.allocate_partials();
      run_all(b, whole);
      b.check(whole ? "one launch" : cut_up ? "small chunks" : "chunks");
    }
  }
}

CASE("the four parts, with an exchange between them") {
  // What half a batch alone cannot know comes from the whole: the statistics, and the gradients of weight and bias.
  for (Order order : {Order::planes, Order::rows}) {
    BnSwish whole({order, 4, 6, 80, DType::float32, true, true, 0, 2});
    make_plan(whole.p);
    cut(whole.p);
    whole.allocate_partials();
    run_all(whole, false);
    BnSwish half({order, 2, 6, 80, DType::float32, true, true, 0, 2});
    half.weight = whole.weight;
    half.bias = whole.bias;
    half.p.weight = half.weight.data();
    half.p.bias = half.bias.data();
    for (int64_t i = 0; i < half.count; ++i) {
      half.x.set(i, whole.x.at(i));
      half.grad.set(i, whole.grad.at(i));
    }
    half.p.mean = whole.p.mean;
    half.p.rstd = whole.p.rstd;
    half.p.grad_weight = whole.p.grad_weight;
    half.p.grad_bias = whole.p.grad_bias;
    make_plan(half.p);
    cut(half.p);
    half.p.count = whole.p.count;
    run_kernel<Apply>(half.p, false);
    run_kernel<Backward<Mode::apply>>(half.p, false);
    for (int64_t i = 0; i < half.count; ++i) {
      CHECK(half.y.at(i) == whole.y.at(i) && half.grad_x.at(i) == whole.grad_x.at(i)) << i;
    }
  }
}

CASE("variance far from zero, in every plan") {
  for (Order order : {Order::planes, Order::rows}) {
    for (bool cut_up : {false, true}) {
      BnSwish b({order, 3, 2, 3000, DType::float32, true, true, 0, 0});
      for (int64_t i = 0; i < b.count; ++i) {
        b.x.set(i, 1e4 + static_cast<double>(static_cast<float>(b.random.uniform(-0.01, 0.01))));
      }
      make_plan(b.p);
      const bool whole = one_launch(b.p) && !cut_up;
      if (cut_up) cut(b.p);
      b.allocate_partials();
      run_statistics(b.p, whole);
      for (int64_t c = 0; c < 2; ++c) {
        long double total = 0, squares = 0;
        b.for_channel(c, [&](int64_t i) { total += b.x.at(i); });
        b.for_channel(c, [&](int64_t i) { squares += (b.x.at(i) - total / 9000) * (b.x.at(i) - total / 9000); });
        const long double var = b.var[static_cast<size_t>(c)];
        CHECK(std::fabs(var - squares / 8999) <= 1e-5L * squares / 8999) << b.var[static_cast<size_t>(c)];
      }
    }
  }
}

CASE("vectors only where every access is aligned") {
  BnSwish b({Order::planes, 2, 3, 64, DType::float16, true, true, 0, 0});
  CHECK(width_of(b.p) == 8);
  b.p.grad_x = static_cast<uint16_t*>(b.grad_x.data()) + 1;
  CHECK(width_of(b.p) == 1);
  b.p.grad_x = b.grad_x.data();
  b.p.spatial = 60;
  CHECK(width_of(b.p) == 1);
}

CASE("an empty batch hands the running statistics on") {
  BnSwish b({Order::planes, 0, 5, 9, DType::float32, false, true, 0, 0});
  make_plan(b.p);
  run_kernel<Apply>(b.p, false);
  CHECK(b.mean == b.running_mean && b.var == b.running_var);
}

// Sizes no test machine can hold: the chunks' ends, and the addresses of the last threads.
CASE("launches beyond 2^31 elements") {
  Problem p{};
  p.batch_stats = true;
  p.channels = 256;
  for (const auto& shape : {std::pair<int64_t, int64_t>{1 << 12, 1 << 14}, {1 << 6, 1 << 20}, {1 << 22, 16}}) {
    for (Order order : {Order::planes, Order::rows}) {
      p.order = order;
      p.batch = shape.first;
      p.spatial = shape.second;
      make_plan(p);
      const Launch l = launch_of(p);
      CHECK(p.chunks.per_channel <= kMaxChunks) << p.chunks.per_channel;
      CHECK(l.blocks == l.tiles * p.chunks.per_channel && l.blocks < int64_t(1) << 31);
      CHECK(partial_at(p, p.chunks.per_channel - 1, 1, 255) == partial_count(p) - 1);
      int64_t last = 0;
      for (int thread = 0; thread < kThreads; ++thread) {
        if (order == Order::planes) {
          const Walk w = walk_of<Order::planes, 4>(p, l, place_of<Order::planes, 4>(p, l, l.blocks - 1, thread));
          const int64_t samples = (w.samples - 1 - w.sample) / w.lines, steps = (w.end - 1 - w.first) / w.step;
          if (w.sample < w.samples) last = larger(last, w.at + samples * w.jump + steps * w.stride + 4);
        } else {
          const Walk w = walk_of<Order::rows, 4>(p, l, place_of<Order::rows, 4>(p, l, l.blocks - 1, thread));
          if (w.sample < w.samples) last = larger(last, w.at + (w.end - 1 - w.first) / w.step * w.stride + 4);
        }
      }
      CHECK(last == elements(p)) << last << " of " << elements(p);
    }
  }
}

}  // namespace
