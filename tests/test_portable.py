"""The native chain as plain C++ (chain_driver.cpp): a call allocates nothing, and Arm computes what x86-64 does."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [*sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), ROOT / "csrc" / "cache_layout.cpp"]
DRIVER = Path(__file__).with_name("chain_driver.cpp")
CHAINS = [f"{family}-{weights}" for family in ("gpt2", "llama") for weights in ("fp32", "bf16", "int8")]
# Largest difference, relative to the largest value. Compilers contract other sums to FMA on Arm: 1e-6 was seen after
# five thoughts. A value may then round to the other side in bf16: 4e-4 was seen, a tenth of a unit.
BOUNDS = {"fp32": 1e-5, "int8": 1e-5, "bf16": 4e-3, "attention": 1e-6}
ARM, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"

slow = pytest.mark.slow  # compiling all of csrc/cpu takes 10 to 30 s of one core


def build(compiler: str, folder: Path, *more: str) -> Path:
    objects = [folder / f"{source.stem}.o" for source in (*SOURCES, DRIVER)]
    flags = ["-std=c++20", "-O2", "-pthread", f"-I{ROOT / 'csrc'}", *more, "-c"]
    for source, target in zip((*SOURCES, DRIVER), objects, strict=True):
        subprocess.run([compiler, *flags, str(source), "-o", str(target)], check=True, timeout=500)
    program = folder / "driver"
    subprocess.run([compiler, "-pthread", "-static", *map(str, objects), "-o", str(program)], check=True, timeout=100)
    return program


def results(*command: str | Path, isa: str = "") -> dict[str, torch.Tensor]:
    """ "chain what" -> values."""
    environment = {**os.environ, "COCONUT_FAST_ISA": isa}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert not isa or lines[0] == ["isa", isa]
    return {f"{name} {what}": torch.tensor([float(x) for x in values]) for name, what, *values in lines[1:]}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler} to compile with")
    return build(compiler, tmp_path_factory.mktemp("here"))


def test_the_driver_fits_the_headers() -> None:
    """The tests that run it are slow, so a change of the C++ interfaces would be noticed late."""
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-fsyntax-only", "-fopenmp", f"-I{ROOT / 'csrc'}"]
    if shutil.which(command[0]) is None:
        pytest.skip(f"there is no {command[0]} to compile with")
    done = subprocess.run([*command, str(DRIVER)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]


@slow
@pytest.mark.parametrize("isa", ["", "portable"])
def test_thoughts_and_tokens_allocate_nothing(here: Path, isa: str) -> None:
    found = results(here, isa=isa)
    for chain in CHAINS:
        for call in ("think", "greedy", "sampled", "nucleus"):
            assert found[f"{chain} allocations-{call}"].item() == 0, f"{chain} {call}"


@slow
def test_arm_computes_what_x86_does(here: Path, tmp_path: Path) -> None:
    for program in (ARM, EMULATOR):
        if shutil.which(program) is None:
            pytest.skip(f"there is no {program}")
    expected, found = results(here, isa="portable"), results(EMULATOR, build(ARM, tmp_path), isa="portable")
    assert found.keys() == expected.keys() and len(found) == len(CHAINS) * 10 + 4
    for name, values in found.items():
        kind = name.split()[0].split("-")[-1]
        if "tokens" in name:
            assert kind == "bf16" or torch.equal(values, expected[name]), name
        else:
            off = (values - expected[name]).abs().max() / expected[name].abs().max().clamp_min(1)
            assert off <= BOUNDS[kind], f"{name}: {off:.2e}"  # also false for NaN
