// Binds weight_norm to lsgm_fast::weight_norm_cpu and its backward operator. The schemas are defined in Python
// (lsgm_fast/ops/weight_norm.py). There is no CUDA kernel.
#if !defined(LSGM_CUDA)
#include <algorithm>
#include <array>
#include <tuple>
#include <utility>
#include <vector>

#include "common/stable.h"
#include "weight_norm/weight_norm.h"

namespace lsgm {
namespace weight_norm {
namespace {

// Whether each filter is one run in memory, one after the other; the order within it does not matter.
bool filters_are_runs(const Tensor& t) {
  if (t.is_contiguous()) return true;
  std::array<std::pair<int64_t, int64_t>, 3> axes;  // (stride, size)
  for (int64_t d = 1; d < 4; ++d) axes[static_cast<size_t>(d - 1)] = {t.stride(d), t.size(d)};
  std::sort(axes.begin(), axes.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : axes) {
    if (size == 1) continue;
    if (stride != expected) return false;
    expected *= size;
  }
  return t.size(0) == 1 || t.stride(0) == expected;
}

void check(const Tensor& t, const char* name, size_t i) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, "[", i, "] has dtype ",
      torch::headeronly::toString(t.scalar_type()), ": expected float32");
}

struct Call {
  Problem p;
  std::vector<Weight> list;
  int64_t filters;
};

void describe(Call& call, const std::vector<Tensor>& weights, const std::vector<Tensor>& log_norms, double eps) {
  STD_TORCH_CHECK(!weights.empty() && weights.size() == log_norms.size(), "got ", weights.size(), " weights and ",
      log_norms.size(), " log norms: expected as many, and at least one");
  call.p = Problem{};
  call.list.resize(weights.size());
  call.filters = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& v = weights[i];
    const Tensor& log_norm = log_norms[i];
    check(v, "weights", i);
    check(log_norm, "log_norms", i);
    STD_TORCH_CHECK(v.dim() == 4, "weights[", i, "] has shape ", shape_of(v), ": expected (C_out, C_in, K, K)");
    STD_TORCH_CHECK(log_norm.numel() == v.size(0) && log_norm.is_contiguous(), "log_norms[", i, "] has shape ",
        shape_of(log_norm), " and strides ", strides_of(log_norm), ": expected (", v.size(0), ", 1, 1, 1), contiguous");
    STD_TORCH_CHECK(filters_are_runs(v), "weights[", i, "] has shape ", shape_of(v), " and strides ", strides_of(v),
        ": expected each filter dense, one after the other");
    Weight& weight = call.list[i];
    weight = Weight{};
    weight.v = v.const_data_ptr<float>();
    weight.log_norm = log_norm.const_data_ptr<float>();
    weight.filters = v.size(0);
    weight.length = weight.filters == 0 ? 0 : v.numel() / weight.filters;
    weight.first = call.filters;
    call.filters += weight.filters;
  }
  call.p.weights = call.list.data();
  call.p.count = static_cast<int64_t>(call.list.size());
  call.p.eps = static_cast<float>(eps);
  cpu::plan(call.p);
}

std::vector<Tensor> allocate(Call& call, const std::vector<Tensor>& weights) {
  std::vector<Tensor> results;
  results.reserve(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    results.push_back(torch::stable::empty_like(weights[i]));
    call.list[i].out = results.back().mutable_data_ptr<float>();
  }
  return results;
}

std::tuple<std::vector<Tensor>, Tensor> forward(
    const std::vector<Tensor>& weights, const std::vector<Tensor>& log_norms, double eps) {
  Call call;
  describe(call, weights, log_norms, eps);
  std::vector<Tensor> results = allocate(call, weights);
  Tensor norms = torch::stable::new_empty(weights[0], {call.filters});
  call.p.norms = norms.mutable_data_ptr<float>();
  const Problem& p = call.p;
  torch::stable::parallel_for(
      0, p.pieces, cpu::grain(p), [&p](int64_t begin, int64_t end) { cpu::forward(p, begin, end); });
  return {std::move(results), norms};
}

std::tuple<std::vector<Tensor>, Tensor> backward(const std::vector<Tensor>& grads, const std::vector<Tensor>& weights,
    const std::vector<Tensor>& log_norms, const Tensor& norms, double eps) {
  Call call;
  describe(call, weights, log_norms, eps);
  STD_TORCH_CHECK(grads.size() == weights.size(), "got ", grads.size(), " gradients of ", weights.size(), " weights");
  STD_TORCH_CHECK(norms.scalar_type() == ScalarType::Float && norms.numel() == call.filters && norms.is_contiguous(),
      "norms has shape ", shape_of(norms), ": expected (", call.filters, ",), float32, as the forward pass returned it");
  for (size_t i = 0; i < weights.size(); ++i) {
    check(grads[i], "grads", i);
    STD_TORCH_CHECK(same_shape(grads[i], weights[i]) && same_strides(grads[i], weights[i]), "grads[", i, "] has shape ",
        shape_of(grads[i]), " and strides ", strides_of(grads[i]), ", its weight ", shape_of(weights[i]), " and ",
        strides_of(weights[i]), ": expected the same");
    call.list[i].grad = grads[i].const_data_ptr<float>();
  }
  std::vector<Tensor> results = allocate(call, weights);
  Tensor grad_log_norms = torch::stable::new_empty(weights[0], {call.filters});
  call.p.saved_norms = norms.const_data_ptr<float>();
  call.p.grad_log_norm = grad_log_norms.mutable_data_ptr<float>();
  const Problem& p = call.p;
  torch::stable::parallel_for(
      0, p.pieces, cpu::grain(p), [&p](int64_t begin, int64_t end) { cpu::backward(p, begin, end); });
  return {std::move(results), grad_log_norms};
}

}  // namespace
}  // namespace weight_norm
}  // namespace lsgm

STABLE_TORCH_LIBRARY_IMPL(lsgm_fast, CPU, m) {
  m.impl("weight_norm_cpu", TORCH_BOX(&lsgm::weight_norm::forward));
  m.impl("weight_norm_cpu_backward", TORCH_BOX(&lsgm::weight_norm::backward));
}
#endif
