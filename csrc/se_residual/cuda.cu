// CUDA kernels of se_residual: thin shells around what threads.h says each thread does. No torch.
//
// Forward is a sum per channel, the gate (one block per sample) and the result; backward the sums of g x, the gate's
// gradients, grad_x, and the gradients of the parameters. Small samples are summed by the gate's block. Sums are in a
// fixed order, without atomics.
#include "common/launch.h"
#include "se_residual/threads.h"

namespace lsgm {
namespace se_residual {
namespace {

__device__ float warp_sum(float x, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

// The sums of a sample's segments, by `blocks` blocks of which this is number `block`.
template <bool kProduct, class T, int N>
__device__ void reduce_planes(const Problem& p, const Launch& l, int64_t sample, int64_t block, int64_t blocks) {
  const int lanes = 1 << l.lane_bits, lane = threadIdx.x & (lanes - 1);
  const int offset = (threadIdx.x % kWarp) >> l.lane_bits;
  const int64_t count = p.channels * p.pieces, step = (blocks * kThreads) >> l.lane_bits;
  // The whole warp stays in the loop, since all of it takes part in the shuffles.
  int64_t base = (block * kThreads + threadIdx.x - threadIdx.x % kWarp) >> l.lane_bits;
  for (; base < count; base += step) {
    const bool active = base + offset < count;
    const Piece piece = plane_piece(p, sample, active ? base + offset : 0);
    const float total = warp_sum(active ? reduce_plane<kProduct, T, N>(p, piece, lane, lanes) : 0.0f, lanes);
    if (active && lane == 0) {
      p.partials[partial_at(p, sample, piece.piece, piece.channel)] = static_cast<double>(total);
    }
  }
}

template <bool kProduct, class T, int N>
__device__ void reduce_rows_of(
    const Problem& p, const Launch& l, int64_t sample, int64_t tile, int64_t block, int64_t blocks) {
  __shared__ float shared[N][kThreads];
  const Place place = place_of(p, l, tile, threadIdx.x, N);
  for (int64_t piece = block; piece < p.pieces; piece += blocks) {
    float sums[N];
    reduce_rows<kProduct, T, N>(p, l, sample, piece, place, sums);
    for (int k = 0; k < N; ++k) shared[k][threadIdx.x] = sums[k];
    __syncthreads();
    if (place.active && place.line == 0) {
      for (int k = 0; k < N; ++k) {
        double total = 0;
        for (int line = 0; line < l.lines; ++line) {
          total += static_cast<double>(shared[k][line * l.columns + threadIdx.x]);
        }
        p.partials[partial_at(p, sample, piece, place.channel + k)] = total;
      }
    }
    __syncthreads();
  }
}

// N is not the last argument, which would promise wide stores: what is written is a number per segment.
template <int N, class T, bool kProduct>
__global__ void __launch_bounds__(kThreads) reduce_kernel(const Problem p, const Launch l) {
  for (int64_t sample = blockIdx.z; sample < p.batch; sample += gridDim.z) {
    if (p.order == Order::planes) {
      reduce_planes<kProduct, T, N>(p, l, sample, blockIdx.x, gridDim.x);
    } else {
      reduce_rows_of<kProduct, T, N>(p, l, sample, blockIdx.y, blockIdx.x, gridDim.x);
    }
  }
}

template <bool kProduct, class T, int N>
__device__ void reduce_sample(const Problem& p, const Launch& l, int64_t sample) {
  if (p.order == Order::planes) {
    reduce_planes<kProduct, T, N>(p, l, sample, 0, 1);
  } else {
    for (int64_t tile = 0; tile < l.tiles; ++tile) reduce_rows_of<kProduct, T, N>(p, l, sample, tile, 0, 1);
  }
  __syncthreads();  // the block reads the partial sums that it wrote
}

__device__ void gate_of(const Problem& p, int64_t sample) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t c = threadIdx.x; c < p.channels; c += kThreads) pool(p, sample, c);
  __syncthreads();
  for (int64_t r = threadIdx.x / kWarp; r < p.hidden; r += kThreads / kWarp) {
    const float sum = warp_sum(hidden_part(p, sample, r, lane), kWarp);
    if (lane == 0) finish_hidden(p, sample, r, sum);
  }
  __syncthreads();
  for (int64_t c = threadIdx.x; c < p.channels; c += kThreads) gate(p, sample, c);
}

__device__ void gate_backward_of(const Problem& p, int64_t sample) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t c = threadIdx.x; c < p.channels; c += kThreads) gate_delta(p, sample, c);
  __syncthreads();
  for (int64_t r = threadIdx.x / kWarp; r < p.hidden; r += kThreads / kWarp) {
    const float sum = warp_sum(hidden_delta_part(p, sample, r, lane), kWarp);
    if (lane == 0) finish_hidden_delta(p, sample, r, sum);
  }
  __syncthreads();
  for (int64_t c = threadIdx.x; c < p.channels; c += kThreads) pooled_delta(p, sample, c);
}

