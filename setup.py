"""Builds coconut_fast._C with torch's extension builder: C++ always, CUDA where nvcc and a CUDA torch are.

Everything else about the package stands in pyproject.toml.
"""

import os
import re
import subprocess
import sys
from glob import glob

import torch
from setuptools import find_packages, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

OPTIMISE = ["-O3", "-std=c++20"]
# at::parallel_for runs on torch's threads only where OpenMP is on. It is not linked: torch brings its own runtime.
THREADS = ["-pthread"] if sys.platform == "darwin" else ["-pthread", "-fopenmp"]


def why_no_cuda() -> str:
    """The reason the CUDA kernels cannot be built here; empty where they can."""
    if not glob("csrc/cuda/*.cu"):
        return "there are no CUDA sources"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    nvcc = os.path.join(CUDA_HOME or "", "bin", "nvcc")
    if not os.path.exists(nvcc):
        return "there is no nvcc (set CUDA_HOME)"
    release = re.search(r"release ([\d.]+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    found = release[1] if release else "of unknown version"
    if found.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc is {found}, torch is built for CUDA {torch.version.cuda}"
    return ""


def extension() -> CppExtension:
    sources = ["csrc/bindings.cpp", *sorted(glob("csrc/*.cpp")), *sorted(glob("csrc/cpu/*.cpp"))]
    common = {
        "include_dirs": [os.path.abspath("csrc")],
        "depends": [file for file in glob("csrc/**", recursive=True) if os.path.isfile(file)],
        "extra_link_args": ["-pthread"],
    }
    reason = why_no_cuda()
    if reason:
        print(f"coconut_fast: building without CUDA kernels: {reason}")
        macros = [("COCONUT_FAST_NO_CUDA_REASON", f'"{reason}"')]
        flags = {"cxx": [*OPTIMISE, *THREADS, "-fvisibility=hidden"]}
        return CppExtension(
            "coconut_fast._C", list(dict.fromkeys(sources)), define_macros=macros, extra_compile_args=flags, **common
        )
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    sources += sorted(glob("csrc/cuda/*.cu"))
    flags = {
        "cxx": [*OPTIMISE, *THREADS, "-fvisibility=hidden"],
        "nvcc": [*OPTIMISE, "-lineinfo", "-Xcompiler=-fvisibility=hidden"],
    }
    macros = [("COCONUT_FAST_WITH_CUDA", None)]
    return CUDAExtension(
        "coconut_fast._C", list(dict.fromkeys(sources)), define_macros=macros, extra_compile_args=flags, **common
    )


setup(
    packages=[*find_packages(include=["coconut_fast*"]), "coconut_fast.kernels"],
    package_dir={"coconut_fast.kernels": "kernels"},
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExtension.with_options(no_python_abi_suffix=False)},
)
