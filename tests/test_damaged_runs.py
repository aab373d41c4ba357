"""Files of a run that are damaged or edited: one sentence that names the file, and no checkpoint is lost."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from coconut_fast.cli import main
from coconut_fast.train.checkpoints import CheckpointError, check_state
from coconut_fast.train.run import run
from tests.runs import tiny


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an epoch to go."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    run(tiny(folder, num_epochs=1))
    return folder


@pytest.fixture
def damaged(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    settings = {k: v for k, v in tiny(tmp_path, num_epochs=2).to_dict().items() if k != "removal_smoothing"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


LAST = "runs/tiny/checkpoint-3"
GO_ON = "; move checkpoint-3 away to go on with an older checkpoint"


def zeroed(content: bytes) -> bytes:
    return bytes(len(content))


def zeros_inside(content: bytes) -> bytes:
    return content[: len(content) // 2] + bytes(512) + content[len(content) // 2 + 512 :]


def changed(**changes: Any) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps({**json.loads(content), **changes}).encode()


def without(name: str) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps({k: v for k, v in json.loads(content).items() if k != name}).encode()


def same_size(content: bytes) -> bytes:
    return b"[]".ljust(len(content))


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("checkpoint.json", without("run"), ": run: found 'nothing', expected an object" + GO_ON),
        ("checkpoint.json", without("best"), ": best: found 'nothing', expected an object or null" + GO_ON),
        ("checkpoint.json", without("history"), ": history: found 'nothing', expected a list" + GO_ON),
        ("checkpoint.json", without("skipped"), ": skipped: found 'nothing', expected a whole number" + GO_ON),
        ("checkpoint.json", changed(files=[]), ": files: found [], expected an object" + GO_ON),
        (
            "checkpoint.json",
            changed(history=[{"stage": 0, "a": 1}]),
            ": history: expected each epoch's metric and stage",
        ),
        ("checkpoint.json", changed(best={"step": 3}), ": best: found {'step': 3}, expected accuracy, stage, step"),
        ("checkpoint.json", same_size, ": found a list, expected an object" + GO_ON),
        ("checkpoint.json", lambda content: content.decode().encode("utf-16"), "not a checkpoint of ours"),
        ("trainer_state.json", zeroed, "trainer_state.json is damaged (Expecting value: line 1 column 1 (char 0))"),
        ("trainer_state.json", same_size, "trainer_state.json is damaged ("),
        ("optimizer.pt", zeroed, "optimizer.pt is damaged (File is not a zip file)" + GO_ON),
        ("optimizer.pt", zeros_inside, "is not what was written)" + GO_ON),
        ("scheduler.pt", zeroed, "scheduler.pt is damaged (File is not a zip file)" + GO_ON),
        ("rng_state.pth", zeroed, "rng_state.pth is damaged (File is not a zip file)" + GO_ON),
        ("../metrics.jsonl", lambda content: content + b"5\n", "found '5', expected an object with a step"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(
    damaged: Path, file: str, damage: Callable[[bytes], bytes], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = damaged / LAST / file
    path.write_bytes(damage(path.read_bytes()))
    assert main(["train", str(damaged / "recipe.yaml")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("coconut-fast: error: ") and message in error
    assert path.resolve().name in error or f"{path.parent} is not a checkpoint" in error


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("symbols", {"foo": 1}, "coconut.json: expected .*symbols: found foo: 1"),
        ("symbols", {"relabel": "no"}, "coconut.json: expected .*symbols: found relabel: 'no'"),
        (
            "curriculum",
            {"removal_smoothing": None},
            "curriculum: removal_smoothing: found None, expected a number above",
        ),
    ],
)
def test_settings_of_a_saved_model_that_make_no_sense_are_named(
    whole: Path, tmp_path: Path, name: str, value: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole / LAST, tmp_path, dirs_exist_ok=True)
    saved = json.loads((tmp_path / "coconut.json").read_text())
    saved["settings"][name] = value
    (tmp_path / "coconut.json").write_text(json.dumps(saved))
    assert main(["eval", str(tmp_path), str(whole / "val.json"), "--device", "cpu"]) == 2
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])


def test_the_files_of_a_sharded_run_are_checked_and_nobody_elses(tmp_path: Path) -> None:
    (tmp_path / "ema.bin").write_text("a user's own")
    for name in ("optimizer.bin", "pytorch_model_fsdp.bin"):
        torch.save({"weight": torch.arange(4096)}, tmp_path / name)
        check_state(tmp_path)
        (tmp_path / name).write_bytes(zeros_inside((tmp_path / name).read_bytes()))
        with pytest.raises(CheckpointError, match=f"{name} is damaged .* is not what was written"):
            check_state(tmp_path)
        (tmp_path / name).unlink()
