// The CUDA kernel of philox_normal, thread by thread on the CPU: what threads.h computes is what the GPU computes. The
// loops below stand for the grid.
#include "philox_normal/threads.h"
#include "tests/philox_normal_problem.h"

namespace {

using namespace lsgm;
using namespace lsgm::philox_normal;
using lsgm::testing::NormalExample;
using lsgm::testing::PhiloxNormal;

struct Forward {
  template <class T, int N>
  static void run(const Problem& p, int64_t max_rows) {
    Launch l = launch_of(p, N);
    l.row_blocks = smaller(l.row_blocks, max_rows);
    for (int64_t row = 0; row < l.row_blocks; ++row) {
      for (int64_t column = 0; column < l.columns; ++column) {
        for (int thread = 0; thread < kThreads; ++thread) make_normals<T, N>(p, l, column, row, thread);
      }
    }
  }
};

CASE("every thread of a CUDA launch") {
  for (const NormalExample& example : lsgm::testing::normal_examples()) {
    for (int64_t max_rows : {kMaxRows, int64_t(1)}) {  // without and with a loop over samples
      PhiloxNormal m(example);
      run_kernel<Forward>(m.p, max_rows);
      m.check("threads");
    }
  }
}

struct Counted {
  template <class T, int N>
  static void run(const Problem& p, int* width) {
    *width = N;
    // Every thread has something to do at the start of a sample's row, and all threads together enough for all of it.
    const Launch l = launch_of(p, N);
    CHECK(l.lanes * l.rows == kThreads && (l.lanes & (l.lanes - 1)) == 0);
    CHECK(l.columns * l.lanes * kGroupsPerThread * (N == 1 ? kBlock : N) >= p.elements);
    CHECK((l.columns - 1) * l.lanes * kGroupsPerThread * (N == 1 ? kBlock : N) < p.elements);
  }
};

CASE("vectors only where every store is aligned") {
  struct Example {
    DType dtype;
    int64_t elements, offset;
    int width;
  };
  const Example examples[] = {
      {DType::float32, 64, 0, 4},
      {DType::float32, 64, 1, 1},
      {DType::float32, 62, 0, 1},
      {DType::float64, 64, 0, 4},
      {DType::float16, 64, 0, 8},
      {DType::float16, 60, 0, 1},  // the second sample would start 8 bytes beyond an aligned address
      {DType::bfloat16, 64, 4, 1},
      {DType::bfloat16, 1 << 22, 0, 8},
  };
  for (const Example& e : examples) {
    PhiloxNormal m({1, e.elements, e.dtype, e.offset});
    int width = 0;
    run_kernel<Counted>(m.p, &width);
    CHECK(width == e.width) << &e - examples << " has " << width;
  }
}

CASE("launches beyond 2^31 elements") {
  Problem p{};
  p.samples = 3;
  p.elements = int64_t(1) << 34;
  const Launch l = launch_of(p, 4);
  CHECK(l.columns < int64_t(1) << 31 && l.columns * l.lanes * kGroupsPerThread * 4 == p.elements) << l.columns;
  CHECK(l.row_blocks == 3);
  p.samples = int64_t(1) << 33;
  p.elements = 5;
  const Launch many = launch_of(p, 1);
  CHECK(many.row_blocks == kMaxRows && many.columns == 1 && many.lanes == 2 && many.rows == 128);
}

}  // namespace
