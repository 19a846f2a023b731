// The CUDA kernels of group_norm_swish, thread by thread on the CPU: what threads.h computes is what the GPU computes.
// The loops below stand for the grid, and for the sums across threads that cuda.cu does in shared memory.
#include "group_norm_swish/threads.h"

#include <cmath>
#include <vector>

#include "tests/buffer.h"

namespace {

using namespace lsgm;
using namespace lsgm::group_norm_swish::cuda;
using lsgm::testing::Buffer;
using lsgm::testing::Random;

// ---- a launch ----

// Sums of M numbers per thread over the threads that share a channel.
template <int M>
class OverChannel {
 public:
  void set(int thread, const float (&values)[M]) {
    for (int m = 0; m < M; ++m) values_[at(thread, m)] = values[m];
  }
  void get(const Place& place, int thread, float (&values)[M]) const {
    const int first = thread - place.turn * place.apart;
    for (int m = 0; m < M; ++m) {
      values[m] = 0;
      for (int turn = 0; turn < place.turns; ++turn) values[m] += values_[at(first + turn * place.apart, m)];
    }
  }

 private:
  static size_t at(int thread, int m) { return static_cast<size_t>(m * kThreads + thread); }
  std::vector<float> values_ = std::vector<float>(static_cast<size_t>(M * kThreads), 0.0f);
};

// f(place, thread) for the threads of a round that have a line.
template <Order O, int N, class F>
void for_each_thread(const Call& c, const Block& b, int round, F&& f) {
  for (int thread = 0; thread < c.plan.lines * c.plan.columns; ++thread) f(place_of<O, N>(c, b, round, thread), thread);
}

template <int K>
void pivot_of(const OverChannel<K + 1>& sums, const Place& place, int thread, float (&pivot)[K]) {
  float values[K + 1];
  sums.get(place, thread, values);
  for (int k = 0; k < K; ++k) pivot[k] = values[k] / values[K];
}

// GCC 12 cannot compile these in a lambda.
template <class T, Order O, int N, bool kSum, class First>
void add_up_thread(const Call& c, const Block& b, const Place& place, int thread, First& first) {
  constexpr int K = channels_of<O, N>();
  Walk w = walk_of<O, N>(c, b, place);
  Batch<N> batch;
  take_v<T, N, kSum>(c, w, batch);
  float sums[K], values[K + 1];
  add_up<O, N>(batch, sums);
  for (int k = 0; k < K; ++k) values[k] = sums[k];
  values[K] = static_cast<float>(batch.count * (N / K));
  first.set(thread, values);
}

template <class T, Order O, int N, bool kSum, class First, class Second>
void difference_thread(
    const Call& c, const Block& b, const Place& place, int thread, const First& first, Second& second) {
  constexpr int K = channels_of<O, N>();
  Walk w = walk_of<O, N>(c, b, place);
  Batch<N> batch;
  take_v<T, N, kSum>(c, w, batch);
  float pivot[K], d[2 * K];
  pivot_of(first, place, thread, pivot);
  differences<T, O, N, kSum>(c, w, batch, pivot, d);
  second.set(thread, d);
}

template <Order O, int N, class First, class Second>
void moments_thread(const Call& c, const Block& b, const Place& place, int thread, const First& first,
    const Second& second, Moments* channels) {
  constexpr int K = channels_of<O, N>();
  float pivot[K], d[2 * K];
  pivot_of(first, place, thread, pivot);
  second.get(place, thread, d);
  for (int k = 0; k < K; ++k) {
    const int64_t channel = place.channel + k;
    CHECK(channel - b.begin < kMost) << channel;
    channels[channel - b.begin] = moments_of(c, b, channel, pivot[k], d[k], d[K + k]);
  }
}

template <class T, Order O, int N, class All>
void gradient_thread(const Call& c, const Block& b, const Place& place, int thread, All& all) {
  constexpr int K = channels_of<O, N>();
  float values[3 * K];
  add_gradients<T, O, N>(c, walk_of<O, N>(c, b, place), slopes_of<K>(c, b, place, nullptr), values);
  all.set(thread, values);
}

template <Order O, int N, class All>
void sums_thread(const Call& c, const Block& b, const Place& place, int thread, const All& all, Sums* kept,
    Correction* channels) {
  constexpr int K = channels_of<O, N>();
  float values[3 * K];
  all.get(place, thread, values);
  for (int k = 0; k < K; ++k) {
    const int64_t slot = place.channel + k - b.begin;
    kept[slot] = {values[k], values[K + k], values[2 * K + k]};
    channels[slot] = store_sums(c, b, place.channel + k, kept[slot]);
  }
}

template <class T, Order O, int N, bool kSum>
std::vector<Moments> channel_moments(const Call& c, const Block& b) {
  constexpr int K = channels_of<O, N>();
  std::vector<Moments> channels(kMost);
  for (int round = 0; round < c.plan.rounds; ++round) {
    OverChannel<K + 1> first;
    OverChannel<2 * K> second;
    for_each_thread<O, N>(c, b, round, [&](const Place& place, int thread) {
      add_up_thread<T, O, N, kSum>(c, b, place, thread, first);
    });
    for_each_thread<O, N>(c, b, round, [&](const Place& place, int thread) {
      difference_thread<T, O, N, kSum>(c, b, place, thread, first, second);
    });
    for_each_thread<O, N>(c, b, round, [&](const Place& place, int thread) {
      if (leads(place)) moments_thread<O, N>(c, b, place, thread, first, second, channels.data());
    });
  }
  return channels;
}

template <class T, Order O, int N>
void apply_block(const Call& c, const Block& b, const Statistics* groups) {
  if (c.y == nullptr) {
    for (int64_t channel = b.begin; channel < b.end; ++channel) store_affine(c, b, channel, groups);
    return;
  }
  for (int round = 0; round < c.plan.rounds; ++round) {
    for_each_thread<O, N>(c, b, round, [&](const Place& place, int) {
      const auto constants = constants_of<channels_of<O, N>()>(c, b, place, groups);
      apply_part<T, O, N>(c, c.v != nullptr ? c.v : c.x, walk_of<O, N>(c, b, place), constants);
    });
  }
}

struct Forward {
  template <class T, Order O, int N>
  static void run(const Call& c, int) {
    std::vector<Statistics> groups(kMost);
    for (int64_t index = 0; index < c.plan.blocks; ++index) {
      const Block b = block_of(c, index);
      CHECK(b.groups <= kMost) << b.groups;
      const auto channels =
          c.residual != nullptr ? channel_moments<T, O, N, true>(c, b) : channel_moments<T, O, N, false>(c, b);
      for (int g = 0; g < b.groups; ++g) {
        const Moments piece = piece_of(c, b, g, channels.data());
        if (!c.plan.whole) {
          store_partial(c, b, g, piece.mean, piece.m2);
          continue;
        }
        groups[static_cast<size_t>(g)] = statistics_of(c, piece.mean, piece.m2);
        if (c.mean != nullptr) store_statistics(c, b, g, groups[static_cast<size_t>(g)]);
      }
      if (c.plan.whole) apply_block<T, O, N>(c, b, groups.data());
    }
    for (int64_t index = 0; !c.plan.whole && index < c.plan.blocks; ++index) {
      const Block b = block_of(c, index, true);
      for (int g = 0; g < b.groups; ++g) {
        double mean = 0, m2 = 0;
        for (int lane = 0; lane < kLanes; ++lane) mean += mean_part(c, b, g, lane);
        for (int lane = 0; lane < kLanes; ++lane) m2 += m2_part(c, b, g, lane, mean);
        groups[static_cast<size_t>(g)] = statistics_of(c, mean, m2);
        if (c.mean != nullptr && b.part == 0 && b.split == 0) {
          store_statistics(c, b, g, groups[static_cast<size_t>(g)]);
        }
      }
      apply_block<T, O, N>(c, b, groups.data());
    }
  }
};

template <class T, Order O, int N>
void apply_gradient_block(const Call& c, const Block& b, const Correction* groups) {
  for (int round = 0; round < c.plan.rounds; ++round) {
    for_each_thread<O, N>(c, b, round, [&](const Place& place, int) {
      apply_gradients<T, O, N>(c, walk_of<O, N>(c, b, place), slopes_of<channels_of<O, N>()>(c, b, place, groups));
    });
  }
}

struct Backward {
  template <class T, Order O, int N>
  static void run(const Call& c, int) {
    constexpr int K = channels_of<O, N>();
    std::vector<Correction> groups(kMost), channels(kMost);
    std::vector<Sums> kept(kMost);
    for (int64_t index = 0; index < c.plan.blocks; ++index) {
      const Block b = block_of(c, index);
      for (int round = 0; round < c.plan.rounds; ++round) {
        OverChannel<3 * K> all;
        for_each_thread<O, N>(c, b, round, [&](const Place& place, int thread) {
          gradient_thread<T, O, N>(c, b, place, thread, all);
        });
        for_each_thread<O, N>(c, b, round, [&](const Place& place, int thread) {
          if (leads(place)) sums_thread<O, N>(c, b, place, thread, all, kept.data(), channels.data());
        });
      }
      for (int g = 0; g < b.groups; ++g) {
        const Correction of = correction_of(c, b, g, channels.data());
        groups[static_cast<size_t>(g)] = of;
        if (!c.plan.whole) store_partial(c, b, g, static_cast<double>(of.a), static_cast<double>(of.b));
      }
      if (!c.plan.whole) continue;
      for (int64_t channel = b.begin; c.grad_channel != nullptr && channel < b.end; ++channel) {
        store_channel(c, b, channel, kept[static_cast<size_t>(channel - b.begin)], groups.data());
      }
      apply_gradient_block<T, O, N>(c, b, groups.data());
    }
    for (int64_t index = 0; !c.plan.whole && index < c.plan.blocks; ++index) {
      const Block b = block_of(c, index, true);
      for (int g = 0; g < b.groups; ++g) {
        double sums[2] = {0, 0};
        for (int lane = 0; lane < kLanes; ++lane) {
          const Pack<double, 2> part = sums_part(c, b, g, lane);
          for (int which = 0; which < 2; ++which) sums[which] += part.v[which];
        }
        groups[static_cast<size_t>(g)] = {static_cast<float>(sums[0]), static_cast<float>(sums[1])};
      }
      for (int64_t channel = b.begin; c.grad_channel != nullptr && b.part == 0 && channel < b.end; ++channel) {
        store_channel(c, b, channel, channel_sums(c, b, channel), groups.data());
      }
      apply_gradient_block<T, O, N>(c, b, groups.data());
    }
    for (int64_t channel = 0; rows_of(c) > 1 && channel < c.channels; ++channel) {
      float of_weight = 0, of_bias = 0;
      for (int lane = 0; lane < kLanes; ++lane) {
        of_weight += row_part(c, weight_sums(c), channel, lane);
        of_bias += row_part(c, bias_sums(c), channel, lane);
      }
      c.grad_weight[channel] = of_weight;
      c.grad_bias[channel] = of_bias;
    }
  }
};

// ---- a call ----

enum class Kind { plain, bias, residual, affine };

struct Example {
  Order order;
  int64_t batch, channels, spatial, groups;
  DType dtype;
  Kind kind;
  bool swish;
  int64_t offset;  // of every tensor, in elements
  double mean, spread;
};

// A call with its memory, and the check of its results against long double.
class GroupNorm {
 public:
  explicit GroupNorm(const Example& e)
      : example(e),
        count(e.batch * e.channels * e.spatial),
        random(static_cast<uint64_t>(count * 31 + e.channels)),
        x(count, e.dtype, e.offset),
        residual(count, e.dtype, e.offset),
        v(count, e.dtype, e.offset),
        y(count, e.dtype, e.offset),
        grad(count, e.dtype, e.offset),
        grad_v(count, e.dtype, e.offset),
        grad_x(count, e.dtype, e.offset) {
    for (int64_t i = 0; i < count; ++i) x.set(i, e.mean + e.spread * random.uniform(-2, 2));
    residual.randomize(random);
    grad.randomize(random);
    grad_v.randomize(random);
    const auto channels = static_cast<size_t>(e.channels), both = channels * static_cast<size_t>(e.batch);
    for (std::vector<float>* values : {&weight, &bias}) {
      for (size_t i = 0; i < channels; ++i) values->push_back(static_cast<float>(random.uniform(-2, 2)));
    }
    for (size_t i = 0; i < both; ++i) channel_bias.push_back(static_cast<float>(e.spread * random.uniform(-2, 2)));
    for (std::vector<float>* values : {&grad_weight, &grad_bias}) values->assign(channels, std::nanf(""));
    for (std::vector<float>* values : {&factor, &shift, &grad_channel}) values->assign(both, std::nanf(""));
    for (std::vector<float>* values : {&mean, &rstd}) {
      values->assign(static_cast<size_t>(e.batch * e.groups), std::nanf(""));
    }
    c = Call{};
    c.order = e.order;
    c.batch = e.batch;
    c.channels = e.channels;
    c.spatial = e.spatial;
    c.groups = e.groups;
    c.dtype = e.dtype;
    c.swish = e.swish;
    c.eps = kEps;
    c.scale = e.kind == Kind::residual ? 0.75 : 1;
    c.x = x.data();
    c.weight = weight.data();
    c.bias = bias.data();
    if (e.kind == Kind::bias) c.channel_bias = channel_bias.data();
    if (e.kind == Kind::affine) {
      c.factor = factor.data();
      c.shift = shift.data();
      return;
    }
    c.y = y.data();
    c.mean = mean.data();
    c.rstd = rstd.data();
    if (e.kind == Kind::residual) {
      c.residual = residual.data();
      c.v = v.data();
    }
  }

