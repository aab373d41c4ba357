"""Training rows on the fly: (problem, epoch, stage) -> token ids and labels -> one ragged batch.

Problems are tokenized once. A stage changes only the keys, so the data set is never mapped again, and a row is the same
in any process, in any order and after a resume.
"""

from __future__ import annotations

import ctypes
import math
import signal
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch.utils.data import Dataset

from coconut_fast.data.curriculum import METHODS, CurriculumConfig, method_stage, row_rng, training_row
from coconut_fast.model.batch import collate
from coconut_fast.tokens import IGNORE, LatentTokens
from coconut_fast.train.buckets import bucketed
from coconut_fast.train.problems import DataSet

Key = tuple[int, int, int]  # problem, epoch, stage
Row = tuple[Key, list[int], list[int]]  # key, input_ids, labels


def end_with_parent(worker: int) -> None:
    """Has a data loader's worker killed when the trainer is. Else it may stay, blocked writing to a pipe that other
    workers hold open (5 of 8 did, 400 MB each)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class StageRows(Dataset):
    """What the data loader indexes: `rows[problem, epoch, stage] -> (key, input_ids, labels)`."""

    def __init__(self, problems: DataSet, config: CurriculumConfig, tokens: LatentTokens, seed: int) -> None:
        self.problems = problems
        self.config = config
        self.tokens = tokens
        self.seed = seed

    def __len__(self) -> int:
        return len(self.problems)

    def __getitem__(self, key: Key) -> Row:
        idx, epoch, stage = key
        rng = row_rng(self.seed, epoch, idx) if self.config.random else None
        return key, *training_row(self.problems.at(idx, epoch), stage, self.config, self.tokens, rng)

    def lengths(self, stage: int) -> list[int]:
        """Tokens of every row at a stage, to sort by: up to a constant (icot, which removes tokens: approximately)."""
        stage = method_stage(stage, self.config)
        first = stage if stage <= self.config.max_latent_stage else None
        return [
            len(e.question_ids) + len(e.answer_ids) + (sum(map(len, e.steps_ids[first:])) if first is not None else 0)
            for e in self.problems.fixed
        ]

    def check(self, stages: Sequence[int], max_positions: int | None, name: str = "train_path") -> None:
        """ValueError for the first row of any stage that cannot run; `name`: the setting.

        That is a row longer than the model's positions, one that starts with a thought, or one without the target asked
        for. Randomness only gives a row another stage or a shorter rest of its chain, so checking all stages without it
        is enough.
        """
        certain = replace(self.config, uniform_prob=0.0, replay_prob=0.0, removal_smoothing=math.inf)
        asks_nodes = self.config.target == "random_frontier" and METHODS[self.config.method].stages != "last"
        for idx, example in enumerate(self.problems.fixed):
            if example.question_ids[:1] == [self.tokens.thought]:
                raise ValueError(
                    f"{self.problems.where}: record {idx + 1}: the question starts with a thought, expected a token "
                    "in front of it"
                )
            if asks_nodes and example.steps_ids and example.frontiers is None:
                raise ValueError(
                    f"{self.problems.where}: record {idx + 1}: found text, expected a graph problem, whose nodes "
                    "target random_frontier asks for (tokenizer: symbols)"
                )
            if max_positions is None:
                continue
            chain = sum(map(len, example.steps_ids))
            slots = self.config.c_thought * self.config.max_latent_stage + 2
            if len(example.question_ids) + len(example.answer_ids) + chain + slots <= max_positions:
                continue  # short enough whatever the stage
            for stage in stages:
                rng = row_rng(self.seed, 0, idx)
                length = len(training_row(example, stage, certain, self.tokens, rng)[0])
                if length > max_positions:
                    raise ValueError(
                        f"{name}: problem {idx + 1} has {length} tokens at stage {stage}, expected at most the "
                        f"{max_positions} positions of the model"
                    )


class Collate:
    """Rows -> {"batch": RaggedBatch, "rows": its rows}; in_buckets: padded to a few shapes (train/buckets.py)."""

    def __init__(self, tokens: LatentTokens, in_buckets: bool = False) -> None:
        self.thought_id = tokens.thought
        self.in_buckets = in_buckets
        self.idle_id = tokens.eos or 0

    def __call__(self, rows: Sequence[Row], passes: int = 0) -> dict[str, Any]:
        """passes: at least this many, whatever the rows need.

        Where the rows need fewer, or there are none, an idle row without labels is added: processes that share weights
        must run the same number of passes.
        """
        ids, labels = [ids for _, ids, _ in rows], [labels for _, _, labels in rows]
        if not rows or 1 + max(row.count(self.thought_id) for row in ids) < passes:
            idle = [self.idle_id] + [self.thought_id] * (passes - 1)
            ids, labels = [*ids, idle], [*labels, [IGNORE] * len(idle)]
        if self.in_buckets:
            return {"batch": bucketed(ids, self.thought_id, labels, self.idle_id), "rows": rows}
        return {"batch": collate(ids, self.thought_id, labels=labels), "rows": rows}
