"""Run by torchrun from test_distributed.py: trains the tiny run in fp64 and writes its results.

torchrun --nproc-per-node N tests/distributed_worker.py FOLDER OUT [key=value ...] [bounded]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from coconut_fast.model.coconut import Coconut
from coconut_fast.train import checkpoints
from coconut_fast.train.build import build
from coconut_fast.train.problems import DataSet
from coconut_fast.train.recipe import parse_overrides
from coconut_fast.train.run import leave_group
from coconut_fast.train.sharding import whole_state
from coconut_fast.train.trainer import CoconutTrainer
from tests.runs import MODEL, NO_DROPOUT, chains, tiny


class Bounded(CoconutTrainer):
    """Has a module that only steps with thoughts use, outside the model's forward."""

    def __init__(self, model: Coconut, *arguments: Any) -> None:
        model.bound = torch.nn.Linear(1, 1).double()
        super().__init__(model, *arguments)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[override]
        loss, output = super().compute_loss(model, inputs, True, num_items_in_batch)
        fed = [h[p.source] for h, p in zip(output.hidden_TD, output.batch.passes[1:], strict=False)]
        if fed:
            lengths = torch.cat(fed).norm(dim=-1, keepdim=True)
            bounds = self.accelerator.unwrap_model(self.model).bound(lengths)
            loss = loss + bounds.square().sum() * self.args.world_size  # the sum over processes, which are averaged
        return (loss, output) if return_outputs else loss


def train(folder: Path, *overrides: str) -> dict[str, Any]:
    """Trains -> the results, as the first process has them."""
    trainer_class = Bounded if "bounded" in overrides else CoconutTrainer
    overrides = tuple(o for o in overrides if o != "bounded")
    given = parse_overrides(overrides)
    body = {key.removeprefix("model."): given.pop(key) for key in [*given] if key.startswith("model.")}
    changes = {"model": {**MODEL, **NO_DROPOUT, **body}, "num_epochs": 3, "uniform_prob": 0.3, **given}
    settings = tiny(folder, **changes)
    train, val = chains(37), chains(8, seed=1)
    model = build(settings, train).double()
    trainer = trainer_class(model, settings, DataSet(train, model.tokenizer), DataSet(val, model.tokenizer))
    last = checkpoints.complete(Path(settings.output_dir))
    trainer.train(resume_from_checkpoint=last[-1] if last else None)
    records = trainer.state.log_history
    return {
        "sharded": sum(isinstance(p, DTensor) for p in trainer.model.parameters()),
        "weights": whole_state(trainer.model),
        "losses": [r["loss"] for r in records if "loss" in r],
        "norms": [r["grad_norm"] for r in records if "grad_norm" in r],
        "scores": [(r["eval_accuracy"], r["eval_loss"]) for r in records if "eval_loss" in r],
    }


def threads() -> list[str]:
    """The names of this process's threads."""
    return [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = train(Path(sys.argv[1]), *sys.argv[3:])
    rank = dist.get_rank()
    leave_group()
    left = [name for name in threads() if "gloo" in name]
    assert "fsdp=true" in sys.argv or not left, f"threads of the group outlive it: {left}"  # FSDP's do, but are idle
    if rank == 0:
        torch.save(result, sys.argv[2])
