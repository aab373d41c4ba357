"""CoconutTrainer: transformers.Trainer with what the method adds, and nothing else.

Its arguments, callbacks, trackers, mixed precision, accumulation and distributed engines are transformers'. Ours are:

    the stage of an epoch, and the optimizer's reset (train/schedule.py)
    ragged rows made on the fly, in an order that is a function of the epoch (train/rows.py, train/order.py), on a GPU
        by a background thread (train/prefetch.py)
    a loss that is the mean over the labelled tokens of the whole step, however it is cut into batches and processes
    evaluation by batched generation (train/validation.py)
    checkpoints that appear whole, and runs that resume as if never interrupted (train/checkpoints.py)
    steps with a non-finite loss or gradient skipped on the device and counted (train/skipped.py); too many in a row end
        the run
    forward and backward replayed as CUDA graphs on a single GPU (train/graphed.py)
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from coconut_fast import ops
from coconut_fast.model.batch import RaggedBatch
from coconut_fast.model.coconut import Coconut
from coconut_fast.model.feedback import FEEDBACKS
from coconut_fast.model.saving import ADDED_WEIGHTS, check_merged, write
from coconut_fast.train import checkpoints, sharding
from coconut_fast.train.arguments import CoconutArguments
from coconut_fast.train.callbacks import StageCallback
from coconut_fast.train.graphed import GraphedStep, has_hooks
from coconut_fast.train.learning_rate import learning_rate_factor
from coconut_fast.train.order import EpochBatches
from coconut_fast.train.prefetch import Prefetcher
from coconut_fast.train.problems import DataSet
from coconut_fast.train.reports import Report, thought_norm, without_skipped
from coconut_fast.train.rows import Collate, StageRows, end_with_parent
from coconut_fast.train.skipped import SkippedSteps, non_finite_error
from coconut_fast.train.state import RunState, check_same_run, run_fingerprint
from coconut_fast.train.validation import validate


class CoconutTrainer(Trainer):
    """Trains `model` on problems as `settings` says; `settings.output_dir` is the run.

    ValueError, before anything runs, for rows longer than the model's positions, and for a checkpoint of another run.
    """

    optimizer: Any
    lr_scheduler: Any
    control: Any
    loss_is_scaled_for_ga = True  # compute_loss divides by the labelled tokens of the whole step
    is_fsdp_enabled: bool
    extract_answer: Callable[[str], str] | None = None  # a subclass's staticmethod, as `evaluate(extract=...)` takes it

    def __init__(
        self,
        model: Coconut,
        settings: CoconutArguments,
        problems: DataSet,
        validation: DataSet | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        check_merged(model)
        self.settings = settings
        self.curriculum = settings.curriculum()
        self.schedule = settings.schedule()
        self.rows = StageRows(problems, self.curriculum, model.tokens, settings.seed)
        self.rows.check(range(self.schedule.last_stage + 1), model.max_positions)
        self.validation = validation
        if validation is not None:
            held_out = StageRows(validation, self.curriculum, model.tokens, settings.seed)
            held_out.check(range(self.schedule.last_stage + 1), model.max_positions, "val_path")
        self.run_state = RunState()
        self.stage = self.schedule.planned_stage(self.schedule.first_epoch)
        model.detach_after = settings.detach_after
        model.settings.parallel_rounds = settings.parallel_rounds
        self.report = Report(settings.output_dir)
        super().__init__(
            model=model,
            args=settings.to_training_arguments(sharding.layer_class(model) if settings.fsdp else None),
            train_dataset=self.rows,
            eval_dataset=validation,
            callbacks=[StageCallback(self), self.report, *callbacks],
        )
        self.model_accepts_loss_kwargs = True  # ask for num_items_in_batch
        kept = [c for c in self.callback_handler.callbacks if type(c).__name__ != "PrinterCallback"]
        self.callback_handler.callbacks = kept
        self.sampler = EpochBatches(
            len(self.rows),
            batch_size=settings.batch_size_training,
            accumulation=settings.gradient_accumulation_steps,
            processes=self.args.world_size,
            process=self.args.process_index,
            seed=settings.seed,
            epoch_size=settings.epoch_size,
        )
        self.step_model: torch.nn.Module = model  # as passed to training_step, for _forward_backward
        self.graphed = None
        if self.fits_graphs():
            self.graphed = GraphedStep(self._forward_backward, model.parameters(), self.args.device)
        self.collate = Collate(model.tokens, in_buckets=self.graphed is not None)
        self.prefetches = self.args.device.type == "cuda"  # on a CPU it would take cores from the step
        self.prefetcher: Prefetcher | None = None  # of the current epoch
        self.judges = True  # whether the last evaluation was of the validation problems
        self.step_rows: list[Any] = []  # the rows of the step in progress
        self.skipped = SkippedSteps(self.args.device)
        self.thought_norm: torch.Tensor | None = None
        self.count_anew()
        self.began = self.counted  # when training began
        self.model_from: Path | None = None  # the checkpoint that `model` is as it was, where that is known

    def count_anew(self) -> None:
        """Begins the interval of the next log."""
        now = {"since": time.perf_counter(), "step": self.state.global_step, "skipped": int(self.skipped.total)}
        self.counted: dict[str, Any] = {"rows": 0, "tokens": 0, **now}

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.settings.fsdp and not self.is_fsdp_enabled and self.args.world_size > 1:
            sharding.enable(self.accelerator, self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True
        if self.settings.precision == "fp16" and self.accelerator.scaler is None:
            # On a CPU accelerate would silently use fp32.
            self.accelerator.native_amp = True
            self.accelerator.scaler = torch.amp.GradScaler(self.args.device.type)

    def fits_graphs(self) -> bool:
        """Whether a step can be one graph: no communication between processes, no host synchronisation, and no loss of
        a subclass, which may read more of `inputs` than the batch, all that a graph has."""
        checkpointed = any(getattr(self.args, f"{what}_checkpointing", False) for what in ("gradient", "activation"))
        between = self.settings.precision == "fp16" or self.args.torch_empty_cache_steps is not None
        alone = self.args.device.type == "cuda" and self.args.n_gpu == self.args.world_size == 1
        plain = type(self).compute_loss is CoconutTrainer.compute_loss and self.settings.parallel_rounds is None
        return alone and plain and not checkpointed and not between

    # ---- data

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(
            self.rows,  # type: ignore[arg-type]
            batch_sampler=self.sampler,  # type: ignore[arg-type]
            collate_fn=self.collate,
            num_workers=self.args.dataloader_num_workers,
            worker_init_fn=end_with_parent,
            # Only batches are pinned, in `_ready`: the loader would also go through every token of their rows.
            generator=torch.Generator(),  # else the loader draws from the generator that dropout uses
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        if self.prefetches:
            if self.prefetcher is None or self.prefetcher.source is not epoch_iterator:
                self.prefetcher = Prefetcher(epoch_iterator, self._ready)
            epoch_iterator = self.prefetcher
        batches = list(islice(epoch_iterator, num_batches))
        self.step_rows = [row for batch in batches for row in batch["rows"]]
        self.counted["rows"] += len(self.step_rows) * self.args.world_size
        self.counted["tokens"] += sum(len(ids) for _, ids, _ in self.step_rows) * self.args.world_size
        labelled: int | torch.Tensor = sum(batch["batch"].num_targets for batch in batches)
        if self.args.world_size > 1:
            labelled = torch.tensor(labelled, device=device)
            dist.all_reduce(labelled)
        if self.is_fsdp_enabled:
            batches = sharding.agree_on_passes(batches, self.collate, device)
        return batches, labelled

    def _ready(self, made: dict[str, Any]) -> dict[str, Any]:
        return {**made, "batch": made["batch"].pin_memory()} if self.args.dataloader_pin_memory else made

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {**inputs, "batch": inputs["batch"].to(self.args.device, non_blocking=True)}

    # ---- a step

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        output = model(batch=inputs["batch"], num_items=num_items_in_batch, loss_only=True)
        loss = output.loss
        if loss is None or self.args.world_size > 1:
            # Gradients are averaged over processes, we want the sum; an idle row needs a backward through all, too.
            idle = self.accelerator.unwrap_model(model).head(output.hidden_TD[-1][:1]).sum() * 0.0
            loss = idle if loss is None else idle + loss * self.args.world_size
        loss = sharding.reach_all(loss, self.accelerator.unwrap_model(model))
        if self.graphed is not None or self._logs_now():
            self.thought_norm = thought_norm(output)
        return (loss, output) if return_outputs else loss

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        if self.graphed is not None and inputs["batch"].num_targets and not has_hooks(self.model):
            self.step_model = model
            assert num_items_in_batch is not None
            loss, norm = self.graphed(inputs["batch"], num_items_in_batch)
            assert loss is not None
            self.thought_norm = norm.clone() if norm is not None and self._logs_now() else None
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        return self.skipped.add(loss)

    def _forward_backward(
        self, batch: RaggedBatch, num_items: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The part of a step that a graph captures -> loss, thought norm."""
        self.thought_norm = None
        return super().training_step(self.step_model, {"batch": batch}, num_items), self.thought_norm

    def _logs_now(self) -> bool:
        return (self.state.global_step + 1) % self.args.logging_steps == 0

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self._skip_unless_finite(norm)
        return norm

    def _skip_unless_finite(self, grad_norm: torch.Tensor | float) -> None:
        """Makes the optimizer skip a step with non-finite loss or gradient, without host synchronisation."""
        if isinstance(grad_norm, DTensor):
            grad_norm = grad_norm.full_tensor()
        norm = torch.as_tensor(grad_norm, device=self.args.device)
        skips, loss = self.skipped.end(norm, all_processes=self.args.world_size > 1)
        self._tr_loss -= skips * loss  # the logged mean is over the other steps
        if self.accelerator.scaler is None:  # with a scaler (fp16), the scaler skips
            getattr(self.optimizer, "optimizer", self.optimizer).found_inf = skips
        looks = self.args.device.type == "cpu" or self._logs_now()  # comparing syncs: on a GPU only when logging
        if looks and self.skipped.streak >= self.settings.max_nonfinite:
            raise non_finite_error(self)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with weight decay on all parameters, as in the official code; fused, which also lets it skip a step."""
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(
                [p for p in (model or self.model).parameters() if p.requires_grad],
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                weight_decay=self.args.weight_decay,
                fused=True,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            factor = learning_rate_factor(self, num_training_steps)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        logs["stage"] = self.stage
        if "loss" in logs:
            seconds = time.perf_counter() - self.counted["since"]
            logs["tokens_per_second"] = self.counted["tokens"] / seconds
            logs["samples_per_second"] = self.counted["rows"] / seconds
            logs["loss"] *= without_skipped(self, self.counted)
            self.count_anew()
            if self.thought_norm is not None:
                logs["thought_norm"] = self.thought_norm.item()
                self.thought_norm = None
            on_gpu = self.args.device.type == "cuda"
            used = torch.cuda.max_memory_allocated() if on_gpu else psutil.Process().memory_info().rss
            logs["memory_gib"] = used / 2**30
            if self.counted["skipped"]:
                logs["skipped_steps"] = self.counted["skipped"]
        if "train_loss" in logs:
            logs["train_loss"] *= without_skipped(self, self.began)
        super().log(logs, start_time)

    # ---- evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluates the model as it is on a DataSet (None: for validation); training rates exclude its time."""
        start = time.perf_counter()
        problems = self.validation if eval_dataset is None else eval_dataset
        figures = validate(self, problems)
        self.judges = problems is self.validation
        self.counted["since"] += time.perf_counter() - start
        metrics: dict[str, Any] = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        metrics["stage"] = self.stage
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- checkpoints

    def train(self, resume_from_checkpoint: str | Path | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Trains, resuming from a checkpoint if one is given. CheckpointError for a broken one or another run's."""
        resume = None if resume_from_checkpoint is None else Path(resume_from_checkpoint)
        if resume is not None:
            manifest = checkpoints.read_manifest(resume)
            check_same_run(manifest["run"], run_fingerprint(self), resume)
            checkpoints.check_state(resume)
            self.run_state.restore(manifest)
            self.skipped.total.fill_(manifest["skipped"])
        if self.args.device.type == "cpu":
            ops.extension().keep_freed_memory()
        try:
            output = super().train(resume_from_checkpoint=resume and str(resume), **kwargs)
            return output._replace(training_loss=output.metrics["train_loss"])
        finally:
            self.report.close()  # so that an error starts on a new line
            if self.args.device.type == "cpu":
                ops.extension().keep_freed_memory(False)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        target = Path(self.args.output_dir) / f"{checkpoints.PREFIX}{self.state.global_step}"
        if self.args.world_size > 1:
            self._save_together(target)
            return
        with checkpoints.atomic_directory(target) as folder:
            self._write_checkpoint(folder)
            checkpoints.write_manifest(folder, self._facts())
        checkpoints.prune(target.parent, self.settings.keep_last, self.run_state.best_step)

    def _save_together(self, target: Path) -> None:
        """All processes write into one directory, which the first one creates and renames."""
        folder = target.with_name(checkpoints.UNFINISHED + target.name)
        if self.args.should_save:
            with checkpoints.atomic_directory(target) as folder:
                dist.barrier()
                self._write_checkpoint(folder)
                dist.barrier()
                checkpoints.write_manifest(folder, self._facts())
            checkpoints.prune(target.parent, self.settings.keep_last, self.run_state.best_step)
        else:
            dist.barrier()
            self._write_checkpoint(folder)
            dist.barrier()
        dist.barrier()

    def _write_checkpoint(self, folder: Path) -> None:
        state = sharding.whole_state(self.model) if self.is_fsdp_enabled else None
        self._save(str(folder), state)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        if self.args.should_save:
            self.state.save_to_json(str(folder / checkpoints.TRAINER_STATE))
            self.report.sync()  # no checkpoint without the records before it

    def _facts(self) -> dict[str, Any]:
        """What checkpoint.json holds: the run it belongs to, its epochs so far and the best one."""
        return {
            "step": self.state.global_step,
            "stage": self.stage,
            "skipped": int(self.skipped.total),
            "history": [asdict(record) for record in self.run_state.history],
            "best": self.run_state.best,
            "run": run_fingerprint(self),
        }

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            write(self.accelerator.unwrap_model(self.model), folder, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        folder, ours, own = Path(resume_from_checkpoint), self.accelerator.unwrap_model(self.model), None
        known, self.model_from = self.model_from, None  # training changes the model
        if folder == known and not (folder / ADDED_WEIGHTS).is_file():
            return
        if type(ours.feedback) not in FEEDBACKS.values():  # a user's module, which cannot be built from its name
            with sharding.gathered(ours):
                own = copy.deepcopy(ours.feedback)
        sharding.load_whole(ours, checkpoints.read_weights(folder, own))
