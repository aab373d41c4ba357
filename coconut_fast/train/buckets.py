"""Batches of few different shapes: what a CUDA graph of a step can be replayed for (train/graphed.py).

A row's result does not depend on the rows beside it nor on what stands behind it. So tokens without labels are added
until every count that a launch sees is one of few:

    every row thinks on to the most thoughts of the batch, one token a pass: all passes have all rows
    rows that are past their end get tokens there, and rows of their own, the fillers, fill the first pass
    positions whose target is IGNORE fill the labelled ones, and reads of the fillers the reads of the first pass

Passes of a single token a row, those of all thoughts but the last, need nothing. Loss and gradients stay the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from coconut_fast.model.batch import (
    PAGE_SIZE,
    Pass,
    RaggedBatch,
    flattened,
    from_buffer,
    row_major,
    shifted,
    split_into_passes,
    to_buffer,
    used_positions,
)
from coconut_fast.tokens import IGNORE

LENGTH_STEP = 256  # of bounds on lengths: they size grids, whose idle programs end at once
ROWS_A_FILLER = 8


def bucketed(
    ids: Sequence[Sequence[int]], thought_id: int, labels: Sequence[Sequence[int]], idle_id: int
) -> RaggedBatch:
    """`collate` of the rows with thoughts and `idle_id` around them, which change its shapes and nothing else."""
    lengths_B = np.array([len(row) for row in ids])
    ids_T, labels_T = flattened(ids), flattened(labels)
    plan = _Plan(lengths_B, ids_T, labels_T, thought_id)
    tails_B, tails = plan.tails(thought_id, idle_id)
    idle = np.full(sum(plan.sizes), idle_id)
    # Rows and what stands behind them take turns; the fillers come last.
    own = np.repeat(np.tile([True, False], len(lengths_B)), np.stack([lengths_B, tails_B], axis=1).flatten())

    def around(values_T: np.ndarray, behind: np.ndarray, last: np.ndarray) -> np.ndarray:
        result = np.empty(len(own), dtype=np.int64)
        result[own], result[~own] = values_T, behind
        return np.append(result, last)

    batch = split_into_passes(
        np.append(lengths_B + tails_B, plan.sizes),
        around(ids_T, tails, idle),
        thought_id,
        labels_T=around(labels_T, np.full(len(tails), IGNORE), np.full(len(idle), IGNORE)),
        # What stands behind a row has the position of its end, as the model may have no later one.
        positions_T=around(plan.at_T, np.repeat(lengths_B - 1, tails_B), np.zeros(len(idle))),
    )
    max_length = _up(max(batch.lengths))
    passes = [plan.filled(p, number, max_length) for number, p in enumerate(batch.passes)]
    batch = replace(
        batch,
        passes=tuple(passes),
        page_table=torch.nn.functional.pad(batch.page_table, (0, max_length // PAGE_SIZE - batch.page_table.shape[1])),
        num_slots=(len(batch.input_ids) // PAGE_SIZE + len(batch.lengths)) * PAGE_SIZE,  # for rows of any lengths
    )
    return from_buffer(to_buffer(batch), batch)


def signature(batch: RaggedBatch) -> tuple:
    """What a step depends on beside the numbers in the batch's tensors."""
    passes = []
    for p in batch.passes:
        used = (p.used.at.numel(), p.used.max_query) if p.used else ()
        passes.append((p.stop - p.start, len(p.rows), p.loss_index.numel(), p.max_query, p.max_length, *used))
    return batch.num_slots, tuple(batch.page_table.shape), *passes


