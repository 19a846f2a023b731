// CPU kernels of group_norm_swish, compiled once per instruction set (LSGM_ISA; see common/cpu.h). No torch.
#include "common/cpu.h"

#include <iterator>
#include <type_traits>

#include "common/registers.h"
#include "group_norm_swish/group_norm_swish.h"

namespace lsgm {
namespace group_norm_swish {

// Floats and doubles that a unit needs for each of its channels; the doubles come first.
enum ScratchDouble : int32_t { kMean, kM2, kRstd = kM2, kGroupSlope, kGroupBase, kScratchDoubles };
enum ScratchFloat : int32_t {
  kPivot,
  kFirst,
  kSecond,
  kOffset,
  kScale,
  kShift,
  kFactor,
  kSlope,
  kBase,
  kScratchFloats
};
constexpr int64_t kScratchSize = kScratchDoubles + (kScratchFloats + 1) / 2;

// A piece of a unit: `size` positions, from `begin` on, of `channels` channels, `per_group` in each of its groups.
struct Piece {
  int64_t sample, number;
  int64_t group, groups;
  int64_t channel, channels, per_group;
  int64_t begin, size;
};

LSGM_HD Piece piece_at(const Problem& p, int64_t k) {
  Piece c;
  const int64_t unit = k / p.units.pieces;
  c.number = k - unit * p.units.pieces;
  c.sample = unit / p.units.per_sample;
  c.group = (unit - c.sample * p.units.per_sample) * p.units.groups;
  c.groups = smaller(p.units.groups, p.groups - c.group);
  c.per_group = channels_per_group(p);
  c.channel = c.group * c.per_group;
  c.channels = c.groups * c.per_group;
  c.begin = c.number * p.units.size;
  c.size = smaller(p.units.size, p.spatial - c.begin);
  return c;
}

// The moments of a piece's first group, and its sums of one kind from its first channel on; where all pieces of a unit
// are combined, its number 0 has the result.
LSGM_HD Moments* moments_at(const Problem& p, const Piece& c, int64_t number) {
  return p.moments + (c.sample * p.units.pieces + number) * p.groups + c.group;
}
LSGM_HD double* sums_at(const Problem& p, const Piece& c, int64_t number, SumRow row) {
  return p.sums + ((c.sample * p.units.pieces + number) * kSumRows + row) * p.channels + c.channel;
}

// The moments `a` of `na` elements and `b` of `nb`, together.
LSGM_HD void join(Moments& a, double na, const Moments& b, double nb) {
  const double distance = b.mean - a.mean, share = nb / (na + nb);
  a.mean += distance * share;
  a.m2 += b.m2 + distance * distance * (na * share);
}

// The offsets' roundings, which the sums of differences have in them.
LSGM_HD void correct_sums(const Problem& p, const Piece& c) {
  if (p.channel_bias == nullptr) return;  // the mean is a float32 number: nothing was lost
  const float* bias = p.channel_bias + c.sample * p.channels + c.channel;
  const double* grad = sums_at(p, c, 0, kGrad);
  double* grad_centred = sums_at(p, c, 0, kGradCentred);
  double* centred = sums_at(p, c, 0, kCentred);
  for (int64_t g = 0; g < c.groups; ++g) {
    const double mean = static_cast<double>(p.mean[c.sample * p.groups + c.group + g]);
    for (int64_t i = g * c.per_group; i < (g + 1) * c.per_group; ++i) {
      const double lost = lost_by(bias[i], mean);
      grad_centred[i] += lost * grad[i];
      centred[i] += lost * static_cast<double>(p.spatial);
    }
  }
}

namespace LSGM_ISA {
namespace {

using namespace lsgm::LSGM_ISA;

constexpr int64_t kBlock = 4096;         // planes: elements, few enough for float32 sums, that share a pivot
constexpr int64_t kPivotElements = 512;  // and the first of them, whose mean it is
constexpr int64_t kBlockRows = 64;       // rows: the same
constexpr int64_t kPivotRows = 16;
constexpr int64_t kSumRowsAtOnce = 32;  // backward: rows after which float32 sums are added to the float64 ones

template <class T>
void store_part(V x, T* p, int64_t count) {
  float parts[kWidth];
  store(x, parts);
  for (int64_t i = 0; i < count; ++i) narrow(parts[i], p[i]);
}

// Memory of a unit: one number for each of its channels in every row.
struct Scratch {
  double* doubles;
  float* floats;
  int64_t channels;

