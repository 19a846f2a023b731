// CUDA kernels of the Runge-Kutta family: thin shells around what threads.h says each thread does. No torch.
//
// The norm is summed in two stages, each in a fixed order and without atomics: a segment's sum by the block that
// computes it, then the sums of a sample's, or of all segments by one block.
#include "common/launch.h"
#include "rk/threads.h"

namespace lsgm {
namespace rk {
namespace {

constexpr int64_t kMaxGrid = 1 << 30;
constexpr int kControlThreads = 128;

// The sum over a block of up to 32 warps, in its first thread.
__device__ __forceinline__ double block_sum(double x) {
  __shared__ double sums[kWarp];
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  __syncthreads();  // the sums of the turn before have been read
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = x;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (unsigned warp = 1; warp < blockDim.x / kWarp; ++warp) x += sums[warp];
  }
  return x;
}

// Blocks that a multiprocessor holds at least. Bytes in flight are then plenty, and no more fit without spills: the 16
// bytes of a 16-bit state are eight numbers of the arithmetic.
template <class Z>
constexpr int resident() {
  return sizeof(Z) == 2 ? 5 : 6;
}

template <class Z, class E, int N>
__global__ void __launch_bounds__(kThreads, resident<Z>()) step_kernel(const __grid_constant__ Call<ComputeOf<Z>> c) {
  for (int64_t s = blockIdx.x; s < c.segments.count; s += gridDim.x) {
    step_segment<Z, E, false, N>(c, s, threadIdx.x);
  }
}

template <class Z, class E, int N>
__global__ void __launch_bounds__(kThreads, resident<Z>())
    step_norm_kernel(const __grid_constant__ Call<ComputeOf<Z>> c, double* __restrict__ partials) {
  for (int64_t s = blockIdx.x; s < c.segments.count; s += gridDim.x) {
    const double total = block_sum(step_segment<Z, E, true, N>(c, s, threadIdx.x));
    if (threadIdx.x == 0) partials[s] = total;
  }
}

__global__ void __launch_bounds__(kMaxSumThreads) norm_kernel(const __grid_constant__ Problem p) {
  for (int64_t run = blockIdx.x; run < p.segments.outer; run += gridDim.x) {
    const double total = block_sum(partial_sums(p, run, threadIdx.x, blockDim.x));
    if (threadIdx.x == 0) store_norm(p, run, total);
  }
}

__global__ void __launch_bounds__(kControlThreads) control_kernel(const __grid_constant__ Control c) {
  const int64_t step = int64_t(gridDim.x) * kControlThreads;
  for (int64_t i = int64_t(blockIdx.x) * kControlThreads + threadIdx.x; i < c.count; i += step) advance(c, i);
}

unsigned grid_of(int64_t blocks) { return static_cast<unsigned>(smaller(blocks, kMaxGrid)); }

struct Step {
  template <class Z, class E, bool kNorm, int N>
  static void run(const Problem& p, cudaStream_t stream) {
    const auto call = call_of<ComputeOf<Z>>(p);
    const unsigned grid = grid_of(p.segments.count);
    if constexpr (kNorm) {
      step_norm_kernel<Z, E, N><<<grid, kThreads, 0, stream>>>(call, p.partials);
    } else {
      step_kernel<Z, E, N><<<grid, kThreads, 0, stream>>>(call);
    }
    check_launch("rk");
  }
};

}  // namespace

namespace cuda {

void plan(Problem& p) { make_plan(p); }

void step(const Problem& p, void* stream) {
  run_kernel<Step>(p, static_cast<cudaStream_t>(stream));
  if (p.norm == nullptr) return;
  norm_kernel<<<grid_of(p.segments.outer), sum_threads(p), 0, static_cast<cudaStream_t>(stream)>>>(p);
  check_launch("rk norm");
}

void control(const Control& c, void* stream) {
  const unsigned grid = grid_of(ceil_div(c.count, kControlThreads));
  control_kernel<<<grid, kControlThreads, 0, static_cast<cudaStream_t>(stream)>>>(c);
  check_launch("rk_control");
}

}  // namespace cuda

}  // namespace rk
}  // namespace lsgm
