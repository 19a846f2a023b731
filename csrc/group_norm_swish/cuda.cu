// CUDA kernels of group_norm_swish and its family: thin shells around what threads.h says each thread does, and the
// sums across threads. No torch.
//
// Every sum is taken in a fixed order and without atomics.
#include <type_traits>

#include "common/launch.h"
#include "group_norm_swish/threads.h"

namespace lsgm {
namespace group_norm_swish {
namespace cuda {
namespace {

// What the kernels' template arguments are called in the compiler's reports.
struct Planes {
  static constexpr Order order = Order::planes;
};
struct Rows {
  static constexpr Order order = Order::rows;
};
template <Order O>
using Lay = std::conditional_t<O == Order::planes, Planes, Rows>;

struct Alone {
  static constexpr bool value = false;
};
struct Residual {
  static constexpr bool value = true;
};

// Sums over the threads that share a channel, which each of them gets. `shared`: M numbers per thread.
template <int M>
__device__ void over_channel(float (&values)[M], const Place& place, float* shared) {
  const int thread = static_cast<int>(threadIdx.x);
  LSGM_UNROLL
  for (int m = 0; m < M; ++m) shared[m * kThreads + thread] = values[m];
  for (int left = place.turns; left > 1;) {
    const int half = (left + 1) / 2;
    __syncthreads();
    if (place.turn + half < left) {
      LSGM_UNROLL
      for (int m = 0; m < M; ++m) {
        values[m] += shared[m * kThreads + thread + half * place.apart];
        shared[m * kThreads + thread] = values[m];
      }
    }
    left = half;
  }
  __syncthreads();
  const int first = thread - place.turn * place.apart;
  LSGM_UNROLL
  for (int m = 0; m < M; ++m) values[m] = shared[m * kThreads + first];
  __syncthreads();
}

// Over the lanes of a warp, in a fixed order; every lane gets the sum.
__device__ double over_lanes(double value) {
  for (int apart = kLanes / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(0xffffffffu, value, apart);
  return value;
}

// f(g, lane) for every group of the block's cell, by a warp.
template <class F>
__device__ void by_warps(const Block& b, F&& f) {
  for (int g = static_cast<int>(threadIdx.x) / kLanes; g < b.groups; g += kThreads / kLanes) {
    f(g, static_cast<int>(threadIdx.x) % kLanes);
  }
}

// Moments of the block's channels.
template <class T, Order O, int N, bool kSum>
__device__ void channel_moments(const Call& c, const Block& b, float* shared, Moments* channels) {
  constexpr int K = channels_of<O, N>();
  for (int round = 0; round < c.plan.rounds; ++round) {
    const Place place = place_of<O, N>(c, b, round, static_cast<int>(threadIdx.x));
    Walk w = walk_of<O, N>(c, b, place);
    Batch<N> batch;
    take_v<T, N, kSum>(c, w, batch);
    float pivot[K], values[K + 1], d[2 * K];
    add_up<O, N>(batch, pivot);
    LSGM_UNROLL
    for (int k = 0; k < K; ++k) values[k] = pivot[k];
    values[K] = static_cast<float>(batch.count * (N / K));
    over_channel(values, place, shared);
    LSGM_UNROLL
    for (int k = 0; k < K; ++k) pivot[k] = values[k] / values[K];
    differences<T, O, N, kSum>(c, w, batch, pivot, d);
    over_channel(d, place, shared);
    if (leads(place)) {
      LSGM_UNROLL
      for (int k = 0; k < K; ++k) {
        const int64_t channel = place.channel + k;
        channels[channel - b.begin] = moments_of(c, b, channel, pivot[k], d[k], d[K + k]);
      }
    }
  }
  __syncthreads();
}

template <class T, Order O, int N>
__device__ void apply_block(const Call& c, const Block& b, const Statistics* groups) {
  if (c.y == nullptr) {
    for (int64_t channel = b.begin + threadIdx.x; channel < b.end; channel += kThreads) {
      store_affine(c, b, channel, groups);
    }
    return;
  }
  for (int round = 0; round < c.plan.rounds; ++round) {
    const Place place = place_of<O, N>(c, b, round, static_cast<int>(threadIdx.x));
    const auto constants = constants_of<channels_of<O, N>()>(c, b, place, groups);
    apply_part<T, O, N>(c, c.v != nullptr ? c.v : c.x, walk_of<O, N>(c, b, place), constants);
  }
}

// The 2: left to itself ptxas aims at more blocks per multiprocessor, and spills for it.
template <class S, class T, class L, int N>
__global__ void __launch_bounds__(kThreads, 2) statistics_kernel(const Call c) {
  constexpr Order O = L::order;
  __shared__ float shared[2 * channels_of<O, N>() * kThreads];
  __shared__ Moments channels[kMost];
  const Block b = block_of(c, blockIdx.x);
  channel_moments<T, O, N, S::value>(c, b, shared, channels);
  const int g = static_cast<int>(threadIdx.x);
  if (g < b.groups) {
    const Moments piece = piece_of(c, b, g, channels);
    store_partial(c, b, g, piece.mean, piece.m2);
  }
}

template <class T, class L, int N>
__global__ void __launch_bounds__(kThreads, 2) apply_kernel(const Call c) {
  __shared__ Statistics groups[kMost];
  const Block b = block_of(c, blockIdx.x, true);
  by_warps(b, [&](int g, int lane) {
    const double mean = over_lanes(mean_part(c, b, g, lane));
    const double m2 = over_lanes(m2_part(c, b, g, lane, mean));
    if (lane != 0) return;
    groups[g] = statistics_of(c, mean, m2);
    if (c.mean != nullptr && b.part == 0 && b.split == 0) store_statistics(c, b, g, groups[g]);
  });
  __syncthreads();
  apply_block<T, L::order, N>(c, b, groups);
}

// Statistics and apply of whole groups; x is read again from the cache.
template <class S, class T, class L, int N>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(const Call c) {
  constexpr Order O = L::order;
  __shared__ float shared[2 * channels_of<O, N>() * kThreads];
  __shared__ Moments channels[kMost];
  __shared__ Statistics groups[kMost];
  const Block b = block_of(c, blockIdx.x);
  channel_moments<T, O, N, S::value>(c, b, shared, channels);
  const int g = static_cast<int>(threadIdx.x);
  if (g < b.groups) {
    const Moments whole = piece_of(c, b, g, channels);
    groups[g] = statistics_of(c, whole.mean, whole.m2);
    if (c.mean != nullptr) store_statistics(c, b, g, groups[g]);
  }
  __syncthreads();
  apply_block<T, O, N>(c, b, groups);
}

// The sums of the block's channels are stored, and here are their shares in A and B; `kept`, not null: and themselves.
template <class T, Order O, int N>
__device__ void channel_gradients(const Call& c, const Block& b, float* shared, Correction* channels, Sums* kept) {
  constexpr int K = channels_of<O, N>();
  for (int round = 0; round < c.plan.rounds; ++round) {
    const Place place = place_of<O, N>(c, b, round, static_cast<int>(threadIdx.x));
    float values[3 * K];
    add_gradients<T, O, N>(c, walk_of<O, N>(c, b, place), slopes_of<K>(c, b, place, nullptr), values);
    over_channel(values, place, shared);
    if (leads(place)) {
      LSGM_UNROLL
      for (int k = 0; k < K; ++k) {
        const int64_t channel = place.channel + k;
        const Sums sums{values[k], values[K + k], values[2 * K + k]};
        channels[channel - b.begin] = store_sums(c, b, channel, sums);
        if (kept != nullptr) kept[channel - b.begin] = sums;
      }
    }
  }
  __syncthreads();
}

template <class T, Order O, int N>
__device__ void apply_gradient_block(const Call& c, const Block& b, const Correction* groups) {
  for (int round = 0; round < c.plan.rounds; ++round) {
    const Place place = place_of<O, N>(c, b, round, static_cast<int>(threadIdx.x));
    const auto slopes = slopes_of<channels_of<O, N>()>(c, b, place, groups);
    apply_gradients<T, O, N>(c, walk_of<O, N>(c, b, place), slopes);
  }
}

template <class T, class L, int N>
__global__ void __launch_bounds__(kThreads, 2) backward_reduce_kernel(const Call c) {
  constexpr Order O = L::order;
  __shared__ float shared[3 * channels_of<O, N>() * kThreads];
  __shared__ Correction channels[kMost];
  const Block b = block_of(c, blockIdx.x);
  channel_gradients<T, O, N>(c, b, shared, channels, nullptr);
  const int g = static_cast<int>(threadIdx.x);
  if (g < b.groups) {
    const Correction piece = correction_of(c, b, g, channels);
    store_partial(c, b, g, static_cast<double>(piece.a), static_cast<double>(piece.b));
  }
}

template <class T, class L, int N>
__global__ void __launch_bounds__(kThreads, 2) backward_apply_kernel(const Call c) {
  __shared__ Correction groups[kMost];
  const Block b = block_of(c, blockIdx.x, true);
  by_warps(b, [&](int g, int lane) {
    const Pack<double, 2> sums = sums_part(c, b, g, lane);
    const double one = over_lanes(sums.v[0]), two = over_lanes(sums.v[1]);
    if (lane == 0) groups[g] = {static_cast<float>(one), static_cast<float>(two)};
  });
  __syncthreads();
  if (c.grad_channel != nullptr && b.part == 0) {
    for (int64_t channel = b.begin + threadIdx.x; channel < b.end; channel += kThreads) {
      store_channel(c, b, channel, channel_sums(c, b, channel), groups);
    }
  }
  apply_gradient_block<T, L::order, N>(c, b, groups);
}

// Both of whole groups.
template <class T, class L, int N>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(const Call c) {
  constexpr Order O = L::order;
  __shared__ float shared[3 * channels_of<O, N>() * kThreads];
  __shared__ Correction channels[kMost], groups[kMost];
  __shared__ Sums kept[kMost];
  const Block b = block_of(c, blockIdx.x);
  channel_gradients<T, O, N>(c, b, shared, channels, kept);
  const int g = static_cast<int>(threadIdx.x);
  if (g < b.groups) groups[g] = correction_of(c, b, g, channels);
  __syncthreads();
  if (c.grad_channel != nullptr) {
    for (int64_t channel = b.begin + threadIdx.x; channel < b.end; channel += kThreads) {
      store_channel(c, b, channel, kept[channel - b.begin], groups);
    }
  }
  apply_gradient_block<T, O, N>(c, b, groups);
}

// Gradients of weight and bias: kLanes threads for each of kSlots channels, neighbours in memory.
constexpr int kSlots = 8;

__device__ float over_slots(float value, float (&shared)[kLanes][kSlots + 1]) {
  const unsigned lane = threadIdx.y, slot = threadIdx.x;
  shared[lane][slot] = value;
  for (unsigned half = kLanes / 2; half > 0; half /= 2) {
    __syncthreads();
    if (lane < half) shared[lane][slot] += shared[lane + half][slot];
  }
  __syncthreads();
  const float total = shared[0][slot];
  __syncthreads();
  return total;
}

__global__ void __launch_bounds__(kLanes* kSlots, 1) parameters_kernel(const Call c) {
  __shared__ float shared[kLanes][kSlots + 1];
  const int64_t channel = int64_t(blockIdx.x) * kSlots + threadIdx.x;
  const int lane = static_cast<int>(threadIdx.y);
  const bool exists = channel < c.channels;
  const float of_weight = over_slots(exists ? row_part(c, weight_sums(c), channel, lane) : 0, shared);
  const float of_bias = over_slots(exists ? row_part(c, bias_sums(c), channel, lane) : 0, shared);
  if (exists && lane == 0) {
    c.grad_weight[channel] = of_weight;
    c.grad_bias[channel] = of_bias;
  }
}

#define LSGM_GROUP_NORM_SWISH_LAUNCH(Name, kernel, ...)                                            \
  struct Name {                                                                                    \
    template <class T, Order O, int N>                                                             \
    static void run(const Call& c, cudaStream_t stream) {                                          \
      kernel<__VA_ARGS__><<<static_cast<unsigned>(c.plan.blocks), kThreads, 0, stream>>>(c);       \
      check_launch("group_norm_swish");                                                            \
    }                                                                                              \
  };
LSGM_GROUP_NORM_SWISH_LAUNCH(StatisticsOfX, statistics_kernel, Alone, T, Lay<O>, N)
LSGM_GROUP_NORM_SWISH_LAUNCH(StatisticsOfSum, statistics_kernel, Residual, T, Lay<O>, N)
LSGM_GROUP_NORM_SWISH_LAUNCH(Apply, apply_kernel, T, Lay<O>, N)
LSGM_GROUP_NORM_SWISH_LAUNCH(ForwardOfX, forward_kernel, Alone, T, Lay<O>, N)
LSGM_GROUP_NORM_SWISH_LAUNCH(ForwardOfSum, forward_kernel, Residual, T, Lay<O>, N)
LSGM_GROUP_NORM_SWISH_LAUNCH(BackwardReduce, backward_reduce_kernel, T, Lay<O>, N)
LSGM_GROUP_NORM_SWISH_LAUNCH(BackwardApply, backward_apply_kernel, T, Lay<O>, N)
LSGM_GROUP_NORM_SWISH_LAUNCH(Backward, backward_kernel, T, Lay<O>, N)
#undef LSGM_GROUP_NORM_SWISH_LAUNCH

template <class Kernel>
void launch(const Call& c, void* stream) {
  run_kernel<Kernel>(c, static_cast<cudaStream_t>(stream));
}

}  // namespace

void plan(Call& c) { make_plan(c); }
int64_t partial_count(const Call& c) { return numbers_of_pieces(c); }
int64_t sum_count(const Call& c) { return numbers_of_rows(c); }

void forward(const Call& c, void* stream) {
  if (c.plan.whole) return c.residual != nullptr ? launch<ForwardOfSum>(c, stream) : launch<ForwardOfX>(c, stream);
  c.residual != nullptr ? launch<StatisticsOfSum>(c, stream) : launch<StatisticsOfX>(c, stream);
  launch<Apply>(c, stream);
}

void backward(const Call& c, void* stream) {
  if (c.plan.whole) {
    launch<Backward>(c, stream);
  } else {
    launch<BackwardReduce>(c, stream);
    launch<BackwardApply>(c, stream);
  }
  if (rows_of(c) == 1) return;
  const auto blocks = static_cast<unsigned>(ceil_div(c.channels, kSlots));
  parameters_kernel<<<blocks, dim3(kSlots, kLanes), 0, static_cast<cudaStream_t>(stream)>>>(c);
  check_launch("group_norm_swish");
}

}  // namespace cuda
}  // namespace group_norm_swish
}  // namespace lsgm
