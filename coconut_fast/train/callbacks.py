"""What happens when epochs and steps begin and end: the stage, the optimizer's reset, the best epoch, the end."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from coconut_fast.data.curriculum import METHODS, CurriculumConfig, num_slots
from coconut_fast.data.examples import TokenizedExample
from coconut_fast.train.schedule import EpochRecord

if TYPE_CHECKING:
    from coconut_fast.model.coconut import Coconut
    from coconut_fast.train.trainer import CoconutTrainer


class StageCallback(TrainerCallback):
    """Acts when epochs and steps begin and end."""

    def __init__(self, trainer: CoconutTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        trainer.skipped.begin()
        trainer.count_anew()
        trainer.began = trainer.counted
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
        sampler.epoch, sampler.stage = len(trainer.run_state.history), stage
        sampler.lengths = trainer.rows.lengths(stage)
        record_curriculum(trainer.accelerator.unwrap_model(trainer.model), trainer.curriculum, stage)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Dropout depends only on seed, step and process: nothing that happens between two steps can change it.
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
        run, updates = self.trainer.run_state, self.trainer.sampler.updates
        if state.global_step < (len(run.history) + 1) * updates:  # a callback has stopped the run within the epoch
            if not control.should_training_stop:
                raise ValueError(
                    f"should_epoch_stop: set by a callback at step {state.global_step}, but epochs of this run have "
                    f"{updates} steps; expected should_training_stop, after which the run can resume"
                )
            control.should_evaluate = False  # the epoch is not over: it is saved as save_steps does
            return
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
        if not epoch_ended or not trainer.judges or metrics is None or "eval_accuracy" not in metrics:
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
    """Records in the model's settings how it is being trained, for coconut.json."""
    saved = model.settings
    padded = replace(config, pad_latent_to_max=True)
    saved.method, saved.stage = config.method, stage
    thinks = METHODS[config.method].slot == "thought"
    saved.num_thoughts = num_slots(TokenizedExample([], [], []), stage, padded) if thinks else 0
    has_markers = model.tokens.start is not None and model.tokens.end is not None
    saved.markers = config.markers if config.markers is not None else METHODS[config.method].markers and has_markers
    default = asdict(CurriculumConfig())
    saved.curriculum = {name: value for name, value in asdict(config).items() if value != default[name]}
