// CPU kernels of bn_swish, compiled once per instruction set (LSGM_ISA; see common/cpu.h). No torch.
#include "common/cpu.h"

#include <iterator>
#include <type_traits>

#include "bn_swish/bn_swish.h"
#include "common/registers.h"

namespace lsgm {
namespace bn_swish {
namespace LSGM_ISA {
namespace {

using namespace lsgm::LSGM_ISA;

constexpr int64_t kPivotElements = 512;  // planes: the first elements of a chunk, whose mean is the pivot
constexpr int64_t kPivotRows = 32;       // rows: the same
// Rows after which float32 sums are added to the float64 ones: few, as each sum is of one row after the other, and they
// stay in the first cache for all channels.
constexpr int64_t kFlushRows = 32;
constexpr int64_t kChannelTile = 1024;  // channels that are taken together in all rows of a chunk

// The planes of a chunk, one after the other: f(first element, size), until it says no.
template <class F>
void for_each_plane(const Problem& p, int64_t channel, const Chunk& c, F&& f) {
  for (int64_t i = 0; i < c.samples; ++i) {
    if (!f(((c.sample + i) * p.channels + channel) * p.spatial + c.begin)) return;
  }
}

// f(chunk's number within its channel, channel) of the chunks [begin, end) of planes: channel by channel where those of
// a channel depend on each other, otherwise in the order of memory.
template <class F>
void for_each_chunk(const Problem& p, int64_t begin, int64_t end, F&& f) {
  const int64_t inner = p.batch_stats ? p.chunks.per_channel : p.channels;
  int64_t i = begin / inner, j = begin % inner;
  for (int64_t n = begin; n < end; ++n) {
    p.batch_stats ? f(j, i) : f(i, j);
    if (++j == inner) {
      j = 0;
      ++i;
    }
  }
}

// f(number, chunk, first channel, channels) of the chunks [begin, end) of rows, in tiles of channels.
template <class F>
void for_each_tile(const Problem& p, int64_t begin, int64_t end, F&& f) {
  for (int64_t k = begin; k < end; ++k) {
    const Chunk c = chunk_at(p, k);
    for (int64_t first = 0; first < p.channels; first += kChannelTile) {
      f(k, c, first, smaller(kChannelTile, p.channels - first));
    }
  }
}

// ---- statistics ----

template <class T>
float plane_sum(const T* x, int64_t n) {
  V even = filled<V>(0.0f), odd = even;
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
    even = add(even, load_all(x + i));
    odd = add(odd, load_all(x + i + kWidth));
  }
  for (; i + kWidth <= n; i += kWidth) even = add(even, load_all(x + i));
  if (i < n) odd = add(odd, load_part(x + i, n - i, 0.0f));
  return sum(add(even, odd));
}

struct Differences {
  V first[4], second[4];
};

inline void count_in(Differences& d, int lane, V x, V minus_pivot) {
  const V difference = add(x, minus_pivot);
  d.first[lane] = add(d.first[lane], difference);
  d.second[lane] = fma(difference, difference, d.second[lane]);
}

template <class T>
void statistics_planes(const Problem& p, int64_t begin, int64_t end) {
  const auto* x = static_cast<const T*>(p.x);
  for_each_chunk(p, begin, end, [&](int64_t k, int64_t channel) {
    const Chunk c = chunk_at(p, k);
    double total = 0;
    int64_t seen = 0;
    for_each_plane(p, channel, c, [&](int64_t at) {
      const int64_t n = smaller(c.size, kPivotElements - seen);
      total += static_cast<double>(plane_sum(x + at, n));
      seen += n;
      return seen < kPivotElements;
    });
    const float pivot = static_cast<float>(total / static_cast<double>(seen));
    const V minus_pivot = filled<V>(-pivot);
    Differences d;
    for (int i = 0; i < 4; ++i) d.first[i] = d.second[i] = filled<V>(0.0f);
    for_each_plane(p, channel, c, [&](int64_t at) {
      int64_t i = 0;
      for (; i + 4 * kWidth <= c.size; i += 4 * kWidth) {
        for (int lane = 0; lane < 4; ++lane) count_in(d, lane, load_all(x + at + i + lane * kWidth), minus_pivot);
      }
      for (; i + kWidth <= c.size; i += kWidth) count_in(d, 0, load_all(x + at + i), minus_pivot);
      if (i < c.size) count_in(d, 1, load_part(x + at + i, c.size - i, pivot), minus_pivot);
      return true;
    });
    const double n = static_cast<double>(c.samples * c.size);
    const double first = static_cast<double>(sum(add(add(d.first[0], d.first[1]), add(d.first[2], d.first[3]))));
    const double second =
        static_cast<double>(sum(add(add(d.second[0], d.second[1]), add(d.second[2], d.second[3]))));
    p.partials[partial_at(p, k, 0, channel)] = static_cast<double>(pivot) + first / n;
    p.partials[partial_at(p, k, 1, channel)] = second - first * first / n;
  });
}

template <class T>
void statistics_rows(const Problem& p, int64_t begin, int64_t end) {
  const auto* x = static_cast<const T*>(p.x);
  alignas(64) float minus_pivot[kChannelTile];
  for_each_tile(p, begin, end, [&](int64_t k, const Chunk& c, int64_t channel, int64_t channels) {
    const T* start = x + c.begin * p.channels + channel;
    const int64_t few = smaller(c.size, kPivotRows);
    const float factor = -1.0f / static_cast<float>(few);
    for_each_group<4>(channels, [&](auto total, int64_t i, int64_t) {
      total.clear();
      auto v = total;
      for (int64_t row = 0; row < few; ++row) {
        v.read(start + row * p.channels + i);
        for (size_t u = 0; u < std::size(v.part); ++u) total.part[u] = add(total.part[u], v.part[u]);
      }
      for (size_t u = 0; u < std::size(v.part); ++u) {
        using R = std::decay_t<decltype(v.part[u])>;
        store(mul(total.part[u], filled<R>(factor)), minus_pivot + i + static_cast<int64_t>(u) * R::width);
      }
    });
    double* mean = p.partials + partial_at(p, k, 0, channel);
    double* m2 = p.partials + partial_at(p, k, 1, channel);
    for (int64_t i = 0; i < channels; ++i) mean[i] = m2[i] = 0;
    for (int64_t row = 0; row < c.size; row += kFlushRows) {
      const int64_t rows = smaller(kFlushRows, c.size - row);
      for_each_group<4>(channels, [&](auto first, int64_t i, int64_t skip) {
        first.clear();
        auto second = first, pivot = first, v = first;
        pivot.read(minus_pivot + i);
        const T* here = start + row * p.channels + i;
        for (int64_t r = 0; r < rows; ++r, here += p.channels) {
          v.read(here);
          for (size_t u = 0; u < std::size(v.part); ++u) {
            const auto difference = add(v.part[u], pivot.part[u]);
            first.part[u] = add(first.part[u], difference);
            second.part[u] = fma(difference, difference, second.part[u]);
          }
        }
        first.add_to(mean + i, skip);
        second.add_to(m2 + i, skip);
      });
    }
    const double n = static_cast<double>(c.size);
    for (int64_t i = 0; i < channels; ++i) {
      const double total = mean[i];
      mean[i] = total / n - static_cast<double>(minus_pivot[i]);
      m2[i] -= total * total / n;
    }
  });
}

// ---- apply ----

template <bool kSwish, class R>
inline R value(R x, R minus_mean, R scale, R bias) {
  // Centred first: x scale + shift would cancel far from 0.
  const R u = fma(add(x, minus_mean), scale, bias);
  if constexpr (kSwish) return div(u, denominator(u));
  return u;
}

template <class T, bool kSwish>
void apply_planes(const Problem& p, int64_t begin, int64_t end) {
  const auto* x = static_cast<const T*>(p.x);
  auto* y = static_cast<T*>(p.y);
  for_each_chunk(p, begin, end, [&](int64_t k, int64_t channel) {
    const Chunk c = chunk_at(p, k);
    const float minus_mean = p.table[kMinusMean * p.channels + channel];
    const float scale = p.table[kScale * p.channels + channel], bias = p.table[kBias * p.channels + channel];
    for_each_plane(p, channel, c, [&](int64_t at) {
      for_each_register<float>(c.size, [=](auto kind, int64_t i) {
        decltype(kind) v;
        using R = decltype(v);
        load(v, x + at + i);
        store(value<kSwish>(v, filled<R>(minus_mean), filled<R>(scale), filled<R>(bias)), y + at + i);
      });
      return true;
    });
  });
}

template <class T, bool kSwish>
void apply_rows(const Problem& p, int64_t begin, int64_t end) {
  const auto* x = static_cast<const T*>(p.x);
  auto* y = static_cast<T*>(p.y);
  const float* minus_means = p.table + kMinusMean * p.channels;
  const float* scales = p.table + kScale * p.channels;
  const float* biases = p.table + kBias * p.channels;
  for (int64_t k = begin; k < end; ++k) {
    const Chunk c = chunk_at(p, k);
    for (int64_t row = c.begin; row < c.begin + c.size; ++row) {
      const int64_t at = row * p.channels;
      for_each_register<float>(p.channels, [=](auto kind, int64_t i) {
        decltype(kind) v, minus_mean, scale, bias;
        load(v, x + at + i);
        load(minus_mean, minus_means + i);
        load(scale, scales + i);
        load(bias, biases + i);
        store(value<kSwish>(v, minus_mean, scale, bias), y + at + i);
      });
    }
  }
}

// ---- backward ----

// Reduce leaves the gradient with respect to u in grad_x, where apply finds it, if it fits there unrounded: the sigmoid
// is then computed once.
template <class T>
constexpr bool kKeeps = std::is_same<T, float>::value;

enum class Mode { reduce, apply, both };

template <class R>
struct Constants {
  R minus_mean, scale, bias;
};

template <class R>
Constants<R> constants(const Problem& p, int64_t channel) {
  const float* t = p.table + channel;
  return {filled<R>(t[kMinusMean * p.channels]), filled<R>(t[kScale * p.channels]), filled<R>(t[kBias * p.channels])};
}

// The gradient with respect to u; `centred` gets x - mean.
template <bool kSwish, class R>
inline R inner_gradient(R grad, R x, const Constants<R>& k, R& centred) {
  centred = add(x, k.minus_mean);
  if constexpr (!kSwish) return grad;
  const R u = fma(centred, k.scale, k.bias);
  const R one = filled<R>(1.0f);
  const R s = div(one, denominator(u));
  return mul(mul(grad, s), fma(u, fnma(s, one, one), one));
}

// The gradient with respect to x of element i, which replaces what reduce left in grad_x.
template <bool kSwish, class T, class R>
inline void apply_at(const Problem& p, int64_t i, const Constants<R>& k, R slope, R offset) {
  auto* grad_x = static_cast<T*>(p.grad_x) + i;
  R x, d, centred;
  load(x, static_cast<const T*>(p.x) + i);
  if constexpr (kKeeps<T>) {
    load(d, grad_x);
    centred = add(x, k.minus_mean);
  } else {
    R grad;
    load(grad, static_cast<const T*>(p.grad) + i);
    d = inner_gradient<kSwish>(grad, x, k, centred);
  }
  store(fma(k.scale, d, fma(slope, centred, offset)), grad_x);
}

template <class T, bool kSwish, Mode kMode>
void backward_planes(const Problem& p, int64_t begin, int64_t end) {
  const auto* x = static_cast<const T*>(p.x);
  const auto* grad = static_cast<const T*>(p.grad);
  auto* grad_x = static_cast<T*>(p.grad_x);
  for_each_chunk(p, begin, end, [&](int64_t k, int64_t channel) {
    const Chunk c = chunk_at(p, k);
    const auto full = constants<V>(p, channel);
    const float mean = -p.table[kMinusMean * p.channels + channel];
    V total[2] = {filled<V>(0.0f), filled<V>(0.0f)}, total_centred[2] = {total[0], total[0]};
    for_each_plane(p, channel, c, [&](int64_t at) {
      const auto step = [&](V g, V v, int lane) {
        V centred;
        const V d = inner_gradient<kSwish>(g, v, full, centred);
        total[lane] = add(total[lane], d);
        total_centred[lane] = fma(d, centred, total_centred[lane]);
        return kMode == Mode::both ? mul(full.scale, d) : d;
      };
      const auto whole = [&](int64_t i, int lane) {
        const V result = step(load_all(grad + i), load_all(x + i), lane);
        if constexpr (kMode == Mode::both || kKeeps<T>) store(result, grad_x + i);
      };
      int64_t i = 0;
      for (; i + 2 * kWidth <= c.size; i += 2 * kWidth) {
        whole(at + i, 0);
        whole(at + i + kWidth, 1);
      }
      for (; i + kWidth <= c.size; i += kWidth) whole(at + i, 0);
      if (i < c.size) {
        const V result = step(load_part(grad + at + i, c.size - i, 0.0f), load_part(x + at + i, c.size - i, mean), 1);
        if constexpr (kMode == Mode::both || kKeeps<T>) {
          float parts[kWidth];
          store(result, parts);
          for (int64_t j = 0; i + j < c.size; ++j) narrow(parts[j], grad_x[at + i + j]);
        }
      }
      return true;
    });
    p.partials[partial_at(p, k, 0, channel)] = static_cast<double>(sum(add(total[0], total[1])));
    p.partials[partial_at(p, k, 1, channel)] = static_cast<double>(sum(add(total_centred[0], total_centred[1])));
  });
}

template <class T, bool kSwish>
void backward_apply_planes(const Problem& p, int64_t begin, int64_t end) {
  for_each_chunk(p, begin, end, [&](int64_t k, int64_t channel) {
    const Chunk c = chunk_at(p, k);
    const float slope = p.table[kSlope * p.channels + channel], offset = p.table[kOffset * p.channels + channel];
    for_each_plane(p, channel, c, [&](int64_t at) {
      const auto step = [&, at](auto kind, int64_t i) {
        using R = decltype(kind);
        apply_at<kSwish, T>(p, at + i, constants<R>(p, channel), filled<R>(slope), filled<R>(offset));
      };
      int64_t i = 0;
      for (; i + kWidth <= c.size; i += kWidth) step(V{}, i);
      for (; i < c.size; ++i) step(Lane<float>{}, i);  // no overlap: what is read has been written over
      return true;
    });
  });
}

template <class T, bool kSwish, Mode kMode>
void backward_rows(const Problem& p, int64_t begin, int64_t end) {
  const auto* x = static_cast<const T*>(p.x);
  const auto* grad = static_cast<const T*>(p.grad);
  auto* grad_x = static_cast<T*>(p.grad_x);
  for_each_tile(p, begin, end, [&](int64_t k, const Chunk& c, int64_t channel, int64_t channels) {
    const float* table = p.table + channel;
    double* total = p.partials + partial_at(p, k, 0, channel);
    double* total_centred = p.partials + partial_at(p, k, 1, channel);
    for (int64_t i = 0; i < channels; ++i) total[i] = total_centred[i] = 0;
    for (int64_t row = 0; row < c.size; row += kFlushRows) {
      const int64_t rows = smaller(kFlushRows, c.size - row);
      for_each_group<2>(channels, [&](auto sums, int64_t i, int64_t skip) {
        using R = std::decay_t<decltype(sums.part[0])>;
        sums.clear();
        auto sums_centred = sums, minus_mean = sums, scale = sums, bias = sums;
        minus_mean.read(table + kMinusMean * p.channels + i);
        scale.read(table + kScale * p.channels + i);
        bias.read(table + kBias * p.channels + i);
        int64_t at = (c.begin + row) * p.channels + channel + i;
        for (int64_t r = 0; r < rows; ++r, at += p.channels) {
          for (size_t u = 0; u < std::size(sums.part); ++u) {
            const int64_t here = at + static_cast<int64_t>(u) * R::width;
            R g, v, centred;
            load(g, grad + here);
            load(v, x + here);
            const Constants<R> constant{minus_mean.part[u], scale.part[u], bias.part[u]};
            const R d = inner_gradient<kSwish>(g, v, constant, centred);
            sums.part[u] = add(sums.part[u], d);
            sums_centred.part[u] = fma(d, centred, sums_centred.part[u]);
            if constexpr (kMode == Mode::both) {
              store(mul(scale.part[u], d), grad_x + here);
            } else if constexpr (kKeeps<T>) {
              store(d, grad_x + here);
            }
          }
        }
        sums.add_to(total + i, skip);
        sums_centred.add_to(total_centred + i, skip);
      });
    }
  });
}

template <class T, bool kSwish>
void backward_apply_rows(const Problem& p, int64_t begin, int64_t end) {
  for (int64_t k = begin; k < end; ++k) {
    const Chunk c = chunk_at(p, k);
    for (int64_t row = c.begin; row < c.begin + c.size; ++row) {
      const int64_t at = row * p.channels;
      const auto step = [&, at](auto kind, int64_t i) {
        using R = decltype(kind);
        Constants<R> constant;
        R slope, offset;
        load(constant.minus_mean, p.table + kMinusMean * p.channels + i);
        load(constant.scale, p.table + kScale * p.channels + i);
        load(constant.bias, p.table + kBias * p.channels + i);
        load(slope, p.table + kSlope * p.channels + i);
        load(offset, p.table + kOffset * p.channels + i);
        apply_at<kSwish, T>(p, at + i, constant, slope, offset);
      };
      int64_t i = 0;
      for (; i + kWidth <= p.channels; i += kWidth) step(V{}, i);
      for (; i < p.channels; ++i) step(Lane<float>{}, i);  // no overlap, as above
    }
  }
}

// Calls f(Type<T>{}) with the type of the elements; float64 is the reference's.
template <class F>
void with_type(const Problem& p, F&& f) {
  switch (p.dtype) {
    case DType::float16:
      return f(Type<Half>{});
    case DType::bfloat16:
      return f(Type<BFloat16>{});
    default:
      return f(Type<float>{});
  }
}

template <class T, bool kSwish, Mode kMode>
void backward_chunks(const Problem& p, int64_t begin, int64_t end) {
  const bool planes = p.order == Order::planes;
  if constexpr (kMode == Mode::apply) {
    planes ? backward_apply_planes<T, kSwish>(p, begin, end) : backward_apply_rows<T, kSwish>(p, begin, end);
  } else {
    planes ? backward_planes<T, kSwish, kMode>(p, begin, end) : backward_rows<T, kSwish, kMode>(p, begin, end);
  }
}

template <Mode kMode>
void backward_of(const Problem& p, int64_t begin, int64_t end) {
  with_type(p, [&](auto type) {
    using T = typename decltype(type)::type;
    p.swish ? backward_chunks<T, true, kMode>(p, begin, end) : backward_chunks<T, false, kMode>(p, begin, end);
  });
}

}  // namespace

void statistics(const Problem& p, int64_t begin, int64_t end) {
  with_type(p, [&](auto type) {
    using T = typename decltype(type)::type;
    p.order == Order::planes ? statistics_planes<T>(p, begin, end) : statistics_rows<T>(p, begin, end);
  });
}

void apply(const Problem& p, int64_t begin, int64_t end) {
  with_type(p, [&](auto type) {
    using T = typename decltype(type)::type;
    if (p.order == Order::planes) {
      p.swish ? apply_planes<T, true>(p, begin, end) : apply_planes<T, false>(p, begin, end);
    } else {
      p.swish ? apply_rows<T, true>(p, begin, end) : apply_rows<T, false>(p, begin, end);
    }
  });
}

void backward_reduce(const Problem& p, int64_t begin, int64_t end) { backward_of<Mode::reduce>(p, begin, end); }
void backward_apply(const Problem& p, int64_t begin, int64_t end) { backward_of<Mode::apply>(p, begin, end); }
void backward_both(const Problem& p, int64_t begin, int64_t end) { backward_of<Mode::both>(p, begin, end); }

}  // namespace LSGM_ISA

#if !LSGM_VEC_AVX2  // what exists once, compiled for every processor
namespace cpu {

void plan(Problem& p) {
  Chunks& c = p.chunks;
  if (p.order == Order::planes) {
    constexpr int64_t kChunk = 4096;  // elements: few enough for float32 sums
    constexpr int64_t kPlane = 128;   // elements from which a plane is worth a chunk of its own
    c.size = smaller(p.spatial, kChunk);
    c.samples = p.batch_stats || c.size < kPlane ? smaller(p.batch, kChunk / c.size) : 1;
    c.pieces = ceil_div(p.spatial, c.size);
    c.per_channel = ceil_div(p.batch, c.samples) * c.pieces;
    c.count = c.per_channel * p.channels;
  } else {
    constexpr int64_t kRows = 128;   // below, the chunks' sums would be too much memory beside x itself
    constexpr int64_t kMost = 512;  // chunks: the same, and the time to combine them
    const int64_t rows = p.batch * p.spatial;
    c.samples = 1;
    c.pieces = 1;
    c.size = larger(kRows, ceil_div(rows, kMost));
    c.per_channel = c.count = ceil_div(rows, c.size);
  }
  p.count = static_cast<double>(p.batch * p.spatial);
}

int64_t grain(const Problem& p) {
  constexpr int64_t kElementsPerThread = 16384;  // some ten microseconds: what waking a second thread costs
  const int64_t chunk = p.chunks.samples * p.chunks.size * (p.order == Order::planes ? 1 : p.channels);
  return larger(1, kElementsPerThread / chunk);
}

bool by_channel(const Problem& p) {
  constexpr int64_t kFewest = 16;  // with fewer, threads would be idle
  return p.order == Order::planes && p.channels >= kFewest;
}

void combine_moments(const Problem& p, int64_t begin, int64_t end) {
  const int64_t chunks = p.chunks.per_channel;
  // The outer loop runs over the chunks: channels are neighbours in memory, or (planes) few at a time.
  for (int64_t c = begin; c < end; ++c) p.moments[c] = {0, 0};
  for (int64_t k = 0; k < chunks; ++k) {
    const double share = static_cast<double>(chunk_elements(p, k)) / static_cast<double>(p.batch * p.spatial);
    for (int64_t c = begin; c < end; ++c) p.moments[c].mean += share * p.partials[partial_at(p, k, 0, c)];
  }
  for (int64_t k = 0; k < chunks; ++k) {
    const double n = static_cast<double>(chunk_elements(p, k));
    for (int64_t c = begin; c < end; ++c) {
      const double distance = p.partials[partial_at(p, k, 0, c)] - p.moments[c].mean;
      p.moments[c].m2 += p.partials[partial_at(p, k, 1, c)] + n * distance * distance;
    }
  }
}

static void fill_table(const Problem& p, int64_t channel) {
  p.table[kMinusMean * p.channels + channel] = -p.mean[channel];
  p.table[kScale * p.channels + channel] = p.weight[channel] * p.rstd[channel];
  p.table[kBias * p.channels + channel] = p.bias[channel];
}

void normalise(const Problem& p, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) {
    p.batch_stats ? store_moments(p, c, p.moments[c]) : store_running(p, c);
    fill_table(p, c);
  }
}

void restore(const Problem& p, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) fill_table(p, c);
}

