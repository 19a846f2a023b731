// The CUDA kernel of residual_add, thread by thread on the CPU: what threads.h computes is what the GPU computes. The
// loop below stands for the grid.
#include "residual_add/threads.h"
#include "tests/residual_add_problem.h"

namespace {

using namespace lsgm;
using namespace lsgm::residual_add;
using lsgm::testing::Example;
using lsgm::testing::ResidualAdd;

struct Threads {
  template <class T, bool kSum, int N>
  static void run(const Problem& p, int* width) {
    CHECK(kSum == (p.h != nullptr));
    *width = N;
    // From the last one down: no thread may need what another one has done.
    for (int64_t i = blocks_of(p, N) * kThreads - 1; i >= 0; --i) combine<T, kSum, N>(p, i);
  }
};

CASE("every thread of a CUDA launch") {
  for (const Example& example : lsgm::testing::examples()) {
    ResidualAdd r(example);
    int width = 0;
    run_kernel<Threads, int*>(r.p, &width);
    r.check("threads");
    CHECK(width == (example.offset == 0 ? 16 / size_of(example.dtype) : 1)) << width;
  }
}

CASE("vectors only where every access is aligned") {
  for (int i = 0; i < 3; ++i) {
    ResidualAdd r({5, DType::float32, true, 0});
    CHECK(can_vectorize(r.p));
    if (i == 0) r.p.x = static_cast<const float*>(r.p.x) + 1;
    if (i == 1) r.p.h = static_cast<const float*>(r.p.h) + 1;
    if (i == 2) r.p.out = static_cast<float*>(r.p.out) + 1;
    CHECK(!can_vectorize(r.p)) << i;
  }
}

// Sizes no test machine can hold: the limits of a grid.
CASE("launches beyond 2^31 elements") {
  Problem p{};
  p.count = (int64_t(1) << 36) + 1;
  for (int64_t width : {1, 8}) {
    const int64_t blocks = blocks_of(p, width);
    CHECK(blocks < int64_t(1) << 31 && blocks * width * kThreads >= p.count);
  }
}

}  // namespace
