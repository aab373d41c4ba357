"""The stage schedule as pure functions of the epochs so far: the next epoch's stage, and when the run is over.

Stage s replaces the first s reasoning steps by thoughts; the last stage drops all language. By count, stage s lasts
`epochs_per_stage` epochs (stage 0 may last `first_stage_epochs`) and the last stage lasts until the run ends. With
`advance_at`, a stage is left as soon as the validation metric of an epoch reaches it, and by count at the latest; a
list may cover only the first stages, and the others are left by count. A stage lasts whole epochs, so a run is
reproduced by its list of (stage, metric).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile

RESETS = ("stage", "epoch", "never")


@dataclass(frozen=True)
class EpochRecord:
    """A finished epoch: its stage, and its validation metric (None where nothing was evaluated)."""

    stage: int
    metric: float | None = None


@dataclass(frozen=True)
class StageSchedule:
    """Which stage each epoch has. ValueError for an invalid value.

    last_stage: the stage that lasts until the end (max_latent_stage + 1; 0 for methods without stages).
    epochs_per_stage: epochs of a stage, by count. first_stage_epochs: of stage 0 (None: as the others).
    first_epoch: epochs of the plan that are skipped (the official code's `resume`, for a model trained before).
    num_epochs: the end of the plan, skipped epochs included. final_epochs: end earlier, after this many epochs in the
    last stage. advance_at: leave a stage when the metric of an epoch is at least this; a list holds one number per
    stage, and the stages past its end are left by count.
    reset_optimizer: "stage" (the paper: when stages switch), "epoch" (the official code's `True`) or "never".
    """

    last_stage: int
    epochs_per_stage: int = 1
    num_epochs: int = 1
    first_stage_epochs: int | None = None
    first_epoch: int = 0
    final_epochs: int | None = None
    advance_at: float | Sequence[float] | None = None
    reset_optimizer: str = "stage"

    def __post_init__(self) -> None:
        for name, low in (("last_stage", 0), ("epochs_per_stage", 1), ("num_epochs", 1), ("first_epoch", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected {low} or more")
        for name, low in (("first_stage_epochs", 0), ("final_epochs", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name}: found {value}, expected {low} or more")
        if self.first_epoch >= self.num_epochs:
            raise ValueError(
                f"resume: found {self.first_epoch}, expected fewer than num_epochs = {self.num_epochs}: "
                "nothing would be left to train"
            )
        thresholds = self.advance_at if isinstance(self.advance_at, Sequence) else [self.advance_at]
        for asked in thresholds[: self.last_stage]:
            if asked is not None and not isinstance(asked, (int, float)):
                raise ValueError(f"advance_at: found {asked!r}, expected numbers")
            if asked is not None and not 0 <= asked <= 1:
                raise ValueError(f"advance_at: found {asked}, expected accuracies from 0 to 1")
        if self.reset_optimizer not in RESETS:
            raise ValueError(f"reset_optimizer: found {self.reset_optimizer!r}, expected one of {', '.join(RESETS)}")

    def epochs_of(self, stage: int) -> int:
        """Epochs of a stage by count; the last stage does not end by count."""
        return self.first_stage_epochs if stage == 0 and self.first_stage_epochs is not None else self.epochs_per_stage

    def planned_stage(self, epoch: int) -> int:
        """The stage of an epoch of the plan (from 0, skipped ones included), by count alone."""
        first = self.epochs_of(0)
        if epoch < first:
            return 0
        return min(1 + (epoch - first) // self.epochs_per_stage, self.last_stage)

    def threshold(self, stage: int) -> float | None:
        """The metric that ends a stage; None where only the count does."""
        if not isinstance(self.advance_at, Sequence):
            return self.advance_at
        return self.advance_at[stage] if stage < len(self.advance_at) else None

    def next_stage(self, history: Sequence[EpochRecord]) -> int | None:
        """The stage of the epoch after those in `history`; None where the run is over."""
        if self.first_epoch + len(history) >= self.num_epochs:
            return None
        if not history:
            return self.planned_stage(self.first_epoch)
        now = history[-1].stage
        if now >= self.last_stage and self.final_epochs is None:
            return now
        if now < self.last_stage and self.advance_at is None:
            return self.planned_stage(self.first_epoch + len(history))
        # Only here, where it is bounded: in a long last stage, plans took time quadratic in num_epochs.
        spent = sum(1 for _ in takewhile(lambda record: record.stage == now, reversed(history)))
        if now >= self.last_stage:
            return None if self.final_epochs is not None and spent >= self.final_epochs else now
        if spent == len(history):  # the run began within this stage
            spent += self._planned_epochs(now, 0, self.first_epoch)
        metric, asked = history[-1].metric, self.threshold(now)
        passed = metric is not None and asked is not None and metric >= asked
        return now + 1 if passed or spent >= self.epochs_of(now) else now

    def epochs_by_count(self) -> dict[int, int]:
        """Stage -> its epochs in a run in which no metric ends a stage: with `advance_at`, the longest run."""
        counts = {}
        for stage in range(self.planned_stage(self.first_epoch), self.planned_stage(self.num_epochs - 1) + 1):
            counts[stage] = self._planned_epochs(stage, self.first_epoch, self.num_epochs)
        if self.last_stage in counts and self.final_epochs is not None:
            counts[self.last_stage] = min(counts[self.last_stage], self.final_epochs)
        return counts

    def _planned_epochs(self, stage: int, begin: int, end: int) -> int:
        """How many of the plan's epochs from `begin` to before `end` have this stage, by count alone."""
        first = self.epochs_of(0) + (stage - 1) * self.epochs_per_stage if stage else 0
        past = end if stage == self.last_stage else first + self.epochs_of(stage)
        return max(0, min(past, end) - max(first, begin))

    def in_words(self) -> str:
        """The plan in words, such as "0: at most 6 epochs, until accuracy 0.9; 1 to 3: 2 epochs each; 4: 8 epochs"."""
        counts = self.epochs_by_count()
        rest = self.last_stage in counts and self.advance_at is not None and self.final_epochs is None
        fixed = sorted(stage for stage in counts if not (rest and stage == self.last_stage))
        parts = []
        for (count, until), group in groupby(fixed, lambda s: (counts[s], self._left_at(s))):
            stages = list(group)
            name, each = (f"{stages[0]} to {stages[-1]}", " each") if len(stages) > 1 else (f"{stages[0]}", "")
            epochs = f"{count} epoch{'s' if count != 1 else ''}{each}"
            parts.append(f"{name}: {epochs}" if until is None else f"{name}: at most {epochs}, until accuracy {until}")
        if rest:
            parts.append(f"{self.last_stage}: the rest of {self.num_epochs - self.first_epoch} epochs")
        return "; ".join(parts)

    def _left_at(self, stage: int) -> float | None:
        return None if stage == self.last_stage else self.threshold(stage)

    def resets(self, history: Sequence[EpochRecord], stage: int) -> bool:
        """Whether the optimizer's state is reset before the epoch after `history`, which has `stage`."""
        if not history or self.reset_optimizer == "never":
            return False
        return self.reset_optimizer == "epoch" or history[-1].stage != stage

    def final_start(self, history: Sequence[EpochRecord]) -> int | None:
        """The epoch of the run (from 0, skipped ones not counted) in which the last stage begins, once it is known."""
        stages = [record.stage for record in history]
        if self.last_stage in stages:
            return stages.index(self.last_stage)
        return len(history) if self.next_stage(history) == self.last_stage else None
