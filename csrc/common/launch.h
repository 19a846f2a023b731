// Launching CUDA kernels.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace lsgm {

// Call right after a launch: an invalid configuration, or a library without code for this GPU, shows here. What fails
// while the kernel runs shows at PyTorch's next synchronisation, as for every asynchronous kernel.
static inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  std::string message = std::string("lsgm_fast: the CUDA kernel ") + kernel +
                        " could not be launched: " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")";
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion) {
    message +=
        "; the library holds no code for this GPU: reinstall lsgm-fast from source with LSGM_FAST_CUDA_ARCHS set";
  } else if (error == cudaErrorInsufficientDriver) {
    message += "; the NVIDIA driver is older than the CUDA toolkit that lsgm-fast was built with";
  }
  throw std::runtime_error(message);
}

}  // namespace lsgm
