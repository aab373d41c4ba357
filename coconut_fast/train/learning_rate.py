"""The learning rate of each step: warmup, then constant, linear, cosine, or cosine over the final epochs alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coconut_fast.train.trainer import CoconutTrainer


def learning_rate_factor(trainer: CoconutTrainer, num_steps: int) -> Callable[[int], float]:
    """step -> the factor that the learning rate is multiplied by."""
    settings = trainer.settings
    warmup, kind = settings.warmup_steps, settings.lr_schedule

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if kind == "constant":
            return 1.0
        if kind == "cosine_final":
            epoch = trainer.schedule.final_start(trainer.run_state.history)
            assert settings.final_epochs is not None
            done = step - epoch * trainer.sampler.updates if epoch is not None else 0
            return _cosine(done / (settings.final_epochs * trainer.sampler.updates))
        progress = (step - warmup) / max(1, num_steps - warmup)
        return max(0.0, 1.0 - progress) if kind == "linear" else _cosine(progress)

    return factor


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, max(0.0, progress))))
