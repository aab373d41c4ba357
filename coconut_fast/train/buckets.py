"""Pads batches to a few shapes, so that a step can replay as a CUDA graph (train/graphed.py).

A row's result depends neither on other rows nor on what follows it, so unlabelled tokens are added until every size a
launch sees is one of a few:

    every row gets thoughts up to the batch's maximum, one token a pass, so that all passes have all rows
    ended rows get padding tokens there, and padding rows (fillers) fill the first pass
    labelled positions are padded with IGNORE targets, the first pass's used positions with the fillers'

Passes of one token a row (every thought but the last) need no padding. Loss and gradients do not change.
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

LENGTH_STEP = 256  # bounds on lengths are multiples of it; they size grids, whose idle programs exit at once
ROWS_A_FILLER = 8


def bucketed(
    ids: Sequence[Sequence[int]], thought_id: int, labels: Sequence[Sequence[int]], idle_id: int
) -> RaggedBatch:
    """`collate` with thoughts and `idle_id` added to the rows, which change its shapes and nothing else."""
    lengths_B = np.array([len(row) for row in ids])
    ids_T, labels_T = flattened(ids), flattened(labels)
    plan = _Plan(lengths_B, ids_T, labels_T, thought_id)
    tails_B, tails = plan.tails(thought_id, idle_id)
    idle = np.full(sum(plan.sizes), idle_id)
    # Each row is followed by its padding; the fillers come last.
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
        # Padding after a row has the position of the row's last token, as the model may have no later one.
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
    """What a step depends on besides the values in the batch's tensors."""
    passes = []
    for p in batch.passes:
        used = (p.used.at.numel(), p.used.max_query) if p.used else ()
        passes.append((p.stop - p.start, len(p.rows), p.loss_index.numel(), p.max_query, p.max_length, *used))
    return batch.num_slots, tuple(batch.page_table.shape), *passes


class _Plan:
    """The padding that rows of token ids need."""

    def __init__(self, lengths_B: np.ndarray, ids_T: np.ndarray, labels_T: np.ndarray, thought_id: int) -> None:
        self.rows = len(lengths_B)
        starts_B, _, self.at_T, pass_T = row_major(lengths_B, ids_T, thought_id)
        predicts_T = shifted(labels_T, starts_B) != IGNORE
        self.thoughts = pass_T[starts_B + lengths_B - 1]
        self.most = int(self.thoughts.max())
        self.mixed = self.most > int(self.thoughts.min())
        # Per pass, over all rows: its tokens, with one for each row that has ended, and its labelled positions.
        tokens = np.bincount(pass_T) + [int((self.thoughts < number).sum()) for number in range(self.most + 1)]
        labelled = np.bincount(pass_T[predicts_T], minlength=self.most + 1)
        self.labelled, self.added = [self.bucket(int(labelled[0]))], [0]
        for number in range(1, self.most + 1):
            share = int(tokens.sum()) // 128  # padding allowed after the first pass, where counts vary more
            single = tokens[number] == self.rows and not self.mixed
            self.labelled.append(self.bucket(int(labelled[number]) or self.mixed, share))
            room = self.labelled[number] + self.bucket(int(tokens[number] - labelled[number]), share)
            self.added.append(0 if single else room - int(tokens[number]))
        # The first pass: each row's leading unused positions, then the fillers' used positions and their tokens.
        ends_B = np.add.reduceat(pass_T == 0, starts_B, dtype=np.int64)
        firsts_B = np.minimum.reduceat(np.where(predicts_T, self.at_T, len(ids_T)), starts_B)
        self.unread = np.minimum(ends_B - (self.most > 0), firsts_B)
        fillers = -(-self.rows // ROWS_A_FILLER)
        read, first = int(tokens[0] - self.unread.sum()), int(labelled[0])
        self.used = _shares(self.labelled[0] + self.bucket(read - first + fillers) - read, fillers)
        room = self.labelled[0] + self.bucket(int(tokens[0]) - first + int(self.used.sum()))
        self.sizes = _shares(room - int(tokens[0]), fillers)

    def bucket(self, count: int, least: int = 0) -> int:
        """`count` rounded up to a multiple of about count / 8, rows / 8 or `least`, whichever is the largest."""
        step = max(8, _power(self.rows // 8), _power(count // 6), _power(least))
        return -(-count // step) * step

    def tails(self, thought_id: int, idle_id: int) -> tuple[np.ndarray, np.ndarray]:
        """The padding after each row: its number of tokens (B,), and the tokens of all rows, concatenated."""
        idle_BP, thinks_BP = np.zeros((2, self.rows, self.most + 1), dtype=np.int64)
        for number in range(self.most + 1):
            past = np.flatnonzero(self.thoughts <= number)
            idle_BP[past, number] = _shares(self.added[number], len(past))
            thinks_BP[:, number] = self.thoughts < number
        tails = np.tile([thought_id, idle_id], idle_BP.size)
        return (idle_BP + thinks_BP).sum(axis=1), tails.repeat(np.stack([thinks_BP, idle_BP], axis=2).flatten())

    def filled(self, p: Pass, number: int, max_length: int) -> Pass:
        """A pass with its labelled positions padded, and upper bounds in place of maxima."""
        tokens, missing = p.stop - p.start, self.labelled[number] - p.loss_index.numel()
        # Spread over as many tokens as possible: gradients for the same token are added sequentially.
        idle = torch.arange(tokens - missing, tokens).remainder(tokens)
        used, left = None, p.thoughts_after
        if number:
            left = torch.from_numpy(self.thoughts - number)  # negative: padding
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
    """The largest power of two up to `count`, at least 1."""
    return 1 << max(count.bit_length() - 1, 0)


def _up(count: int) -> int:
    return -(-count // LENGTH_STEP) * LENGTH_STEP


def _bound(count: int) -> int:
    """An upper bound on tokens per row; 1 stays 1, as it selects another kernel."""
    return count if count == 1 else max(64, 2 * _power(count - 1)) if count <= LENGTH_STEP else _up(count)
