"""Accuracy of a recipe's model on its val_path, without training: `only_eval: true`."""

from __future__ import annotations

import torch

from coconut_fast.data.curriculum import METHODS, num_slots
from coconut_fast.data.examples import TokenizedExample
from coconut_fast.evaluate.accuracy import evaluate
from coconut_fast.infer.scoring import Evaluation
from coconut_fast.model.coconut import Coconut
from coconut_fast.train.arguments import CoconutArguments
from coconut_fast.train.build import build
from coconut_fast.train.callbacks import record_curriculum
from coconut_fast.train.problems import read_file

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}  # precisions that compute over fp32 weights


def evaluate_recipe(settings: CoconutArguments) -> Evaluation:
    """Evaluates the model that training would start from, greedily. ValueError for invalid settings or data."""
    _, limit = settings.limits()
    examples = read_file(settings.val_path, "val_path", limit)
    train = read_file(settings.train_path, "train_path") if settings.tokenizer == "words" else []
    model = build(settings, train).eval()
    num_thoughts = fill_settings(model, settings)
    if settings.device != "cpu":
        model.to("cuda" if torch.cuda.is_available() else "cpu")
    half = AUTOCAST.get(settings.precision)
    with torch.autocast(model.device.type, half, enabled=half is not None):
        return evaluate(
            model,
            examples,
            num_thoughts=num_thoughts,
            max_new_tokens=settings.answer_length(),
            batch_size=settings.eval_batch_size,
            where=str(settings.val_path),
        )


def fill_settings(model: Coconut, settings: CoconutArguments) -> int | None:
    """What the checkpoint does not say of its training, `model.settings` gets from the recipe.

    Returns the thoughts per question where the recipe's num_thoughts or the checkpoint says just their number. Official
    checkpoints say nothing; then all stages' thoughts are used if `resume` agrees, with a ValueError where the official
    code would silently take another number from it.
    """
    saved, count = model.settings, settings.num_thoughts
    if saved.curriculum is not None and saved.stage is not None:
        return count
    config, last = settings.curriculum(), settings.max_latent_stage + 1
    slot = METHODS[config.method].slot
    if count is None and slot == "thought":
        count = saved.num_thoughts
    if count is None:
        empty = TokenizedExample([], [[]] * last, [])
        stage = settings.resume // settings.epochs_per_stage
        by_resume, full = num_slots(empty, stage, config), num_slots(empty, last, config)
        if by_resume != full and slot == "pause":
            raise ValueError(
                f"resume: found {settings.resume}, which would mean {by_resume} pause tokens where a fully trained "
                f"model has {full}; say max_latent_stage={stage} or resume={(last - 1) * settings.epochs_per_stage}"
            )
        if by_resume != full:
            raise ValueError(
                f"num_thoughts: found none, and resume={settings.resume} would mean {by_resume} thoughts where a fully "
                f"trained model has {full}; say num_thoughts={by_resume} or num_thoughts={full}"
            )
    record_curriculum(model, config, last)
    if saved.parallel_rounds is None:
        saved.parallel_rounds = settings.parallel_rounds
    return count
