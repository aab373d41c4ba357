"""What a user's callbacks may do to a run: stop it within an epoch, from where it resumes, and evaluate; its bar."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerState

from coconut_fast.train import checkpoints
from coconut_fast.train.build import build
from coconut_fast.train.problems import DataSet
from coconut_fast.train.reports import DELAY, Report, read_metrics
from coconut_fast.train.trainer import CoconutTrainer
from tests.runs import chains, tiny

pytestmark = pytest.mark.usefixtures("one_thread")


class Stop(TrainerCallback):
    """Sets a field of the control when an event of a step happens."""

    def __init__(self, step: int, what: str = "should_training_stop", event: str = "on_step_end") -> None:
        self.step, self.what = step, what
        setattr(self, event, self.act)

    def act(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            setattr(control, self.what, True)


def make_trainer(folder: Path, *callbacks: TrainerCallback, **changes: Any) -> CoconutTrainer:
    """Three epochs of five steps."""
    settings = tiny(folder, **{"num_epochs": 3, "batch_size_training": 8, "uniform_prob": 0.3, **changes})
    train = chains(40)
    model = build(settings, train)
    validation = DataSet(chains(8, seed=1), model.tokenizer)
    return CoconutTrainer(model, settings, DataSet(train, model.tokenizer), validation, callbacks=callbacks)


def figures(trainer: CoconutTrainer) -> list[tuple]:
    """What was logged, without a run's last record, which is of the steps since it was started."""
    records = read_metrics(Path(trainer.args.output_dir) / "metrics.jsonl")
    names = ("step", "stage", "loss", "eval_accuracy", "eval_loss")
    return [tuple(r.get(name) for name in names) for r in records if "train_loss" not in r]


@pytest.mark.parametrize(("step", "event", "improve"), [(7, "on_step_end", True), (5, "on_step_begin", False)])
def test_a_run_that_a_callback_stops_goes_on_as_if_never_stopped(
    tmp_path: Path, step: int, event: str, improve: bool
) -> None:
    changes = {"batch_size_training": 4, "gradient_accumulation_steps": 2, "save_only_improve": improve}
    whole = make_trainer(tmp_path / "whole", **changes)
    whole.train()
    stopped = make_trainer(tmp_path / "stopped", Stop(step, event=event), **changes)
    stopped.train()
    last = checkpoints.complete(Path(stopped.args.output_dir))[-1]
    manifest = checkpoints.read_manifest(last)
    assert (manifest["step"], len(manifest["history"])) == (step, 1), "an epoch that is not over is not recorded"

    again = make_trainer(tmp_path / "stopped", **changes)
    again.train(resume_from_checkpoint=last)
    assert again.run_state == whole.run_state and figures(again) == figures(whole)
    for ours, expected in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, expected)


def test_an_epoch_is_not_cut_short(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, Stop(7, "should_epoch_stop"))
    with pytest.raises(ValueError, match="should_epoch_stop: set by a callback at step 7, .* 5 steps; expected should"):
        trainer.train()
    assert [folder.name for folder in checkpoints.complete(Path(trainer.args.output_dir))] == ["checkpoint-5"]


class EvaluateOthers(TrainerCallback):
    """Evaluates other problems when an epoch's end has been evaluated and saved."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found.append(self.trainer.evaluate(self.problems))  # type: ignore[attr-defined]


def test_evaluations_of_other_problems_leave_the_run_alone(tmp_path: Path) -> None:
    callback = EvaluateOthers()
    trainer = make_trainer(tmp_path, callback, num_epochs=1)
    callback.trainer, callback.problems = trainer, DataSet(chains(3, seed=2), trainer.model.tokenizer)  # type: ignore
    trainer.train()
    assert [found["eval_examples"] for found in callback.found] == [3]
    [record] = trainer.run_state.history
    before = copy.deepcopy(trainer.run_state)
    own, other = trainer.evaluate(metric_key_prefix="test"), trainer.evaluate(callback.problems)  # type: ignore
    assert own["test_examples"] == 8 and own["test_accuracy"] == record.metric and own["test_loss"] > 0
    assert other["eval_examples"] == 3 and other["eval_loss"] != own["test_loss"]
    assert trainer.run_state == before
    with pytest.raises(ValueError, match="eval_dataset: found list, expected a DataSet"):
        trainer.evaluate([1])


def test_every_line_of_the_progress_bar_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """That of a bar, too, that an evaluation finds with its delay over, but before its first sight."""
    for seen in (False, True):
        report = Report(tmp_path)
        report.bar = tqdm(total=9, delay=DELAY)
        report.bar.start_t = report.bar.last_print_t = time.time() - DELAY - 1
        if seen:
            report.bar.update()
        state = TrainerState(is_world_process_zero=True)
        report.on_evaluate(None, state, None, {"epoch": 1, "stage": 0, "eval_accuracy": 0.5})
        report.close()
        shown = capsys.readouterr().err
        assert "epoch 1  stage 0" in shown and shown.endswith("\n")
        assert ("/9 [" in shown) == seen