class _Plan:
    """What has to be added to rows of token ids."""

    def __init__(self, lengths_B: np.ndarray, ids_T: np.ndarray, labels_T: np.ndarray, thought_id: int) -> None:
        self.rows = len(lengths_B)
        starts_B, _, self.at_T, pass_T = row_major(lengths_B, ids_T, thought_id)
        predicts_T = shifted(labels_T, starts_B) != IGNORE
        self.thoughts = pass_T[starts_B + lengths_B - 1]
        self.most = int(self.thoughts.max())
        self.mixed = self.most > int(self.thoughts.min())
        # Of every pass, all rows together: its tokens, one of each row that is past its end, and those that predict.
        tokens = np.bincount(pass_T) + [int((self.thoughts < number).sum()) for number in range(self.most + 1)]
        labelled = np.bincount(pass_T[predicts_T], minlength=self.most + 1)
        self.labelled, self.added = [self.bucket(int(labelled[0]))], [0]
        for number in range(1, self.most + 1):
            share = int(tokens.sum()) // 128  # what may be wasted behind the first pass, where counts vary more
            single = tokens[number] == self.rows and not self.mixed
            self.labelled.append(self.bucket(int(labelled[number]) or self.mixed, share))
            room = self.labelled[number] + self.bucket(int(tokens[number] - labelled[number]), share)
            self.added.append(0 if single else room - int(tokens[number]))
        # The first pass: of each row the tokens that nobody reads, the fillers' reads, and their tokens.
        ends_B = np.add.reduceat(pass_T == 0, starts_B, dtype=np.int64)
        firsts_B = np.minimum.reduceat(np.where(predicts_T, self.at_T, len(ids_T)), starts_B)
        self.unread = np.minimum(ends_B - (self.most > 0), firsts_B)
        fillers = -(-self.rows // ROWS_A_FILLER)
        read, first = int(tokens[0] - self.unread.sum()), int(labelled[0])
        self.used = _shares(self.labelled[0] + self.bucket(read - first + fillers) - read, fillers)
        room = self.labelled[0] + self.bucket(int(tokens[0]) - first + int(self.used.sum()))
        self.sizes = _shares(room - int(tokens[0]), fillers)

    def bucket(self, count: int, least: int = 0) -> int:
        """The count rounded up to a multiple of about 1/8 of it, of `least`, or of some tokens where rows are many."""
        step = max(8, _power(self.rows // 8), _power(count // 6), _power(least))
        return -(-count // step) * step

    def tails(self, thought_id: int, idle_id: int) -> tuple[np.ndarray, np.ndarray]:
        """What stands behind the rows: how many tokens (B,), and the tokens of one row after the other."""
        idle_BP, thinks_BP = np.zeros((2, self.rows, self.most + 1), dtype=np.int64)
        for number in range(self.most + 1):
            past = np.flatnonzero(self.thoughts <= number)
            idle_BP[past, number] = _shares(self.added[number], len(past))
            thinks_BP[:, number] = self.thoughts < number
        tails = np.tile([thought_id, idle_id], idle_BP.size)
        return (idle_BP + thinks_BP).sum(axis=1), tails.repeat(np.stack([thinks_BP, idle_BP], axis=2).flatten())

    def filled(self, p: Pass, number: int, max_length: int) -> Pass:
        """A pass with its labelled positions filled up, and bounds in the place of maxima."""
        tokens, missing = p.stop - p.start, self.labelled[number] - p.loss_index.numel()
        # At tokens that differ as far as they can: the gradients of one token are added one after the other.
        idle = torch.arange(tokens - missing, tokens).remainder(tokens)
        used, left = None, p.thoughts_after
        if number:
            left = torch.from_numpy(self.thoughts - number)  # below 0: a thought of nobody
        else:
            used = used_positions(np.array(p.counts), np.append(self.unread, self.sizes - self.used))
        return replace(
            p,
            max_query=_bound(p.max_query) if number else max_length,
            max_length=max_length,
            thoughts_after=left,
            loss_index=torch.cat([p.loss_index, idle]),
            targets=torch.cat([p.targets, p.targets.new_full((missing,), IGNORE)]),
            used=used and replace(used, max_query=_bound(used.max_query)),
        )


def _shares(total: int, parts: int) -> np.ndarray:
    return total // parts + (np.arange(parts) < total % parts) if parts else np.zeros(0, dtype=np.int64)


def _power(count: int) -> int:
    """The largest power of two that is not above, 1 at least."""
    return 1 << max(count.bit_length() - 1, 0)


def _up(count: int) -> int:
    return -(-count // LENGTH_STEP) * LENGTH_STEP


def _bound(count: int) -> int:
    """A bound of the most tokens of a row; 1 remains, as it makes another kernel."""
    return count if count == 1 else max(64, 2 * _power(count - 1)) if count <= LENGTH_STEP else _up(count)
