"""The peers we are measured against. Each runs the same weights and the same rows as we do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.shapes import DEVICE, make_tokens


def official_missing() -> str | None:
    """Why the official code cannot be measured here; None where it can."""
    checkout = os.environ.get("COCONUT_REFERENCE")
    if not checkout:
        return "COCONUT_REFERENCE names no checkout of the official code"
    if not (Path(checkout) / "coconut.py").is_file():
        return f"COCONUT_REFERENCE={checkout} holds no coconut.py"
    return None


def llama_missing() -> str | None:
    """Why llama.cpp cannot be measured here; None where it can."""
    if not os.environ.get("COCONUT_LLAMA_PYTHON"):
        return "COCONUT_LLAMA_PYTHON names no interpreter with llama_cpp, gguf and safetensors"
    return None


def official(work: str, model: Path, *, vocab_size: int, dtype: str, rounds: int = 1, **job: Any) -> dict[str, Any]:
    """Runs benchmarks/peers/official.py; work: "generate" or "train". RuntimeError with its output where it fails."""
    tokens = make_tokens(vocab_size)
    job |= {
        "work": work,
        "checkout": os.environ["COCONUT_REFERENCE"],
        "model": str(model),
        "dtype": dtype,
        "device": DEVICE,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "thought": tokens.thought,
        "start": tokens.start,
        "end": tokens.end,
    }
    return _run("official.py", os.environ.get("COCONUT_REFERENCE_PYTHON", sys.executable), job)


def llama_cpp(model: Path, *, weights: str, prompts: list[list[int]], thoughts: int, rounds: int = 5) -> dict[str, Any]:
    """Runs benchmarks/peers/llama_cpp.py on a GPT-2 saved in fp32: seconds of a latent and of a token pass.

    weights: "fp32", "bf16" or "int8" (Q8_0). prompts: one per row of the batch, all of one length, of small ids.
    """
    job = {"model": str(model), "format": weights, "prompts": prompts, "thoughts": thoughts, "rounds": rounds}
    return _run("llama_cpp.py", os.environ["COCONUT_LLAMA_PYTHON"], job | {"threads": torch.get_num_threads()})


def _run(program: str, python: str, job: dict[str, Any]) -> dict[str, Any]:
    """Runs a program of this folder under another interpreter: a job in, its last line out, both JSON."""
    path = Path(__file__).with_name(program)
    done = subprocess.run([python, str(path)], input=json.dumps(job), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{program} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