  double* operator[](ScratchDouble row) const { return doubles + row * channels; }
  float* operator[](ScratchFloat row) const { return floats + row * channels; }
};

Scratch scratch_of(const Problem& p, double* memory) {
  const int64_t channels = p.units.groups * channels_per_group(p);
  return {memory, reinterpret_cast<float*>(memory + kScratchDoubles * channels), channels};
}

// ---- statistics ----

// v of n elements from `at` on, where it is a sum.
template <class T>
void add_residual(const Problem& p, int64_t at, int64_t n) {
  if (p.residual == nullptr) return;
  const T* x = static_cast<const T*>(p.x) + at;
  const T* residual = static_cast<const T*>(p.residual) + at;
  T* v = static_cast<T*>(p.v) + at;
  const float scale = p.scale;
  for_each_register<float>(n, [=](auto kind, int64_t i) {
    decltype(kind) a, b;
    load(a, x + i);
    load(b, residual + i);
    store(mul(add(a, b), filled<decltype(a)>(scale)), v + i);
  });
}

// Stretches of `size` elements, `stride` apart, each of one channel, with its bias, or of several where there is none.
struct Stretches {
  int64_t count, size, stride;
  const float* bias;
};

// Sums over the differences from a pivot, in four independent registers.
struct Differences {
  V first[4], second[4];

