// The whole test framework: CASE("name") { CHECK(condition) << "what else to print"; }
// Cases register themselves; csrc/tests/main.cpp runs them under CTest, and lsgm_fast._C runs the same ones on request.
#pragma once

#include <cstdint>
#include <functional>
#include <sstream>
#include <string>
#include <vector>

namespace lsgm {
namespace testing {

struct Case {
  const char* name;
  void (*run)();
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

inline std::vector<std::string>& failures() {
  static std::vector<std::string> all;
  return all;
}

struct Register {
  Register(const char* name, void (*run)()) { cases().push_back({name, run}); }
};

// Records a failure when it goes out of scope, with what was streamed into it.
class Failure {
 public:
  Failure(const char* file, int line, const char* condition) {
    text_ << file << ":" << line << ": not true: " << condition << " ";
  }
  ~Failure() { failures().push_back(text_.str()); }
  template <class T>
  Failure& operator<<(const T& value) {
    text_ << value;
    return *this;
  }

 private:
  std::ostringstream text_;
};

// Runs the cases; returns what failed, one text per failed check.
inline std::vector<std::string> run_all() {
  failures().clear();
  for (const Case& c : cases()) {
    const size_t before = failures().size();
    c.run();
    for (size_t i = before; i < failures().size(); ++i) failures()[i] = std::string(c.name) + ": " + failures()[i];
  }
  return failures();
}

// The same numbers on every machine and standard library.
class Random {
 public:
  explicit Random(uint64_t seed)
      : state_(seed * 2 + 1) {}
  uint64_t bits() {
    state_ += 0x9e3779b97f4a7c15u;  // splitmix64
    uint64_t x = state_;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
  }
  double uniform(double low, double high) { return low + (high - low) * static_cast<double>(bits() >> 11) * 0x1p-53; }

 private:
  uint64_t state_;
};

}  // namespace testing
}  // namespace lsgm

#define LSGM_JOIN2(a, b) a##b
#define LSGM_JOIN(a, b) LSGM_JOIN2(a, b)
#define CASE(name)                                                                                        \
  static void LSGM_JOIN(case_, __LINE__)();                                                               \
  static const lsgm::testing::Register LSGM_JOIN(register_, __LINE__)(name, &LSGM_JOIN(case_, __LINE__)); \
  static void LSGM_JOIN(case_, __LINE__)()
#define CHECK(condition) \
  if (!(condition)) lsgm::testing::Failure(__FILE__, __LINE__, #condition)
