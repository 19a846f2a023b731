// CUDA kernels of mixed_score: thin shells around what threads.h says each thread does. No torch.
//
// grad_logit is summed in two stages, each in a fixed order and without atomics: a segment's sum by the threads that
// share it, then the sums of all segments by one block per 32 channels.
#include "common/launch.h"
#include "mixed_score/threads.h"

namespace lsgm {
namespace mixed_score {
namespace {

template <class C, class E, class Z, int N>
__global__ void __launch_bounds__(kThreads) forward_planes_kernel(const Problem p, const int lanes) {
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t step = int64_t(gridDim.x) * kThreads / lanes;
  for (int64_t s = thread / lanes; s < p.segments.count; s += step) {
    forward_plane<C, E, Z, N>(p, s, threadIdx.x % lanes, lanes);
  }
}

template <class C, class E, class Z, int N>
__global__ void __launch_bounds__(kThreads) forward_rows_kernel(const Problem p, const Launch l) {
  const auto column = column_of<C, N>(p, l, blockIdx.y, threadIdx.x);
  for (int64_t s = blockIdx.x; s < p.segments.count; s += gridDim.x) forward_rows<C, E, Z, N>(p, l, s, column);
}

template <class C, class E, class Z, int N>
__global__ void __launch_bounds__(kThreads) backward_planes_kernel(const Problem p, const int lanes) {
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t step = int64_t(gridDim.x) * kThreads / lanes;
  const int lane = threadIdx.x % lanes;
  // The whole warp stays in the loop, since all of it takes part in the shuffles.
  const int offset = (threadIdx.x % kWarp) / lanes;
  for (int64_t base = (thread - threadIdx.x % kWarp) / lanes; base < p.segments.count; base += step) {
    const int64_t s = base + offset;
    const bool active = s < p.segments.count;
    C total = active ? backward_plane<C, E, Z, N>(p, s, lane, lanes) : C(0);
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      total += __shfl_xor_sync(0xffffffffu, total, distance);
    }
    if (active && lane == 0) p.partials[plane_partial(p, plane_at(p, s))] = static_cast<double>(total);
  }
}

template <class C, class E, class Z, int N>
__global__ void __launch_bounds__(kThreads, 2) backward_rows_kernel(const Problem p, const Launch l) {
  __shared__ C shared[N][kThreads];
  const auto column = column_of<C, N>(p, l, blockIdx.y, threadIdx.x);
  for (int64_t s = blockIdx.x; s < p.segments.count; s += gridDim.x) {
    C sums[N];
    backward_rows<C, E, Z, N>(p, l, s, column, sums);
    for (int k = 0; k < N; ++k) shared[k][threadIdx.x] = sums[k];
    __syncthreads();
    if (column.place.active && column.place.line == 0) {
      for (int k = 0; k < N; ++k) {
        double total = 0;
        for (int line = 0; line < l.lines; ++line) {
          total += static_cast<double>(shared[k][line * l.columns + threadIdx.x]);
        }
        p.partials[row_partial(p, s, column.place.channel + k)] = total;
      }
    }
    __syncthreads();
  }
}

constexpr int kFinishChannels = 32;
constexpr int kFinishRows = 32;

__global__ void __launch_bounds__(kFinishChannels* kFinishRows) finish_kernel(const Problem p, const int64_t rows) {
  __shared__ double shared[kFinishRows][kFinishChannels];
  const int64_t channel = int64_t(blockIdx.x) * kFinishChannels + threadIdx.x;
  double total = 0;
  if (channel < p.channels) {
    for (int64_t row = threadIdx.y; row < rows; row += kFinishRows) total += p.partials[row * p.channels + channel];
  }
  shared[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y != 0 || channel >= p.channels) return;
  for (int row = 1; row < kFinishRows; ++row) total += shared[row][threadIdx.x];
  store_logit_gradient(p, channel, total);
}

struct Forward {
  template <class C, class E, class Z, int N>
  static void run(const Problem& p, cudaStream_t stream) {
    const Launch l = launch_of(p, N);
    const dim3 grid(static_cast<unsigned>(l.blocks), static_cast<unsigned>(l.channel_tiles));
    if (p.order == Order::planes) {
      forward_planes_kernel<C, E, Z, N><<<grid, kThreads, 0, stream>>>(p, l.lanes);
    } else {
      forward_rows_kernel<C, E, Z, N><<<grid, kThreads, 0, stream>>>(p, l);
    }
    check_launch("mixed_score");
  }
};

struct Backward {
  template <class C, class E, class Z, int N>
  static void run(const Problem& p, cudaStream_t stream) {
    const Launch l = launch_of(p, N);
    const dim3 grid(static_cast<unsigned>(l.blocks), static_cast<unsigned>(l.channel_tiles));
    if (p.order == Order::planes) {
      backward_planes_kernel<C, E, Z, N><<<grid, kThreads, 0, stream>>>(p, l.lanes);
    } else {
      backward_rows_kernel<C, E, Z, N><<<grid, kThreads, 0, stream>>>(p, l);
    }
    check_launch("mixed_score_backward");
  }
};

}  // namespace

namespace cuda {

void plan(Problem& p) { make_plan(p); }

void forward(const Problem& p, void* stream) { run_kernel<Forward>(p, static_cast<cudaStream_t>(stream)); }

void backward(const Problem& p, void* stream) {
  run_kernel<Backward>(p, static_cast<cudaStream_t>(stream));
  const auto blocks = static_cast<unsigned>(ceil_div(p.channels, kFinishChannels));
  finish_kernel<<<blocks, dim3(kFinishChannels, kFinishRows), 0, static_cast<cudaStream_t>(stream)>>>(
      p, partial_rows(p));
  check_launch("mixed_score_backward");
}

}  // namespace cuda

}  // namespace mixed_score
}  // namespace lsgm
