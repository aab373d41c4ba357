"""Shared fixtures: paths of the optional test data, and seeds."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which importing torch does not do
if not os.access(Path.home(), os.W_OK):  # triton compiles nothing where it cannot make ~/.triton
    os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"triton-{os.getuid()}"))


def _patch_the_language_once_per_launch() -> None:
    """The interpreter replaces the functions of triton.language for every call of a device function, which takes more
    than half of a kernel's time, although they stay replaced until the launch ends."""
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[str] = set()  # the modules whose functions this launch has called

    def patch_once(function: Any) -> Any:
        if function.__module__ in patched:
            return None
        patched.add(function.__module__)
        return patch(function)

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_anew


if os.environ.get("TRITON_INTERPRET") == "1":
    _patch_the_language_once_per_launch()

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("COCONUT_FAST_TEST_DATA", ROOT.parent / "shared"))


def _folder(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"optional test data is absent: {folder}")
    return folder


@pytest.fixture
def golden() -> Path:
    """Numbers of the official implementation."""
    return _folder("golden")


@pytest.fixture
def prosqa_sets() -> Path:
    """The released ProsQA validation and test sets."""
    return _folder("prosqa")


@pytest.fixture
def device() -> torch.device:
    """Where Triton kernels run: on the GPU where there is one, else in the interpreter on the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The persistent kernel's source, compiled for the CPU."""
    from tests.persistent_setup import compile_kernel

    return compile_kernel(tmp_path_factory.mktemp("persistent"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """PyTorch computes with one thread, so that two trainings can be equal bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["portable", "avx2", "avx512", "avx512_bf16"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test once for each instruction set of this machine, which the C++ kernels then use."""
    from coconut_fast import ops

    monkeypatch.setenv("COCONUT_FAST_ISA", request.param)
    try:
        ops.extension().isa()
    except ValueError:
        pytest.skip(f"this machine has no {request.param}")
    return request.param


@pytest.fixture(params=["eager", "chosen"])
def runner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test twice: on the eager runner, and on the one the engine chooses (the native chain where possible)."""
    if request.param == "eager":
        from coconut_fast.infer import engine
        from coconut_fast.infer.eager import EagerRunner

        monkeypatch.setattr(engine, "choose_runner", lambda model: (EagerRunner, "asked for"))
    return request.param


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call acquires the model's graph runner, as on a GPU."""
    from coconut_fast.infer import engine, runner_cache

    monkeypatch.setattr(engine, "choose_runner", lambda model: (runner_cache.acquire, "asked for"))
