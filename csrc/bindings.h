// Shared by the bindings: the list of areas, and checks of tensor arguments, which raise ValueError.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/utils/pybind.h>

#include <sstream>
#include <string>
#include <vector>

#include "cpu/dtype.h"

namespace py = pybind11;

void bind_attention(py::module_& m);
void bind_native(py::module_& m);
void bind_gelu(py::module_& m);
void bind_gemm(py::module_& m);
void bind_linear(py::module_& m);
void bind_memory(py::module_& m);
void bind_cuda(py::module_& m);

inline std::string describe(const at::Tensor& t) {
  std::ostringstream text;
  text << t.scalar_type() << " " << t.sizes() << " on " << t.device();
  return text.str();
}

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw py::value_error(text.str());
}

// The kernels read raw memory. Subclasses with their own dispatch (DTensor, FakeTensor) and torch.func tensors report
// the CPU but may have no memory, or none that holds their values; that of a lazily negated view has the wrong sign.
inline void check_plain(const char* op, const char* name, const at::Tensor& t) {
  constexpr c10::DispatchKeySet elsewhere{c10::DispatchKey::Python, c10::DispatchKey::Functionalize,
                                          c10::DispatchKey::Negative, c10::DispatchKey::Conjugate};
  if (t.key_set().has_any(elsewhere) || !t.has_storage() || (t.numel() > 0 && !t.const_data_ptr()))
    refuse(op, ": ", name, " is ", describe(t), " with no memory that holds its values (a DTensor or other subclass, a "
           "tensor of torch.func, a lazily negated view); expected a plain tensor");
}

// Requires a contiguous CPU tensor of `shape`, where -1 stands for any size.
inline void check_shape(const char* op, const char* name, const at::Tensor& t, const std::vector<int64_t>& shape) {
  bool fits = t.device().is_cpu() && t.is_contiguous() && t.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = shape[i] < 0 || t.size(i) == shape[i];
  if (!fits)
    refuse(op, ": ", name, " is ", describe(t), t.is_contiguous() ? "" : ", not contiguous",
           "; expected a contiguous CPU tensor of shape ", at::IntArrayRef(shape), " (-1: any)");
  check_plain(op, name, t);
}

inline void check_type(const char* op, const char* name, const at::Tensor& t, at::ScalarType type) {
  if (t.scalar_type() != type) refuse(op, ": ", name, " is ", t.scalar_type(), "; expected ", type);
}

inline coconut_fast::Dtype dtype_of(const char* op, const char* name, const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return coconut_fast::Dtype::f32;
    case at::kBFloat16: return coconut_fast::Dtype::bf16;
    case at::kHalf: return coconut_fast::Dtype::f16;
    case at::kDouble: return coconut_fast::Dtype::f64;
    default: refuse(op, ": ", name, " is ", t.scalar_type(), "; expected Float, BFloat16, Half or Double");
  }
}
