// CUDA kernels of score_drift: thin shells around what threads.h says each thread does. No torch.
#include "common/launch.h"
#include "score_drift/threads.h"

namespace lsgm {
namespace score_drift {
namespace {

template <class C, class E, class Z, int N>
__global__ void __launch_bounds__(kThreads) forward_planes_kernel(const Problem problem, const int lanes) {
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t step = int64_t(gridDim.x) * kThreads / lanes;
  for (int64_t s = thread / lanes; s < problem.segments.count; s += step) {
    forward_plane<C, E, Z, N>(problem, s, threadIdx.x % lanes, lanes);
  }
}

template <class C, class E, class Z, int N>
__global__ void __launch_bounds__(kThreads) forward_rows_kernel(const Problem problem, const Launch l) {
  const auto column = column_of<C, N>(problem, l, blockIdx.y, threadIdx.x);
  for (int64_t s = blockIdx.x; s < problem.segments.count; s += gridDim.x) {
    forward_rows<C, E, Z, N>(problem, l, s, column);
  }
}

struct Forward {
  template <class C, class E, class Z, int N>
  static void run(const Problem& problem, cudaStream_t stream) {
    const Launch l = launch_of(problem, N);
    const dim3 grid(static_cast<unsigned>(l.blocks), static_cast<unsigned>(l.channel_tiles));
    if (problem.order == Order::planes) {
      forward_planes_kernel<C, E, Z, N><<<grid, kThreads, 0, stream>>>(problem, l.lanes);
    } else {
      forward_rows_kernel<C, E, Z, N><<<grid, kThreads, 0, stream>>>(problem, l);
    }
    check_launch("score_drift");
  }
};

}  // namespace

namespace cuda {

void plan(Problem& problem) { make_plan(problem); }

void forward(const Problem& problem, void* stream) {
  run_kernel<Forward>(problem, static_cast<cudaStream_t>(stream));
}

}  // namespace cuda

}  // namespace score_drift
}  // namespace lsgm
