// Binds lsgm_fast::rk_{stage,finish,drift_stage,drift_finish,control}_{cpu,cuda}. Compiled into both libraries, with
// LSGM_CUDA defined in the CUDA one. The schemas are defined in Python (lsgm_fast/ops/rk.py).
#include <optional>
#include <tuple>
#include <vector>

#include "common/stable.h"
#include "rk/rk.h"

namespace lsgm {
namespace rk {
namespace {

using Coefficients = std::vector<double>;

void check_coefficients(const char* name, const Coefficients& row, const Tensor& k) {
  STD_TORCH_CHECK(!row.empty() && static_cast<int64_t>(row.size()) <= k.size(0), name, " has ", row.size(),
      " coefficients: expected 1 to ", k.size(0), ", the number of stages");
}

double at(const Coefficients& row, int64_t i) { return i < static_cast<int64_t>(row.size()) ? row[i] : 0.0; }

// The stages that are read; the one that is made in the call, `slot`, stays in registers (-1: there is none).
void set_row(Problem& p, const Coefficients& a, const Coefficients& e, int64_t slot) {
  p.slot = static_cast<int>(slot);
  p.a_new = slot < 0 ? 0.0 : at(a, slot);
  p.e_new = slot < 0 ? 0.0 : at(e, slot);
  p.row.count = 0;
  for (int64_t i = 0; i < kMaxStages; ++i) {
    if (i == slot || (at(a, i) == 0.0 && at(e, i) == 0.0)) continue;
    p.row.slot[p.row.count] = static_cast<int>(i);
    p.row.a[p.row.count] = at(a, i);
    p.row.e[p.row.count] = at(e, i);
    ++p.row.count;
  }
}

// What all calls have: the state at the start of the step, the stages and the step size.
Problem describe(const Tensor& y, const Tensor& k, const Tensor& h) {
  STD_TORCH_CHECK(y.dim() >= 1, "y is 0-d: expected (B, ...)");
  bool shapes = k.dim() == y.dim() + 1 && k.size(0) >= 1 && k.size(0) <= kMaxStages;
  for (int64_t d = 0; shapes && d < y.dim(); ++d) shapes = k.size(d + 1) == y.size(d);
  STD_TORCH_CHECK(shapes, "k has shape ", shape_of(k), ": expected 1 to ", kMaxStages, " stages of y's, ", shape_of(y));
  STD_TORCH_CHECK(same_device(k, y), "y and k must be on one device");
  STD_TORCH_CHECK(y.is_contiguous() && k.is_contiguous(), "y and k must be contiguous, their strides are ",
      strides_of(y), " and ", strides_of(k));
  Problem p{};
  p.batch = y.size(0);
  p.channels = y.dim() > 1 ? y.size(1) : 1;
  p.spatial = 1;
  for (int64_t d = 2; d < y.dim(); ++d) p.spatial *= y.size(d);
  p.dtype = dtype_of(y, "y");
  STD_TORCH_CHECK(dtype_of(k, "k") == p.dtype, "k and y must have one dtype, theirs are ",
      torch::headeronly::toString(k.scalar_type()), " and ", torch::headeronly::toString(y.scalar_type()));
  p.h = sample_scalars(h, "h", y);
  p.y = y.const_data_ptr();
  p.k = const_cast<void*>(k.const_data_ptr());  // written only where there is a drift, by way of a mutable argument
  return p;
}

void set_drift(Problem& problem, const Tensor& eps, Tensor& z, const std::optional<Tensor>& logit, const Tensor& p,
    const Tensor& q, const Tensor& r, const Tensor& y, Tensor& k, int64_t slot) {
  STD_TORCH_CHECK(y.dim() >= 2 && same_shape(z, y) && same_shape(eps, y), "eps, z and y have shapes ", shape_of(eps),
      ", ", shape_of(z), " and ", shape_of(y), ": expected one, (B, C, ...)");
  STD_TORCH_CHECK(same_device(eps, y) && same_device(z, y), "eps, z and y must be on one device");
  STD_TORCH_CHECK(eps.is_contiguous() && z.is_contiguous(), "eps and z must be contiguous, their strides are ",
      strides_of(eps), " and ", strides_of(z));
  STD_TORCH_CHECK(dtype_of(z, "z") == problem.dtype, "z and y must have one dtype");
  STD_TORCH_CHECK(slot >= 0 && slot < k.size(0), "stage is ", slot, ": expected 0 to ", k.size(0) - 1);
  problem.eps_dtype = dtype_of(eps, "eps");
  STD_TORCH_CHECK(problem.dtype == DType::float64 ||
                      (problem.dtype == DType::float32 && problem.eps_dtype != DType::float64),
      "z is ", torch::headeronly::toString(z.scalar_type()), " and eps ",
      torch::headeronly::toString(eps.scalar_type()),
      ": expected a float64 state, or a float32 one with an eps no wider");
  if (logit.has_value()) {
    STD_TORCH_CHECK(logit->numel() == problem.channels && logit->is_contiguous() && same_device(*logit, y),
        "mixing_logit has shape ", shape_of(*logit), ": expected ", problem.channels,
        " contiguous values on the state's device");
    problem.logit = scalars(*logit, "mixing_logit", 0, 1);
    problem.logit.stride = 1;
  }
  problem.p = sample_scalars(p, "p", z);
  problem.q = sample_scalars(q, "q", z);
  problem.r = sample_scalars(r, "r", z);
  problem.eps = eps.const_data_ptr();
  problem.z = z.mutable_data_ptr();
  problem.k = k.mutable_data_ptr();
}

Tensor make_norm(Problem& p, const Tensor& y, double rtol, double atol, bool per_sample) {
  const ScalarType dtype = p.dtype == DType::float64 ? ScalarType::Double : ScalarType::Float;
  std::vector<int64_t> shape;
  if (per_sample) shape.push_back(p.batch);
  Tensor norm = torch::stable::new_empty(y, shape, dtype);
  p.norm = norm.mutable_data_ptr();
  p.per_sample = per_sample;
  p.rtol = rtol;
  p.atol = atol;
  return norm;
}

#if defined(LSGM_CUDA)

void run(Problem& p, const Tensor& y) {
  const torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
  cuda::plan(p);
  if (p.norm == nullptr) return cuda::step(p, current_stream(y));
  // From PyTorch's allocator, so that a CUDA graph can own it.
  const Tensor partials = torch::stable::new_empty(y, {p.segments.count}, ScalarType::Double);
  p.partials = static_cast<double*>(partials.mutable_data_ptr());
  cuda::step(p, current_stream(y));
}

#else

void run(Problem& p, const Tensor&) {
  cpu::plan(p);
  constexpr int64_t kOnStack = 8192;
  alignas(double) unsigned char small[kOnStack];
  std::vector<unsigned char> large;
  const int64_t size = cpu::scratch(p);
  if (size > kOnStack) large.resize(static_cast<size_t>(size));
  cpu::prepare(p, size > kOnStack ? large.data() : small);
  torch::stable::parallel_for(
      0, p.segments.count, cpu::grain(p), [&p](int64_t begin, int64_t end) { cpu::step(p, begin, end); });
  if (p.norm != nullptr) cpu::finish(p);
}

#endif

Tensor stage(const Tensor& y, const Tensor& k, const Coefficients& a, const Tensor& h) {
  check_coefficients("a", a, k);
  Problem p = describe(y, k, h);
  set_row(p, a, {}, -1);
  Tensor out = torch::stable::empty_like(y);
  p.z = out.mutable_data_ptr();
  if (elements(p) > 0) run(p, y);
  return out;
}

std::tuple<Tensor, Tensor> finish(const Tensor& y, const Tensor& k, const Coefficients& b, const Coefficients& e,
    const Tensor& h, double rtol, double atol, bool per_sample) {
  check_coefficients("b", b, k);
  check_coefficients("e", e, k);
  Problem p = describe(y, k, h);
  set_row(p, b, e, -1);
  Tensor out = torch::stable::empty_like(y);
  p.z = out.mutable_data_ptr();
  Tensor norm = make_norm(p, y, rtol, atol, per_sample);
  if (elements(p) > 0) {
    run(p, y);
  } else {
    torch::stable::zero_(norm);
  }
  return {out, norm};
}

void drift_stage(const Tensor& eps, Tensor z, const std::optional<Tensor>& logit, const Tensor& p, const Tensor& q,
    const Tensor& r, const Tensor& y, Tensor k, int64_t slot, const Coefficients& a, const Tensor& h) {
  check_coefficients("a", a, k);
  Problem problem = describe(y, k, h);
  set_drift(problem, eps, z, logit, p, q, r, y, k, slot);
  set_row(problem, a, {}, slot);
  if (elements(problem) > 0) run(problem, y);
}

Tensor drift_finish(const Tensor& eps, Tensor z, const std::optional<Tensor>& logit, const Tensor& p, const Tensor& q,
    const Tensor& r, const Tensor& y, Tensor k, int64_t slot, const Coefficients& b, const Coefficients& e,
    const Tensor& h, double rtol, double atol, bool per_sample) {
  check_coefficients("b", b, k);
  check_coefficients("e", e, k);
  Problem problem = describe(y, k, h);
  set_drift(problem, eps, z, logit, p, q, r, y, k, slot);
  set_row(problem, b, e, slot);
  Tensor norm = make_norm(problem, y, rtol, atol, per_sample);
  if (elements(problem) > 0) {
    run(problem, y);
  } else {
    torch::stable::zero_(norm);
  }
  return norm;
}

Tensor control(const Tensor& before, const Tensor& norm, double t_end, double exponent, double safety,
    double min_factor, double max_factor) {
  STD_TORCH_CHECK(before.dim() >= 1 && before.size(before.dim() - 1) == kFields && before.is_contiguous() &&
                      dtype_of(before, "control") == DType::float64,
      "control has shape ", shape_of(before), " and dtype ", torch::headeronly::toString(before.scalar_type()),
      ": expected (..., ", static_cast<int>(kFields), "), contiguous, float64");
  Control c{};
  c.count = before.numel() / kFields;
  STD_TORCH_CHECK(norm.numel() == c.count && norm.dim() <= 1 && same_device(norm, before), "norm has shape ",
      shape_of(norm), ": expected ", c.count, " values on control's device");
  c.norm = scalars(norm, "norm", 0, c.count);
  c.t_end = t_end;
  c.exponent = exponent;
  c.safety = safety;
  c.min_factor = min_factor;
  c.max_factor = max_factor;
  Tensor after = torch::stable::empty_like(before);
  c.before = static_cast<const double*>(before.const_data_ptr());
  c.after = static_cast<double*>(after.mutable_data_ptr());
  if (c.count == 0) return after;
#if defined(LSGM_CUDA)
  const torch::stable::accelerator::DeviceGuard guard(before.get_device_index());
  cuda::control(c, current_stream(before));
#else
  for (int64_t i = 0; i < c.count; ++i) advance(c, i);
#endif
  return after;
}

}  // namespace
}  // namespace rk
}  // namespace lsgm

#if defined(LSGM_CUDA)
STABLE_TORCH_LIBRARY_IMPL(lsgm_fast, CUDA, m) {
  m.impl("rk_stage_cuda", TORCH_BOX(&lsgm::rk::stage));
  m.impl("rk_finish_cuda", TORCH_BOX(&lsgm::rk::finish));
  m.impl("rk_drift_stage_cuda", TORCH_BOX(&lsgm::rk::drift_stage));
  m.impl("rk_drift_finish_cuda", TORCH_BOX(&lsgm::rk::drift_finish));
  m.impl("rk_control_cuda", TORCH_BOX(&lsgm::rk::control));
}
#else
STABLE_TORCH_LIBRARY_IMPL(lsgm_fast, CPU, m) {
  m.impl("rk_stage_cpu", TORCH_BOX(&lsgm::rk::stage));
  m.impl("rk_finish_cpu", TORCH_BOX(&lsgm::rk::finish));
  m.impl("rk_drift_stage_cpu", TORCH_BOX(&lsgm::rk::drift_stage));
  m.impl("rk_drift_finish_cpu", TORCH_BOX(&lsgm::rk::drift_finish));
  m.impl("rk_control_cpu", TORCH_BOX(&lsgm::rk::control));
}
#endif
