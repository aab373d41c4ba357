"""AMX tiles of the native chain: the kernel's own source on emulated tiles, and the real thing where a CPU has them."""

from __future__ import annotations

import copy
import ctypes
import os
import platform
import shutil
import subprocess
import sys
from math import ceil
from pathlib import Path

import pytest
import torch

from coconut_fast import doctor, ops
from coconut_fast.infer import native
from tests.compare import assert_as_good_as_torch
from tests.test_few_rows_linear import draw
from tests.test_native import chains, native_chains, quantised, random_model, wrap
from tests.test_portable import BOUNDS, CHAINS, build, results

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++20", "-O2", "-g", "-pthread", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]
FLAGS += ["-Wno-unknown-pragmas", "-Wno-unused-function"]
EMULATED = ["-include", str(TESTS / "amx_on_cpu.h")]
SEGMENT = 256  # as in pack.cpp
REFUSED = "COCONUT_FAST_ISA is amx, but this machine runs at most avx512_bf16"
ASK = "import ctypes, sys; f = ctypes.CDLL(sys.argv[1]).chosen_isa; f.restype = ctypes.c_char_p; print(f().decode())"

needs_compiler = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"there is no {COMPILER} to compile with")
needs_build = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="tiles are built for x86-64 Linux alone"
)
needs_vectors = pytest.mark.skipif(
    ops.extension().isa() not in ("avx512_bf16", "amx"), reason="needs AVX512-BF16, which every CPU with tiles has"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kernel, packing and choice of the instruction set over emulated tiles. Compiles for some 5 s of one core."""
    path = tmp_path_factory.mktemp("amx") / "amx.so"
    sources = [TESTS / "amx_driver.cpp", *(CSRC / "cpu" / f"{name}.cpp" for name in ("isa", "pack", "memory", "team"))]
    command = [COMPILER, *FLAGS, *EMULATED, "-shared", "-fPIC", *map(str, sources), "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return path


def multiply(library: Path, x: torch.Tensor, w: torch.Tensor, int8: bool = False) -> tuple[torch.Tensor, list[int]]:
    """x (rows, k) times w (n, k) transposed, fp32 -> (rows, n); and the counts of amx_driver.cpp."""
    (rows, k), n = x.shape, len(w)
    out, counts = torch.full((rows, n), float("nan")), (ctypes.c_long * 4)()
    call = ctypes.CDLL(str(library)).multiply
    call.argtypes = [ctypes.c_bool, ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    call.argtypes += [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    call.restype = None
    call(int8, w.data_ptr(), n, k, x.data_ptr(), rows, out.data_ptr(), counts)
    return out, list(counts)


def quantise(x: torch.Tensor, largest: float, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, k) -> integers up to `largest`, and the scale that each `size` of them share: both (rows, k)."""
    peaks = torch.cat([part.abs().amax(1, keepdim=True).expand_as(part) for part in x.split(size, dim=1)], dim=1)
    return torch.round(x * (torch.tensor(largest) / peaks)), peaks / largest  # not largest / peaks, which rounds twice


# Rows in one tile and in several: full, uneven, the last one overlapping. Chunks of 1, 2 and 4 blocks, outputs and
# inputs with padding, a segment and more.
@needs_compiler
@pytest.mark.parametrize("rows", [1, 8, 16, 17, 32, 33, 35, 64, 70])
@pytest.mark.parametrize(("n", "k", "wide"), [(10, 64, 1), (32, 100, 2), (128, 600, 4), (80, 300, 1)])
def test_bf16_products(library: Path, rows: int, n: int, k: int, wide: int) -> None:
    x, w = draw(rows, k), draw(n, k, seed=1)
    x[-1, ::7] = 1e-39  # denormals count as zero
    ours, counts = multiply(library, x, w)
    x, w = x.bfloat16(), w.bfloat16()
    assert_as_good_as_torch(ours, x.float() @ w.float().T, x.double() @ w.double().T)
    chunks, tiles, steps = ceil(n / 16 / wide), ceil(rows / 16), 2 * ceil(k / 64)
    pairs = chunks * ceil(wide / 2)  # two blocks share a load of inputs, two tiles of inputs one of weights
    loads = tiles * pairs + ceil(tiles / 2) * chunks * wide
    assert counts[:3] == [wide, loads * steps, tiles * chunks * wide * steps]
    lines = chunks * wide * steps * 16  # cache lines of all weights; prefetches round each tile's share up
    assert lines <= counts[3] <= 1.25 * lines


@needs_compiler
@pytest.mark.parametrize("rows", [1, 8, 16, 17, 35])
@pytest.mark.parametrize(("n", "k"), [(10, 64), (32, 100), (128, 600), (80, 300)])
def test_int8_products(library: Path, rows: int, n: int, k: int) -> None:
    x, w = draw(rows, k), draw(n, k, seed=1)
    x[0] = x[0].sign() * 3  # all digits at their largest
    ours, counts = multiply(library, x, w, int8=True)
    (x, x_scales), (w, w_scales) = quantise(x, 32512, SEGMENT), quantise(w, 127, k)
    truth = (x.double() * x_scales.double()) @ (w.double() * w_scales.double()).T
    assert_as_good_as_torch(ours, (x * x_scales) @ (w * w_scales).T, truth)
    assert counts[2] == 2 * ceil(rows / 16) * ceil(n / 16 / counts[0]) * counts[0] * ceil(k / 64)  # two digits


@needs_compiler
@pytest.mark.parametrize("int8", [False, True], ids=["bf16", "int8"])
def test_a_row_does_not_depend_on_the_rows_beside_it(library: Path, int8: bool) -> None:
    x, w = draw(70, 300), draw(64, 300, seed=1)
    together, _ = multiply(library, x, w, int8)
    for first, last in ((0, 1), (5, 22), (30, 70)):
        assert torch.equal(multiply(library, x[first:last].clone(), w, int8)[0], together[first:last])


@needs_compiler
@needs_build
@needs_vectors
@pytest.mark.parametrize(
    ("asked", "tiles", "answer"),
    [
        ("", "", "avx512_bf16"),
        ("avx2", "", "avx2"),
        ("amx", "", "amx"),
        ("amx", "absent", REFUSED),
        ("amx", "refused", f"{REFUSED}: Linux refuses it the use of tiles"),
    ],
)
def test_tiles_are_used_where_they_are_asked_for(library: Path, asked: str, tiles: str, answer: str) -> None:
    environment = {**os.environ, "COCONUT_FAST_ISA": asked, "COCONUT_FAST_TILES": tiles}
    command = [sys.executable, "-c", ASK, str(library)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == answer


def test_doctor_names_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.extension(), "has_tiles", lambda: True)
    monkeypatch.setattr(ops.extension(), "isa", lambda: "avx512_bf16")
    assert "AMX tiles, untried so far, with COCONUT_FAST_ISA=amx" in doctor.report("cpu")
    monkeypatch.setattr(ops.extension(), "isa", lambda: "amx")
    shown = doctor.report("cpu")
    assert "native chain, amx, " in shown and "untried" not in shown


@needs_compiler
@needs_build
def test_both_kernels_are_compiled_to_tiles_and_give_them_back(tmp_path: Path) -> None:
    listing = tmp_path / "amx.s"
    command = [COMPILER, "-std=c++20", "-O3", f"-I{CSRC}", "-S", str(CSRC / "cpu" / "kernels_amx.cpp")]
    subprocess.run([*command, "-o", str(listing)], check=True, timeout=500)
    words = [line.split()[0] for line in listing.read_text().splitlines() if line.startswith("\t")]
    assert words.count("tdpbf16ps") >= 4 and words.count("tdpbsud") >= 4
    assert [x for x in words if x in ("ldtilecfg", "tilerelease")] == ["ldtilecfg", "tilerelease"] * 2


@pytest.mark.slow  # compiles all of csrc/cpu twice
@needs_compiler
@needs_build
@needs_vectors
def test_chains_on_emulated_tiles_compute_what_vectors_do(tmp_path: Path) -> None:
    for name in ("vectors", "tiles"):
        (tmp_path / name).mkdir()
    expected = results(build(COMPILER, tmp_path / "vectors"), isa="avx512_bf16")
    found = results(build(COMPILER, tmp_path / "tiles", *EMULATED), isa="amx")
    assert found.keys() == expected.keys() and len(found) == len(CHAINS) * 10 + 4
    for name, values in found.items():
        kind = name.split()[0].split("-")[-1]
        if kind != "bf16":  # int8 has exact sums, and fp32 no tiles
            assert torch.equal(values, expected[name]), name
        elif "tokens" not in name:
            off = (values - expected[name]).abs().max() / expected[name].abs().max().clamp_min(1)
            assert off <= BOUNDS[kind], f"{name}: {off:.2e}"


@pytest.mark.skipif(not ops.extension().has_tiles(), reason="this CPU has no AMX tiles")
@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_chains_on_real_tiles(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COCONUT_FAST_ISA", "amx")
    prompts = [[(7 * i + j) % 99 for j in range(1 + 7 * i % 37)] for i in range(21)]
    counts = [i % 4 for i in range(21)]
    for name in ("gpt2", "qwen3", "qwen3-wide"):
        hf = random_model(name, torch.bfloat16)
        model = native.NativeModel(wrap(hf), weights=weights, threads=2)
        assert model.chain.isa == "amx"
        ours = native_chains(model, prompts, counts)
        exact = copy.deepcopy(hf).double()
        plain, truth = (quantised(m, 0) if weights == "int8" else m for m in (hf, exact))
        what = f"{name} {weights}"
        assert_as_good_as_torch(ours, chains(plain, prompts, counts), chains(truth, prompts, counts), what=what)
