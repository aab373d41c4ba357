"""One training step (forward, backward, AdamW) against the official code and Hugging Face's step without thoughts.

    COCONUT_REFERENCE=... COCONUT_REFERENCE_PYTHON=... pytest benchmarks/bench_train.py

Each measurement runs in a process of its own (benchmarks/train_step.py), so that peak memory is its own; time is the
best of five steps, as memory settles by the fourth (one or two steps for the official code). Correctness first: the
first fp32 loss must agree with the official one to 1e-5.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import official, official_missing
from benchmarks.shapes import DEVICE, make_hf, make_rows
from benchmarks.train_step import EITHER, OWN, SAVINGS
from coconut_fast import ops

GPT2 = {"shape": "gpt2", "rows": 8, "length": 330, "thoughts": 6, "labelled": 14}
GSM8K = GPT2 | {"rows": 128, "length": 60, "labelled": 40}
GRAPHS = {"shape": "superposition", "rows": 32, "length": 110, "thoughts": 4, "labelled": 2}
RUN = 300 * 14_785  # graphs seen in the superposition paper's training
OFFICIAL_LIMIT = 30 if DEVICE == "cuda" else 120  # seconds that a step of 128 graphs may take the official code
# name: the job, how many of its rows the official code is timed on, and for how many seconds at most. Its cost grows
# with the square of the rows: a scaled-up part of them and a step that did not end in time both understate it.
WORKLOADS = {
    "GPT-2 124M, 8 ProsQA rows, 6 thoughts": (GPT2, 8, None),
    "GPT-2 124M, 128 GSM8k rows, 6 thoughts": (GSM8K, 16, None),
    "2 layers of 768, 32 graphs, 4 thoughts": (GRAPHS, 32, None),
    "2 layers of 768, 128 graphs, 4 thoughts": (GRAPHS | {"rows": 128}, 128, OFFICIAL_LIMIT),
}
DTYPES = ["float32", "bfloat16"]
STEP_TOKENS = 14  # per written reasoning step; a stage turns one step into a thought


@functools.cache
def _step(job: str) -> dict[str, Any]:
    program = Path(__file__).with_name("train_step.py")
    done = subprocess.run([sys.executable, str(program)], input=job, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def step(who: str = "ours", dtype: str = "float32", **job: Any) -> dict[str, Any]:
    """benchmarks/train_step.py in a fresh process: seconds, losses, peak_bytes. A job runs once per session."""
    return _step(json.dumps({"who": who, "dtype": dtype, **job}, sort_keys=True))


def gigabytes(result: dict[str, Any]) -> str:
    return f"{result['peak_bytes'] / 1e9:.2f} GB"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_train_step(benchmark, figures, tmp_path: Path, workload: str, dtype: str) -> None:
    job, timed, limit = WORKLOADS[workload]
    if "GSM8k" in workload and DEVICE == "cpu":
        pytest.skip("takes a GPU")
    ours = benchmark.pedantic(step, kwargs={"dtype": dtype, **job}, rounds=1)
    plain = step("hugging_face", dtype, **job)
    peers, note = {"hf_plain": plain["seconds"]}, f"{gigabytes(ours)}, plain {gigabytes(plain)}"
    if job["shape"] == "superposition":
        note += f", the paper's run at this rate {RUN / job['rows'] * ours['seconds'] / 60:.0f} min"
    if official_missing() is None:
        hf = make_hf(job["shape"])
        hf.save_pretrained(tmp_path)
        vocab = hf.config.vocab_size
        rows, labels = make_rows(vocab, job["rows"], job["length"], job["thoughts"], job["labelled"])
        # AdamW's state is part of the peak from the second step on; where only time is wanted one step will do.
        whole = timed == job["rows"] and limit is None
        theirs = official(
            "train",
            tmp_path,
            vocab_size=vocab,
            dtype=dtype,
            rows=rows[:timed],
            labels=labels[:timed],
            rounds=2 if whole and dtype == "float32" else 1,
            limit=limit,
        )
        if whole and dtype == "float32":
            assert abs(ours["losses"][0] / theirs["losses"][0] - 1) < 1e-5, "the losses differ: nothing is timed"
            note += f", official {gigabytes(theirs)}"
        name = "official" if timed == job["rows"] else f"official_{timed}_rows_scaled"
        peers[name if theirs.get("ended", True) else "official_not_ended"] = theirs["seconds"] * job["rows"] / timed
    figures.add(f"step {dtype}: {workload}", ours["seconds"], note=note, **peers)


@pytest.mark.parametrize("thoughts", [0, 1, 6, 32])
def test_thoughts_cost(benchmark, figures, thoughts: int) -> None:
    """Step time and memory by number of thoughts, against the same step without any."""
    ours = benchmark.pedantic(step, kwargs=GPT2 | {"thoughts": thoughts}, rounds=1)
    none = step(**GPT2 | {"thoughts": 0})
    note = f"{gigabytes(ours)}, {ours['peak_bytes'] / none['peak_bytes']:.2f} times that of none"
    figures.add(
        f"step float32: GPT-2 124M, 8 rows, {thoughts} thoughts",
        ours["seconds"],
        note=note,
        no_thoughts=none["seconds"],
    )


@pytest.mark.parametrize("stage", [0, 3])
def test_stages(benchmark, figures, stage: int) -> None:
    """ProsQA's curriculum: six steps of reasoning, the first `stage` of them thoughts, the others written and learned.

    Stage 6 is the first workload of `test_train_step`.
    """
    written = GPT2["labelled"] + (6 - stage) * STEP_TOKENS
    ours = benchmark.pedantic(step, kwargs=GPT2 | {"thoughts": stage, "labelled": written}, rounds=1)
    last = step(**GPT2)
    figures.add(
        f"step float32: GPT-2 124M, 8 rows, stage {stage}",
        ours["seconds"],
        note=gigabytes(ours),
        stage_6=last["seconds"],
    )


@pytest.mark.parametrize("rounds", [1, 3, 8])
def test_parallel_rounds(benchmark, figures, rounds: int) -> None:
    """32 thoughts refined in Jacobi rounds: what the step costs, and how its loss differs from sequential thoughts."""
    job = GPT2 | {"thoughts": 32}
    ours = benchmark.pedantic(step, kwargs=job | {"parallel_rounds": rounds}, rounds=1)
    sequential = step(**job)
    note = f"{gigabytes(ours)}, loss {ours['losses'][0]:.6f} (one by one {sequential['losses'][0]:.6f})"
    figures.add(
        f"step float32: 32 thoughts in {rounds} rounds", ours["seconds"], note=note, one_by_one=sequential["seconds"]
    )


@pytest.mark.parametrize("without", SAVINGS)
def test_ablation(benchmark, figures, without: str) -> None:
    """What each saving is worth: our own fp32 step with one of them switched off."""
    on_cpu = DEVICE == "cpu"
    if not {OWN: on_cpu and ops.extension().gemm_runs(), EITHER: on_cpu}.get(without, True):
        pytest.skip("a step here has nothing of it")
    job = GPT2 | {"rows": 4}
    ours = benchmark.pedantic(step, kwargs=job, rounds=1)
    off = step(**job, without=without)
    note = f"{gigabytes(ours)}, without {gigabytes(off)}"
    figures.add(f"step float32: 4 rows, without {without}", ours["seconds"], note=note, without=off["seconds"])
