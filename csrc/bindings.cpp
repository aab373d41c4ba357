// The one file that knows torch and Python: everything else in csrc/ is plain C++ (or CUDA) on raw pointers.
// One `static void bind_<area>(py::module_&)` per area, called at the end.

#include <ATen/ATen.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

namespace py = pybind11;

// ---- build --------------------------------------------------------------------------------------------------------

static py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["cxx"] = static_cast<long>(__cplusplus);
  info["torch"] = TORCH_VERSION;
#ifdef COCONUT_FAST_WITH_CUDA
  info["cuda"] = true;
  info["cuda_reason"] = "";
#else
  info["cuda"] = false;
  info["cuda_reason"] = COCONUT_FAST_NO_CUDA_REASON;
#endif
  return info;
}

static void bind_build(py::module_& m) {
  m.def("build_info", &build_info,
        "What this module was built with: compiler, C++ standard, torch version, and whether (or why not) with CUDA.");
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "The C++ half of coconut_fast: cache layout, CPU kernels, and CUDA kernels where they were built.";
  bind_build(m);
}
