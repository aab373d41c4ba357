"""Bucketed batches: the same loss and gradients as the rows alone, in few shapes."""

from __future__ import annotations

import pytest
import torch

from coconut_fast.model.batch import RaggedBatch, collate, tensors
from coconut_fast.tokens import IGNORE
from coconut_fast.train.buckets import _bound, bucketed, signature
from tests.families import TOKENS, make_pair, make_row

# (question, thoughts, tail) of every row
BATCHES = {
    "equal thoughts": [(9, 3, 5), (20, 3, 4), (6, 3, 7), (11, 3, 2)],
    "mixed thoughts": [(9, 3, 5), (20, 0, 4), (6, 1, 7), (11, 4, 2), (7, 2, 3)],
    "no thoughts": [(9, 0, 5), (20, 0, 4), (6, 0, 7)],
    "one row": [(9, 2, 5)],
    "many rows": [(5 + i % 3, 2, 3) for i in range(40)],
}


def rows_of(shapes: list[tuple[int, int, int]]) -> tuple[list[list[int]], list[list[int]]]:
    rows = [make_row(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    return rows, [[IGNORE] * (len(row) - tail) + row[-tail:] for row, (_, _, tail) in zip(rows, shapes, strict=True)]


def both(shapes: list[tuple[int, int, int]]) -> tuple[RaggedBatch, RaggedBatch]:
    rows, labels = rows_of(shapes)
    return collate(rows, TOKENS.thought, labels), bucketed(rows, TOKENS.thought, labels, idle_id=0)


@pytest.mark.parametrize("detach_after", [None, 1])
@pytest.mark.parametrize("family", ["gpt2", "mistral"])
@pytest.mark.parametrize("shapes", BATCHES.values(), ids=BATCHES)
def test_loss_and_gradients_stay_the_same(shapes: list, family: str, detach_after: int | None) -> None:
    model = make_pair(family, torch.float64)[0].train()
    model.detach_after = detach_after
    found = []
    for batch in both(shapes):
        model.zero_grad()
        loss = model(batch=batch, num_items=17, loss_only=True).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for plain, filled in zip(*found, strict=True):
        torch.testing.assert_close(filled, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shapes", BATCHES.values(), ids=BATCHES)
def test_rows_are_found_again(shapes: list) -> None:
    """Every row is there, all have the same number of passes, and no position exceeds those of the rows."""
    plain, filled = both(shapes)
    assert filled.num_targets == plain.num_targets
    assert sum(int((p.targets != IGNORE).sum()) for p in filled.passes) == plain.num_targets
    assert {p.rows for p in filled.passes[1:]} <= {tuple(range(len(shapes)))}
    thoughts = sum(len(p.rows) for p in plain.passes[1:])
    assert sum(int((p.thoughts_after >= 0).sum()) for p in filled.passes[1:]) == thoughts
    assert int(filled.position_ids.max()) == int(plain.position_ids.max())
    for p in filled.passes:
        assert p.max_query >= max(p.counts)
        assert p.max_length >= int(p.lengths.max())
        assert len(p.slots.unique()) == len(p.slots)
        assert int(p.slots.max()) < filled.num_slots


def test_nothing_is_added_to_passes_of_one_token_a_row() -> None:
    _, filled = both([(9, 3, 5)] * 25)  # elsewhere 25 tokens would become 32
    assert [p.stop - p.start for p in filled.passes[1:3]] == [25, 25]


def test_batches_of_like_rows_have_one_signature_and_what_it_stands_for() -> None:
    shapes = [[(30 + (i * k) % 7, 3, 5 + (i < k)) for i in range(32)] for k in (1, 2, 3)]
    plain, batches = zip(*map(both, shapes), strict=True)
    for alone, filled in zip(plain, batches, strict=True):
        assert len(alone.input_ids) < len(filled.input_ids) < 1.1 * len(alone.input_ids)
    assert len({signature(b) for b in batches}) == 1
    assert len({tuple((t.shape, t.storage_offset(), t.dtype) for t in tensors(b)) for b in batches}) == 1
    assert signature(both([(60, 3, 5)] * 32)[1]) != signature(batches[0])


def test_one_long_answer_has_another_signature_than_many_short_ones() -> None:
    """Their totals agree but the longest row does not: a graph of one has too small a grid for the other."""
    found: dict[tuple, set[tuple]] = {}
    for long in range(60, 131):
        for short in (3, 4, 5):
            batch = both([(25, 1, long), *[(25, 1, short)] * 15])[1]
            sums = tuple((p.stop - p.start, p.loss_index.numel(), p.max_length) for p in batch.passes)
            found.setdefault(sums, set()).add((signature(batch), tuple(p.max_query for p in batch.passes)))
    assert any(len({queries for _, queries in of}) > 1 for of in found.values()), "two such batches are among these"
    for of in found.values():
        assert len({known for known, _ in of}) == len(of), "a signature for every bound"


def test_bounds_are_none_below_what_they_bound() -> None:
    assert all(_bound(count) >= count for count in range(1, 5000)) and _bound(1) == 1