  // `cut`: in two launches, with blocks so small that each group has several, which else only large tensors have.
  void run(bool cut) {
    plan(cut);
    run_kernel<Forward>(c, 0);
    if (example.kind == Kind::affine) return;
    const void* kept = c.x;
    if (example.kind == Kind::residual) {
      c.x = v.data();
      c.grad_v = grad_v.data();
    }
    c.grad = grad.data();
    c.grad_x = grad_x.data();
    c.grad_weight = grad_weight.data();
    c.grad_bias = grad_bias.data();
    if (example.kind == Kind::bias) c.grad_channel = grad_channel.data();
    plan(cut);
    run_kernel<Backward>(c, 0);
    c.x = kept;
  }

  int64_t at(int64_t sample, int64_t channel, int64_t position) const {
    if (c.order == Order::planes) return (sample * c.channels + channel) * c.spatial + position;
    return (sample * c.spatial + position) * c.channels + channel;
  }

  void check(const char* who) const {
    const int64_t each = c.channels / c.groups;
    const long double n = static_cast<long double>(each * c.spatial), unit = 0x1p-24L;
    const long double stored = lsgm::testing::unit_roundoff(c.dtype);
    std::vector<long double> of_weight(static_cast<size_t>(c.channels), 0), of_bias = of_weight, size = of_weight;
    for (int64_t b = 0; b < c.batch; ++b) {
      for (int64_t g = 0; g < c.groups; ++g) {
        const auto of_group = [&](auto&& f) {
          for (int64_t ch = g * each; ch < (g + 1) * each; ++ch) {
            for (int64_t i = 0; i < c.spatial; ++i) f(ch, at(b, ch, i));
          }
        };
        const auto value = [&](int64_t ch, int64_t i) -> long double {
          if (example.kind == Kind::residual) return v.at(i);
          const long double added = example.kind == Kind::bias ? channel_bias[slot(b, ch)] : 0;
          return x.at(i) + added;
        };
        long double m = 0, var = 0;
        of_group([&](int64_t ch, int64_t i) { m += value(ch, i) / n; });
        of_group([&](int64_t ch, int64_t i) { var += (value(ch, i) - m) * (value(ch, i) - m) / n; });
        const long double r = 1 / std::sqrt(var + kEps);
        // A channel bias is added in float32 at the size of x.
        const long double moved = 2 * unit * std::fabs(m) * r;
        if (example.kind == Kind::affine) {
          for (int64_t ch = g * each; ch < (g + 1) * each; ++ch) {
            const long double f = weight[index(ch)] * r, s = bias[index(ch)] - m * f;
            CHECK(std::fabs(factor[slot(b, ch)] - f) <= 16 * unit * std::fabs(f)) << who << " factor " << ch;
            CHECK(std::fabs(shift[slot(b, ch)] - s) <= 16 * unit * (std::fabs(m * f) + std::fabs(s)) + 1e-9L)
                << who << " shift " << ch << " " << shift[slot(b, ch)] << " " << double(s);
          }
          continue;
        }
        const auto where = static_cast<size_t>(b * c.groups + g);
        CHECK(std::fabs(mean[where] - m) <= 2 * unit * (std::fabs(m) + std::sqrt(var))) << who << " mean " << g;
        CHECK(std::fabs(rstd[where] - r) <= 16 * unit * r) << who << " rstd " << g << " " << rstd[where];
        long double sum_a = 0, sum_b = 0, sizes = 0;
        const auto inner = [&](int64_t ch, int64_t i) {
          const long double u = (value(ch, i) - m) * r * weight[index(ch)] + bias[index(ch)];
          const long double s = 1 / (1 + std::exp(-u));
          return grad.at(i) * (c.swish ? s * (1 + u * (1 - s)) : 1);
        };
        of_group([&](int64_t ch, int64_t i) {
          const long double w = weight[index(ch)], h = (value(ch, i) - m) * r, u = h * w + bias[index(ch)];
          const long double expected = c.swish ? u / (1 + std::exp(-u)) : u;
          const long double scale = std::fabs(h * w) + std::fabs(bias[index(ch)]) + 0.1L;
          CHECK(std::fabs(y.at(i) - expected) <= 16 * unit * scale + stored * std::fabs(expected) + 1e-7L)
              << who << " y " << i << " " << y.at(i) << " " << double(expected);
          const long double d = inner(ch, i);
          of_bias[index(ch)] += d;
          of_weight[index(ch)] += d * h;
          size[index(ch)] += (24 * unit + 3 * moved) * std::fabs(grad.at(i)) * (1 + std::fabs(h)) * (1 + std::fabs(w));
          sum_a += w * d;
          sum_b += w * d * h;
          sizes += std::fabs(grad.at(i)) * (1 + std::fabs(h)) * (1 + std::fabs(w)) * (1 + std::fabs(w));
        });
        for (int64_t ch = g * each; ch < (g + 1) * each; ++ch) {
          long double of_channel = 0, parts = 0;
          for (int64_t k = 0; k < c.spatial; ++k) {
            const int64_t i = at(b, ch, k);
            const long double w = weight[index(ch)], h = (value(ch, i) - m) * r;
            const long double of_v = r * (w * inner(ch, i) - sum_a / n - h * sum_b / n);
            const long double rounding = (24 * unit + 3 * moved) * r *
                (std::fabs(w * grad.at(i)) * (1 + std::fabs(w * h)) + sizes / n * (1 + std::fabs(h)));
            const bool own = example.kind == Kind::residual;
            const long double expected = (of_v + (own ? grad_v.at(i) : 0)) * c.scale;
            CHECK(std::fabs(grad_x.at(i) - expected) <= 2 * rounding + 1.01L * stored * std::fabs(expected) + 1e-7L)
                << who << " grad_x " << i << " " << grad_x.at(i) << " " << double(expected);
            of_channel += of_v;
            parts += rounding;
          }
          if (example.kind != Kind::bias) continue;
          CHECK(std::fabs(grad_channel[slot(b, ch)] - of_channel) <= 4 * parts)
              << who << " grad_channel " << ch << " " << grad_channel[slot(b, ch)] << " " << double(of_channel);
        }
      }
    }
    for (size_t ch = 0; example.kind != Kind::affine && ch < of_bias.size(); ++ch) {
      CHECK(std::fabs(grad_bias[ch] - of_bias[ch]) <= size[ch]) << who << " grad_bias " << ch << " " << grad_bias[ch];
      CHECK(std::fabs(grad_weight[ch] - of_weight[ch]) <= 2 * size[ch]) << who << " grad_weight " << ch;
    }
    for (int64_t i = 0; example.kind == Kind::residual && i < count; ++i) {
      const double sum = (x.at(i) + residual.at(i)) * c.scale;
      CHECK(std::fabs(v.at(i) - sum) <= (2 * 0x1p-24 * 4 + double(stored) * 1.01) * std::fabs(sum) + 1e-6)
          << who << " v " << i;
    }
  }

