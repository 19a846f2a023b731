// CUDA kernel of residual_add: a thin shell around what threads.h says each thread does. No torch.
#include "common/launch.h"
#include "residual_add/threads.h"

namespace lsgm {
namespace residual_add {
namespace {

template <class T, bool kSum, int N>
__global__ void __launch_bounds__(kThreads) combine_kernel(const Problem p) {
  combine<T, kSum, N>(p, int64_t(blockIdx.x) * kThreads + threadIdx.x);
}

struct Launch {
  template <class T, bool kSum, int N>
  static void run(const Problem& p, cudaStream_t stream) {
    combine_kernel<T, kSum, N><<<static_cast<unsigned>(blocks_of(p, N)), kThreads, 0, stream>>>(p);
    check_launch("residual_add");
  }
};

}  // namespace

namespace cuda {

void run(const Problem& p, void* stream) { run_kernel<Launch>(p, static_cast<cudaStream_t>(stream)); }

}  // namespace cuda

}  // namespace residual_add
}  // namespace lsgm
