"""Every CUDA source as compiled for sm_80 and sm_90a: no spills, no more registers than its launch bound allows."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "csrc" / "cuda"
SOURCES = sorted(CUDA.glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90a")
REGISTERS = 65536  # per SM, on both
NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="there is no nvcc to compile CUDA sources with")


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], str]:
    """The assembler's report by (source, architecture). All are compiled in parallel, 13 s of one core each."""
    folder = tmp_path_factory.mktemp("cuda")
    runs = {}
    for source in SOURCES:
        for arch in ARCHITECTURES:
            command = [str(NVCC), "-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", f"-arch={arch}", "-Xptxas=-v", "-c"]
            command += [str(source), "-o", str(folder / f"{source.stem}_{arch}.o")]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            runs[source.name, arch] = subprocess.Popen(command, **pipes)
    said = {key: run.communicate(timeout=500)[0] for key, run in runs.items()}
    for key, run in runs.items():
        assert run.returncode == 0, f"{key}: {said[key]}"
    return said


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", [s.name for s in SOURCES])
def test_no_spills_and_registers_within_the_launch_bound(reports, source: str, arch: str) -> None:
    report = reports[source, arch]
    assert "warning" not in report, report
    kernels = re.findall(r"Compiling entry function '(\w+)'", report)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    assert kernels and len(kernels) == len(registers) <= len(spills), report
    assert all(set(found) == {"0"} for found in spills), report
    threads = re.search(r"kThreads = (\d+);", (CUDA / "program.h").read_text())
    assert threads and "__launch_bounds__(kThreads, 1)" in (CUDA / source).read_text()
    assert max(registers) <= REGISTERS // int(threads[1]), report


@pytest.mark.parametrize("file", sorted(p.name for p in CUDA.iterdir()))
def test_cuda_sources_know_neither_torch_nor_python(file: str) -> None:
    included = re.findall(r'#include [<"](.*?)[>"]', (CUDA / file).read_text())
    assert all(not re.match(r"(torch|ATen|c10|pybind11|Python)", name) for name in included), included
    assert all((ROOT / "csrc" / name).is_file() for name in included if name.endswith(".h") and "/" in name), included


@needs_nvcc
def test_the_binding_compiles_as_in_a_cuda_build(tmp_path: Path) -> None:
    """Against this torch's headers; a CPU build has all but one, which is generated at configuration."""
    plan = subprocess.run([str(NVCC), "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    found = re.search(r"TOP=(\S+)", plan)
    assert found, plan
    toolkit = Path(found[1]) / "include"
    made = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    made.parent.mkdir(parents=True)
    made.write_text("#define C10_CUDA_BUILD_SHARED_LIBS\n")
    folders = [ROOT / "csrc", *cpp_extension.include_paths(), sysconfig.get_paths()["include"], toolkit, tmp_path]
    command = ["g++", "-std=c++20", "-fsyntax-only", "-DCOCONUT_FAST_WITH_CUDA", "-DTORCH_EXTENSION_NAME=_C"]
    command += [f"-I{folder}" for folder in folders] + [str(ROOT / "csrc" / "bindings_cuda.cpp")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
