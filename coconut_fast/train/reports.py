"""What a run reports: metrics.jsonl always, a progress bar, and a plot of the learning curve at the end."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from coconut_fast.files import naming, write_atomically
from coconut_fast.model.coconut import CoconutOutput

if TYPE_CHECKING:
    from coconut_fast.train.trainer import CoconutTrainer

METRICS = "metrics.jsonl"
CURVE = "curve.png"
HEADROOM = 1.15  # room above the curves for the names of stages
DELAY = 2  # seconds until the progress bar appears
SHOWN = {  # record -> progress bar
    "stage": "stage",
    "loss": "loss",
    "eval_accuracy": "accuracy",
    "tokens_per_second": "tokens/s",
    "samples_per_second": "samples/s",
    "thought_norm": "thought norm",
    "memory_gib": "GiB",
}


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a metrics file, without a last line that a killed process left incomplete.

    ValueError, naming file and line, for a line that is no record.
    """
    records = []
    if Path(path).is_file():
        for number, line in enumerate(Path(path).read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            try:
                record = json.loads(line)
            except ValueError:
                break
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError(f"{path}: line {number}: found {line[:40]!r}, expected an object with a step")
            records.append(record)
    return records


def thought_norm(output: CoconutOutput) -> torch.Tensor | None:
    """Mean norm of the hidden states fed back as thoughts, padding excluded."""
    passes = output.batch.passes
    fed = [h[p.source] for h, p in zip(output.hidden_TD, passes[1:], strict=False)]
    if not fed:
        return None
    own = torch.cat([p.thoughts_after for p in passes]) >= 0  # not those added by train/buckets.py
    norms = torch.linalg.vector_norm(torch.cat(fed).detach().float(), dim=-1)
    return norms.where(own, 0.0).sum() / own.sum()


def without_skipped(trainer: CoconutTrainer, since: dict[str, Any]) -> float:
    """The factor that makes a mean over all steps since then, in which skipped ones are 0, one over the others."""
    steps = trainer.state.global_step - since["step"]
    kept = steps - (int(trainer.skipped.total) - since["skipped"])
    return steps / kept if kept else math.nan


class Report(TrainerCallback):
    """Writes every logged record to metrics.jsonl and shows the latest figures in a progress bar."""

    def __init__(self, run: str | os.PathLike[str]) -> None:
        self.path = Path(run) / METRICS
        self.bar: tqdm | None = None
        self.shown: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        # A resumed run repeats the steps after its checkpoint; their old records are dropped.
        kept = [record for record in read_metrics(self.path) if record["step"] <= state.global_step]
        with write_atomically(self.path) as file:
            file.writelines(json.dumps(record) + "\n" for record in kept if state.global_step)
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="train", unit="step", dynamic_ncols=True, delay=DELAY
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        record = {"step": state.global_step, **logs}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.shown |= {short: figure(logs[name]) for name, short in SHOWN.items() if logs.get(name) is not None}
        if self.bar is not None:
            self.bar.set_postfix(self.shown, refresh=False)

    def sync(self) -> None:
        """The records so far are on the disk when this returns."""
        if self.path.exists():
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and metrics:
            line = f"epoch {metrics['epoch']:g}  stage {metrics['stage']}  step {state.global_step}"
            names = ("eval_loss", "eval_accuracy", "eval_mean_tokens")
            line += "".join(f"  {name[5:]} {figure(metrics[name])}" for name in names if name in metrics)
            # tqdm.write would show a bar that has never shown itself, and close() not end its line.
            bar = self.bar
            shown = bar is not None and not bar.disable and bar.last_print_t >= bar.start_t + DELAY
            (tqdm.write if shown else print)(line, file=sys.stderr)

    def close(self) -> None:
        """Closes the progress bar, however training ends."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def figure(value: float) -> str:
    """Four digits, and never an exponent for a large number."""
    return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def draw_curve(run: str | os.PathLike[str]) -> Path | None:
    """curve.png of a run, from its metrics.jsonl: loss and validation accuracy over steps, stages marked.

    None where nothing was logged.
    """
    from matplotlib.figure import Figure  # not pyplot, which manages windows or a notebook's display

    records = read_metrics(Path(run) / METRICS)
    losses = [(r["step"], r["loss"]) for r in records if "loss" in r]
    scores = [(r["step"], r["eval_accuracy"]) for r in records if "eval_accuracy" in r]
    if not losses and not scores:
        return None
    picture = Figure(figsize=(9, 4.5), layout="constrained")
    left = picture.subplots()
    right = left.twinx()
    if losses:
        left.plot(*zip(*losses, strict=True), color="tab:blue", linewidth=1, label="training loss")
    if scores:
        right.plot(*zip(*scores, strict=True), color="tab:orange", marker="o", markersize=3, label="accuracy")
    left.set(xlabel="step", ylabel="training loss", title=literal(Path(run).name))
    highest = max((loss for _, loss in losses if math.isfinite(loss)), default=0)  # skipped steps log inf and nan
    left.set_ylim(0, HEADROOM * highest or None)
    right.set(ylabel="validation accuracy", ylim=(0, HEADROOM), yticks=[n / 5 for n in range(6)])
    for number, (start, stage) in enumerate(stage_starts(records)):
        left.axvline(start, color="grey", linewidth=0.8, linestyle=":", alpha=0.8)
        height = 0.98 - 0.05 * (number % 2)  # so that names of short stages do not overlap
        left.text(start, height, f" stage {stage}", transform=left.get_xaxis_transform(), va="top", fontsize=7)
    handles = [line for axis in (left, right) for line in axis.get_lines() if not str(line.get_label()).startswith("_")]
    left.legend(handles=handles, loc="lower left", fontsize=8)
    target = Path(run) / CURVE
    with write_atomically(target, binary=True) as file:
        picture.savefig(file, dpi=120, format="png")
    return target


def literal(text: str) -> str:
    """Escapes `text` for matplotlib, where a dollar sign begins a formula."""
    return text.replace("$", r"\$")


def stage_starts(records: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """(step, stage) where each stage begins: the last step logged in the previous stage."""
    starts: list[tuple[int, int]] = []
    step = 0
    for record in records:
        if "stage" in record:
            if not starts or record["stage"] != starts[-1][1]:
                starts.append((step, record["stage"]))
            step = record["step"]
    return starts
