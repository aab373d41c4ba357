"""The order of training problems: seeded, bucketed by length, dealt to processes, a pure function of the epoch.

Only the epoch's number is needed to resume. The rows of one optimizer step are chosen first and only then dealt to
accumulation steps and processes, so the same `rows_per_update` gives the same steps on any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

BUCKET = 64  # optimizer steps whose rows are sorted by length together: more waste less, fewer mix better


def epoch_order(num_examples: int, epoch: int, seed: int, epoch_size: int | None = None) -> np.ndarray:
    """(n,) int64: the problems of an epoch. Every problem comes once before any comes again, across epochs too."""
    size = epoch_size or num_examples
    positions = np.arange(epoch * size, (epoch + 1) * size)
    rounds = positions // num_examples
    shuffles = {int(r): np.random.default_rng((seed, int(r))).permutation(num_examples) for r in np.unique(rounds)}
    return np.concatenate([shuffles[r][positions[rounds == r] - r * num_examples] for r in sorted(shuffles)])


def update_batches(order: np.ndarray, lengths: Sequence[int], rows_per_update: int, seed: int) -> list[np.ndarray]:
    """The problems of each optimizer step, of similar lengths within a step; a smaller step, if any, comes last.

    lengths: tokens of every problem, by its index. The steps themselves are in random order.
    """
    sizes = np.asarray(lengths)
    rng = np.random.default_rng(seed)
    full = len(order) // rows_per_update * rows_per_update
    steps = []
    for start in range(0, full, BUCKET * rows_per_update):
        bucket = order[start : min(start + BUCKET * rows_per_update, full)]
        bucket = bucket[np.argsort(sizes[bucket], kind="stable")]
        steps += np.split(bucket, len(bucket) // rows_per_update)
    rest = order[full:]
    return [steps[i] for i in rng.permutation(len(steps))] + ([rest] if len(rest) else [])


def deal(rows: np.ndarray, batch_size: int, processes: int, process: int) -> Iterator[np.ndarray]:
    """The batches of one process within one optimizer step, `batch_size` rows each (the last one fewer, perhaps none).

    Rows are dealt in turn, so that all processes get rows of similar lengths and the same number of batches.
    """
    for start in range(0, len(rows), batch_size * processes):
        yield rows[start : start + batch_size * processes][process::processes]


class EpochBatches:
    """The batch sampler of one process: lists of (problem, epoch, stage), for the data loader.

    The trainer sets `epoch`, `stage` and `lengths` before an epoch begins. The last list of an epoch may be empty,
    where fewer problems are left than there are processes.
    """

    def __init__(
        self,
        num_examples: int,
        *,
        batch_size: int,
        accumulation: int,
        processes: int = 1,
        process: int = 0,
        seed: int = 0,
        epoch_size: int | None = None,
    ) -> None:
        self.num_examples = num_examples
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.rows_per_update = batch_size * accumulation * processes
        self.processes = processes
        self.process = process
        self.seed = seed
        self.epoch_size = epoch_size or num_examples
        self.epoch = 0
        self.stage = 0
        self.lengths: Any = np.zeros(num_examples, dtype=np.int64)

    @property
    def updates(self) -> int:
        """Optimizer steps per epoch."""
        return -(-self.epoch_size // self.rows_per_update)

    def __len__(self) -> int:
        # A full step is a whole number of batches, so only the last batch of the epoch can be smaller.
        return -(-self.epoch_size // (self.batch_size * self.processes))

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        order = epoch_order(self.num_examples, self.epoch, self.seed, self.epoch_size)
        for rows in update_batches(order, self.lengths, self.rows_per_update, seed=self.seed + self.epoch):
            for batch in deal(rows, self.batch_size, self.processes, self.process):
                yield [(int(idx), self.epoch, self.stage) for idx in batch]
