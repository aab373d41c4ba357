"""Accuracy of a recipe's model on its val_path, without training: `only_eval: true`."""

from __future__ import annotations

import torch

from coconut_fast.data.curriculum import CurriculumConfig, num_slots, saved_curriculum
from coconut_fast.data.examples import TokenizedExample
from coconut_fast.infer.scoring import Evaluation, generate_and_score, make_problems
from coconut_fast.model.coconut import Coconut
from coconut_fast.train.arguments import CoconutArguments
from coconut_fast.train.build import build
from coconut_fast.train.problems import read_file, tokenize


def evaluate_recipe(settings: CoconutArguments) -> Evaluation:
    """Evaluates the model that training would start from, greedily. ValueError for invalid settings or data."""
    _, limit = settings.limits()
    examples = read_file(settings.val_path, "val_path", limit)
    train = read_file(settings.train_path, "train_path") if settings.tokenizer == "words" else []
    model = build(settings, train).eval()
    stage, config, num_thoughts = thoughts_of_recipe(settings, model)
    if settings.device != "cpu":
        model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenized = tokenize(examples, model.tokenizer, model.settings.symbols, where=str(settings.val_path))
    return generate_and_score(
        model,
        make_problems(model, examples, tokenized, stage, config),
        num_thoughts=num_thoughts,
        max_new_tokens=settings.answer_length(),
        batch_size=settings.eval_batch_size,
        where=str(settings.val_path),
    )


def thoughts_of_recipe(settings: CoconutArguments, model: Coconut) -> tuple[int, CurriculumConfig, int | None]:
    """(stage, curriculum, number of thoughts if given explicitly).

    The checkpoint says, or num_thoughts does. Official checkpoints do not; then all stages' thoughts are used if
    `resume` agrees, with a ValueError where the official code would silently take another number from it.
    """
    if model.settings.curriculum is not None and model.settings.stage is not None:
        return model.settings.stage, saved_curriculum(model.settings.curriculum), settings.num_thoughts
    config = settings.curriculum()
    last = config.max_latent_stage + 1
    if settings.num_thoughts is None:
        empty = TokenizedExample([], [[]] * last, [])
        by_resume = num_slots(empty, settings.resume // settings.epochs_per_stage, config)
        full = num_slots(empty, last, config)
        if by_resume != full:
            raise ValueError(
                f"num_thoughts: found none, and resume={settings.resume} would mean {by_resume} thoughts where a fully "
                f"trained model has {full}; say num_thoughts={by_resume} or num_thoughts={full}"
            )
    return last, config, settings.num_thoughts
