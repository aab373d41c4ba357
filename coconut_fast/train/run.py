"""A whole training run: read, build or resume, train, keep the best, draw the curve. The same call again resumes."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from coconut_fast.data.curriculum import METHODS
from coconut_fast.data.examples import Example
from coconut_fast.files import check_folder, remove_unfinished, reserve, write_json
from coconut_fast.model.coconut import Coconut
from coconut_fast.model.feedback import FEEDBACKS, name_of
from coconut_fast.model.saving import COCONUT_JSON
from coconut_fast.train import checkpoints
from coconut_fast.train.arguments import CoconutArguments
from coconut_fast.train.build import build
from coconut_fast.train.problems import DataSet, read_file
from coconut_fast.train.reports import draw_curve
from coconut_fast.train.schedule import EpochRecord
from coconut_fast.train.state import check_same_run, run_fingerprint
from coconut_fast.train.trainer import CoconutTrainer


def run(settings: CoconutArguments, trainer_class: type[CoconutTrainer] = CoconutTrainer) -> Path:
    """Trains as the settings say, from the newest checkpoint in `settings.output_dir` where there is one.

    Returns that directory: it then holds the best model of the last stage (for `coconut_fast.load`), checkpoints,
    metrics.jsonl, curve.png and run.json. ValueError for invalid settings or data, another run's checkpoint, or a
    directory in which another process trains; OSError where a checkpoint cannot be written; NonFiniteError where
    training diverges. trainer_class: with a loss or metrics of your own (docs/extending.md).
    """
    folder = Path(settings.output_dir)
    check_folder(folder, "save_path")
    train_limit, val_limit = settings.limits()
    examples = read_file(settings.train_path, "train_path", train_limit)
    held_out = read_file(settings.val_path, "val_path", val_limit) if settings.val_path else []
    if os.environ.get("RANK", "0") != "0":  # the first process reserves the directory for all, and writes
        _train(settings, folder, examples, held_out, trainer_class, main=False)
    else:
        with reserve(folder, "save_path"):
            remove_unfinished(folder)
            _train(settings, folder, examples, held_out, trainer_class, main=True)
    return folder


def _train(
    settings: CoconutArguments,
    folder: Path,
    examples: list[Example],
    held_out: list[Example],
    trainer_class: type[CoconutTrainer],
    main: bool,
) -> None:
    """What each process does; only `main` writes."""
    found = [] if settings.debug else checkpoints.complete(folder)
    last = found[-1] if found else None
    if last is None and not settings.debug and (folder / COCONUT_JSON).exists():
        raise ValueError(
            f"name: {folder} holds the model of a run without its checkpoints, expected one of them to go on from; "
            "move it away, or use another name for a new run"
        )
    manifest: dict[str, Any] = checkpoints.read_manifest(last) if last else {}
    model = checkpoints.read_model(last) if last else build(settings, examples)
    how = {"tokenizer": model.tokenizer, "symbols": model.settings.symbols, "seed": settings.seed}
    problems = DataSet(examples, **how, where=str(settings.train_path))
    validation = DataSet(held_out, **how, where=str(settings.val_path)) if held_out else None

    trainer = trainer_class(model, settings, problems, validation)
    if type(model.feedback) not in FEEDBACKS.values():
        raise ValueError(
            f"feedback: found a {type(model.feedback).__name__}, which no checkpoint could be loaded with again; "
            "expected a class in coconut_fast.model.feedback.FEEDBACKS"
        )
    if last:
        check_same_run(manifest["run"], run_fingerprint(trainer), last)
        if trainer_class is CoconutTrainer:  # another may have changed the model
            trainer.model_from = last
    if main:
        write_json(folder / "run.json", {**settings.to_dict(), "removal_smoothing": str(settings.removal_smoothing)})
        print(summary(trainer, last), file=sys.stderr)
    history = [EpochRecord(**record) for record in manifest.get("history", [])]
    if trainer.schedule.next_stage(history) is not None:
        trainer.train(resume_from_checkpoint=last)
    elif main:
        print("finished    nothing is left to train; another name begins a new run", file=sys.stderr)
    if main:
        finish(folder, settings.debug)


def summary(trainer: CoconutTrainer, last: Path | None) -> str:
    """What the run is about to do, in a few lines."""
    settings, schedule = trainer.settings, trainer.schedule
    model: Coconut = trainer.accelerator.unwrap_model(trainer.model)
    parameters = sum(p.numel() for p in model.parameters())
    size = f"{parameters / 1e6:,.1f}M" if parameters >= 1e6 else f"{parameters:,}"
    slot = METHODS[settings.method].slot
    slots = f", {settings.c_thought} {slot}{'s' if settings.c_thought != 1 else ''} per step" if slot else ""
    feedback = f", fed back by {name_of(model.feedback)}" if slot == "thought" else ""
    held_out = f", {len(trainer.validation)} for validation" if trainer.validation else ""
    origin = f", from {last.name}" if last else ""
    if last and settings.load_model_path is not None:
        origin += f", not from load_model_path ({settings.load_model_path}); another name begins a new run"
    return "\n".join(
        [
            f"run         {settings.output_dir}{origin}",
            f"model       {type(model.hf).__name__}, {size} parameters, {settings.precision}",
            f"problems    {len(trainer.rows)}{held_out}",
            f"method      {settings.method}{slots}{feedback}",
            f"stages      {schedule.in_words()}",
            f"batch       {trainer.sampler.rows_per_update} = {settings.batch_size_training} per process x "
            f"{settings.gradient_accumulation_steps} accumulated x {trainer.args.world_size} processes",
            f"device      {trainer.args.device}",
        ]
    )


def finish(folder: Path, debug: bool) -> None:
    """Puts the best model of the last stage (without validation: the last one) into the run's directory itself."""
    chosen = None if debug else checkpoints.best_or_last(folder)
    if chosen is not None:  # from the disk: the model in memory may be sharded
        checkpoints.read_model(chosen).save_pretrained(folder)
    draw_curve(folder)


def leave_group() -> None:
    """Destroys the process group of a process about to exit, and what a finished trainer still holds of it.

    Threads of a group that outlives the interpreter may free a tensor without one, which aborts the process, and
    torchrun then stops the others in the middle of their writes.
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # a trainer is a reference cycle, and its model's DDP holds the group
        dist.destroy_process_group()
