"""What a run keeps between epochs, and how a checkpoint is matched to its run."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coconut_fast.train.arguments import CoconutArguments
from coconut_fast.train.checkpoints import CheckpointError
from coconut_fast.train.schedule import EpochRecord

if TYPE_CHECKING:
    from coconut_fast.train.trainer import CoconutTrainer

# Settings that may change when a run resumes: where it writes, what it shows, how long it lasts.
MAY_CHANGE = {
    "name", "project", "save_path", "debug", "only_eval", "device", "train_path", "val_path", "load_model_path",
    "num_epochs", "eval_batch_size", "num_thoughts", "save_steps", "keep_last", "logging_steps", "report_to",
    "num_workers", "training_arguments", "max_nonfinite", "batch_size_training", "gradient_accumulation_steps",
}  # fmt: skip


@dataclass
class RunState:
    """Finished epochs and the best of the current stage: with the step number, all that a run needs to resume."""

    history: list[EpochRecord] = field(default_factory=list)
    best: dict[str, Any] | None = None  # stage, accuracy, step

    @property
    def best_step(self) -> int | None:
        return self.best["step"] if self.best else None

    def restore(self, manifest: dict[str, Any]) -> None:
        self.history = [EpochRecord(**record) for record in manifest["history"]]
        self.best = manifest["best"]

    def improves(self, stage: int, accuracy: float, step: int) -> bool:
        """Records an epoch's accuracy -> whether it is its stage's best (accuracy falls when language is removed)."""
        if self.best is not None and self.best["stage"] == stage and accuracy <= self.best["accuracy"]:
            return False
        self.best = {"stage": stage, "accuracy": accuracy, "step": step}
        return True


def run_fingerprint(trainer: CoconutTrainer) -> dict[str, Any]:
    """What makes a run the same run: every setting that its steps depend on, and its data."""
    free = {*MAY_CHANGE, *trainer.settings.without_effect()}
    settings = {k: v for k, v in trainer.settings.to_dict().items() if k not in free}
    if "removal_smoothing" in settings:
        settings["removal_smoothing"] = str(settings["removal_smoothing"])  # JSON has no infinity
    problems = trainer.rows.problems
    data = {"problems": len(problems), "train_path_digest": problems.digest}  # wherever the file is now
    return {**settings, "rows_per_update": trainer.sampler.rows_per_update, **data}


def check_same_run(saved: dict[str, Any], present: dict[str, Any], folder: Path) -> None:
    """CheckpointError, naming the first setting that differs, for a checkpoint of another run.

    A setting that is newer than the checkpoint counts as its default there; one without effect may have any value.
    """
    defaults = {setting.name: setting.default for setting in fields(CoconutArguments)}
    for name in sorted({*saved, *present}):
        if name in defaults and name not in present:
            continue
        was, now = saved.get(name, defaults.get(name)), present.get(name)
        if was != now:
            raise CheckpointError(
                f"{folder} belongs to another run: {name} was {was!r} there and is {now!r} now; "
                "use its settings to go on, or another name for a new run"
            )
