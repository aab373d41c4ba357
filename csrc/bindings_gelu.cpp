// Binds GELU of the training step on CPU; kernels/reference.py says what it computes.

#include <ATen/Parallel.h>

#include "bindings.h"
#include "cpu/gelu.h"

constexpr int64_t kGrain = 1 << 14;  // values; less is not worth waking a thread

static coconut_fast::Dtype check(const char* op, const at::Tensor& x) {
  const auto dtype = dtype_of(op, "x", x);
  if (dtype == coconut_fast::Dtype::f64 || !x.device().is_cpu() || !x.is_contiguous())
    refuse(op, ": x is ", describe(x), "; expected a contiguous CPU tensor of Float, BFloat16 or Half");
  check_plain(op, "x", x);
  return dtype;
}

static at::Tensor gelu(const at::Tensor& x) {
  const auto dtype = check("gelu", x);
  at::Tensor y = at::empty_like(x);
  const auto* from = static_cast<const char*>(x.const_data_ptr());
  auto* to = static_cast<char*>(y.mutable_data_ptr());
  const int64_t size = size_of(dtype);
  py::gil_scoped_release release;
  at::parallel_for(0, x.numel(), kGrain, [&](int64_t first, int64_t last) {
    coconut_fast::gelu(from + first * size, to + first * size, dtype, last - first);
  });
  return y;
}

static at::Tensor gelu_backward(const at::Tensor& grad, const at::Tensor& x) {
  const auto dtype = check("gelu_backward", x);
  check_shape("gelu_backward", "grad", grad, x.sizes().vec());
  check_type("gelu_backward", "grad", grad, x.scalar_type());
  at::Tensor grad_x = at::empty_like(x);
  const auto* of = static_cast<const char*>(grad.const_data_ptr());
  const auto* from = static_cast<const char*>(x.const_data_ptr());
  auto* to = static_cast<char*>(grad_x.mutable_data_ptr());
  const int64_t size = size_of(dtype);
  py::gil_scoped_release release;
  at::parallel_for(0, x.numel(), kGrain, [&](int64_t first, int64_t last) {
    coconut_fast::gelu_backward(of + first * size, from + first * size, to + first * size, dtype, last - first);
  });
  return grad_x;
}

void bind_gelu(py::module_& m) {
  m.def("gelu", &gelu, py::arg("x"), "kernels/reference.py: gelu_ref, on CPU.");
  m.def("gelu_backward", &gelu_backward, py::arg("grad"), py::arg("x"),
        "kernels/reference.py: gelu_backward_ref, on CPU.");
}
