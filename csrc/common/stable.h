// What registrations need from PyTorch, through its stable ABI only: no symbol of a particular PyTorch or Python
// version.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(LSGM_CUDA)
#include <torch/csrc/stable/accelerator.h>
#endif

#include <array>
#include <optional>
#include <sstream>
#include <string>

#include "common/dtypes.h"
#include "common/scalars.h"

namespace lsgm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

static inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::Double:
      return DType::float64;
    case ScalarType::Half:
      return DType::float16;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    default:
      STD_TORCH_CHECK(false, name, " has dtype ", torch::headeronly::toString(t.scalar_type()),
          ": expected float32, float64, float16 or bfloat16");
  }
  return DType::float32;
}

static inline std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << "(";
  for (int64_t d = 0; d < t.dim(); ++d) text << (d ? ", " : "") << t.size(d);
  text << ")";
  return text.str();
}

static inline std::string strides_of(const Tensor& t) {
  std::ostringstream text;
  text << "(";
  for (int64_t d = 0; d < t.dim(); ++d) text << (d ? ", " : "") << t.stride(d);
  text << ")";
  return text.str();
}

static inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != b.size(d)) return false;
  }
  return true;
}

// Same place in memory for every element; the stride of an axis of size 1 means nothing.
static inline bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

static inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

// `expected` float32 or float64 values along `axis`, or one for all.
static inline Scalars scalars(const Tensor& t, const char* name, int64_t axis, int64_t expected) {
  Scalars s;
  s.data = t.const_data_ptr();
  s.dtype = dtype_of(t, name);
  STD_TORCH_CHECK(s.dtype == DType::float32 || s.dtype == DType::float64, name, " has dtype ",
      torch::headeronly::toString(t.scalar_type()), ": expected float32 or float64");
  s.stride = expected == 1 || t.numel() == 1 ? 0 : t.stride(axis);
  return s;
}

// One value, or one per sample of `like`.
static inline Scalars sample_scalars(const Tensor& t, const char* name, const Tensor& like) {
  const int64_t batch = like.size(0);
  STD_TORCH_CHECK(t.dim() <= 1 && (t.numel() == 1 || t.numel() == batch), name, " has shape ", shape_of(t),
      ": expected () or (", batch, ",)");
  STD_TORCH_CHECK(same_device(t, like), name, " must be on the device of the other tensors");
  return scalars(t, name, 0, batch);
}

// PyTorch's own function of this name in the stable ABI takes no dtype.
static inline Tensor empty_like(const Tensor& t, ScalarType dtype) {
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{from(t), from(std::optional<ScalarType>(dtype)), from(std::nullopt),
      from(std::nullopt), from(std::nullopt), from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

#if defined(LSGM_CUDA)

static inline void* current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}

#endif

}  // namespace lsgm
