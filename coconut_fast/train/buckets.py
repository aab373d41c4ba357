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

from coconut_fast.model.batch import PAGE_SIZE, Pass, RaggedBatch, collate, make_reads, packed, unpacked
from coconut_fast.tokens import IGNORE

LENGTH_STEP = 256  # of bounds on lengths: they size grids, whose idle programs end at once
ROWS_A_FILLER = 8


def bucketed(
    ids: Sequence[Sequence[int]], thought_id: int, labels: Sequence[Sequence[int]], idle_id: int
) -> RaggedBatch:
    """`collate` of the rows with thoughts and `idle_id` around them, which change its shapes and nothing else."""
    plan = _Plan(ids, thought_id, labels)
    tails = plan.tails(idle_id, thought_id)
    idle = [[idle_id] * size for size in plan.sizes]
    batch = collate(
        [[*row, *tail] for row, tail in zip(ids, tails, strict=True)] + idle,
        thought_id,
        [[*row, *[IGNORE] * len(tail)] for row, tail in zip(labels, tails, strict=True)]
        + [[IGNORE] * len(row) for row in idle],
        # What stands behind a row has the position of its end, as the model may have no later one.
        [[*range(len(row)), *[len(row) - 1] * len(tail)] for row, tail in zip(ids, tails, strict=True)]
        + [[0] * len(row) for row in idle],
    )
    max_length = _up(max(batch.lengths))
    passes = [plan.filled(p, number, max_length) for number, p in enumerate(batch.passes)]
    filled = replace(
        batch,
        passes=tuple(passes),
        page_table=torch.nn.functional.pad(batch.page_table, (0, max_length // PAGE_SIZE - batch.page_table.shape[1])),
        num_slots=(len(batch.input_ids) // PAGE_SIZE + len(batch.lengths)) * PAGE_SIZE,  # for rows of any lengths
        words=None,
    )
    return unpacked(packed(filled), filled)


def signature(batch: RaggedBatch) -> tuple:
    """What a step depends on beside the numbers in the batch's tensors."""
    passes = []
    for p in batch.passes:
        reads = (p.reads.at.numel(), p.reads.max_query) if p.reads else ()
        passes.append((p.stop - p.start, len(p.rows), p.loss_index.numel(), p.max_query, p.max_length, *reads))
    return batch.num_slots, tuple(batch.page_table.shape), *passes


class _Plan:
    """What has to be added to rows of token ids."""

    def __init__(self, ids: Sequence[Sequence[int]], thought_id: int, labels: Sequence[Sequence[int]]) -> None:
        self.rows = len(ids)
        cuts = [np.append(np.flatnonzero(np.asarray(row) == thought_id), len(row)) for row in ids]
        predicts = [np.append(np.asarray(row[1:]) != IGNORE, False) for row in labels]
        self.thoughts = np.array([len(c) - 1 for c in cuts])
        self.most = int(self.thoughts.max())
        self.mixed = self.most > int(self.thoughts.min())
        # Of every pass, all rows together: its tokens, and those that predict a labelled one.
        tokens, labelled = np.zeros((2, self.most + 1), dtype=np.int64)
        for cut, hits in zip(cuts, predicts, strict=True):
            starts = np.append(0, cut[:-1])
            tokens[: len(cut)] += cut - starts
            labelled[: len(cut)] += np.add.reduceat(hits, starts, dtype=np.int64)
            tokens[len(cut) :] += 1
        self.labelled, self.added = [self.bucket(int(labelled[0]))], [0]
        for number in range(1, self.most + 1):
            share = int(tokens.sum()) // 128  # what may be wasted behind the first pass, where counts vary more
            single = tokens[number] == self.rows and not self.mixed
            self.labelled.append(self.bucket(int(labelled[number]) or self.mixed, share))
            room = self.labelled[number] + self.bucket(int(tokens[number] - labelled[number]), share)
            self.added.append(0 if single else room - int(tokens[number]))
        # The first pass: of each row the tokens that nobody reads, the fillers' reads, and their tokens.
        self.unread = [
            min([int(cut[0]) - (self.most > 0), *np.flatnonzero(hits[: cut[0]])[:1].tolist()])
            for cut, hits in zip(cuts, predicts, strict=True)
        ]
        fillers = -(-self.rows // ROWS_A_FILLER)
        read, first = int(tokens[0]) - sum(self.unread), int(labelled[0])
        self.reads = _shares(self.labelled[0] + self.bucket(read - first + fillers) - read, fillers)
        room = self.labelled[0] + self.bucket(int(tokens[0]) - first + sum(self.reads))
        self.sizes = _shares(room - int(tokens[0]), fillers)

    def bucket(self, count: int, least: int = 0) -> int:
        """The count rounded up to a multiple of about 1/16 of it, of `least`, or of some tokens where rows are many."""
        step = max(8, _power(self.rows // 8), _power(count // 12), _power(least))
        return -(-count // step) * step

    def tails(self, idle_id: int, thought_id: int) -> list[list[int]]:
        """What stands behind every row."""
        tails: list[list[int]] = [[] for _ in range(self.rows)]
        for number in range(self.most + 1):
            past = np.flatnonzero(self.thoughts <= number).tolist()
            for b, share in zip(past, _shares(self.added[number], len(past)), strict=True):
                tails[b] += [thought_id] * int(self.thoughts[b] < number) + [idle_id] * share
        return tails

    def filled(self, p: Pass, number: int, max_length: int) -> Pass:
        """A pass with its labelled positions filled up, and bounds in the place of maxima."""
        tokens, missing = p.stop - p.start, self.labelled[number] - p.loss_index.numel()
        # At tokens that differ as far as they can: the gradients of one token are added one after the other.
        idle = torch.arange(tokens - missing, tokens).remainder(tokens)
        reads, left = None, p.detachable
        if number:
            left = torch.from_numpy(self.thoughts - number)  # below 0: a thought of nobody
        else:
            idly = [size - read for size, read in zip(self.sizes, self.reads, strict=True)]
            reads = make_reads(list(p.counts), [*self.unread, *idly])
        return replace(
            p,
            max_query=_bound(p.max_query) if number else max_length,
            max_length=max_length,
            detachable=left,
            loss_index=torch.cat([p.loss_index, idle]),
            targets=torch.cat([p.targets, p.targets.new_full((missing,), IGNORE)]),
            reads=reads and replace(reads, max_query=_bound(reads.max_query)),
        )


def _shares(total: int, parts: int) -> list[int]:
    return [total // parts + (i < total % parts) for i in range(parts)] if parts else []


def _power(count: int) -> int:
    """The largest power of two that is not above, 1 at least."""
    return 1 << max(count.bit_length() - 1, 0)


def _up(count: int) -> int:
    return -(-count // LENGTH_STEP) * LENGTH_STEP


def _bound(count: int) -> int:
    """A bound of the most tokens of a row; 1 remains, as it makes another kernel."""
    return count if count == 1 else max(16, 2 * _power(count - 1)) if count <= LENGTH_STEP else _up(count)
