// Binds the CUDA kernels (csrc/cuda/): the one file that knows both torch and CUDA. Empty in a build without.
#include "bindings.h"

#ifndef COCONUT_FAST_WITH_CUDA

void bind_cuda(py::module_&) {}

#else

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <map>

#include "cuda/program.h"

using namespace coconut_fast;

static void persistent_launch(const std::map<std::string, at::Tensor>& tensors,
                              const std::map<std::string, double>& numbers, int blocks, int threads) {
  const char* op = "persistent_launch";
  const auto hidden = tensors.find("hidden");
  if (hidden == tensors.end()) refuse(op, ": tensors has no \"hidden\"");
  const at::Device device = hidden->second.device();
  Arguments arguments{};
  for (const auto& [name, tensor] : tensors) {
    if (!tensor.is_cuda() || tensor.device() != device || !tensor.is_contiguous())
      refuse(op, ": ", name, " is ", describe(tensor), tensor.is_contiguous() ? "" : ", not contiguous",
             "; expected a contiguous tensor on ", device, ", a CUDA device");
    if (!set_pointer(arguments, name.c_str(), tensor.data_ptr())) refuse(op, ": there is no tensor ", name);
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
