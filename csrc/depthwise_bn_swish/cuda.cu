// CUDA kernels of depthwise_bn_swish: thin shells around what threads.h says each thread does. No torch.
//
// No atomics: every sum is taken in a fixed order, that of a thread, of the strips of a block, and of chunks.
#include <type_traits>

#include "common/launch.h"
#include "depthwise_bn_swish/threads.h"

namespace lsgm {
namespace depthwise_bn_swish {
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

struct Stride1 {
  static constexpr int stride = 1;
};
struct Stride2 {
  static constexpr int stride = 2;
};

// The 2 in the bounds: left to itself ptxas aims at more blocks per multiprocessor, and spills for it.
template <class S, class T, class L, int N>
__global__ void __launch_bounds__(kThreads, 2) convolve_kernel(const Problem p, const Launch l) {
  constexpr Order O = L::order;
  extern __shared__ __align__(16) float shared[];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t block = blockIdx.x, tile = block / l.channel_tiles;
  const Tile t = tile_at(l, tile, block - tile * l.channel_tiles);
  const Window source = source_of(p, l, Kind::convolve, t);
  stage<T, O, N, true>(p, source, p.x, thread, l.threads, shared);
  const Place place = place_of<O>(l, thread);
  float weights[kTaps];
  load_weights<T>(p, l, place.active ? t.channel + place.channel : p.channels, weights);
  __syncthreads();
  Strip y;
  if (place.active) convolve<O, S::stride>(source, place, shared, weights, y);
  __syncthreads();
  const Window result = window_of(t, l, p.out_height, p.out_width);
  if (place.active) put<O>(result, place, y, shared);
  __syncthreads();
  flush<T, O, N, true>(p, result, p.out, thread, l.threads, shared);
}

template <class T, class L, int N>
__global__ void __launch_bounds__(kThreads, 2) spread_kernel(const Problem p, const Launch l) {
  constexpr Order O = L::order;
  extern __shared__ __align__(16) float shared[];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t block = blockIdx.x, tile = block / l.channel_tiles;
  const Tile t = tile_at(l, tile, block - tile * l.channel_tiles);
  const Window source = source_of(p, l, Kind::spread, t);
  stage<T, O, N, false>(p, source, p.grad, thread, l.threads, shared);
  const Place place = place_of<O>(l, thread);
  float weights[kTaps];
  load_weights<T>(p, l, place.active ? t.channel + place.channel : p.channels, weights);
  __syncthreads();
  Strip y;
  if (place.active) spread<O>(source, place, shared, weights, y);
  __syncthreads();
  const Window result = window_of(t, l, p.height, p.width);
  if (place.active) put<O>(result, place, y, shared);
  __syncthreads();
  flush<T, O, N, false>(p, result, p.grad_x, thread, l.threads, shared);
}

// One block for each multiprocessor in the bounds: 25 sums and the staging of 8 halves need the registers.
template <class S, class T, class L, int N>
__global__ void __launch_bounds__(kThreads, 1) weight_gradient_kernel(const Problem p, const Launch l) {
  constexpr Order O = L::order;
  extern __shared__ __align__(16) float shared[];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t block = blockIdx.x, chunk = block / l.channel_tiles, channel_tile = block - chunk * l.channel_tiles;
  const Place place = place_of<O>(l, thread);
  float* of_grad = shared + in_floats(l);
  float sums[kTaps] = {};
  const int64_t end = smaller(l.tiles, (chunk + 1) * l.per_chunk);
  for (int64_t i = chunk * l.per_chunk; i < end; ++i) {
    const Tile t = tile_at(l, i, channel_tile);
    const Window source = source_of(p, l, Kind::weights, t), grad = window_of(t, l, p.out_height, p.out_width);
    stage<T, O, N, false>(p, source, p.x, thread, l.threads, shared);
    stage<T, O, N, false>(p, grad, p.grad, thread, l.threads, of_grad);
    __syncthreads();
    if (place.active) add_products<O, S::stride>(source, grad, place, shared, of_grad, sums);
    __syncthreads();
  }
  put_sums(l, thread, sums, shared);
  for (int left = l.strips; left > 1;) {
    const int half = (left + 1) / 2;
    __syncthreads();
    fold<O>(l, place, thread, half, left, shared);
    left = half;
  }
  __syncthreads();
  store_sums<O>(p, l, tile_at(l, 0, channel_tile), chunk, thread, shared);
}

__global__ void __launch_bounds__(kThreads) combine_kernel(const Problem p, const int64_t chunks) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < p.channels * kTaps) combine(p, chunks, i);
}

struct Where {
  Launch launch;
  cudaStream_t stream;
};

// Calls kernel<<<...>>> as `where` says.
template <class F>
void start(const Problem& p, const Where& where, F kernel) {
  const Launch& l = where.launch;
  const auto shared = static_cast<size_t>(l.shared) * sizeof(float);
  kernel<<<static_cast<unsigned>(l.blocks), static_cast<unsigned>(l.threads), shared, where.stream>>>(p, l);
  check_launch("depthwise_bn_swish");
}

struct Convolve {
  template <class T, Order O, int N>
  static void run(const Problem& p, const Where& where) {
    if (p.stride == 1) {
      start(p, where, &convolve_kernel<Stride1, T, Lay<O>, N>);
    } else {
      start(p, where, &convolve_kernel<Stride2, T, Lay<O>, N>);
    }
  }
};

struct Spread {
  template <class T, Order O, int N>
  static void run(const Problem& p, const Where& where) {
    start(p, where, &spread_kernel<T, Lay<O>, N>);
  }
};

struct WeightGradient {
  template <class T, Order O, int N>
  static void run(const Problem& p, const Where& where) {
    if (p.stride == 1) {
      start(p, where, &weight_gradient_kernel<Stride1, T, Lay<O>, N>);
    } else {
      start(p, where, &weight_gradient_kernel<Stride2, T, Lay<O>, N>);
    }
  }
};

}  // namespace

namespace cuda {

int64_t partial_count(const Problem& p) { return partial_count_of(p); }

void forward(const Problem& p, void* stream) {
  run_kernel<Convolve>(p, Where{launch_of(p, Kind::convolve), static_cast<cudaStream_t>(stream)});
}

void backward(const Problem& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (p.stride == 1) {
    const Problem turned = turned_around(p);
    Launch l = launch_of(turned, Kind::convolve);
    l.turned = true;
    run_kernel<Convolve>(turned, Where{l, s});
  } else {
    run_kernel<Spread>(p, Where{launch_of(p, Kind::spread), s});
  }
  const Launch l = launch_of(p, Kind::weights);
  run_kernel<WeightGradient>(p, Where{l, s});
  combine_kernel<<<static_cast<unsigned>(ceil_div(p.channels * kTaps, kThreads)), kThreads, 0, s>>>(p, l.chunks);
  check_launch("depthwise_bn_swish");
}

}  // namespace cuda

}  // namespace depthwise_bn_swish
}  // namespace lsgm
