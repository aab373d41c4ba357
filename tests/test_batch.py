"""Ragged batches: the plan of passes, the padded layout, and what is refused."""

from __future__ import annotations

import pytest
import torch

from coconut_fast.model.batch import collate, from_padded
from coconut_fast.tokens import IGNORE

T = 9  # the thought


def test_passes_cut_rows_before_their_thoughts() -> None:
    batch = collate([[1, 2, T, T, 3, 4], [5, 6], [7, T, 8]], T, labels=[[IGNORE] * 4 + [3, 4], [5, 6], [IGNORE, T, 8]])
    assert [(p.rows, p.counts) for p in batch.passes] == [((0, 1, 2), (2, 2, 1)), ((0, 2), (1, 2)), ((0,), (3,))]
    assert batch.input_ids.tolist() == [1, 2, 5, 6, 7, T, T, 8, T, 3, 4]
    assert batch.position_ids.tolist() == [0, 1, 0, 1, 0, 2, 1, 2, 3, 4, 5]
    assert [p.source.tolist() for p in batch.passes] == [[], [1, 4], [0]]
    assert [p.thought_at.tolist() for p in batch.passes] == [[], [0, 1], [0]]
    assert [p.thoughts_after.tolist() for p in batch.passes] == [[], [1, 0], [0]]
    # row 0: 3 and 4 from the positions before them; row 1: 6; row 2: T from 7, 8 from T
    assert [p.targets.tolist() for p in batch.passes] == [[6, T], [8], [3, 4]]
    assert [p.loss_index.tolist() for p in batch.passes] == [[2, 4], [1], [0, 1]]
    assert batch.num_targets == 5


def test_every_token_stands_once_in_the_padded_layout() -> None:
    ids = torch.tensor([[0, 0, 1, T, 2], [3, 4, 5, T, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    batch = from_padded(ids, T, mask)
    padded = torch.zeros(10, dtype=torch.int64).index_copy(0, batch.padded_at, batch.input_ids).view(2, 5)
    assert torch.equal(padded * mask, ids * mask)
    assert batch.position_ids.tolist() == [0, 0, 1, 2, 1, 2, 3]


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        ([[1], []], None, "row 1 is empty"),
        ([], None, "row 0 is empty"),
        ([[1], [T, 1]], None, "row 1 starts with a thought"),
        ([[1, 2]], [[1]], "row 0 has 1 labels for 2 tokens"),
        ([[1, 2], [3, 4]], [[IGNORE, 2], [-1, 4]], "row 1 has -1, expected token ids, or -100 for none"),
    ],
)
def test_bad_rows_are_refused(rows: list, labels: list | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collate(rows, T, labels)


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="input_ids: expected shape"):
        from_padded(torch.tensor([1, 2]), T)
    with pytest.raises(ValueError, match="labels: expected the shape"):
        from_padded(torch.tensor([[1, 2]]), T, labels=torch.tensor([[1]]))
    with pytest.raises(ValueError, match="input_ids: expected a .* tensor, found a list"):
        from_padded([[1, 2]], T)
    with pytest.raises(ValueError, match="labels: expected a .* tensor, found a list"):
        from_padded(torch.tensor([[1, 2]]), T, labels=[[1, 2]])
