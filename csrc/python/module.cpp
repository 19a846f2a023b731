// lsgm_fast._C: what the compiled code says about itself and about the machine. Nothing in lsgm_fast needs it.
//
// It is the only compiled file that depends on the Python version, so it holds no operator. A wheel carries the one of
// the Python that built it, under a file name (_C.cpython-311-x86_64-linux-gnu.so) that other Pythons do not look at:
// for them the module is absent and everything else works. That is what lets one wheel, tagged py3-none-<platform>,
// serve several Pythons.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <vector>

#include "common/cpu.h"
#include "tests/check.h"

#define LSGM_TEXT2(x) #x
#define LSGM_TEXT(x) LSGM_TEXT2(x)

namespace py = pybind11;

namespace {

py::dict build_report() {
  py::dict report;
#if defined(__clang__)
  report["compiler"] = "clang " __clang_version__;
#else
  report["compiler"] = "gcc " __VERSION__;
#endif
  report["cxx_standard"] = static_cast<long>(__cplusplus);
  report["pybind11"] = LSGM_TEXT(PYBIND11_VERSION_MAJOR) "." LSGM_TEXT(PYBIND11_VERSION_MINOR);
  report["python"] = PY_VERSION;
  std::vector<std::string> sets{"scalar"};
#if defined(LSGM_HAVE_AVX2)
  sets.push_back("avx2");
#endif
#if defined(LSGM_HAVE_AVX512)
  sets.push_back("avx512");
#endif
  report["instruction_sets"] = sets;
  return report;
}

py::dict cpu_report() {
  py::dict report;
  report["instruction_set"] = lsgm::has_avx512() ? "avx512" : lsgm::has_avx2() ? "avx2" : "scalar";
  return report;
}

// The part of NVML that is needed, looked up at run time: a driver may be absent.
struct Nvml {
  using Device = void*;
  struct Memory {
    unsigned long long total, free, used;
  };

  template <class F>
  F find(const char* name) const {
    return reinterpret_cast<F>(dlsym(library.get(), name));
  }

  struct Close {
    void operator()(void* handle) const { dlclose(handle); }
  };
  std::unique_ptr<void, Close> library{dlopen("libnvidia-ml.so.1", RTLD_LAZY | RTLD_LOCAL)};
};

// NVML talks to the driver without touching CUDA: no context appears on any GPU, and the process can still fork.
std::vector<py::dict> cuda_devices() {
  std::vector<py::dict> devices;
  const Nvml nvml;
  if (!nvml.library) return devices;
  const auto init = nvml.find<int (*)()>("nvmlInit_v2");
  const auto shutdown = nvml.find<int (*)()>("nvmlShutdown");
  const auto count_of = nvml.find<int (*)(unsigned*)>("nvmlDeviceGetCount_v2");
  const auto device_at = nvml.find<int (*)(unsigned, Nvml::Device*)>("nvmlDeviceGetHandleByIndex_v2");
  const auto name_of = nvml.find<int (*)(Nvml::Device, char*, unsigned)>("nvmlDeviceGetName");
  const auto capability_of = nvml.find<int (*)(Nvml::Device, int*, int*)>("nvmlDeviceGetCudaComputeCapability");
  const auto memory_of = nvml.find<int (*)(Nvml::Device, Nvml::Memory*)>("nvmlDeviceGetMemoryInfo");
  const auto driver_of = nvml.find<int (*)(char*, unsigned)>("nvmlSystemGetDriverVersion");
  if (!init || !shutdown || !count_of || !device_at || !name_of || !capability_of || !memory_of || !driver_of) {
    return devices;
  }
  if (init() != 0) return devices;
  char driver[80] = "";
  unsigned count = 0;
  if (driver_of(driver, sizeof driver) == 0 && count_of(&count) == 0) {
    for (unsigned i = 0; i < count; ++i) {
      Nvml::Device device = nullptr;
      char name[96] = "";
      int major = 0, minor = 0;
      Nvml::Memory memory{};
      if (device_at(i, &device) != 0 || name_of(device, name, sizeof name) != 0 ||
          capability_of(device, &major, &minor) != 0 || memory_of(device, &memory) != 0) {
        continue;
      }
      py::dict entry;
      entry["index"] = i;
      entry["name"] = std::string(name);
      entry["capability"] = py::make_tuple(major, minor);
      entry["memory_bytes"] = memory.total;
      entry["driver"] = std::string(driver);
      devices.push_back(entry);
    }
  }
  shutdown();
  return devices;
}

std::vector<std::string> self_check() {
  const py::gil_scoped_release release;
  return lsgm::testing::run_all();
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "What the compiled part of lsgm_fast says about itself and about the machine.";
  m.def("build_report", &build_report, "Compiler, language standard and instruction sets of this build.");
  m.def("cpu_report", &cpu_report, "The instruction set that this processor's CPU kernels use.");
  m.def("cuda_devices", &cuda_devices,
      "NVIDIA GPUs in the machine, as the driver lists them; empty without a driver. Ignores CUDA_VISIBLE_DEVICES and "
      "creates no CUDA context.");
  m.def("self_check", &self_check,
      "Run the C++ unit tests of the kernels on this processor; returns what failed, one text per failed check.");
}
