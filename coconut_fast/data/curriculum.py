"""The curriculum as pure functions: (example, stage, CurriculumConfig) -> token ids and labels.

A training row is question, start marker, slots, end marker, remaining steps, answer. At stage s the first s reasoning
steps are replaced by s * c_thought slots; past the last stage all steps are gone. A slot is a thought (a hidden state
fed back) or, in the pause rows of the paper's Table 1, a pause token. Labels are -100 on question, markers and slots.
Rows equal the official code's for coconut, no_thoughts, cot and no_cot.

    method                      slots           steps removed by      Table 1 of arXiv 2412.06769
    coconut                     thoughts        stage                 Coconut
    no_curriculum               thoughts        all, from the start   - w/o curriculum
    no_thoughts                 none            stage                 - w/o thought
    pause_as_thought            pause tokens    stage                 - pause as thought
    pause_as_thought_multipass  thoughts        stage                 the same, with Coconut's extra passes: rows as
                                                                      coconut's, the model feeds back an embedding
    pause                       pause tokens    all, from the start   Pause token
    icot                        none            stage, by tokens      iCoT (Deng et al., arXiv 2405.14838)
    cot                         none            none                  CoT
    no_cot                      none            all, from the start   No-CoT
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from numbers import Integral
from typing import Any

from coconut_fast.data.examples import TokenizedExample
from coconut_fast.tokens import IGNORE, LatentTokens


@dataclass(frozen=True, slots=True)
class Method:
    """What a method puts between question and answer, and whether it moves through the stages."""

    slot: str | None  # "thought", "pause" or None
    stages: str  # "all": as scheduled; "first": the whole chain throughout; "last": no chain throughout
    markers: bool  # whether <|start-latent|> and <|end-latent|> frame the slots by default


METHODS = {
    "coconut": Method("thought", "all", True),
    "no_curriculum": Method("thought", "last", True),
    "no_thoughts": Method(None, "all", False),
    "pause_as_thought": Method("pause", "all", True),
    "pause_as_thought_multipass": Method("thought", "all", True),
    "pause": Method("pause", "last", False),
    "icot": Method(None, "all", False),
    "cot": Method(None, "first", False),
    "no_cot": Method(None, "last", False),
}
TARGETS = ("chain", "next_node", "random_frontier")


@dataclass(frozen=True)
class CurriculumConfig:
    """How rows are made. ValueError where a value makes no sense.

    method: a key of METHODS.
    c_thought: slots per removed reasoning step.
    max_latent_stage: the last stage with language; a stage past it drops all remaining steps.
    pad_latent_to_max: past the last stage (and in question rows) a row gets max_latent_stage * c_thought slots even if
        its chain is shorter; otherwise c_thought per step of its chain, up to that number.
    uniform_prob: probability that a training row uses a stage drawn from 0..number of steps (paper, section 5: 0.3).
    replay_prob: probability that a training row uses a stage drawn from the earlier ones (superposition paper: 0.1).
    target: what a training row is asked for. "chain": remaining steps and answer. "next_node": the next step alone;
        "random_frontier": one node of `example.frontiers[stage]`; both ask for the answer once the chain is used up.
    markers: whether the two markers frame the slots; None: as the method does, if the model has them.
    tokens_per_stage: icot only: leading tokens of the chain removed per stage.
    removal_smoothing: icot only: o more tokens are removed with probability proportional to exp(-removal_smoothing * o)
        (Deng et al.: 4); inf: none.
    """

    method: str = "coconut"
    c_thought: int = 1
    max_latent_stage: int = 6
    pad_latent_to_max: bool = True
    uniform_prob: float = 0.0
    replay_prob: float = 0.0
    target: str = "chain"
    markers: bool | None = None
    tokens_per_stage: int = 8
    removal_smoothing: float = math.inf

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: found {self.method!r}, expected one of {', '.join(METHODS)}")
        if self.target not in TARGETS:
            raise ValueError(f"target: found {self.target!r}, expected one of {', '.join(TARGETS)}")
        for name in ("c_thought", "max_latent_stage", "tokens_per_stage"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name}: found {value!r}, expected 0 or more, a whole number")
        if not isinstance(self.pad_latent_to_max, bool):
            raise ValueError(f"pad_latent_to_max: found {self.pad_latent_to_max!r}, expected True or False")
        if not isinstance(self.markers, bool | None):
            raise ValueError(f"markers: found {self.markers!r}, expected True, False or None")
        for name in ("uniform_prob", "replay_prob"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(f"{name}: found {value!r}, expected a probability from 0 to 1")
        if self.uniform_prob + self.replay_prob > 1:
            raise ValueError(
                f"uniform_prob + replay_prob: found {self.uniform_prob} + {self.replay_prob}, expected at most 1"
            )
        if not isinstance(self.removal_smoothing, int | float) or not self.removal_smoothing > 0:
            raise ValueError(f"removal_smoothing: found {self.removal_smoothing!r}, expected a number above 0")
        if self.target != "chain" and self.method in ("icot", "cot"):
            raise ValueError(f"target: found {self.target!r}, expected 'chain' for method {self.method!r}")

    @property
    def random(self) -> bool:
        """Whether training rows need a random generator."""
        return bool(
            self.uniform_prob
            or self.replay_prob
            or self.target == "random_frontier"
            or (self.method == "icot" and self.removal_smoothing < math.inf)
        )


def saved_curriculum(saved: Mapping[str, Any]) -> CurriculumConfig:
    """The curriculum of a checkpoint's coconut.json. ValueError for unknown names or invalid values."""
    unknown = [name for name in saved if name not in CurriculumConfig.__dataclass_fields__]
    if unknown:
        raise ValueError(f"coconut.json: curriculum: {unknown[0]!r} is unknown to this version of coconut_fast")
    try:
        return CurriculumConfig(**saved)
    except ValueError as error:
        raise ValueError(f"coconut.json: curriculum: {error}") from error