  void clear() {
    for (int i = 0; i < 4; ++i) first[i] = second[i] = filled<V>(0.0f);
  }
  void count(int lane, V difference) {
    first[lane] = add(first[lane], difference);
    second[lane] = fma(difference, difference, second[lane]);
  }
};

template <class T>
Moments block_moments(const T* v, const Stretches& s) {
  V even = filled<V>(0.0f), odd = even;
  double total = 0;
  int64_t seen = 0;
  for (int64_t k = 0; k < s.count && seen < kPivotElements; ++k) {
    const T* here = v + k * s.stride;
    const int64_t n = smaller(s.size, kPivotElements - seen);
    int64_t i = 0;
    for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
      even = add(even, load_all(here + i));
      odd = add(odd, load_all(here + i + kWidth));
    }
    for (; i + kWidth <= n; i += kWidth) even = add(even, load_all(here + i));
    if (i < n) odd = add(odd, load_part(here + i, n - i, 0.0f));
    if (s.bias != nullptr) total += static_cast<double>(s.bias[k]) * static_cast<double>(n);
    seen += n;
  }
  total += static_cast<double>(sum(add(even, odd)));
  const float pivot = static_cast<float>(total / static_cast<double>(seen));
  const V minus_pivot = filled<V>(-pivot);
  Differences d;
  d.clear();
  for (int64_t k = 0; k < s.count; ++k) {
    const T* here = v + k * s.stride;
    const float shift = s.bias == nullptr ? 0.0f : s.bias[k];
    const V shifts = filled<V>(shift);
    // The pivot first: it takes away what makes v large.
    const auto difference = [=](V x) { return add(add(x, minus_pivot), shifts); };
    int64_t i = 0;
    for (; i + 4 * kWidth <= s.size; i += 4 * kWidth) {
      for (int lane = 0; lane < 4; ++lane) d.count(lane, difference(load_all(here + i + lane * kWidth)));
    }
    for (int lane = 0; i + kWidth <= s.size; i += kWidth, ++lane) d.count(lane, difference(load_all(here + i)));
    if (i < s.size) {
      float parts[kWidth];
      for (int64_t j = 0; j < kWidth; ++j) {
        parts[j] = i + j < s.size ? (widen<float>(here[i + j]) - pivot) + shift : 0.0f;
      }
      d.count(3, load_all(parts));
    }
  }
  const double n = static_cast<double>(s.count * s.size);
  const double first = static_cast<double>(sum(add(add(d.first[0], d.first[1]), add(d.first[2], d.first[3]))));
  const double second = static_cast<double>(sum(add(add(d.second[0], d.second[1]), add(d.second[2], d.second[3]))));
  return {static_cast<double>(pivot) + first / n, second - first * first / n};
}

template <class T>
void statistics_planes(const Problem& p, const Piece& c, Moments* out) {
  const T* v = static_cast<const T*>(p.v);
  for (int64_t g = 0; g < c.groups; ++g) {
    const int64_t channel = c.channel + g * c.per_group;
    const float* bias = p.channel_bias == nullptr ? nullptr : p.channel_bias + c.sample * p.channels + channel;
    int64_t stretches = c.per_group, size = c.size;
    if (bias == nullptr && size == p.spatial) {
      size *= stretches;
      stretches = 1;
    }
    const int64_t together = size < kBlock ? kBlock / size : 1;
    Moments all{0, 0};
    double count = 0;
    for (int64_t k = 0; k < stretches; k += together) {
      const int64_t some = smaller(together, stretches - k);
      for (int64_t i = 0; i < size; i += kBlock) {
        const int64_t n = smaller(kBlock, size - i);
        const int64_t at = element_at(p, c.sample, channel + k, c.begin + i);
        if (p.residual != nullptr) {
          for (int64_t j = 0; j < some; ++j) add_residual<T>(p, at + j * p.spatial, n);
        }
        const Moments block = block_moments(v + at, {some, n, p.spatial, bias == nullptr ? nullptr : bias + k});
        join(all, count, block, static_cast<double>(some * n));
        count += static_cast<double>(some * n);
      }
    }
    out[g] = all;
  }
}

// The mean of the first rows of a block, and the sums of the differences from it, for every channel.
template <class T>
void block_sums(const T* v, int64_t stride, int64_t rows, const Scratch& s, int64_t channels) {
  const int64_t few = smaller(rows, kPivotRows);
  const float factor = 1.0f / static_cast<float>(few);
  for_each_group<4>(channels, [&](auto first, int64_t i, int64_t) {
    using R = std::decay_t<decltype(first.part[0])>;
    first.clear();
    auto second = first, pivot = first, x = first;
    for (int64_t r = 0; r < few; ++r) {
      x.read(v + r * stride + i);
      for (size_t u = 0; u < std::size(x.part); ++u) pivot.part[u] = add(pivot.part[u], x.part[u]);
    }
    auto minus_pivot = pivot;
    for (size_t u = 0; u < std::size(x.part); ++u) {
      minus_pivot.part[u] = mul(pivot.part[u], filled<R>(-factor));
      pivot.part[u] = mul(pivot.part[u], filled<R>(factor));
    }
    for (int64_t r = 0; r < rows; ++r) {
      x.read(v + r * stride + i);
      for (size_t u = 0; u < std::size(x.part); ++u) {
        const auto difference = add(x.part[u], minus_pivot.part[u]);
        first.part[u] = add(first.part[u], difference);
        second.part[u] = fma(difference, difference, second.part[u]);
      }
    }
    pivot.write(s[kPivot] + i);
    first.write(s[kFirst] + i);
    second.write(s[kSecond] + i);
  });
}

template <class T>
void statistics_rows(const Problem& p, const Piece& c, const Scratch& s, Moments* out) {
  const T* v = static_cast<const T*>(p.v);
  const float* bias = p.channel_bias == nullptr ? nullptr : p.channel_bias + c.sample * p.channels + c.channel;
  double* mean = s[kMean];
  double* m2 = s[kM2];
  for (int64_t g = 0; g < c.groups; ++g) out[g] = {0, 0};
  for (int64_t row = 0; row < c.size; row += kBlockRows) {
    const int64_t rows = smaller(kBlockRows, c.size - row);
    const int64_t at = element_at(p, c.sample, c.channel, c.begin + row);
    if (p.residual != nullptr) {
      for (int64_t r = 0; r < rows; ++r) add_residual<T>(p, at + r * p.channels, c.channels);
    }
    block_sums(v + at, p.channels, rows, s, c.channels);
    const double n = static_cast<double>(rows), share = 1 / n;
    const float *pivot = s[kPivot], *first = s[kFirst], *second = s[kSecond];
    for (int64_t i = 0; i < c.channels; ++i) {
      const double difference = static_cast<double>(first[i]) * share;
      mean[i] = static_cast<double>(pivot[i]) + difference;
      m2[i] = static_cast<double>(second[i]) - static_cast<double>(first[i]) * difference;
    }
    if (bias != nullptr) {
      for (int64_t i = 0; i < c.channels; ++i) mean[i] += static_cast<double>(bias[i]);
    }
    const double spread = static_cast<double>(c.per_group), before = static_cast<double>(row) * spread;
    for (int64_t g = 0; g < c.groups; ++g) {
      const double* means = mean + g * c.per_group;
      const double* squares = m2 + g * c.per_group;
      Moments block{0, 0};
      for (int64_t i = 0; i < c.per_group; ++i) block.mean += means[i];
      block.mean /= spread;
      for (int64_t i = 0; i < c.per_group; ++i) {
        const double distance = means[i] - block.mean;
        block.m2 += squares[i] + n * distance * distance;
      }
      join(out[g], before, block, n * spread);
    }
  }
}

// ---- apply ----

// What a unit's statistics themselves are the result of. The table is filled.
void store_results(const Problem& p, const Piece& c, const Scratch& s) {
  if (p.mean != nullptr) {
    for (int64_t g = 0; g < c.groups; ++g) {
      p.mean[c.sample * p.groups + c.group + g] = static_cast<float>(s[kMean][g * c.per_group]);
      p.rstd[c.sample * p.groups + c.group + g] = static_cast<float>(s[kRstd][g * c.per_group]);
    }
  }
  if (p.factor == nullptr) return;
  for (int64_t i = 0; i < c.channels; ++i) {
    const int64_t at = c.sample * p.channels + c.channel + i;
    p.factor[at] = s[kScale][i];
    // With the factor as it is stored: x factor + shift is then the bias at the mean.
    p.shift[at] = static_cast<float>(
        static_cast<double>(p.bias[c.channel + i]) - s[kMean][i] * static_cast<double>(p.factor[at]));
  }
}

template <bool kSwish, class R>
inline R value(R v, R offset, R scale, R shift) {
  // Centred first: v scale + shift would cancel far from 0.
  const R u = fma(add(v, offset), scale, shift);
  if constexpr (kSwish) return div(u, denominator(u));
  return u;
}

template <class T, bool kSwish>
void apply_piece(const Problem& p, const Piece& c, const Scratch& s) {
  const float *offsets = s[kOffset], *scales = s[kScale], *shifts = s[kShift];
  const T* v = static_cast<const T*>(p.v) + element_at(p, c.sample, c.channel, c.begin);
  T* y = static_cast<T*>(p.y) + element_at(p, c.sample, c.channel, c.begin);
  if (p.order == Order::planes) {
    for (int64_t i = 0; i < c.channels; ++i, v += p.spatial, y += p.spatial) {
      const V offset = filled<V>(offsets[i]), scale = filled<V>(scales[i]), shift = filled<V>(shifts[i]);
      int64_t j = 0;
      for (; j + kWidth <= c.size; j += kWidth) store(value<kSwish>(load_all(v + j), offset, scale, shift), y + j);
      if (j < c.size) {
        const int64_t rest = c.size - j;
        store_part(value<kSwish>(load_part(v + j, rest, 0.0f), offset, scale, shift), y + j, rest);
      }
    }
    return;
  }
  for (int64_t row = 0; row < c.size; ++row, v += p.channels, y += p.channels) {
    for_each_register<float>(c.channels, [=](auto kind, int64_t i) {
      decltype(kind) x, offset, scale, shift;
      load(x, v + i);
      load(offset, offsets + i);
      load(scale, scales + i);
      load(shift, shifts + i);
      store(value<kSwish>(x, offset, scale, shift), y + i);
    });
  }
}

// ---- backward ----

// The reduction leaves the gradient with respect to u in grad_x, where the rest finds it, if it fits there unrounded:
// the sigmoid is then computed once.
template <class T>
constexpr bool kKeeps = std::is_same<T, float>::value;

// The gradient with respect to u; `centred` is v - mean.
template <bool kSwish, class R>
inline R inner_gradient(R grad, R centred, R scale, R shift) {
  if constexpr (!kSwish) return grad;
  const R u = fma(centred, scale, shift);
  const R one = filled<R>(1.0f);
  const R sigmoid = div(one, denominator(u));
  return mul(mul(grad, sigmoid), fma(u, fnma(sigmoid, one, one), one));
}

template <bool kBias, class R>
struct Totals {
  R grad, grad_centred, centred;

