"""Steps whose loss or gradient is not finite: skipped and counted on the device, without waiting for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from coconut_fast.files import write_json

if TYPE_CHECKING:
    from coconut_fast.train.trainer import CoconutTrainer


class NonFiniteError(RuntimeError):
    """Too many steps in a row whose loss or gradient was not finite."""


class SkippedSteps:
    """total: how many steps were skipped; streak: how many of them in a row, up to now. () tensors on the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.total = torch.zeros((), device=device)
        self.streak = torch.zeros((), device=device)
        self.begin()

    def begin(self) -> None:
        """Begins a step, of which no batch has been seen."""
        self.loss = torch.zeros((), device=self.device)
        self.loss_is_finite = torch.ones((), dtype=torch.bool, device=self.device)

    def add(self, loss: torch.Tensor) -> torch.Tensor:
        """Adds a batch's loss to the step's -> the loss, 0 where it is not finite."""
        self.loss_is_finite = self.loss_is_finite & torch.isfinite(loss)
        loss = torch.nan_to_num(loss, nan=0.0, posinf=0.0, neginf=0.0)
        self.loss = self.loss + loss
        return loss

    def end(self, grad_norm: torch.Tensor, all_processes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Ends the step -> 1 where it must be skipped (all_processes: in all, if in one), else 0; its summed loss."""
        skips = (~(torch.isfinite(grad_norm) & self.loss_is_finite)).float()
        if all_processes:
            dist.all_reduce(skips, op=dist.ReduceOp.MAX)
        self.streak = (self.streak + 1) * skips
        self.total = self.total + skips
        loss = self.loss
        self.begin()
        return skips, loss


def non_finite_error(trainer: CoconutTrainer) -> NonFiniteError:
    """The error for too many such steps in a row; writes the last one's rows to a file."""
    own = f"-process-{trainer.args.process_index}" if trainer.args.world_size > 1 else ""  # each has its own rows
    step = trainer.state.global_step + 1
    file = Path(trainer.args.output_dir) / f"nonfinite-step-{step}{own}.json"
    names = ("problem", "epoch", "stage", "input_ids", "labels")
    write_json(file, [dict(zip(names, (*key, ids, labels), strict=True)) for key, ids, labels in trainer.step_rows])
    return NonFiniteError(
        f"loss or gradient was not finite in {int(trainer.skipped.streak)} steps in a row, up to step {step}; the last "
        f"batch is in {file}"
    )