def row_rng(seed: int, epoch: int, idx: int) -> random.Random:
    """The generator of one row in one epoch: the same in any process, for any order of rows, and after a resume."""
    return random.Random(f"{seed}/{epoch}/{idx}")


def training_row(
    example: TokenizedExample,
    stage: int,
    config: CurriculumConfig,
    tokens: LatentTokens,
    rng: random.Random | None = None,
) -> tuple[list[int], list[int]]:
    """(input_ids, labels) of `example` at `stage`, equally long; labels are -100 where there is no target.

    `rng` (see row_rng) is needed where `config.random`; ValueError where it is missing, the stage is negative, or
    `tokens` lacks a token that the method needs.
    """
    if config.random and rng is None:
        raise ValueError("rng: found None, expected a random.Random, because the curriculum draws at random")
    stage = _drawn_stage(example, stage, config, rng)
    dropped = stage > config.max_latent_stage
    slots = _full_slots(example, config) if dropped else stage * config.c_thought
    cue: list[int] = []
    if config.target == "chain":
        asked = ([] if dropped else _remaining(example, stage, config, rng)) + example.answer_ids
    elif not dropped and stage < len(example.steps_ids):
        asked = _node(example, stage, config.target, rng)
    else:
        slots = min(slots, _full_slots(example, config))
        cue, asked = example.answer_ids[: example.cue], example.answer_ids[example.cue :]
    given = example.question_ids + _slots(slots, config, tokens) + cue
    return given + asked, [IGNORE] * len(given) + asked


def question_row(example: TokenizedExample, stage: int, config: CurriculumConfig, tokens: LatentTokens) -> list[int]:
    """input_ids of the prompt at `stage`: question, markers and slots (and the cue, for targets that give one)."""
    slots = num_slots(example, stage, config)
    cue = [] if config.target == "chain" else example.answer_ids[: example.cue]
    return example.question_ids + _slots(slots, config, tokens) + cue


def num_slots(example: TokenizedExample, stage: int, config: CurriculumConfig) -> int:
    """Thoughts (or pause tokens) in `question_row` of `example` at `stage`."""
    if METHODS[config.method].slot is None:
        return 0
    return min(_full_slots(example, config), method_stage(stage, config) * config.c_thought)


def method_stage(stage: int, config: CurriculumConfig) -> int:
    """The stage whose rows a method uses at a scheduled stage: some always use the first or the last one."""
    if stage < 0:
        raise ValueError(f"stage: found {stage}, expected 0 or more")
    stages = METHODS[config.method].stages
    if stages == "first":
        return 0
    return config.max_latent_stage + 1 if stages == "last" else stage


def _drawn_stage(example: TokenizedExample, stage: int, config: CurriculumConfig, rng: random.Random | None) -> int:
    """The stage a training row uses: the scheduled one, or by chance another. One draw decides, a second chooses."""
    stage = method_stage(stage, config)
    if METHODS[config.method].stages != "all" or rng is None or not (config.uniform_prob or config.replay_prob):
        return stage
    chance = rng.random()
    if chance < config.uniform_prob:
        return rng.randrange(len(example.steps_ids) + 1)
    if chance < config.uniform_prob + config.replay_prob and stage > 0:
        return rng.randrange(min(stage, config.max_latent_stage + 1))
    return stage


def _full_slots(example: TokenizedExample, config: CurriculumConfig) -> int:
    """Slots of a row whose whole chain is gone."""
    stages = config.max_latent_stage
    if not config.pad_latent_to_max:
        stages = min(stages, len(example.steps_ids))
    return stages * config.c_thought


def _slots(count: int, config: CurriculumConfig, tokens: LatentTokens) -> list[int]:
    method = METHODS[config.method]
    filling: list[int] = []
    if method.slot is not None:
        token = tokens.pause if method.slot == "pause" else tokens.thought
        if token is None:
            raise ValueError(
                f"tokens.pause: found None, expected a token id, because method {config.method!r} needs it"
            )
        filling = [token] * count
    start, end = tokens.start, tokens.end
    markers = config.markers
    if markers is None:
        markers = method.markers and start is not None and end is not None
    if not markers:
        return filling
    if start is None or end is None:
        raise ValueError("markers: asked for, but tokens.start or tokens.end is None; expected both token ids")
    return [start, *filling, end]


def _node(example: TokenizedExample, stage: int, target: str, rng: random.Random | None) -> list[int]:
    """The target of a row in the superposition paper (arXiv 2505.12514) after the thoughts of `stage` steps."""
    if target == "next_node":
        return example.steps_ids[stage]
    if example.frontiers is None or len(example.frontiers) <= stage or not example.frontiers[stage]:
        raise ValueError(
            f"target: 'random_frontier' needs a frontier at stage {stage}, example {example.idx} has none; expected "
            "a graph problem"
        )
    assert rng is not None  # training_row has checked it
    return [rng.choice(example.frontiers[stage])]


def _remaining(example: TokenizedExample, stage: int, config: CurriculumConfig, rng: random.Random | None) -> list[int]:
    """The tokens of the chain that are left at `stage`."""
    if config.method != "icot":
        return list(chain.from_iterable(example.steps_ids[stage:]))
    removed = stage * config.tokens_per_stage
    if rng is not None and config.removal_smoothing < math.inf:
        # P(o) = (1 - e^-l) e^(-l o): a geometric distribution, drawn by inversion
        removed += int(-math.log(1.0 - rng.random()) / config.removal_smoothing)
    return list(chain.from_iterable(example.steps_ids))[removed:]