// One block per sample, as many as the first axis of a grid takes.
template <bool kBackward>
__global__ void __launch_bounds__(kThreads) gate_kernel(const Problem p) {
  kBackward ? gate_backward_of(p, blockIdx.x) : gate_of(p, blockIdx.x);
}

template <int N, class T, bool kBackward>
__global__ void __launch_bounds__(kThreads) reduce_and_gate_kernel(const Problem p, const Launch l) {
  reduce_sample<kBackward, T, N>(p, l, blockIdx.x);
  kBackward ? gate_backward_of(p, blockIdx.x) : gate_of(p, blockIdx.x);
}

template <bool kBackward, class T, int N>
__global__ void __launch_bounds__(kThreads) apply_planes_kernel(const Problem p, const Launch l) {
  const int lanes = 1 << l.lane_bits, lane = threadIdx.x & (lanes - 1);
  const int64_t count = p.channels * p.pieces, step = (int64_t(gridDim.x) * kThreads) >> l.lane_bits;
  for (int64_t sample = blockIdx.z; sample < p.batch; sample += gridDim.z) {
    for (int64_t k = (int64_t(blockIdx.x) * kThreads + threadIdx.x) >> l.lane_bits; k < count; k += step) {
      apply_plane<kBackward, T, N>(p, sample, plane_piece(p, sample, k), lane, lanes);
    }
  }
}

template <bool kBackward, class T, int N>
__global__ void __launch_bounds__(kThreads) apply_rows_kernel(const Problem p, const Launch l) {
  const Place place = place_of(p, l, blockIdx.y, threadIdx.x, N);
  for (int64_t sample = blockIdx.z; sample < p.batch; sample += gridDim.z) {
    for (int64_t piece = blockIdx.x; piece < p.pieces; piece += gridDim.x) {
      apply_rows<kBackward, T, N>(p, l, sample, piece, place);
    }
  }
}

__global__ void __launch_bounds__(kThreads) parameters_kernel(const Problem p) {
  const int64_t count = parameter_count(p), step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step) parameter_gradient(p, i);
}

// The sums, the gate and what is made of it, forward or backward.
template <bool kBackward>
struct Run {
  template <class T, int N>
  static void run(const Problem& p, cudaStream_t stream) {
    const Launch l = launch_of(p, N);
    const dim3 grid(
        static_cast<unsigned>(l.blocks), static_cast<unsigned>(l.tiles), static_cast<unsigned>(l.samples));
    const auto samples = static_cast<unsigned>(p.batch);
    if (is_small(p)) {
      reduce_and_gate_kernel<N, T, kBackward><<<samples, kThreads, 0, stream>>>(p, l);
    } else {
      reduce_kernel<N, T, kBackward><<<grid, kThreads, 0, stream>>>(p, l);
      gate_kernel<kBackward><<<samples, kThreads, 0, stream>>>(p);
    }
    if (p.order == Order::planes) {
      apply_planes_kernel<kBackward, T, N><<<grid, kThreads, 0, stream>>>(p, l);
    } else {
      apply_rows_kernel<kBackward, T, N><<<grid, kThreads, 0, stream>>>(p, l);
    }
    check_launch(kBackward ? "se_residual_backward" : "se_residual");
  }
};

}  // namespace

namespace cuda {

void plan(Problem& p) { make_plan(p); }

void forward(const Problem& p, void* stream) { run_kernel<Run<false>>(p, static_cast<cudaStream_t>(stream)); }

void backward(const Problem& p, void* stream) {
  run_kernel<Run<true>>(p, static_cast<cudaStream_t>(stream));
  const auto blocks = static_cast<unsigned>(smaller(ceil_div(parameter_count(p), kThreads), kMaxBlocks));
  parameters_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  check_launch("se_residual_backward");
}

}  // namespace cuda

}  // namespace se_residual
}  // namespace lsgm
