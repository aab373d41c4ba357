"""Validation during training: accuracy by batched generation, and the loss of the validation rows.

Both are for the trainer's current stage. Problems and rows are split over the processes, and each process gets the
figures of all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from coconut_fast.infer import runner_cache
from coconut_fast.infer.scoring import Evaluation, generate_and_score, make_problems
from coconut_fast.model.coconut import Coconut
from coconut_fast.train import sharding
from coconut_fast.train.problems import DataSet
from coconut_fast.train.rows import StageRows

if TYPE_CHECKING:
    from coconut_fast.train.trainer import CoconutTrainer


def validate(trainer: CoconutTrainer, problems: DataSet | None) -> dict[str, Any]:
    """The figures of infer.scoring.Evaluation.summary, and "loss"; the model keeps its mode (train or eval)."""
    if not isinstance(problems, DataSet):
        raise ValueError(f"eval_dataset: found {type(problems).__name__}, expected a DataSet")
    model: Coconut = trainer.accelerator.unwrap_model(trainer.model)
    was_training = model.training
    model.eval()
    with sharding.gathered(model), trainer.accelerator.autocast():
        result = _answers(trainer, model, problems)
        loss = _mean_loss(trainer, model, problems)
    model.train(was_training)
    return {**result.summary(), "loss": loss}


def _answers(trainer: CoconutTrainer, model: Coconut, validation: DataSet) -> Evaluation:
    """Every problem's judged answer, with the stage's number of thoughts."""
    args = trainer.args
    problems = make_problems(model, validation.examples, validation.fixed, trainer.stage, trainer.curriculum)
    mine = generate_and_score(
        model,
        problems[args.process_index :: args.world_size],
        max_new_tokens=trainer.settings.answer_length(),
        batch_size=trainer.settings.eval_batch_size,
        extract=trainer.extract_answer,
    )
    runner_cache.drop(model)  # training needs the cache's memory more than the next evaluation needs the graphs
    if args.world_size == 1:
        return mine
    parts: list[Evaluation] = [mine] * args.world_size
    dist.all_gather_object(parts, mine)
    return Evaluation([p for part in parts for p in part.predictions], max(part.seconds for part in parts))


@torch.no_grad()
def _mean_loss(trainer: CoconutTrainer, model: Coconut, validation: DataSet) -> float:
    """The mean loss over all labelled tokens of the stage's rows."""
    args = trainer.args
    rows = StageRows(validation, trainer.curriculum, model.tokens, trainer.settings.seed)
    mine = range(args.process_index, len(rows), args.world_size)
    size = trainer.settings.batch_size_training
    totals = torch.zeros(2, dtype=torch.float64, device=args.device)
    for start in tqdm(range(0, len(mine), size), desc="loss", unit="batch", delay=2, leave=False):
        batch = trainer.collate([rows[idx, 0, trainer.stage] for idx in mine[start : start + size]])["batch"]
        loss = model(batch=batch.to(args.device), num_items=1, loss_only=True).loss
        totals += torch.stack([loss.double(), torch.full_like(loss, batch.num_targets, dtype=torch.float64)])
    if args.world_size > 1:
        dist.all_reduce(totals)
    return (totals[0] / totals[1]).item()