  void clear() { grad = grad_centred = centred = filled<R>(0.0f); }
  void count(R d, R v) {
    grad = add(grad, d);
    grad_centred = fma(d, v, grad_centred);
    if constexpr (kBias) centred = add(centred, v);
  }
};

template <class T, bool kSwish, bool kBias>
void reduce_planes(const Problem& p, const Piece& c, const Scratch& s) {
  double* sums[] = {sums_at(p, c, c.number, kGrad), sums_at(p, c, c.number, kGradCentred),
      sums_at(p, c, c.number, kCentred)};
  for (int64_t channel = 0; channel < c.channels; ++channel) {
    const int64_t start = element_at(p, c.sample, c.channel + channel, c.begin);
    const T* v = static_cast<const T*>(p.v) + start;
    const T* grad = static_cast<const T*>(p.grad) + start;
    T* grad_x = static_cast<T*>(p.grad_x) + start;
    const float minus_offset = -s[kOffset][channel];
    const V offset = filled<V>(s[kOffset][channel]), scale = filled<V>(s[kScale][channel]);
    const V shift = filled<V>(s[kShift][channel]);
    for (double* row : sums) row[channel] = 0;
    for (int64_t begin = 0; begin < c.size; begin += kBlock) {
      const int64_t end = smaller(c.size, begin + kBlock);
      Totals<kBias, V> totals[2];
      totals[0].clear();
      totals[1].clear();
      const auto step = [&](V g, V x, int lane) {
        const V centred = add(x, offset);
        const V d = inner_gradient<kSwish>(g, centred, scale, shift);
        totals[lane].count(d, centred);
        return d;
      };
      const auto whole = [&](int64_t i, int lane) {
        const V d = step(load_all(grad + i), load_all(v + i), lane);
        if constexpr (kKeeps<T>) store(d, grad_x + i);
      };
      int64_t i = begin;
      for (; i + 2 * kWidth <= end; i += 2 * kWidth) {
        whole(i, 0);
        whole(i + kWidth, 1);
      }
      for (; i + kWidth <= end; i += kWidth) whole(i, 0);
      if (i < end) {
        const int64_t rest = end - i;
        const V d = step(load_part(grad + i, rest, 0.0f), load_part(v + i, rest, minus_offset), 1);
        if constexpr (kKeeps<T>) store_part(d, grad_x + i, rest);
      }
      sums[kGrad][channel] += static_cast<double>(sum(add(totals[0].grad, totals[1].grad)));
      sums[kGradCentred][channel] += static_cast<double>(sum(add(totals[0].grad_centred, totals[1].grad_centred)));
      if constexpr (kBias) {
        sums[kCentred][channel] += static_cast<double>(sum(add(totals[0].centred, totals[1].centred)));
      }
    }
  }
}

template <class T, bool kSwish, bool kBias>
void reduce_rows(const Problem& p, const Piece& c, const Scratch& s) {
  double* sums[] = {sums_at(p, c, c.number, kGrad), sums_at(p, c, c.number, kGradCentred),
      sums_at(p, c, c.number, kCentred)};
  for (double* row : sums) {
    for (int64_t i = 0; i < c.channels; ++i) row[i] = 0;
  }
  for (int64_t row = 0; row < c.size; row += kSumRowsAtOnce) {
    const int64_t rows = smaller(kSumRowsAtOnce, c.size - row);
    const int64_t start = element_at(p, c.sample, c.channel, c.begin + row);
    for_each_group<2>(c.channels, [&](auto offset, int64_t i, int64_t skip) {
      using R = std::decay_t<decltype(offset.part[0])>;
      auto scale = offset, shift = offset;
      offset.read(s[kOffset] + i);
      scale.read(s[kScale] + i);
      shift.read(s[kShift] + i);
      auto total = offset, total_product = offset, total_centred = offset;
      total.clear();
      total_product.clear();
      total_centred.clear();
      int64_t at = start + i;
      for (int64_t r = 0; r < rows; ++r, at += p.channels) {
        for (size_t u = 0; u < std::size(offset.part); ++u) {
          const int64_t here = at + static_cast<int64_t>(u) * R::width;
          R g, x;
          load(g, static_cast<const T*>(p.grad) + here);
          load(x, static_cast<const T*>(p.v) + here);
          const R centred = add(x, offset.part[u]);
          const R d = inner_gradient<kSwish>(g, centred, scale.part[u], shift.part[u]);
          total.part[u] = add(total.part[u], d);
          total_product.part[u] = fma(d, centred, total_product.part[u]);
          if constexpr (kBias) total_centred.part[u] = add(total_centred.part[u], centred);
          if constexpr (kKeeps<T>) store(d, static_cast<T*>(p.grad_x) + here);
        }
      }
      total.add_to(sums[kGrad] + i, skip);
      total_product.add_to(sums[kGradCentred] + i, skip);
      if constexpr (kBias) total_centred.add_to(sums[kCentred] + i, skip);
    });
  }
}

// What the sums say about a unit's gradients, and the gradient of its channel bias.
void backward_table(const Problem& p, const Piece& c, const Scratch& s) {
  const double n = static_cast<double>(group_elements(p));
  const double* grad = sums_at(p, c, 0, kGrad);
  const double* grad_centred = sums_at(p, c, 0, kGradCentred);
  const float* weight = p.weight + c.channel;
  const double *mean = s[kMean], *rstd = s[kRstd];
  double *slope = s[kGroupSlope], *base = s[kGroupBase];
  for (int64_t g = 0; g < c.groups; ++g) {
    const int64_t begin = g * c.per_group, end = begin + c.per_group;
    double total = 0, total_centred = 0;
    for (int64_t i = begin; i < end; ++i) {
      total += static_cast<double>(weight[i]) * grad[i];
      total_centred += static_cast<double>(weight[i]) * grad_centred[i];
    }
    const double r = rstd[begin], share = -r / n;
    for (int64_t i = begin; i < end; ++i) {
      base[i] = share * total;
      slope[i] = share * r * r * total_centred;
    }
  }
  const float* bias = p.channel_bias == nullptr ? nullptr : p.channel_bias + c.sample * p.channels + c.channel;
  const double scale = static_cast<double>(p.scale);
  float *factor = s[kFactor], *slopes = s[kSlope], *bases = s[kBase];
  for (int64_t i = 0; i < c.channels; ++i) {
    factor[i] = static_cast<float>(scale * rstd[i] * static_cast<double>(weight[i]));
    slopes[i] = static_cast<float>(scale * slope[i]);
    bases[i] = static_cast<float>(scale * base[i]);
  }
  if (bias == nullptr) return;
  for (int64_t i = 0; i < c.channels; ++i) {
    bases[i] = static_cast<float>(scale * (base[i] + slope[i] * lost_by(bias[i], mean[i])));
  }
  if (c.number != 0) return;
  const double* centred = sums_at(p, c, 0, kCentred);
  const double positions = static_cast<double>(p.spatial);
  float* grad_bias = p.grad_channel_bias + c.sample * p.channels + c.channel;
  for (int64_t i = 0; i < c.channels; ++i) {
    grad_bias[i] = static_cast<float>(
        rstd[i] * static_cast<double>(weight[i]) * grad[i] + slope[i] * centred[i] + base[i] * positions);
  }
}

template <class R>
struct Constants {
  R offset, scale, shift, factor, slope, base;
};

// The gradient with respect to v through y. `given`: what the reduction left in grad_x, or grad.
template <class T, bool kSwish, class R>
inline R gradient(R v, R given, const Constants<R>& k) {
  const R centred = add(v, k.offset);
  R d = given;
  if constexpr (!kKeeps<T>) d = inner_gradient<kSwish>(given, centred, k.scale, k.shift);
  return fma(k.factor, d, fma(k.slope, centred, k.base));
}

template <class T, bool kSwish>
void backward_apply_piece(const Problem& p, const Piece& c, const Scratch& s) {
  const int64_t start = element_at(p, c.sample, c.channel, c.begin);
  const T* v = static_cast<const T*>(p.v) + start;
  T* grad_x = static_cast<T*>(p.grad_x) + start;
  const T* given = kKeeps<T> ? grad_x : static_cast<const T*>(p.grad) + start;
  const T* grad_v = p.grad_v == nullptr ? nullptr : static_cast<const T*>(p.grad_v) + start;
  if (p.order == Order::planes) {
    const V outer = filled<V>(p.scale);
    for (int64_t i = 0; i < c.channels; ++i) {
      const Constants<V> k{filled<V>(s[kOffset][i]), filled<V>(s[kScale][i]), filled<V>(s[kShift][i]),
          filled<V>(s[kFactor][i]), filled<V>(s[kSlope][i]), filled<V>(s[kBase][i])};
      int64_t j = i * p.spatial;
      const int64_t end = j + c.size;
      for (; j + kWidth <= end; j += kWidth) {
        V result = gradient<T, kSwish>(load_all(v + j), load_all(given + j), k);
        if (grad_v != nullptr) result = fma(outer, load_all(grad_v + j), result);
        store(result, grad_x + j);
      }
      if (j < end) {
        const int64_t rest = end - j;
        V result = gradient<T, kSwish>(load_part(v + j, rest, 0.0f), load_part(given + j, rest, 0.0f), k);
        if (grad_v != nullptr) result = fma(outer, load_part(grad_v + j, rest, 0.0f), result);
        store_part(result, grad_x + j, rest);
      }
    }
    return;
  }
  for (int64_t row = 0; row < c.size; ++row) {
    const auto step = [&](auto kind, int64_t i) {
      decltype(kind) x, g, z;
      Constants<decltype(x)> k;
      load(k.offset, s[kOffset] + i);
      load(k.scale, s[kScale] + i);
      load(k.shift, s[kShift] + i);
      load(k.factor, s[kFactor] + i);
      load(k.slope, s[kSlope] + i);
      load(k.base, s[kBase] + i);
      const int64_t at = row * p.channels + i;
      load(x, v + at);
      load(g, given + at);
      auto result = gradient<T, kSwish>(x, g, k);
      if (grad_v != nullptr) {
        load(z, grad_v + at);
        result = fma(filled<decltype(x)>(p.scale), z, result);
      }
      store(result, grad_x + at);
    };
    int64_t i = 0;
    for (; i + kWidth <= c.channels; i += kWidth) step(V{}, i);
    for (; i < c.channels; ++i) step(Lane<float>{}, i);  // no overlap: what is read has been written over
  }
}

// ---- pieces and units ----

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

// Offset, scale and shift of a unit's channels, after `mean` and `rstd` of the same.
void fill_table(const Problem& p, const Piece& c, const Scratch& s) {
  const float *weight = p.weight + c.channel, *bias = p.bias + c.channel;
  const double *mean = s[kMean], *rstd = s[kRstd];
  float *offset = s[kOffset], *scale = s[kScale], *shift = s[kShift];
  const auto fill = [=](auto channel_bias) {
    for (int64_t i = 0; i < c.channels; ++i) {
      const Affine a = affine_of(weight[i], bias[i], channel_bias(i), mean[i], rstd[i]);
      offset[i] = a.offset;
      scale[i] = a.scale;
      shift[i] = a.shift;
    }
  };
  if (p.channel_bias == nullptr) return fill([](int64_t) { return 0.0f; });
  const float* channel_bias = p.channel_bias + c.sample * p.channels + c.channel;
  fill([=](int64_t i) { return channel_bias[i]; });
}

void forward_table(const Problem& p, const Piece& c, const Scratch& s) {
  const Moments* moments = moments_at(p, c, 0);
  double *mean = s[kMean], *rstd = s[kRstd];
  for (int64_t g = 0; g < c.groups; ++g) {
    const double r = rstd_of(p, moments[g].m2);
    for (int64_t i = g * c.per_group; i < (g + 1) * c.per_group; ++i) {
      mean[i] = moments[g].mean;
      rstd[i] = r;
    }
  }
  fill_table(p, c, s);
}

void restore_table(const Problem& p, const Piece& c, const Scratch& s) {
  const int64_t first = c.sample * p.groups + c.group;
  double *mean = s[kMean], *rstd = s[kRstd];
  for (int64_t g = 0; g < c.groups; ++g) {
    for (int64_t i = g * c.per_group; i < (g + 1) * c.per_group; ++i) {
      mean[i] = static_cast<double>(p.mean[first + g]);
      rstd[i] = static_cast<double>(p.rstd[first + g]);
    }
  }
  fill_table(p, c, s);
}

template <class T>
void statistics_of(const Problem& p, const Piece& c, const Scratch& s) {
  Moments* out = moments_at(p, c, c.number);
  p.order == Order::planes ? statistics_planes<T>(p, c, out) : statistics_rows<T>(p, c, s, out);
}

template <class T>
void apply_of(const Problem& p, const Piece& c, const Scratch& s) {
  forward_table(p, c, s);
  if (c.number == 0) store_results(p, c, s);
  if (p.y == nullptr) return;
  p.swish ? apply_piece<T, true>(p, c, s) : apply_piece<T, false>(p, c, s);
}

template <class T, bool kSwish>
void reduce_piece(const Problem& p, const Piece& c, const Scratch& s) {
  if (p.order == Order::planes) {
    p.channel_bias == nullptr ? reduce_planes<T, kSwish, false>(p, c, s) : reduce_planes<T, kSwish, true>(p, c, s);
  } else {
    p.channel_bias == nullptr ? reduce_rows<T, kSwish, false>(p, c, s) : reduce_rows<T, kSwish, true>(p, c, s);
  }
}

template <class T>
void reduce_of(const Problem& p, const Piece& c, const Scratch& s) {
  restore_table(p, c, s);
  p.swish ? reduce_piece<T, true>(p, c, s) : reduce_piece<T, false>(p, c, s);
}

// After reduce_of, or with the table filled.
template <class T>
void backward_apply_of(const Problem& p, const Piece& c, const Scratch& s) {
  backward_table(p, c, s);
  p.swish ? backward_apply_piece<T, true>(p, c, s) : backward_apply_piece<T, false>(p, c, s);
}

// f(Type<T>{}, piece, scratch) of all pieces [begin, end).
template <class F>
void for_each_piece(const Problem& p, int64_t begin, int64_t end, double* memory, F&& f) {
  const Scratch scratch = scratch_of(p, memory);
  with_type(p, [&](auto type) {
    for (int64_t k = begin; k < end; ++k) f(type, piece_at(p, k), scratch);
  });
}

}  // namespace

void forward(const Problem& p, int64_t begin, int64_t end, double* scratch) {
  for_each_piece(p, begin, end, scratch, [&](auto type, const Piece& c, const Scratch& s) {
    using T = typename decltype(type)::type;
    statistics_of<T>(p, c, s);
    apply_of<T>(p, c, s);
  });
}

void statistics(const Problem& p, int64_t begin, int64_t end, double* scratch) {
  for_each_piece(p, begin, end, scratch, [&](auto type, const Piece& c, const Scratch& s) {
    statistics_of<typename decltype(type)::type>(p, c, s);
  });
}

void apply(const Problem& p, int64_t begin, int64_t end, double* scratch) {
  for_each_piece(p, begin, end, scratch, [&](auto type, const Piece& c, const Scratch& s) {
    apply_of<typename decltype(type)::type>(p, c, s);
  });
}

void backward(const Problem& p, int64_t begin, int64_t end, double* scratch) {
  for_each_piece(p, begin, end, scratch, [&](auto type, const Piece& c, const Scratch& s) {
    using T = typename decltype(type)::type;
    reduce_of<T>(p, c, s);
    correct_sums(p, c);
    backward_apply_of<T>(p, c, s);
  });
}

void backward_reduce(const Problem& p, int64_t begin, int64_t end, double* scratch) {
  for_each_piece(p, begin, end, scratch, [&](auto type, const Piece& c, const Scratch& s) {
    reduce_of<typename decltype(type)::type>(p, c, s);
  });
}

void backward_apply(const Problem& p, int64_t begin, int64_t end, double* scratch) {
  for_each_piece(p, begin, end, scratch, [&](auto type, const Piece& c, const Scratch& s) {
    restore_table(p, c, s);
    backward_apply_of<typename decltype(type)::type>(p, c, s);
  });
}

}  // namespace LSGM_ISA

#if !LSGM_VEC_AVX2  // what exists once, compiled for every processor
namespace cpu {

void plan(Problem& p, bool backward) {
  constexpr int64_t kFewest = 16;            // units, so that no thread is idle
  constexpr int64_t kSmallest = 4096;        // elements of a unit, below which more of them do not pay
  constexpr int64_t kPiece = 32768;          // elements of a piece
  constexpr int64_t kCache = 768 * 1024;     // bytes: of most processors' second cache what a unit may have
  constexpr int64_t kNarrowest = 128;        // bytes of a row that a unit has: whole lines of the cache, and a few
  const int64_t sample = p.channels * p.spatial;
  Units& u = p.units;
  u.size = p.spatial;
  u.pieces = 1;
  bool cut;
  if (p.order == Order::planes) {
    constexpr int64_t kTogether = 4096;  // elements: small groups go through each step side by side
    const int64_t together = smaller(larger(1, kTogether / group_elements(p)), ceil_div(p.batch * p.groups, kFewest));
    u.groups = smaller(together, p.groups);
    cut = p.batch * p.groups < kFewest / 2;
  } else {
    // Neighbouring channels share the memory's lines: a unit has all of them, or so many that both cache and threads
    // are served.
    const int64_t limit = smaller(p.groups, larger(1, p.channels * size_of(p.dtype) / kNarrowest));
    const int64_t for_threads = smaller(ceil_div(kFewest, p.batch), sample / kSmallest);
    const int64_t for_cache = ceil_div(sample * size_of(p.dtype) * (backward ? 3 : 2), kCache);
    int64_t tiles = larger(1, larger(for_threads, for_cache));
    cut = p.batch < kFewest / 2 && tiles > limit;
    if (tiles > limit) tiles = for_cache > limit ? 1 : limit;
    u.groups = ceil_div(p.groups, tiles);
  }
  u.per_sample = ceil_div(p.groups, u.groups);
  const int64_t channels = u.groups * channels_per_group(p);
  if (cut && channels * p.spatial > 2 * kPiece) {
    constexpr int64_t kRows = 64;
    u.size = smaller(p.spatial, ceil_div(larger(kPiece / channels, 1), kRows) * kRows);
    u.pieces = ceil_div(p.spatial, u.size);
  }
  u.count = p.batch * u.per_sample;
}

int64_t grain(const Problem& p) {
  constexpr int64_t kElementsPerThread = 16384;  // some ten microseconds: what waking a second thread costs
  return larger(1, kElementsPerThread / (p.units.groups * channels_per_group(p) * p.units.size));
}

int64_t moment_count(const Problem& p) { return p.batch * p.units.pieces * p.groups; }
int64_t sum_count(const Problem& p) { return p.batch * p.units.pieces * kSumRows * p.channels; }
int64_t scratch_size(const Problem& p) { return kScratchSize * p.units.groups * channels_per_group(p); }

void combine(const Problem& p) {
  for (int64_t unit = 0; unit < p.units.count; ++unit) {
    const Piece c = piece_at(p, unit * p.units.pieces);
    Moments* all = moments_at(p, c, 0);
    for (int64_t k = 1; k < p.units.pieces; ++k) {
      const double before = static_cast<double>(c.per_group * k * p.units.size);
      const double n = static_cast<double>(c.per_group * smaller(p.units.size, p.spatial - k * p.units.size));
      for (int64_t g = 0; g < c.groups; ++g) join(all[g], before, moments_at(p, c, k)[g], n);
    }
  }
}

void combine_sums(const Problem& p) {
  for (int64_t unit = 0; unit < p.units.count; ++unit) {
    const Piece c = piece_at(p, unit * p.units.pieces);
    for (SumRow row : {kGrad, kGradCentred, kCentred}) {
      double* all = sums_at(p, c, 0, row);
      for (int64_t k = 1; k < p.units.pieces; ++k) {
        const double* more = sums_at(p, c, k, row);
        for (int64_t i = 0; i < c.channels; ++i) all[i] += more[i];
      }
    }
    correct_sums(p, c);
  }
}

void finish(const Problem& p) {
  const int64_t per_group = channels_per_group(p), stride = p.units.pieces * kSumRows * p.channels;
  for (int64_t g = 0; g < p.groups; ++g) {
    for (int64_t channel = g * per_group; channel < (g + 1) * per_group; ++channel) {
      const double* sums = p.sums + channel;
      double weight = 0, bias = 0;
      for (int64_t sample = 0; sample < p.batch; ++sample, sums += stride) {
        weight += static_cast<double>(p.rstd[sample * p.groups + g]) * sums[kGradCentred * p.channels];
        bias += sums[kGrad * p.channels];
      }
      p.grad_weight[channel] = static_cast<float>(weight);
      p.grad_bias[channel] = static_cast<float>(bias);
    }
  }
}

#define LSGM_CHOOSE(kernel)                                                          \
  void kernel(const Problem& p, int64_t begin, int64_t end, double* scratch) {       \
    LSGM_IF_AVX512(if (has_avx512()) return avx512::kernel(p, begin, end, scratch);) \
    LSGM_IF_AVX2(if (has_avx2()) return avx2::kernel(p, begin, end, scratch);)       \
    scalar::kernel(p, begin, end, scratch);                                          \
  }
LSGM_CHOOSE(forward)
LSGM_CHOOSE(statistics)
LSGM_CHOOSE(apply)
LSGM_CHOOSE(backward)
LSGM_CHOOSE(backward_reduce)
LSGM_CHOOSE(backward_apply)
#undef LSGM_CHOOSE

}  // namespace cpu
#endif

}  // namespace group_norm_swish
}  // namespace lsgm
