// Philox against Random123's known answers; the CPU kernels of philox_normal, baseline and AVX2, against long double.
#include "common/cpu.h"
#include "tests/philox_normal_problem.h"

namespace {

using namespace lsgm;
using namespace lsgm::philox_normal;
using lsgm::testing::NormalExample;
using lsgm::testing::PhiloxNormal;

using Kernel = void (*)(const Problem&, int64_t, int64_t);

CASE("known answers of Philox4x32-10") {
  struct Answer {
    Words counter;
    uint32_t key0, key1;
    Words expected;
  };
  constexpr uint32_t ones = 0xFFFFFFFFu;
  const Answer answers[] = {  // Random123, kat_vectors
      {{{0, 0, 0, 0}}, 0, 0, {{0x6627E8D5u, 0xE169C58Du, 0xBC57AC4Cu, 0x9B00DBD8u}}},
      {{{ones, ones, ones, ones}}, ones, ones, {{0x408F276Du, 0x41C83B0Eu, 0xA20BC7C6u, 0x6D5451FDu}}},
      {{{0x243F6A88u, 0x85A308D3u, 0x13198A2Eu, 0x03707344u}}, 0xA4093822u, 0x299F31D0u,
          {{0xD16CFE09u, 0x94FDCCEBu, 0x5001E420u, 0x24126EA1u}}},
  };
  for (const Answer& a : answers) {
    const Words got = philox(a.counter, a.key0, a.key1);
    for (int k = 0; k < 4; ++k) CHECK(got.x[k] == a.expected.x[k]) << &a - answers << " " << k;
  }
}

CASE("uniforms are rounded once, to nearest") {
  CHECK(angle_uniform(0xFFFFFFFFu) == 1.0f);
  CHECK(angle_uniform(0xFFFFFF7Fu) == 1.0f - 0x1p-24f);  // just below a tie
  CHECK(angle_uniform(0xFFFFFE80u) == 1.0f - 0x1p-23f);  // a tie, to even
  CHECK(angle_uniform(0xFFFFFE81u) == 1.0f - 0x1p-24f);
  CHECK(radius_uniform(0) == 0x1p-33f && radius_uniform(1) == 0x1.8p-32f && radius_uniform(0xFFFFFFFFu) == 1.0f);
}

// In three ranges, as three threads would.
void in_ranges(const Problem& p, Kernel kernel) {
  const int64_t n = p.segments.count, third = n / 3;
  kernel(p, 2 * third, n);
  kernel(p, 0, third);
  kernel(p, third, 2 * third);
}

void check_kernels(const char* who, Kernel forward) {
  for (const NormalExample& example : lsgm::testing::normal_examples()) {
    PhiloxNormal m(example);
    cpu::plan(m.p);
    in_ranges(m.p, forward);
    m.check(who);
  }
}

CASE("baseline kernel") { check_kernels("scalar", &scalar::forward); }

#if defined(LSGM_HAVE_AVX2)
CASE("AVX2 kernel") {
  if (has_avx2()) check_kernels("avx2", &avx2::forward);
}
#endif

CASE("the kernel chosen at run time") { check_kernels("cpu", &cpu::forward); }

CASE("an element's value does not depend on where a request ends or is cut") {
  for (DType dtype : {DType::float32, DType::float64, DType::bfloat16}) {
    PhiloxNormal whole({2, 20000, dtype, 0});
    cpu::plan(whole.p);
    cpu::forward(whole.p, 0, whole.p.segments.count);
    for (int64_t elements : {1, 6, 31, 32, 35, 8190, 8200, 19999}) {
      PhiloxNormal part({2, elements, dtype, 1});
      part.p.indices = whole.p.indices;
      cpu::plan(part.p);
      for (int64_t s = part.p.segments.count - 1; s >= 0; --s) cpu::forward(part.p, s, s + 1);
      for (int64_t i = 0; i < 2 * elements; ++i) {
        CHECK(part.out.at(i) == whole.out.at(i / elements * 20000 + i % elements)) << elements << " " << i;
      }
    }
  }
}

CASE("the last blocks of the largest sample") {
  // Counters up to 2^32 - 1, in the segments that a sample of 2^34 elements would end with.
  constexpr int64_t elements = int64_t(1) << 34, end = 5000;
  PhiloxNormal m({1, end, DType::float64, 0});
  m.p.elements = elements;
  cpu::plan(m.p);
  const int64_t last = m.p.segments.count - 1;
  const int64_t begin = last * m.p.segments.limit * kBlock;
  CHECK(elements - begin == m.p.segments.limit * kBlock);
  std::vector<double> values(static_cast<size_t>(elements - begin));
  // Only the last segment is written, so the buffer stands for the end of the result.
  m.p.out = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(values.data()) - static_cast<uintptr_t>(begin) * 8);
  cpu::forward(m.p, last, last + 1);
  for (size_t i = values.size() - 64; i < values.size(); i += 4) {
    double expected[4];
    normals_of(words_of(m.p, index_of(m.p, 0), (begin + static_cast<int64_t>(i)) / kBlock), expected);
    for (size_t k = 0; k < 4; ++k) CHECK(std::fabs(values[i + k] - expected[k]) < 1e-14) << i << " " << k;
  }
}

}  // namespace
