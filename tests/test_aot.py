"""Resources of every Triton kernel as compiled for sm_80 and sm_90: no spills, bounded registers, wide loads; passes of
several rows also for GPUs with less shared memory per block.

The bounds are the ones the kernel files state: a docstring that says "Registers at most N" or "128-bit" is held to it.
The compilation runs in a separate process, since this one may have loaded triton as an interpreter.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import triton

ROOT = Path(__file__).resolve().parents[1]
KERNELS = [p for p in (ROOT / "kernels").glob("*.py") if "@triton.jit" in p.read_text()]
OPS = sorted(p.stem for p in KERNELS if p.stem != "common")
# bytes of shared memory per block: A100, 4090, H100, 5090
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}


LINEAR = {1: "_linear", 8: "_linear_dot", 64: "_linear_wide"}  # by the number of rows


def spilled(found: dict) -> int:
    """Bytes spilled for want of registers. Not the 8 that the assembler of Triton 3.8 (on sm_120 also that of 3.7)
    spills by its own choice, to stay within 56, 72 or 80 registers, so that one more block is resident."""
    chooses = found["capability"] == 120 or tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)
    return 0 if chooses and found["spilled"] <= 8 and found["registers"] <= 80 else found["spilled"]


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    attention = [op for op in OPS if "attention" in op]
    others = [op for op in OPS if op not in attention]
    parts = [attention, others, ["fused_pass"]]  # about half a minute of one core each
    command = [sys.executable, "-m", "tests.aot"]
    with tempfile.TemporaryFile("w+") as errors:
        runs = [
            subprocess.Popen(
                [*command, *ops], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
            )
            for ops in parts
        ]
        lines = [line for run in runs for line in run.communicate(timeout=550)[0].splitlines()]
        errors.seek(0)
        assert all(run.returncode == 0 for run in runs), errors.read()[-3000:]
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("op", OPS)
def test_resources(compiled, op) -> None:
    doc = importlib.import_module(f"coconut_fast.kernels.{op}").__doc__
    bound = re.search(r"[Rr]egisters at most (\d+)", doc)
    assert bound, f"kernels/{op}.py states no bound on its registers"
    mine = [found for found in compiled if found["case"].split("/")[0] == op and "kernel" in found]
    assert {found["capability"] for found in mine} == {80, 90}, f"{op} has no case in aot_cases.py for both"
    for found in mine:
        assert spilled(found) == 0, found
        assert found["registers"] <= int(bound[1]), found
        assert found["shared"] <= SHARED[found["capability"]], found
    if "128-bit" in doc:  # the streaming launch of a case; a reduction of partial results may do without
        for case in {found["case"] for found in mine}:
            assert any(found["vector_loads"] for found in mine if found["case"] == case), case


@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize("shape", ["gpt2", "llama1b"])
def test_fused_passes(compiled, shape, rows) -> None:
    """The launches of a chain of two thoughts and of a token pass, over two layers of the real model."""
    cases = [f"fused_pass/{shape}/bfloat16/{rows}/{kind}" for kind in ("think", "decode")]
    mine = [found for found in compiled if found["case"] in cases]
    names = {found["case"].split("/")[-1]: found["launches"] for found in mine if "launches" in found}
    layer = [LINEAR[rows], "_decode", LINEAR[rows], LINEAR[rows], LINEAR[rows]]
    if rows > 16 and shape == "gpt2":
        layer = ["_norm", "_linear_wide", "_decode", "_linear_wide", "_norm", "_linear_wide", "_linear_wide"]
    elif rows > 16:  # two products of a layer go to cuBLAS, whose launches are not recorded
        layer = ["_norm", "_linear_wide", "_decode_group", "_linear_wide", "_norm", "_activate"]
    last = [] if rows <= 16 else ["_norm"]
    assert names["think"] == [*["_feed", *layer, *layer, *last] * 2, "_feed"]
    assert names["decode"] == ["_feed", *layer, *layer, *last, "_norm", "_head", "_largest", "_accept"]
    built = [found for found in mine if "kernel" in found]
    assert {found["capability"] for found in built} == ({80, 90} if rows == 1 else {80, 89, 90, 120})
    for found in built:
        assert spilled(found) == 0 and found["registers"] <= 255, found
        assert found["shared"] <= SHARED[found["capability"]], found
        assert found["overlaps"] == found["waits"] == (found["capability"] >= 90), found
        if found["overlaps"]:
            assert found["written_ahead"] == 0, f"a write ahead of the wait races with the kernel before: {found}"
            ahead = found["kernel"].startswith(("_linear", "_decode"))
            assert (found["read_ahead"] > 0) == ahead, f"only weights and the cache are read ahead of the wait: {found}"
    streams = [found for found in built if found["kernel"] not in ("_activate", "_largest", "_accept")]
    assert streams and all(found["vector_loads"] for found in streams), "weights, cache and states move in 128 bits"


@pytest.mark.parametrize("tokens", [64, 16384])
@pytest.mark.parametrize("shape", ["gpt2", "llama1b"])
def test_reading_prompts(compiled, shape, tokens) -> None:
    mine = [found for found in compiled if found["case"] == f"fused_pass/{shape}/bfloat16/{tokens}/prefill"]
    names = next(found["launches"] for found in mine if "launches" in found)
    few = "_decode_group" if shape == "llama1b" and tokens > 64 else "_decode"  # by rows: 64 tokens are one row
    first, last = (["_norm", "_append", attend, "_norm", "_activate"] for attend in ("_forward", few))
    assert names == ["_feed", *first, *last, "_norm", "_norm"]
    for found in mine:
        if "kernel" in found:
            assert spilled(found) == 0 and found["vector_loads"], found
            assert found["shared"] <= SHARED[found["capability"]], found
