"""The released ProsQA sets on the command line: train some hundred steps, kill, resume, evaluate all 500 questions."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coconut_fast.train.reports import read_metrics
from tests.conftest import ROOT

STEPS = 400


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "coconut_fast", *map(str, arguments)]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_train_kill_resume_evaluate(prosqa_sets: Path, tmp_path: Path) -> None:
    problems, run = tmp_path / "train.json", tmp_path / "runs" / "prosqa_scratch"
    subprocess.run(command("data", "prosqa", problems, "--count", 4000), check=True)
    train = command(
        "train",
        ROOT / "recipes" / "prosqa_scratch.yaml",
        f"train_path={problems}",
        f"val_path={prosqa_sets / 'prosqa_valid.json'}",
        f"save_path={run.parent}",
    )

    process = subprocess.Popen(train)
    while not any(run.glob("checkpoint-*/checkpoint.json")):
        assert process.poll() is None, "ended before its first checkpoint"
        time.sleep(0.2)
    time.sleep(3)  # into the next epoch
    process.kill()
    process.wait()

    resumed = subprocess.run(train, check=True, capture_output=True, text=True)
    assert ", from checkpoint-" in resumed.stderr
    records = [record for record in read_metrics(run / "metrics.jsonl") if "eval_loss" in record]
    assert records[-1]["step"] == STEPS and records[-1]["stage"] == 7
    assert records[-1]["eval_loss"] < records[0]["eval_loss"]

    evaluate = command("eval", run, prosqa_sets / "prosqa_test.json", "--out", tmp_path / "results")
    subprocess.run(evaluate, check=True)
    answers = (tmp_path / "results" / "prosqa_scratch.jsonl").read_text().splitlines()
    assert len(answers) == 500
    assert all(json.loads(answer)["num_thoughts"] == 6 for answer in answers)
