#include <cstdio>

#include "tests/check.h"

int main() {
  const auto failed = lsgm::testing::run_all();
  const size_t shown = failed.size() < 20 ? failed.size() : 20;
  for (size_t i = 0; i < shown; ++i) std::fprintf(stderr, "%s\n", failed[i].c_str());
  std::fprintf(stderr, "%zu cases, %zu failed checks\n", lsgm::testing::cases().size(), failed.size());
  return failed.empty() ? 0 : 1;
}
