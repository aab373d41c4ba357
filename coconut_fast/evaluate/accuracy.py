"""Accuracy of a checkpoint on a data set, by batched generation; infer/scoring.py states what counts as the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from coconut_fast.data.curriculum import METHODS, CurriculumConfig, saved_curriculum
from coconut_fast.data.examples import Example
from coconut_fast.infer.scoring import Evaluation, generate_and_score, make_problems
from coconut_fast.model.coconut import Coconut
from coconut_fast.train.problems import DataSet


def evaluate(
    model: Coconut,
    examples: Sequence[Example],
    *,
    num_thoughts: int | None = None,
    method: str | None = None,
    max_new_tokens: int = 128,
    batch_size: int | None = None,
    weights: str | None = None,
    extract: Callable[[str], str] | None = None,
    where: str = "the data",
) -> Evaluation:
    """Accuracy of a model on problems, by greedy decoding.

    num_thoughts: for every question; None: as the checkpoint was trained (coconut.json). It is never derived from
    anything else: ValueError if a thinking model's checkpoint does not say. method: how prompts are made, where the
    checkpoint does not know (a plain Hugging Face model evaluated as "cot", say). weights: see `generate`. extract: a
    generated text -> the answer, in place of the official rule; like the expected answer, it is compared without commas
    and surrounding whitespace. where: the file the problems are from, for errors.
    """
    tokenized = DataSet(examples, model.tokenizer, model.settings.symbols, where=where).fixed
    config, stage = trained_curriculum(model, method, num_thoughts)
    return generate_and_score(
        model,
        make_problems(model, examples, tokenized, stage, config),
        num_thoughts=num_thoughts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        weights=weights,
        extract=extract,
        where=where,
    )


def trained_curriculum(
    model: Coconut, method: str | None = None, num_thoughts: int | None = None
) -> tuple[CurriculumConfig, int]:
    """The curriculum and the stage a checkpoint was trained with; ValueError if the number of thoughts is unknown."""
    saved = model.settings
    if method is not None and method not in METHODS:
        raise ValueError(f"method: found {method!r}, expected one of {', '.join(METHODS)}")
    asked = method or saved.method
    if num_thoughts is not None and METHODS[asked].slot != "thought":
        raise ValueError(f"num_thoughts: found {num_thoughts}, expected none: method {asked!r} has no thoughts")
    if saved.curriculum is not None and saved.stage is not None and asked == saved.method:
        return saved_curriculum(saved.curriculum), saved.stage
    if METHODS[asked].slot is None:
        return CurriculumConfig(method=asked), 0
    trained = saved.num_thoughts if METHODS[saved.method].slot == "thought" else None
    count = num_thoughts if num_thoughts is not None else trained
    if count is None and METHODS[asked].slot == "pause":
        raise ValueError(
            f"method: found {asked!r}, but the checkpoint does not say how many pause tokens it was trained with; "
            "expected a method without them"
        )
    if count is None:
        raise ValueError(
            f"num_thoughts: the checkpoint does not say how many thoughts it was trained with (method {asked!r}); "
            "pass num_thoughts"
        )
    markers = saved.markers and model.tokens.start is not None and model.tokens.end is not None
    return CurriculumConfig(method=asked, c_thought=1, max_latent_stage=count, markers=markers), count
