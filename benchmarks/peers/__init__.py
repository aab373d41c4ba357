"""What we are measured against. Each peer runs the same weights and the same rows as we do."""

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
    python = os.environ.get("COCONUT_REFERENCE_PYTHON", sys.executable)
    program = Path(__file__).with_name("official.py")
    done = subprocess.run([python, str(program)], input=json.dumps(job), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the official code failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
