// CUDA kernels of fir_resample: thin shells around what threads.h says each thread does. No torch.
#include <type_traits>

#include "common/launch.h"
#include "fir_resample/threads.h"

namespace lsgm {
namespace fir_resample {
namespace {

// What the kernels' template arguments are called in the compiler's reports.
struct Planes {
  static constexpr Order order = Order::planes;
};
struct Rows {
  static constexpr Order order = Order::rows;
};
struct Up {
  static constexpr bool up = true;
};
struct Down {
  static constexpr bool up = false;
};
struct Filter {
  static constexpr bool fir = true;
};
struct Plain {
  static constexpr bool fir = false;
};

template <class Way, class Taps, class T, class L, int N>
__global__ void __launch_bounds__(kThreads) resample_kernel(const Problem p, const Launch l) {
  resample<Way::up, Taps::fir, T, L::order, N>(p, l, blockIdx.x, static_cast<int>(threadIdx.x));
}

struct Resample {
  template <bool kUp, bool kFir, class T, Order O, int N>
  static void run(const Problem& p, cudaStream_t stream) {
    using Way = std::conditional_t<kUp, Up, Down>;
    using Taps = std::conditional_t<kFir, Filter, Plain>;
    using L = std::conditional_t<O == Order::planes, Planes, Rows>;
    const Launch l = launch_of(p);
    resample_kernel<Way, Taps, T, L, N><<<static_cast<unsigned>(l.blocks), kThreads, 0, stream>>>(p, l);
    check_launch("fir_resample");
  }
};

}  // namespace

namespace cuda {

void run(const Problem& p, void* stream) { run_kernel<Resample>(p, static_cast<cudaStream_t>(stream)); }

}  // namespace cuda

}  // namespace fir_resample
}  // namespace lsgm
