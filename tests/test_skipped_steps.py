"""Steps whose loss or gradient is not finite: skipped, counted, left out of the logged loss, and too many of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coconut_fast.train.reports import read_metrics
from coconut_fast.train.skipped import NonFiniteError
from coconut_fast.train.trainer import CoconutTrainer
from tests.test_trainer import EXACT, assert_equal, make_trainer, weights

pytestmark = pytest.mark.usefixtures("one_thread")


class Spoiled(CoconutTrainer):
    """Its loss is not a number in chosen steps."""

    bad_steps: tuple[int, ...] = ()

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("nan") if self.model.training and self.state.global_step in self.bad_steps else loss


def spoiled(folder: Path, bad_steps: tuple[int, ...], **changes: Any) -> Spoiled:
    trainer = make_trainer(folder, **{**EXACT, **changes})
    trainer.__class__ = Spoiled
    trainer.bad_steps = bad_steps  # type: ignore[attr-defined]
    return trainer  # type: ignore[return-value]


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path: Path) -> None:
    trainer = spoiled(tmp_path, (0, 1, 4))
    start = weights(trainer)
    seen: list[dict[str, torch.Tensor]] = []
    step = trainer.create_optimizer().step

    def watch(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        seen.append(weights(trainer))
        return result

    trainer.optimizer.step = watch
    trainer.train()
    assert_equal(seen[1], start)
    assert any(not torch.equal(seen[2][n], start[n]) for n in start)
    assert_equal(seen[4], seen[3])
    assert int(trainer.skipped.total) == 3
    assert all(torch.isfinite(w).all() for w in weights(trainer).values())
    records = read_metrics(tmp_path / "runs" / "tiny-debug" / "metrics.jsonl")
    assert records[-2]["skipped_steps"] == 3
    assert [r["step"] for r in records if r.get("loss", 0) != r.get("loss", 0)] == [1, 2, 5], "nothing to log"


def test_the_logged_loss_is_of_the_steps_that_were_not_skipped(tmp_path: Path) -> None:
    """Where a loss or, in halves of a step, a gradient was not finite."""
    halves = {"batch_size_training": 8, "gradient_accumulation_steps": 2, "lr": 0.0, "num_epochs": 1}
    losses = {}
    for kind in (CoconutTrainer, Spoiled, BadGradient):
        trainer = make_trainer(tmp_path, **{**EXACT, **halves, "logging_steps": 1 if kind is CoconutTrainer else 3})
        trainer.__class__ = kind
        trainer.bad_steps = (1,)  # type: ignore[attr-defined]
        mean = trainer.train().training_loss
        losses[kind] = [r["loss"] for r in trainer.state.log_history if "loss" in r]
        assert mean == trainer.state.log_history[-1]["train_loss"] == pytest.approx(np.mean(losses[kind]), rel=1e-5)
    first, _, last = losses[CoconutTrainer]
    assert losses[Spoiled] == losses[BadGradient] == pytest.approx([(first + last) / 2], rel=1e-5)


class BadGradient(CoconutTrainer):
    """The loss is fine, but in two steps a gradient of the first of two batches is infinite."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.state.global_step in (1, 3) and not self.accelerator.sync_gradients:
            next(self.model.parameters()).grad[0] = float("inf")
        return loss


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_is_skipped_too(tmp_path: Path, max_grad_norm: float) -> None:
    halves = {"batch_size_training": 8, "gradient_accumulation_steps": 2, "max_grad_norm": max_grad_norm}
    trainer = make_trainer(tmp_path, **{**EXACT, **halves})
    trainer.__class__ = BadGradient
    trainer.train()
    assert int(trainer.skipped.total) == 2
    assert all(torch.isfinite(w).all() for w in weights(trainer).values())


def test_too_many_in_a_row_end_the_run_with_the_batch_saved(tmp_path: Path) -> None:
    trainer = spoiled(tmp_path, (0, 2, 3, 4), max_nonfinite=3)
    with pytest.raises(NonFiniteError, match="not finite in 3 steps in a row, up to step 5; the last batch is in"):
        trainer.train()
    assert trainer.report.bar is None, "the error stands on a line of its own"
    batch = json.loads((tmp_path / "runs" / "tiny-debug" / "nonfinite-step-5.json").read_text())
    assert len(batch) == 16 and batch[0].keys() == {"problem", "epoch", "stage", "input_ids", "labels"}
