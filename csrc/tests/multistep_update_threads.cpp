// The CUDA kernel of multistep_update, thread by thread on the CPU: what threads.h computes is what the GPU computes.
// The loops below stand for the grid.
#include "multistep_update/threads.h"
#include "tests/multistep_update_problem.h"

namespace {

using namespace lsgm;
using namespace lsgm::multistep_update;
using lsgm::testing::Example;
using lsgm::testing::Kind;
using lsgm::testing::MultistepUpdate;

struct Options {
  int64_t max_blocks;
  bool wide;         // take the path for groups beyond 2^31 elements
  int* width;        // elements per thread that were chosen
  Variation* which;  // kernel that was chosen
};

template <class V>
constexpr Variation value_of() {
  return std::is_same<V, Planes>::value ? Variation::planes
         : std::is_same<V, Rows>::value ? Variation::rows
                                        : Variation::none;
}

struct Forward {
  template <class C, class Y, class H, class V, int N>
  static void run(const Problem& p, const Options& options) {
    Launch l = launch_of(p, N);
    if (options.wide) l.narrow = false;
    l.blocks_y = smaller(l.blocks_y, options.max_blocks);
    CHECK(l.columns * l.lines == kThreads);
    if (options.width) *options.width = N;
    if (options.which) *options.which = value_of<V>();
    for (int64_t y = 0; y < l.blocks_y * l.lines; ++y) {
      for (int64_t group = y; group < l.groups; group += l.blocks_y * l.lines) {
        for (int64_t x = 0; x < l.blocks_x * l.columns; ++x) combine<C, Y, H, V, N>(p, l, group, x);
      }
    }
  }
};

CASE("every thread of a CUDA launch") {
  for (const Example& example : lsgm::testing::examples()) {
    for (bool wide : {false, true}) {  // also with and without a loop over the groups
      MultistepUpdate m(example);
      run_kernel<Forward, const Options&>(m.p, {wide ? 1 : kMaxBlocksY, wide, nullptr, nullptr});
      m.check("threads");
    }
  }
}

int width_of(const Problem& p, Variation* which = nullptr) {
  int width = 0;
  run_kernel<Forward, const Options&>(p, {kMaxBlocksY, false, &width, which});
  return width;
}

CASE("vectors only where every access is aligned") {
  const std::vector<Kind> numbers = {Kind::number, Kind::number}, by_channel = {Kind::number, Kind::channel};
  const auto example = [](Order order, int64_t channels, int64_t spatial, const std::vector<Kind>& kinds) {
    return Example{order, 2, channels, spatial, DType::float32, DType::float16, kinds, DType::float32, 0};
  };
  MultistepUpdate m(example(Order::planes, 3, 64, numbers));
  CHECK(width_of(m.p) == 8);
  void* const out = m.p.out;
  m.p.out = static_cast<float*>(out) + 1;
  m.p.batch = 1;
  CHECK(width_of(m.p) == 1);
  m.p.out = out;
  CHECK(width_of(m.p) == 8);
  m.p.inputs[1] = static_cast<const Half*>(m.p.inputs[1]) + 1;
  CHECK(width_of(m.p) == 1);
  // Numbers need no channel to be a multiple of the width, only the whole.
  MultistepUpdate odd(example(Order::planes, 4, 5, numbers));
  CHECK(width_of(odd.p) == 8);
  Variation which;
  MultistepUpdate planes(example(Order::planes, 8, 6, by_channel));
  CHECK(width_of(planes.p, &which) == 1 && which == Variation::planes);
  MultistepUpdate rows(example(Order::rows, 8, 5, by_channel));
  CHECK(width_of(rows.p, &which) == 8 && which == Variation::rows);
  // Without a history the state alone decides.
  MultistepUpdate alone(example(Order::rows, 4, 5, {Kind::channel}));
  CHECK(width_of(alone.p) == 4);
}

CASE("neighbouring factors are read at once only where they are neighbours and aligned") {
  MultistepUpdate m({Order::rows, 3, 8, 5, DType::float32, DType::float32,
      {Kind::channel, Kind::both, Kind::channel_apart, Kind::number, Kind::sample}, DType::float32, 0});
  Launch l = launch_of(m.p, 4);
  CHECK(l.packed[0] && l.packed[1] && !l.packed[2] && !l.packed[3] && !l.packed[4]);
  m.p.coefficients[0].factor = static_cast<const float*>(m.p.coefficients[0].factor) + 1;
  m.p.coefficients[1].sample_stride = 6;
  l = launch_of(m.p, 4);
  CHECK(!l.packed[0] && !l.packed[1]);
}

CASE("samples are kept apart only where a coefficient asks for it") {
  Problem p{};
  p.order = Order::rows;
  p.batch = 300;
  p.channels = 4;
  p.spatial = 6;
  p.terms = 2;
  CHECK(launch_of(p, 4).groups == 1);
  p.coefficients[0].channel_stride = 1;
  CHECK(launch_of(p, 4).groups == 1);
  p.order = Order::planes;
  Launch l = launch_of(p, 2);
  CHECK(l.groups == 300 && l.size == 24 && l.columns == 16 && l.lines == 16 && l.blocks_x == 1 && l.blocks_y == 19);
  p.order = Order::rows;
  p.coefficients[1].sample_stride = 1;
  CHECK(launch_of(p, 4).groups == 300);
}

// Sizes no test machine can hold: the place of the last thread, and the limits of a grid.
CASE("launches beyond 2^31 elements") {
  Problem p{};
  p.order = Order::planes;
  p.batch = 1 << 18;
  p.channels = 256;
  p.spatial = 1 << 9;  // 2^35 elements
  p.terms = 2;
  const auto covered = [&](int64_t width) {
    const Launch l = launch_of(p, width);
    return l.blocks_x < int64_t(1) << 31 && l.blocks_y <= kMaxBlocksY && l.groups * l.size == int64_t(1) << 35 &&
           l.blocks_x * l.columns * width >= l.size && (l.blocks_x - 1) * l.columns * width < l.size &&
           l.narrow == (l.size < int64_t(1) << 31);
  };
  for (int64_t width : {1, 4}) {
    for (Order order : {Order::planes, Order::rows}) {
      p.order = order;
      for (int64_t sample_stride : {0, 1}) {
        for (int64_t channel_stride : {0, 1}) {
          p.coefficients[1].sample_stride = sample_stride;
          p.coefficients[0].channel_stride = channel_stride;
          CHECK(covered(width)) << width << static_cast<int>(order) << sample_stride << channel_stride;
        }
      }
    }
  }
  CHECK(quotient((int64_t(1) << 33) + 7, 1 << 4, false) == int64_t(1) << 29);
  CHECK(quotient((int64_t(1) << 31) - 1, 3, true) == 715827882);
}

}  // namespace
