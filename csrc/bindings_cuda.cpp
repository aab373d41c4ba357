// Binds the CUDA kernels (csrc/cuda/): the only file that knows both torch and CUDA. Empty in a build without CUDA.
#include "bindings.h"

#ifndef COCONUT_FAST_WITH_CUDA

void bind_cuda(py::module_&) {}

#else

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <map>
#include <type_traits>

#include "cuda/program.h"

using namespace coconut_fast;

template <class T>
static at::ScalarType element(at::ScalarType storage) {
  if (std::is_void_v<T>) return storage;
  if (std::is_same_v<T, float>) return at::kFloat;
  if (std::is_same_v<T, int64_t>) return at::kLong;
  return std::is_same_v<T, Layer> ? at::kByte : at::kInt;
}

// The dtype of the tensor that pointer argument `name` refers to; Undefined if there is no such argument.
static at::ScalarType dtype_of(const std::string& name, at::ScalarType storage) {
#define COCONUT_FAST_POINTER(type, field) \
  if (name == #field) return element<std::remove_const_t<type>>(storage);
  COCONUT_FAST_POINTERS(COCONUT_FAST_POINTER)
#undef COCONUT_FAST_POINTER
  return at::ScalarType::Undefined;
}

static void persistent_launch(const std::map<std::string, at::Tensor>& tensors,
                              const std::map<std::string, double>& numbers, int blocks, int threads) {
  const char* op = "persistent_launch";
  const auto hidden = tensors.find("hidden");
  if (hidden == tensors.end()) refuse(op, ": tensors has no \"hidden\"");
  const at::Device device = hidden->second.device();
  const auto bf16 = numbers.find("bf16");
  const at::ScalarType storage = bf16 != numbers.end() && bf16->second ? at::kBFloat16 : at::kFloat;
  Arguments arguments{};
  for (const auto& [name, tensor] : tensors) {
    if (!tensor.is_cuda() || tensor.device() != device || !tensor.is_contiguous())
      refuse(op, ": ", name, " is ", describe(tensor), tensor.is_contiguous() ? "" : ", not contiguous",
             "; expected a contiguous tensor on ", device.is_cuda() ? device.str() : "a CUDA device");
    if (!set_pointer(arguments, name.c_str(), tensor.data_ptr())) refuse(op, ": there is no tensor ", name);
    const at::ScalarType expected = dtype_of(name, storage);
    if (tensor.scalar_type() != expected) refuse(op, ": ", name, " is ", describe(tensor), "; expected ", expected);
  }
  for (const auto& [name, value] : numbers)
    if (!set_number(arguments, name.c_str(), value)) refuse(op, ": there is no number ", name);
  const c10::cuda::CUDAGuard guard(device);
  const char* error = coconut_fast_persistent(&arguments, blocks, threads, c10::cuda::getCurrentCUDAStream().stream());
  if (error) throw std::runtime_error(std::string(op) + ": " + error);
}

void bind_cuda(py::module_& m) {
  m.def("persistent_launch", &persistent_launch, py::arg("tensors"), py::arg("numbers"), py::arg("blocks"),
        py::arg("threads"),
        "Runs a schedule of the persistent kernel on the current stream. tensors and numbers: the arguments of "
        "csrc/cuda/program.h by name; coconut_fast/infer/persistent.py is the caller. RuntimeError where the device "
        "cannot take the launch.");
}

#endif
