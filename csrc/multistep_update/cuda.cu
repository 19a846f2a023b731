// CUDA kernel of multistep_update: a thin shell around what threads.h says each thread does. No torch.
#include "common/launch.h"
#include "multistep_update/threads.h"

namespace lsgm {
namespace multistep_update {
namespace {

// The 2: left to itself ptxas aims at four blocks per multiprocessor, and spills for it.
template <class C, class Y, class H, class V, int N>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(const Problem p, const Launch l) {
  const int64_t vector = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t step = int64_t(gridDim.y) * blockDim.y;
  for (int64_t group = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; group < l.groups; group += step) {
    combine<C, Y, H, V, N>(p, l, group, vector);
  }
}

struct Forward {
  template <class C, class Y, class H, class V, int N>
  static void run(const Problem& p, cudaStream_t stream) {
    const Launch l = launch_of(p, N);
    const dim3 grid(static_cast<unsigned>(l.blocks_x), static_cast<unsigned>(l.blocks_y));
    const dim3 block(static_cast<unsigned>(l.columns), static_cast<unsigned>(l.lines));
    forward_kernel<C, Y, H, V, N><<<grid, block, 0, stream>>>(p, l);
    check_launch("multistep_update");
  }
};

}  // namespace

namespace cuda {

void forward(const Problem& p, void* stream) { run_kernel<Forward>(p, static_cast<cudaStream_t>(stream)); }

}  // namespace cuda

}  // namespace multistep_update
}  // namespace lsgm
