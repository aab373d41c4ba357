"""One training step (forward, backward, AdamW) against the official code and Hugging Face's step without thoughts.

    COCONUT_REFERENCE=... COCONUT_REFERENCE_PYTHON=... pytest benchmarks/bench_train.py

Each measurement runs in a process of its own (benchmarks/train_step.py), so that peak memory is its own.
Correctness first: the first fp32 loss must agree with the official one to 1e-5.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.peers import official, official_missing
from benchmarks.shapes import make_hf, make_rows

# name: shape, rows, prompt tokens, thoughts, labelled tokens, whether the official code is timed
WORKLOADS = {
    "GPT-2 124M, 8 ProsQA rows, 6 thoughts": ("gpt2", 8, 330, 6, 14, True),
    "2 layers of 768, 32 graphs, 4 thoughts": ("superposition", 32, 110, 4, 2, True),
    "2 layers of 768, 128 graphs, 4 thoughts": ("superposition", 128, 110, 4, 2, False),
}


def step(**job: object) -> dict:
    """benchmarks/train_step.py in a fresh process."""
    program = Path(__file__).with_name("train_step.py")
    done = subprocess.run([sys.executable, str(program)], input=json.dumps(job), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_train_step(benchmark, figures, tmp_path, workload: str, dtype: str) -> None:
    shape, count, length, thoughts, labelled, timed = WORKLOADS[workload]
    job = {"shape": shape, "rows": count, "length": length, "thoughts": thoughts, "labelled": labelled, "dtype": dtype}
    ours = benchmark.pedantic(step, kwargs={"who": "ours", **job}, rounds=1)
    plain = step(who="hugging_face", **job)
    peers, note = {"hf_plain": plain["seconds"]}, f"{ours['peak_bytes'] / 1e9:.2f} GB"
    if timed and official_missing() is None:
        hf = make_hf(shape)
        hf.save_pretrained(tmp_path)
        vocab = hf.config.vocab_size
        rows, labels = make_rows(vocab, count, length, thoughts, labelled)
        theirs = official("train", tmp_path, vocab_size=vocab, dtype=dtype, rows=rows, labels=labels, rounds=2)
        if dtype == "float32":
            assert abs(ours["losses"][0] / theirs["losses"][0] - 1) < 1e-5, "the losses differ: nothing is timed"
        peers["official"] = theirs["seconds"]
        note += f", official {theirs['peak_bytes'] / 1e9:.2f} GB"
    figures.add(f"step {dtype}: {workload}", ours["seconds"], note=note, **peers)


@pytest.mark.parametrize(
    "without", ["deferred weight gradients", "fused head and loss", "attention kernels", "fused GELU"]
)
def test_ablation(benchmark, figures, without: str) -> None:
    """What each saving is worth: our own fp32 step with one of them switched off."""
    shape, count, length, thoughts, labelled, _ = WORKLOADS["GPT-2 124M, 8 ProsQA rows, 6 thoughts"]
    job = {"who": "ours", "shape": shape, "rows": count, "length": length, "thoughts": thoughts}
    job |= {"labelled": labelled, "dtype": "float32", "rounds": 2}
    ours = benchmark.pedantic(step, kwargs=job, rounds=1)
    off = step(**job, without=without)
    note = f"{ours['peak_bytes'] / 1e9:.2f} GB, without {off['peak_bytes'] / 1e9:.2f} GB"
    figures.add(f"step float32 without {without}", ours["seconds"], note=note, without=off["seconds"])


@pytest.mark.parametrize("thoughts", [0, 1, 6, 32])
def test_thoughts_cost(benchmark, figures, thoughts: int) -> None:
    """Step time and memory by number of thoughts, one after the other and in 3 parallel rounds."""
    job = {"who": "ours", "shape": "gpt2", "rows": 8, "length": 330, "thoughts": thoughts, "labelled": 14}
    job |= {"dtype": "float32", "rounds": 2}
    ours = benchmark.pedantic(step, kwargs=job, rounds=1)
    parallel = step(**job, parallel_rounds=3)["seconds"] if thoughts > 3 else None
    note = f"{ours['peak_bytes'] / 1e9:.2f} GB"
    figures.add(
        f"step float32: GPT-2 124M, 8 rows, {thoughts} thoughts", ours["seconds"], note=note, parallel_3=parallel
    )