  Example example;
  int64_t count;
  Random random;
  Buffer x, residual, v, y, grad, grad_v, grad_x;
  std::vector<float> weight, bias, channel_bias, mean, rstd, factor, shift, grad_weight, grad_bias, grad_channel, sums;
  std::vector<double> partials;
  Call c;

 private:
  static constexpr double kEps = 1e-6;

  static size_t index(int64_t channel) { return static_cast<size_t>(channel); }
  size_t slot(int64_t sample, int64_t channel) const { return static_cast<size_t>(sample * c.channels + channel); }

  void plan(bool cut) {
    make_plan(c);
    if (cut) {
      make_split(c, c.plan);
      const int64_t step = c.order == Order::planes ? int64_t(c.plan.columns) * c.plan.width : c.plan.lines;
      c.plan.size = larger(1, c.spatial / 3 / step) * step;
      c.plan.parts = ceil_div(c.spatial, c.plan.size);
      c.plan.blocks = c.batch * c.plan.cells * c.plan.splits * c.plan.parts;
    }
    partials.assign(static_cast<size_t>(numbers_of_pieces(c)), std::nan(""));
    sums.assign(static_cast<size_t>(numbers_of_rows(c)), std::nanf(""));
    c.partials = partials.data();
    c.sums = sums.data();
  }
};

std::vector<Example> examples() {
  // Odd sizes, sizes with wide accesses, more channels than a block has threads, groups that vectors do not fit.
  const int64_t shapes[][4] = {{1, 1, 5, 1}, {3, 5, 63, 1}, {2, 34, 1, 2}, {5, 1, 1023, 1}, {1, 3, 1031, 1},
      {4, 8, 32, 4}, {1, 70, 9, 7}, {2, 16, 64, 4}, {2, 24, 16, 8}, {130, 8, 16, 4}, {2, 48, 40, 2}, {1, 1080, 8, 4},
      {1, 8, 2080, 2}, {140, 6, 24, 2}};
  const Kind kinds[] = {Kind::plain, Kind::bias, Kind::residual, Kind::affine};
  std::vector<Example> all;
  int64_t n = 0;
  for (const auto& s : shapes) {
    for (Order order : {Order::planes, Order::rows}) {
      for (Kind kind : kinds) {
        const DType dtype = n % 4 == 3 ? DType::bfloat16 : n % 4 == 2 ? DType::float16 : DType::float32;
        all.push_back({order, s[0], s[1], s[2], s[3], dtype, kind, n % 3 != 2, n % 7 == 0 ? 1 : 0, 0.5, 1});
        n += 5;
      }
      n += 3;
    }
  }
  return all;
}

CASE("every thread of a CUDA launch") {
  bool whole = false, split = false, vectors = false;
  for (const Example& example : examples()) {
    for (bool cut : {false, true}) {
      GroupNorm call(example);
      call.run(cut);
      call.check(cut ? "small blocks" : call.c.plan.whole ? "one launch" : "two launches");
      whole = whole || call.c.plan.whole;
      split = split || !(cut || call.c.plan.whole);
      vectors = vectors || call.c.plan.width == 8;
    }
  }
  CHECK(whole && split && vectors);
}

CASE("far from zero, in every plan") {
  for (Order order : {Order::planes, Order::rows}) {
    for (Kind kind : {Kind::plain, Kind::affine}) {
      for (bool cut : {false, true}) {
        GroupNorm call({order, 2, 8, 300, 2, DType::float32, kind, false, 0, 1e4, 0.01});
        for (int64_t i = 0; i < call.count; i += 17) call.x.set(i, 1e4 + 3);
        call.run(cut);
        call.check(cut ? "small blocks" : "blocks");
      }
    }
  }
}

CASE("vectors only where every access is aligned") {
  GroupNorm call({Order::planes, 2, 4, 64, 2, DType::float16, Kind::residual, true, 0, 0, 1});
  CHECK(width_of(call.c) == 8);
  call.c.v = static_cast<uint16_t*>(call.v.data()) + 1;
  CHECK(width_of(call.c) == 1);
  call.c.v = call.v.data();
  call.c.spatial = 60;
  CHECK(width_of(call.c) == 1);
}

CASE("few groups are spread over many blocks, and their pieces stay few") {
  for (Order order : {Order::planes, Order::rows}) {
    for (DType dtype : {DType::float32, DType::bfloat16}) {
      for (const auto& s : {std::pair<int64_t, int64_t>{128, 1024}, {512, 256}, {768, 1024}, {1024, 1024}}) {
        for (int64_t batch : {1, 16, 64}) {
          Call c{};
          c.order = order;
          c.dtype = dtype;
          c.batch = batch;
          c.channels = s.first;
          c.spatial = s.second;
          c.groups = 32;
          make_plan(c);
          CHECK(c.plan.blocks >= 64) << c.plan.blocks << " blocks, batch " << batch << " channels " << c.channels;
          CHECK(pieces_of(c) <= kPieces) << pieces_of(c);
          CHECK(c.plan.width == 16 / size_of(dtype));
        }
      }
    }
  }
}

// Sizes no test machine can hold: the addresses of the last threads.
CASE("launches beyond 2^31 elements") {
  for (const auto& s : {std::pair<int64_t, int64_t>{1 << 12, 1 << 14}, {1, 1 << 24}, {1 << 22, 16}}) {
    for (Order order : {Order::planes, Order::rows}) {
      Call c{};
      c.order = order;
      c.dtype = DType::float32;
      c.batch = s.first;
      c.channels = 256;
      c.spatial = s.second;
      c.groups = 32;
      make_plan(c);
      CHECK(c.plan.blocks < int64_t(1) << 31) << c.plan.blocks;
      const Block b = block_of(c, c.plan.blocks - 1);
      const int64_t pair = partial_at(c, b, b.groups - 1, pieces_of(c) - 1);
      CHECK(c.plan.whole || pair + 2 == numbers_of_pieces(c)) << pair;
      int64_t last = 0;
      for (int round = 0; round < c.plan.rounds; ++round) {
        for (int thread = 0; thread < c.plan.lines * c.plan.columns; ++thread) {
          const bool planes = order == Order::planes;
          const Place place =
              planes ? place_of<Order::planes, 4>(c, b, round, thread) : place_of<Order::rows, 4>(c, b, round, thread);
          const Walk w = planes ? walk_of<Order::planes, 4>(c, b, place) : walk_of<Order::rows, 4>(c, b, place);
          if (w.left > 0) last = larger(last, w.at + (w.left - 1) * w.stride + 4);
        }
      }
      CHECK(last == c.batch * c.channels * c.spatial) << last;
    }
  }
}

}  // namespace
