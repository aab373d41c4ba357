"""Scoring: problems -> prompts -> generate() -> judged answers. In infer/ because training validates with it too.

The answer is the text after the last "#" ("[A]" in graph problems in symbols), or the whole text without one. It is
correct if it equals the expected answer, both without commas and surrounding whitespace (the official rule; if the
expected answer itself holds n "#", the text after the (n + 1)th from the end is compared). In graph problems in symbols
the target node is expected, as the model was asked for it. Thoughts count as generated tokens, end-of-text does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from coconut_fast.data.curriculum import CurriculumConfig, method_stage, question_row
from coconut_fast.data.examples import Example, TokenizedExample
from coconut_fast.infer.engine import generate
from coconut_fast.infer.prompts import with_thoughts
from coconut_fast.model.coconut import Coconut


@dataclass(frozen=True)
class Problem:
    """What is asked: a prompt as the model sees it, and the answers that count as right."""

    idx: int
    question: str  # as asked: of a graph in symbols, with the numbers that the model gets
    prompt: list[int]
    accepted: tuple[str, ...]
    length: int | None = None  # tokens of the answer that count; None: up to end-of-text


@dataclass(frozen=True)
class Prediction:
    """The judged answer to one problem."""

    idx: int
    question: str
    expected: str
    answer: str
    correct: bool
    num_thoughts: int
    new_tokens: int  # thoughts included, end-of-text not
    text: str


@dataclass(frozen=True)
class Evaluation:
    """The result of one model on one data set; `seconds` is wall clock for all problems, batched."""

    predictions: list[Prediction] = field(repr=False)
    seconds: float

    @property
    def correct(self) -> int:
        return sum(p.correct for p in self.predictions)

    @property
    def accuracy(self) -> float:
        """From 0 to 1."""
        return self.correct / max(1, len(self.predictions))

    @property
    def mean_tokens(self) -> float:
        """Generated tokens per problem, thoughts included."""
        return sum(p.new_tokens for p in self.predictions) / max(1, len(self.predictions))

    @property
    def mean_thoughts(self) -> float:
        return sum(p.num_thoughts for p in self.predictions) / max(1, len(self.predictions))

    @property
    def seconds_per_example(self) -> float:
        return self.seconds / max(1, len(self.predictions))

    def summary(self) -> dict[str, Any]:
        """The figures of a table row, ready for JSON."""
        return {
            "accuracy": self.accuracy,
            "correct": self.correct,
            "examples": len(self.predictions),
            "mean_tokens": self.mean_tokens,
            "mean_thoughts": self.mean_thoughts,
            "seconds_per_example": self.seconds_per_example,
        }

    def records(self) -> list[dict[str, Any]]:
        """One JSON object per problem."""
        return [asdict(p) for p in self.predictions]


def extract_answer(text: str, mark: str = "#", inside: int = 0) -> str:
    """The text after the last mark, not counting the `inside` marks of the answer itself; see `clean`."""
    return clean(mark.join(text.split(mark)[-1 - inside :]))


def clean(answer: str) -> str:
    """Commas removed, stripped."""
    return answer.replace(",", "").strip()


def make_problems(
    model: Coconut,
    examples: Sequence[Example],
    tokenized: Sequence[TokenizedExample],
    stage: int,
    config: CurriculumConfig,
) -> list[Problem]:
    """The prompts of a stage with the answers that count as right.

    Where the curriculum asks for one node of a graph, the nodes it may ask for at this stage are the right answers.
    """
    stage = method_stage(stage, config)
    problems = []
    for example, ids in zip(examples, tokenized, strict=True):
        prompt = question_row(ids, stage, config, model.tokens)
        question = example.question
        accepted: tuple[str, ...] = (clean(example.answer),)
        if model.settings.symbols is not None:  # the record may be in words, or have other numbers for the nodes
            question = model.tokenizer.decode(ids.question_ids)
            accepted = (extract_answer(model.tokenizer.decode(ids.answer_ids[:-1]), "[A]"),)
        length = None
        if config.target != "chain" and stage <= config.max_latent_stage and stage < len(ids.steps_ids):
            prompt = prompt[: len(prompt) - ids.cue]
            asked = [ids.steps_ids[stage]]
            if config.target == "random_frontier" and ids.frontiers is not None:
                asked = [[node] for node in ids.frontiers[stage]]
            accepted = tuple(clean(model.tokenizer.decode(nodes)) for nodes in asked)
            length = len(asked[0])
        problems.append(Problem(ids.idx, question, prompt, accepted, length))
    return problems


def generate_and_score(
    model: Coconut,
    problems: Sequence[Problem],
    *,
    num_thoughts: int | None = None,
    max_new_tokens: int = 128,
    batch_size: int | None = None,
    weights: str | None = None,
    extract: Callable[[str], str] | None = None,
    where: str = "the data",
) -> Evaluation:
    """Generates and judges. `max_new_tokens` is limited to the positions the model has left after each prompt. extract:
    a generated text -> the answer to compare, in place of the official rule.

    ValueError, naming the record of `where`, for a prompt that is itself too long.
    """
    mark = "#" if model.settings.symbols is None else "[A]"
    limits = [_limit(model, problem, num_thoughts, max_new_tokens, where) for problem in problems]
    start = time.perf_counter()
    output = generate(
        model,
        [p.prompt for p in problems],
        num_thoughts=num_thoughts,
        max_new_tokens=limits,
        batch_size=batch_size,
        weights=weights,
    )
    seconds = time.perf_counter() - start
    if output.stats.interrupted:
        raise KeyboardInterrupt
    predictions = []
    for problem, text, ids, thoughts in zip(problems, output.texts, output.token_ids, output.num_thoughts, strict=True):
        assert ids is not None
        if problem.length is not None:
            ids = ids[: problem.length]
            text = model.tokenizer.decode(ids)
        found = (
            extract_answer(text or "", mark, problem.accepted[0].count(mark))
            if extract is None
            else clean(extract(text or ""))
        )
        predictions.append(
            Prediction(
                idx=problem.idx,
                question=problem.question,
                expected=problem.accepted[0],
                answer=found,
                correct=found in problem.accepted,
                num_thoughts=thoughts,
                new_tokens=len(ids) + thoughts,
                text=text or "",
            )
        )
    return Evaluation(predictions, seconds)


def _limit(model: Coconut, problem: Problem, num_thoughts: int | None, max_new_tokens: int, where: str) -> int:
    """Tokens wanted of a problem's answer that fit after its prompt; the last one is never fed."""
    wanted = min(problem.length or max_new_tokens, max_new_tokens)
    if model.max_positions is None:
        return wanted
    prompt = problem.prompt
    if num_thoughts is not None and num_thoughts <= model.max_positions:
        prompt = with_thoughts(model, prompt, num_thoughts)
    length = max(len(prompt), num_thoughts or 0)
    if length > model.max_positions:
        raise ValueError(
            f"{where}: record {problem.idx + 1}: the question has {length} tokens with its thoughts, expected at "
            f"most the {model.max_positions} positions of the model"
        )
    return min(wanted, model.max_positions - length + 1)
