"""What a run remembers between epochs, and what happens at their borders: stages, resets, the best epoch, the end."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from coconut_fast.data.curriculum import METHODS, CurriculumConfig, num_slots
from coconut_fast.data.examples import TokenizedExample
from coconut_fast.train.arguments import CoconutArguments
from coconut_fast.train.saving import CheckpointError
from coconut_fast.train.schedule import EpochRecord

if TYPE_CHECKING:
    from coconut_fast.model.coconut import Coconut
    from coconut_fast.train.trainer import CoconutTrainer

# Settings that may change when a run goes on: where it writes, what it shows, how long it lasts.
MAY_CHANGE = {
    "name", "project", "save_path", "debug", "only_eval", "device", "train_path", "val_path", "load_model_path",
    "num_epochs", "eval_batch_size", "num_thoughts", "save_steps", "keep_last", "logging_steps", "report_to",
    "num_workers", "training_arguments", "max_nonfinite", "fsdp", "batch_size_training", "gradient_accumulation_steps",
}  # fmt: skip


@dataclass
class RunState:
    """Finished epochs, and the best of the present stage; with the step's number all that a run needs to go on."""

    history: list[EpochRecord] = field(default_factory=list)
    best: dict[str, Any] | None = None  # stage, accuracy, step
    loss_is_finite: torch.Tensor = field(default_factory=lambda: torch.tensor(True))

    @property
    def best_step(self) -> int | None:
        return self.best["step"] if self.best else None

    def restore(self, manifest: dict[str, Any], device: torch.device) -> None:
        self.history = [EpochRecord(**record) for record in manifest["history"]]
        self.best = manifest["best"]
        self.loss_is_finite = torch.ones((), dtype=torch.bool, device=device)

    def improves(self, stage: int, accuracy: float, step: int) -> bool:
        """Notes an epoch's accuracy; whether it is its stage's best (accuracy falls where language is taken away)."""
        if self.best is not None and self.best["stage"] == stage and accuracy <= self.best["accuracy"]:
            return False
        self.best = {"stage": stage, "accuracy": accuracy, "step": step}
        return True


class StageCallback(TrainerCallback):
    """The borders of epochs and steps."""

    def __init__(self, trainer: CoconutTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        trainer.run_state.loss_is_finite = torch.ones((), dtype=torch.bool, device=args.device)
        if trainer.schedule.next_stage(trainer.run_state.history) is None:
            raise ValueError(
                f"num_epochs: the run in {args.output_dir} has finished its {len(trainer.run_state.history)} epochs; "
                "raise num_epochs to go on"
            )

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        stage = trainer.schedule.next_stage(trainer.run_state.history)
        assert stage is not None, "on_evaluate or on_epoch_end has stopped a run that is over"
        trainer.stage = stage
        starts_here = state.global_step % trainer.sampler.updates == 0
        if starts_here and trainer.schedule.resets(trainer.run_state.history, stage):
            trainer.optimizer.state.clear()  # what a new optimizer would start with
        sampler = trainer.sampler
        sampler.epoch, sampler.stage, sampler.lengths = (
            len(trainer.run_state.history),
            stage,
            trainer.rows.lengths(stage),
        )
        record_curriculum(trainer.accelerator.unwrap_model(trainer.model), trainer.curriculum, stage)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Dropout of a step is a function of the step: nothing that happens between two steps can change it.
        key = f"{args.seed}/{state.global_step}/{args.process_index}".encode()
        torch.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "little"))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # The last step of an epoch is saved after its evaluation, so that a checkpoint knows how the epoch went.
        every = self.trainer.settings.save_steps
        if every and state.global_step % every == 0 and state.global_step % self.trainer.sampler.updates:
            control.should_save = not self.trainer.settings.debug

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        run = self.trainer.run_state
        run.history.append(EpochRecord(self.trainer.stage))
        if self.trainer.settings.save_only_improve:
            control.should_save = False
        if self.trainer.validation is None and self.trainer.schedule.next_stage(run.history) is None:
            control.should_training_stop = True

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        trainer, run = self.trainer, self.trainer.run_state
        epoch_ended = state.global_step and len(run.history) * trainer.sampler.updates == state.global_step
        if not epoch_ended or metrics is None:
            return
        accuracy = metrics["eval_accuracy"]
        run.history[-1] = EpochRecord(trainer.stage, accuracy)
        improved = run.improves(trainer.stage, accuracy, state.global_step)
        over = trainer.schedule.next_stage(run.history) is None
        if trainer.settings.save_only_improve:  # the end of a run is always saved, so that it is known to be over
            control.should_save = (improved or over) and not trainer.settings.debug
        if over:
            control.should_training_stop = True


def record_curriculum(model: Coconut, config: CurriculumConfig, stage: int) -> None:
    """Writes into the model's settings how it is being trained, for coconut.json."""
    saved = model.settings
    padded = replace(config, pad_latent_to_max=True)
    saved.method, saved.stage = config.method, stage
    thinks = METHODS[config.method].slot == "thought"
    saved.num_thoughts = num_slots(TokenizedExample([], [], []), stage, padded) if thinks else 0
    has_markers = model.tokens.start is not None and model.tokens.end is not None
    saved.markers = config.markers if config.markers is not None else METHODS[config.method].markers and has_markers
    default = asdict(CurriculumConfig())
    saved.curriculum = {name: value for name, value in asdict(config).items() if value != default[name]}


def learning_rate_factor(trainer: CoconutTrainer, num_steps: int) -> Callable[[int], float]:
    """step -> what the learning rate is multiplied with."""
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


def run_fingerprint(trainer: CoconutTrainer) -> dict[str, Any]:
    """What makes a run the same run: every setting that its steps depend on, and its data."""
    settings = {k: v for k, v in trainer.settings.to_dict().items() if k not in MAY_CHANGE}
    settings["removal_smoothing"] = str(settings["removal_smoothing"])  # JSON has no infinity
    problems = trainer.rows.problems
    data = {"problems": len(problems), "train_path_digest": problems.digest}  # wherever the file lies now
    return {**settings, "rows_per_update": trainer.sampler.rows_per_update, **data}


def check_same_run(saved: dict[str, Any], present: dict[str, Any], folder: Path) -> None:
    """CheckpointError, naming the first setting that differs, for a checkpoint of another run.

    A setting that is newer than the checkpoint had its default there.
    """
    defaults = {setting.name: setting.default for setting in fields(CoconutArguments)}
    for name in sorted({*saved, *present}):
        was, now = saved.get(name, defaults.get(name)), present.get(name)
        if was != now:
            raise CheckpointError(
                f"{folder} belongs to another run: {name} was {was!r} there and is {now!r} now; "
                "use its settings to go on, or another name for a new run"
            )
