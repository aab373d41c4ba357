"""Thoughts refined in parallel: Jacobi rounds over all thoughts at once (PCCoT, arXiv 2506.18582).

Sequential thinking is a triangular system: thought i is fed from the hidden state before it. A Jacobi round runs every
thought position in one pass, each fed from the round before; after round r the first r thoughts are exact. So T rounds
cost T passes however many thoughts there are, and once T reaches the number of thoughts, the result is the sequential
one. The last round also runs the tokens after the thoughts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from coconut_fast.model.batch import RaggedBatch
from coconut_fast.model.cache import KVCache

if TYPE_CHECKING:
    from coconut_fast.model.coconut import Coconut


def refine(
    model: Coconut,
    batch: RaggedBatch,
    cache: KVCache,
    rows: Sequence[int],
    seeds: torch.Tensor | None = None,
    loss_only: bool = False,
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Hidden states and input embeddings of every pass of `batch`, as sequential thinking returns them.

    rows: new rows of the cache. The number of rounds is that of the model's settings, at least 1; thoughts that no
    round has reached yet are fed the embedding of the thought token itself.
    """
    device, rounds = batch.input_ids.device, model.settings.parallel_rounds
    assert rounds is not None
    embeds_TD = model.embed(batch.input_ids)
    first = batch.passes[0]
    ragged = cache.append([rows[b] for b in first.rows], first.counts, seeds, first.used if loss_only else None)
    start_hidden = model.body(embeds_TD[: first.stop], batch.position_ids[: first.stop], ragged)
    if len(batch.passes) == 1:
        return (start_hidden,), (embeds_TD,)

    plan = _Plan(batch)
    tail = plan.tail.to(device)
    thought_at, fed_by, in_span = plan.thought_at.to(device), plan.fed_by.to(device), plan.in_span.to(device)
    is_first = plan.is_first.to(device)[:, None]
    whole = cache.append([rows[b] for b in plan.rows], plan.counts, seeds)
    whole = replace(whole, rewritten=True)
    lengths = whole.lengths - torch.tensor(plan.counts, dtype=torch.int32, device=device)
    spans = torch.tensor(plan.spans, dtype=torch.int32, device=device)
    span = replace(
        whole,
        row_offsets=torch.nn.functional.pad(spans.cumsum(0, dtype=torch.int32), (1, 0)),
        lengths=lengths + spans,
        slots=whole.slots[in_span],
        max_query=max(plan.spans),
    )
    positions, x_TD = batch.position_ids[tail], embeds_TD[tail]
    exact = model.feedback(start_hidden[batch.passes[1].source]).to(x_TD.dtype)  # the input of each row's first thought
    # A row's first thought is always fed this; the others their embedding at first, then the hidden state before them.
    from_start = exact[plan.row_of.to(device)]
    fed = torch.where(is_first, from_start, x_TD[thought_at])
    for _ in range(rounds - 1):
        x = x_TD.index_copy(0, thought_at, fed)[in_span]
        hidden = model.body(x, positions[in_span], span)
        fed = torch.where(is_first, from_start, model.feedback(hidden[fed_by]).to(x.dtype))
    x = x_TD.index_copy(0, thought_at, fed)
    hidden = model.body(x, positions, whole)

    flat_hidden = torch.cat([start_hidden, hidden.new_zeros(len(tail), hidden.shape[1])]).index_copy(0, tail, hidden)
    flat_embeds = embeds_TD.index_copy(0, tail, x)
    cuts = [slice(p.start, p.stop) for p in batch.passes]
    return tuple(flat_hidden[c] for c in cuts), tuple(flat_embeds[c] for c in cuts)


class _Plan:
    """The tokens of every row from its first thought on, row by row, and the places of the thoughts among them."""

    def __init__(self, batch: RaggedBatch) -> None:
        segments: dict[int, list[tuple[int, int]]] = {b: [] for b in batch.passes[1].rows}
        for p in batch.passes[1:]:
            at = p.start
            for row, count in zip(p.rows, p.counts, strict=True):
                segments[row].append((at, count))
                at += count
        self.rows = list(segments)
        self.counts = [sum(n for _, n in s) for s in segments.values()]
        self.spans = []  # per row: its tokens up to the last thought
        tail, thought_at, fed_by, is_first, row_of, in_span = [], [], [], [], [], []
        base = span_base = 0
        for i, parts in enumerate(segments.values()):
            span = sum(n for _, n in parts[:-1]) + 1
            offset = 0
            for j, (start, count) in enumerate(parts):
                tail += range(start, start + count)
                thought_at.append(base + offset)
                fed_by.append(span_base + max(offset - 1, 0))
                is_first.append(j == 0)
                row_of.append(i)
                offset += count
            in_span += range(base, base + span)
            self.spans.append(span)
            base += offset
            span_base += span
        self.tail = torch.tensor(tail)  # flat positions in the batch
        self.thought_at = torch.tensor(thought_at)  # in the tail
        self.fed_by = torch.tensor(fed_by)  # in the spans
        self.is_first = torch.tensor(is_first)
        self.row_of = torch.tensor(row_of)
        self.in_span = torch.tensor(in_span)  # in the tail
