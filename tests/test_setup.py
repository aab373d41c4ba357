"""setup.py: why the CUDA kernels cannot be built, in one line, with stand-ins for nvcc and a CUDA torch."""

from __future__ import annotations

import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import setuptools
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], str]:
    """why_no_cuda of a machine whose toolkit is tmp_path and whose torch is built for CUDA 13.0."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    namespace = runpy.run_path(str(ROOT / "setup.py"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setitem(namespace["why_no_cuda"].__globals__, "CUDA_HOME", str(tmp_path))
    return namespace["why_no_cuda"]


def toolkit(folder: Path, release: str, headers: str | None) -> None:
    (folder / "bin").mkdir(exist_ok=True)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)
    if headers is not None:
        (folder / headers).mkdir(parents=True, exist_ok=True)
        (folder / headers / "cuda_runtime.h").touch()


def test_reasons(why: Callable[[], str], tmp_path: Path) -> None:
    assert why() == "there is no nvcc (set CUDA_HOME)"
    toolkit(tmp_path, "13.1", None)  # as when /usr/local/bin/nvcc calls the toolkit's
    assert why() == f"{tmp_path} has an nvcc and no cuda_runtime.h (set CUDA_HOME to the toolkit itself)"
    toolkit(tmp_path, "12.8", "include")
    assert why() == "nvcc is 12.8, torch is built for CUDA 13.0"


@pytest.mark.parametrize("headers", ["include", "targets/x86_64-linux/include"])
def test_a_toolkit_of_the_same_major_builds(headers: str, why: Callable[[], str], tmp_path: Path) -> None:
    toolkit(tmp_path, "13.1", headers)
    assert why() == ""


def test_a_torch_without_cuda_is_said(why: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert why() == f"torch {torch.__version__} is built without CUDA"


def test_ninja_of_an_environment_that_is_not_activated_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ninja = tmp_path / "bin" / "ninja"
    ninja.parent.mkdir()
    ninja.write_text("#!/bin/sh\necho 1.13.0")
    ninja.chmod(0o755)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setattr(sys, "executable", str(ninja.with_name("python")))
    monkeypatch.setenv("PATH", "/bin/without/ninja")
    runpy.run_path(str(ROOT / "setup.py"))
    assert shutil.which("ninja") == str(ninja)
