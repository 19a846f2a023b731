// CUDA kernel of philox_normal: a thin shell around what threads.h says each thread does. No torch.
#include "common/launch.h"
#include "philox_normal/threads.h"

namespace lsgm {
namespace philox_normal {
namespace {

template <class T, int N>
__global__ void __launch_bounds__(kThreads) generate_kernel(const Problem p, const Launch l) {
  make_normals<T, N>(p, l, blockIdx.x, blockIdx.y, threadIdx.x);
}

struct Forward {
  template <class T, int N>
  static void run(const Problem& p, cudaStream_t stream) {
    const Launch l = launch_of(p, N);
    const dim3 grid(static_cast<unsigned>(l.columns), static_cast<unsigned>(l.row_blocks));
    generate_kernel<T, N><<<grid, kThreads, 0, stream>>>(p, l);
    check_launch("philox_normal");
  }
};

}  // namespace

namespace cuda {

void forward(const Problem& p, void* stream) { run_kernel<Forward>(p, static_cast<cudaStream_t>(stream)); }

}  // namespace cuda

}  // namespace philox_normal
}  // namespace lsgm