void combine_sums(const Problem& p, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) p.sums[c] = {0, 0};
  for (int64_t k = 0; k < p.chunks.per_channel; ++k) {
    for (int64_t c = begin; c < end; ++c) {
      p.sums[c].grad += p.partials[partial_at(p, k, 0, c)];
      p.sums[c].centred += p.partials[partial_at(p, k, 1, c)];
    }
  }
  for (int64_t c = begin; c < end; ++c) {
    p.grad_bias[c] = static_cast<float>(p.sums[c].grad);
    p.grad_weight[c] = static_cast<float>(p.sums[c].centred * static_cast<double>(p.rstd[c]));
  }
}

void coefficients(const Problem& p, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) {
    const double rstd = static_cast<double>(p.rstd[c]), scale = static_cast<double>(p.weight[c]) * rstd;
    p.table[kSlope * p.channels + c] = static_cast<float>(-scale * rstd * rstd * p.sums[c].centred / p.count);
    p.table[kOffset * p.channels + c] = static_cast<float>(-scale * p.sums[c].grad / p.count);
  }
}

#define LSGM_CHOOSE(kernel)                                                 \
  void kernel(const Problem& p, int64_t begin, int64_t end) {               \
    LSGM_IF_AVX512(if (has_avx512()) return avx512::kernel(p, begin, end);) \
    LSGM_IF_AVX2(if (has_avx2()) return avx2::kernel(p, begin, end);)       \
    scalar::kernel(p, begin, end);                                          \
  }
LSGM_CHOOSE(statistics)
LSGM_CHOOSE(apply)
LSGM_CHOOSE(backward_reduce)
LSGM_CHOOSE(backward_apply)
LSGM_CHOOSE(backward_both)
#undef LSGM_CHOOSE

}  // namespace cpu
#endif

}  // namespace bn_swish
}  // namespace lsgm
