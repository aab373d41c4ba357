// Binds few_rows_linear on CPU; kernels/reference.py says what it computes.

#include <ATen/Parallel.h>

#include <algorithm>
#include <optional>

#include "bindings.h"
#include "cpu/few_rows_linear.h"

using namespace coconut_fast;

constexpr int64_t kGrain = 1 << 16;  // bytes of weights; less is not worth waking a thread

static at::Tensor few_rows_linear_op(const at::Tensor& x, const at::Tensor& weight,
                                     const std::optional<at::Tensor>& bias) {
  const auto dtype = dtype_of("few_rows_linear", "x", x);
  if ((dtype != Dtype::f32 && dtype != Dtype::bf16) || !x.device().is_cpu() || x.dim() < 1)
    refuse("few_rows_linear: x is ", describe(x), "; expected (..., K) of Float or BFloat16 on the CPU");
  check_plain("few_rows_linear", "x", x);
  const int64_t k = x.size(-1);
  check_shape("few_rows_linear", "weight", weight, {-1, k});
  check_type("few_rows_linear", "weight", weight, x.scalar_type());
  const int64_t n = weight.size(0), rows = k ? x.numel() / k : 0;
  if (bias) {
    check_shape("few_rows_linear", "bias", *bias, {n});
    check_type("few_rows_linear", "bias", *bias, x.scalar_type());
  }
  auto shape = x.sizes().vec();
  shape.back() = n;
  if (!k) return bias ? bias->expand(shape).clone() : at::zeros(shape, x.options());
  const at::Tensor inputs = x.contiguous();
  at::Tensor y = at::empty(shape, x.options());
  const FewRowsLinear linear{static_cast<const char*>(inputs.const_data_ptr()),
                             static_cast<const char*>(weight.const_data_ptr()),
                             bias ? static_cast<const char*>(bias->const_data_ptr()) : nullptr,
                             static_cast<char*>(y.mutable_data_ptr()), dtype, rows, k, n};
  py::gil_scoped_release release;
  const int64_t block_bytes = kOutputs * k * size_of(dtype) * std::max<int64_t>(1, rows / 4);
  at::parallel_for(0, linear.blocks(), std::max<int64_t>(1, kGrain / block_bytes),
                   [&](int64_t first, int64_t last) { few_rows_linear(linear, first, last); });
  return y;
}

void bind_linear(py::module_& m) {
  m.def("few_rows_linear", &few_rows_linear_op, py::arg("x"), py::arg("weight"), py::arg("bias") = py::none(),
        "kernels/reference.py: few_rows_linear_ref, on CPU; fp32 and bf16.");
}
