// CUDA kernels of bn_swish: thin shells around what threads.h says each thread does, and the sums across threads. No
// torch.
//
// Every sum is taken in a fixed order and without atomics: of a thread, of the threads of a block, and of the chunks of
// a channel by 32 threads.
#include <type_traits>

#include "bn_swish/threads.h"
#include "common/launch.h"

namespace lsgm {
namespace bn_swish {
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

struct ReduceMode {
  static constexpr Mode mode = Mode::reduce;
};
struct ApplyMode {
  static constexpr Mode mode = Mode::apply;
};
struct BothMode {
  static constexpr Mode mode = Mode::both;
};

// Sums over the lines of a block, which every thread of the column gets. `shared`: M numbers per thread.
template <int M>
__device__ void over_lines(float (&values)[M], int lines, int columns, float* shared) {
  const int thread = static_cast<int>(threadIdx.x), line = thread / columns;
  LSGM_UNROLL
  for (int m = 0; m < M; ++m) shared[m * kThreads + thread] = values[m];
  for (int left = lines; left > 1;) {
    const int half = (left + 1) / 2;
    __syncthreads();
    if (line + half < left) {
      LSGM_UNROLL
      for (int m = 0; m < M; ++m) {
        values[m] += shared[m * kThreads + thread + half * columns];
        shared[m * kThreads + thread] = values[m];
      }
    }
    left = half;
  }
  __syncthreads();
  LSGM_UNROLL
  for (int m = 0; m < M; ++m) values[m] = shared[m * kThreads + thread - line * columns];
  __syncthreads();
}

// The same over all that one channel has in the block: all threads of planes, a column of rows.
template <Order O, int M>
__device__ void over_channel(float (&values)[M], const Launch& l, float* shared) {
  if (O == Order::planes) {
    over_lines(values, kThreads, 1, shared);
  } else {
    over_lines(values, l.lines, l.columns, shared);
  }
}

template <Order O, int K>
__device__ void over_channel(Differences<K>& d, const Launch& l, float* shared) {
  float values[2 * K];
  LSGM_UNROLL
  for (int k = 0; k < K; ++k) {
    values[k] = d.first[k];
    values[K + k] = d.second[k];
  }
  over_channel<O>(values, l, shared);
  LSGM_UNROLL
  for (int k = 0; k < K; ++k) {
    d.first[k] = values[k];
    d.second[k] = values[K + k];
  }
}

// Whether the thread stores what its channels' sums are.
template <Order O>
__device__ bool leads(const Place& place) {
  return place.active && place.line == 0 && (O == Order::rows || place.column == 0);
}

// What only the threads that lead get.
template <class T, Order O, int N>
__device__ void chunk_moments(const Problem& p, const Launch& l, const Place& place, float* shared,
    Moments (&moments)[channels_of<O, N>()]) {
  constexpr int K = channels_of<O, N>();
  Walk w = walk_of<O, N>(p, l, place);
  Batch<N> b;
  take<T, O, N, false>(p, w, b);
  float pivot[K], values[K + 1];
  add_up<O, N>(b, pivot);
  LSGM_UNROLL
  for (int k = 0; k < K; ++k) values[k] = pivot[k];
  values[K] = static_cast<float>(b.count * (N / K));
  over_channel<O>(values, l, shared);
  LSGM_UNROLL
  for (int k = 0; k < K; ++k) pivot[k] = values[k] / values[K];
  Differences<K> d;
  differences<T, O, N>(p, w, b, pivot, d);
  over_channel<O>(d, l, shared);
  if (!leads<O>(place)) return;
  const double n = static_cast<double>(chunk_elements(p, place.chunk));
  LSGM_UNROLL
  for (int k = 0; k < K; ++k) moments[k] = moments_of(pivot[k], d.first[k], d.second[k], n);
}

// The 2, and the 1 further down: left to itself ptxas aims at more blocks per multiprocessor, and spills for it.
template <class T, class L, int N>
__global__ void __launch_bounds__(kThreads, 2) statistics_kernel(const Problem p, const Launch l) {
  constexpr Order O = L::order;
  constexpr int K = channels_of<O, N>();
  __shared__ float shared[2 * K * kThreads];
  const Place place = place_of<O, N>(p, l, blockIdx.x, threadIdx.x);
  Moments moments[K];
  chunk_moments<T, O, N>(p, l, place, shared, moments);
  if (!leads<O>(place)) return;
  double mean[K], m2[K];
  LSGM_UNROLL
  for (int k = 0; k < K; ++k) {
    mean[k] = moments[k].mean;
    m2[k] = moments[k].m2;
  }
  store_partials<O, K>(p, place, mean, m2);
}

template <class T, class L, int N>
__global__ void __launch_bounds__(kThreads, 2) apply_kernel(const Problem p, const Launch l) {
  constexpr Order O = L::order;
  constexpr int K = channels_of<O, N>();
  const Place place = place_of<O, N>(p, l, blockIdx.x, threadIdx.x);
  const Constants<K> c =
      p.batch_stats ? constants_of<K>(p, place) : running_constants<K>(p, place, leads<O>(place) && place.chunk == 0);
  apply_chunk<T, O, N>(p, walk_of<O, N>(p, l, place), c);
}

// Statistics and apply of whole channels; x is read again from the cache.
template <class T, class L, int N>
__global__ void __launch_bounds__(kThreads, 2) channel_forward_kernel(const Problem p, const Launch l) {
  constexpr Order O = L::order;
  constexpr int K = channels_of<O, N>();
  __shared__ float shared[2 * K * kThreads];
  const Place place = place_of<O, N>(p, l, blockIdx.x, threadIdx.x);
  Moments moments[K];
  chunk_moments<T, O, N>(p, l, place, shared, moments);
  if (leads<O>(place)) {
    LSGM_UNROLL
    for (int k = 0; k < K; ++k) store_moments(p, place.channel + k, moments[k]);
  }
  __syncthreads();  // the block's other threads read them
  apply_chunk<T, O, N>(p, walk_of<O, N>(p, l, place), constants_of<K>(p, place));
}

template <class M, class T, class L, int N>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(const Problem p, const Launch l) {
  constexpr Mode kMode = M::mode;
  constexpr Order O = L::order;
  constexpr int K = channels_of<O, N>();
  const Place place = place_of<O, N>(p, l, blockIdx.x, threadIdx.x);
  Constants<K> c = constants_of<K>(p, place);
  if (kMode == Mode::apply) correct(p, place, c);
  Differences<K> sums;
  backward_chunk<kMode, T, O, N>(p, walk_of<O, N>(p, l, place), c, sums);
  if constexpr (kMode != Mode::apply) {
    __shared__ float shared[2 * K * kThreads];
    over_channel<O>(sums, l, shared);
    if (!leads<O>(place)) return;
    double one[K], two[K];
    LSGM_UNROLL
    for (int k = 0; k < K; ++k) {
      one[k] = static_cast<double>(sums.first[k]);
      two[k] = static_cast<double>(sums.second[k]);
    }
    store_partials<O, K>(p, place, one, two);
  }
}

// Reduce and apply of whole channels.
template <class T, class L, int N>
__global__ void __launch_bounds__(kThreads, 2) channel_backward_kernel(const Problem p, const Launch l) {
  constexpr Order O = L::order;
  constexpr int K = channels_of<O, N>();
  __shared__ float shared[2 * K * kThreads];
  const Place place = place_of<O, N>(p, l, blockIdx.x, threadIdx.x);
  Constants<K> c = constants_of<K>(p, place);
  Differences<K> sums;
  backward_chunk<Mode::reduce, T, O, N>(p, walk_of<O, N>(p, l, place), c, sums);
  over_channel<O>(sums, l, shared);
  if (leads<O>(place)) {
    LSGM_UNROLL
    for (int k = 0; k < K; ++k) {
      store_sums(p, place.channel + k, {static_cast<double>(sums.first[k]), static_cast<double>(sums.second[k])});
    }
  }
  __syncthreads();
  correct(p, place, c);
  backward_chunk<Mode::apply, T, O, N>(p, walk_of<O, N>(p, l, place), c, sums);
}

// Combining chunks: kLanes threads for each of kSlots channels, neighbours in memory in either order.
constexpr int kSlots = 8;

struct Combining {
  int64_t channel;
  int lane, slot;
};

__device__ Combining combining(const Problem& p) {
  Combining c;
  c.lane = static_cast<int>(p.order == Order::planes ? threadIdx.x : threadIdx.y);
  c.slot = static_cast<int>(p.order == Order::planes ? threadIdx.y : threadIdx.x);
  c.channel = int64_t(blockIdx.x) * kSlots + c.slot;
  return c;
}

__device__ double over_lanes(double value, const Combining& c, double (&shared)[kLanes][kSlots + 1]) {
  shared[c.lane][c.slot] = value;
  for (int half = kLanes / 2; half > 0; half /= 2) {
    __syncthreads();
    if (c.lane < half) shared[c.lane][c.slot] += shared[c.lane + half][c.slot];
  }
  __syncthreads();
  const double total = shared[0][c.slot];
  __syncthreads();
  return total;
}

__global__ void __launch_bounds__(kLanes* kSlots, 1) moments_kernel(const Problem p) {
  __shared__ double shared[kLanes][kSlots + 1];
  const Combining c = combining(p);
  const bool exists = c.channel < p.channels;
  Moments m;
  m.mean = over_lanes(exists ? mean_part(p, c.channel, c.lane) : 0, c, shared);
  m.m2 = over_lanes(exists ? m2_part(p, c.channel, c.lane, m.mean) : 0, c, shared);
  if (exists && c.lane == 0) store_moments(p, c.channel, m);
}

__global__ void __launch_bounds__(kLanes* kSlots, 1) sums_kernel(const Problem p) {
  __shared__ double shared[kLanes][kSlots + 1];
  const Combining c = combining(p);
  const bool exists = c.channel < p.channels;
  Sums sums;
  sums.grad = over_lanes(exists ? sum_part(p, c.channel, c.lane, 0) : 0, c, shared);
  sums.centred = over_lanes(exists ? sum_part(p, c.channel, c.lane, 1) : 0, c, shared);
  if (exists && c.lane == 0) store_sums(p, c.channel, sums);
}

#define LSGM_BN_SWISH_LAUNCH(Name, kernel, ...)                                             \
  struct Name {                                                                             \
    template <class T, Order O, int N>                                                      \
    static void run(const Problem& p, cudaStream_t stream) {                                \
      const Launch l = launch_of(p);                                                        \
      kernel<__VA_ARGS__><<<static_cast<unsigned>(l.blocks), kThreads, 0, stream>>>(p, l);  \
      check_launch("bn_swish");                                                             \
    }                                                                                       \
  };
LSGM_BN_SWISH_LAUNCH(Statistics, statistics_kernel, T, Lay<O>, N)
LSGM_BN_SWISH_LAUNCH(Apply, apply_kernel, T, Lay<O>, N)
LSGM_BN_SWISH_LAUNCH(ChannelForward, channel_forward_kernel, T, Lay<O>, N)
LSGM_BN_SWISH_LAUNCH(BackwardReduce, backward_kernel, ReduceMode, T, Lay<O>, N)
LSGM_BN_SWISH_LAUNCH(BackwardApply, backward_kernel, ApplyMode, T, Lay<O>, N)
LSGM_BN_SWISH_LAUNCH(BackwardBoth, backward_kernel, BothMode, T, Lay<O>, N)
LSGM_BN_SWISH_LAUNCH(ChannelBackward, channel_backward_kernel, T, Lay<O>, N)
#undef LSGM_BN_SWISH_LAUNCH

template <class Kernel>
void launch(const Problem& p, void* stream) {
  run_kernel<Kernel>(p, static_cast<cudaStream_t>(stream));
}

void combine(const Problem& p, void* stream, void (*kernel)(Problem)) {
  const auto blocks = static_cast<unsigned>(ceil_div(p.channels, kSlots));
  const dim3 threads = p.order == Order::planes ? dim3(kLanes, kSlots) : dim3(kSlots, kLanes);
  kernel<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  check_launch("bn_swish");
}

}  // namespace

namespace cuda {

void plan(Problem& p) { make_plan(p); }

void statistics(const Problem& p, void* stream) {
  launch<Statistics>(p, stream);
  combine(p, stream, &moments_kernel);
}

void apply(const Problem& p, void* stream) { launch<Apply>(p, stream); }

void forward(const Problem& p, void* stream) {
  if (one_launch(p)) return launch<ChannelForward>(p, stream);
  if (p.batch_stats) statistics(p, stream);
  apply(p, stream);
}

void backward_reduce(const Problem& p, void* stream) {
  launch<BackwardReduce>(p, stream);
  combine(p, stream, &sums_kernel);
}

void backward_apply(const Problem& p, void* stream) { launch<BackwardApply>(p, stream); }

void backward_both(const Problem& p, void* stream) {
  launch<BackwardBoth>(p, stream);
  combine(p, stream, &sums_kernel);
}

void backward(const Problem& p, void* stream) {
  if (one_launch(p)) return launch<ChannelBackward>(p, stream);
  if (!p.batch_stats) return backward_both(p, stream);
  backward_reduce(p, stream);
  backward_apply(p, stream);
}

}  // namespace cuda

}  // namespace bn_swish
}  // namespace lsgm
