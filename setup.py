"""Builds coconut_fast._C with torch's extension builder: C++ always, CUDA where nvcc and a CUDA build of torch exist.

Everything else about the package is in pyproject.toml, except its dependencies: a wheel only runs with the torch it was
built against, so it requires exactly that one.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from glob import glob

import torch
from setuptools import find_packages, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

OPTIMISE = ["-O3", "-std=c++20"]
# at::parallel_for runs on torch's threads only with OpenMP. It is not linked: torch brings its own runtime.
CXX = [*OPTIMISE, "-pthread", "-fopenmp", "-fvisibility=hidden"]
NVCC = [*OPTIMISE, "-lineinfo", "-Xcompiler=-fvisibility=hidden"]
ARCHITECTURES = "8.0;9.0+PTX"  # where there is no GPU to query
# Python's own flags ask for debug information, 20 MB of it. CFLAGS can turn it on again.
os.environ["CFLAGS"] = f"-g0 {os.environ.get('CFLAGS', '')}"
# torch looks for ninja only on PATH, which lacks that of an environment that is not activated (`make`). Without ninja,
# files are compiled one after the other, and all of them after any change.
os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), os.path.dirname(sys.executable)])

TORCH = re.match(r"\d+\.\d+", torch.__version__)[0]
TRITON = {"2.11": "3.6", "2.12": "3.7", "2.13": "3.7", "2.14": "3.8"}  # torch requires it only if built for a GPU
if TORCH not in TRITON:
    sys.exit(f"coconut_fast: torch {torch.__version__} is installed, 2.11 to 2.14 is needed")
DEPENDENCIES = [
    f"torch=={TORCH}.*",
    f"triton=={TRITON[TORCH]}.*; platform_system == 'Linux'",
    "transformers>=5.17",
    "accelerate>=1.1",
    "tokenizers>=0.22",
    "safetensors>=0.4.3",
    "numpy>=1.26",
    "psutil>=5.9",
    "pyyaml>=6.0",
    "tqdm>=4.66",
    "matplotlib>=3.8",
]


def why_no_cuda() -> str:
    """The reason the CUDA kernels cannot be built here; empty where they can."""
    if not glob("csrc/cuda/*.cu"):
        return "there are no CUDA sources"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    nvcc = os.path.join(CUDA_HOME or "", "bin", "nvcc")
    if not os.path.exists(nvcc):
        return "there is no nvcc (set CUDA_HOME)"
    if not (glob(f"{CUDA_HOME}/include/cuda_runtime.h") or glob(f"{CUDA_HOME}/targets/*/include/cuda_runtime.h")):
        return f"{CUDA_HOME} has an nvcc and no cuda_runtime.h (set CUDA_HOME to the toolkit itself)"
    release = re.search(r"release ([\d.]+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    found = release[1] if release else "of unknown version"
    if found.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc is {found}, torch is built for CUDA {torch.version.cuda}"
    return ""


class Build(BuildExtension):
    """Reports a missing compiler in one line instead of a page of errors."""

    def run(self) -> None:
        compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
        if not shutil.which(compiler):
            sys.exit(f"coconut_fast: no C++ compiler {compiler!r} is found (CXX names one); GCC 11 or later is needed")
        super().run()


def extension() -> CppExtension:
    """The C++ module, with the CUDA kernels where they can be built; otherwise it records why not."""
    sources = sorted([*glob("csrc/*.cpp"), *glob("csrc/cpu/*.cpp")])
    shared = {
        "include_dirs": [os.path.abspath("csrc")],
        "depends": [file for file in glob("csrc/**", recursive=True) if os.path.isfile(file)],
        "extra_link_args": ["-pthread"],
    }
    reason = why_no_cuda()
    if reason:
        print(f"coconut_fast: building without CUDA kernels: {reason}", file=sys.stderr)
        shared["define_macros"] = [("COCONUT_FAST_NO_CUDA_REASON", f'"{reason}"')]
        return CppExtension("coconut_fast._C", sources, extra_compile_args={"cxx": CXX}, **shared)
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    sources += sorted(glob("csrc/cuda/*.cu"))
    shared["define_macros"] = [("COCONUT_FAST_WITH_CUDA", None)]
    return CUDAExtension("coconut_fast._C", sources, extra_compile_args={"cxx": CXX, "nvcc": NVCC}, **shared)


setup(
    install_requires=DEPENDENCIES,
    packages=[*find_packages(include=["coconut_fast*"]), "coconut_fast.kernels", "coconut_fast.recipes"],
    package_dir={"coconut_fast.kernels": "kernels", "coconut_fast.recipes": "recipes"},
    package_data={"coconut_fast": ["py.typed"], "coconut_fast.recipes": ["*.yaml"]},
    ext_modules=[extension()],
    cmdclass={"build_ext": Build},
)
