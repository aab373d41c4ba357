"""The cache layout against a model made of plain dictionaries, with the storage it describes simulated slot by slot."""

from __future__ import annotations

import gc
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from coconut_fast import KVCache, ops

CacheLayout = ops.extension().CacheLayout


def snapshot(layout) -> tuple:
    """All that can be seen of a layout."""
    counters = (layout.num_pages, layout.free_pages, layout.rows_in_use)
    return layout.page_table.tolist(), layout.lengths.tolist(), *counters


def refused(layout, operation: Callable, *args, match: str = "") -> None:
    """operation(*args) raises ValueError, and nothing changed."""
    before = snapshot(layout)
    with pytest.raises(ValueError, match=match):
        operation(*args)
    assert snapshot(layout) == before


class LayoutMachine(RuleBasedStateMachine):
    """Random operations on a layout, a storage that follows `append`, and {row: tokens} as the truth."""

    @initialize(
        num_pages=st.integers(1, 24),
        page_size=st.integers(1, 5),
        max_rows=st.integers(2, 8),
        per_row=st.none() | st.integers(2, 8),
    )
    def build(self, num_pages, page_size, max_rows, per_row):
        self.page_size, self.max_rows, self.per_row = page_size, max_rows, per_row or num_pages
        self.layout = CacheLayout(num_pages, page_size, max_rows, per_row)
        self.tokens: dict[int, list[int]] = {row: [] for row in self.layout.alloc(2)}
        self.storage: list[int | None] = [None] * (num_pages * page_size)
        self.next_token = 0
        self.table, self.lengths = self.layout.page_table, self.layout.lengths
        self.addresses = self.table.data_ptr(), self.lengths.data_ptr()

    def some_rows(self, data, unique=True):
        return data.draw(st.lists(st.sampled_from(sorted(self.tokens)), min_size=1, max_size=4, unique=unique))

    def pages(self, row) -> list[int]:
        return self.table[row, : -(-len(self.tokens[row]) // self.page_size)].tolist()

    def holders(self) -> dict[int, int]:
        counts: dict[int, int] = {}
        for row in self.tokens:
            for page in self.pages(row):
                counts[page] = counts.get(page, 0) + 1
        return counts

    @rule(n=st.integers(0, 3))
    def alloc(self, n):
        if n > self.max_rows - len(self.tokens):
            return refused(self.layout, self.layout.alloc, n, match="alloc")
        rows = self.layout.alloc(n)
        assert len(set(rows)) == n and not set(rows) & set(self.tokens)
        self.tokens |= {row: [] for row in rows}

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def append(self, data):
        rows = self.some_rows(data)
        self.append_to(rows, [data.draw(st.integers(0, 2 * self.page_size)) for _ in rows])

    @precondition(lambda self: self.tokens)
    @rule()
    def decode_step(self):
        self.append_to(sorted(self.tokens), [1] * len(self.tokens))

    @precondition(lambda self: len(self.tokens) < self.max_rows)
    @rule(data=st.data())
    def prompt(self, data):
        rows = self.layout.alloc(1)
        self.tokens[rows[0]] = []
        self.append_to(rows, [data.draw(st.integers(1, 3 * self.page_size))])

    def append_to(self, rows, counts):
        ends = [len(self.tokens[row]) + count for row, count in zip(rows, counts, strict=True)]
        holders = self.holders()
        needed, num_copies = 0, 0
        for row, end in zip(rows, ends, strict=True):
            pages, length = self.pages(row), len(self.tokens[row])
            needed += -(-end // self.page_size) - len(pages)
            if end > length and length % self.page_size and holders[pages[-1]] > 1:
                holders[pages[-1]] -= 1
                num_copies += 1
        if needed + num_copies > self.layout.free_pages:
            return refused(self.layout, self.layout.append, rows, counts, match="append")
        if max(ends) > self.per_row * self.page_size:
            return refused(self.layout, self.layout.append, rows, counts, match="at most")
        slots, copies = self.layout.append(rows, counts)
        assert slots.dtype == copies.dtype == torch.int64
        assert slots.shape == (sum(counts),) and copies.shape == (num_copies, 2)
        for source, target in copies.tolist():
            for i in range(self.page_size):
                self.storage[target * self.page_size + i] = self.storage[source * self.page_size + i]
        places = iter(slots.tolist())
        for row, count in zip(rows, counts, strict=True):
            for _ in range(count):
                self.storage[next(places)] = self.next_token
                self.tokens[row].append(self.next_token)
                self.next_token += 1

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def fork(self, data):
        rows = self.some_rows(data, unique=False)
        if len(rows) > self.max_rows - len(self.tokens):
            return refused(self.layout, self.layout.fork, rows, match="fork")
        free = self.layout.free_pages
        forks = self.layout.fork(rows)
        assert len(set(forks)) == len(rows) and not set(forks) & set(self.tokens)
        assert self.layout.free_pages == free
        self.tokens |= {new: list(self.tokens[old]) for new, old in zip(forks, rows, strict=True)}
        if data.draw(st.booleans()):
            self.append_to(sorted({*rows, *forks}), [1] * len({*rows, *forks}))

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def truncate(self, data):
        rows = self.some_rows(data)
        lengths = [data.draw(st.integers(0, len(self.tokens[row]) + 1)) for row in rows]
        if any(length > len(self.tokens[row]) for row, length in zip(rows, lengths, strict=True)):
            return refused(self.layout, self.layout.truncate, rows, lengths, match="truncate")
        self.layout.truncate(rows, lengths)
        for row, length in zip(rows, lengths, strict=True):
            del self.tokens[row][length:]

    @precondition(lambda self: len(self.tokens) > 1)
    @rule(data=st.data())
    def free(self, data):
        rows = self.some_rows(data)[:2]
        self.layout.free(rows)
        for row in rows:
            del self.tokens[row]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def misuse(self, data):
        rows = self.some_rows(data)
        absent = data.draw(st.sampled_from([row for row in range(-1, self.max_rows + 2) if row not in self.tokens]))
        wrong, why = data.draw(st.sampled_from([([*rows, absent], "not in use"), ([*rows, rows[0]], "named twice")]))
        refused(self.layout, self.layout.append, wrong, [1] * len(wrong), match=f"append: .*{why}")
        refused(self.layout, self.layout.truncate, wrong, [0] * len(wrong), match=f"truncate: .*{why}")
        refused(self.layout, self.layout.free, wrong, match=f"free: .*{why}")
        refused(self.layout, self.layout.fork, [*rows, absent], match="fork: .*not in use")
        refused(self.layout, self.layout.append, rows, [-1] * len(rows), match="negative")
        refused(self.layout, self.layout.truncate, rows, [-1] * len(rows), match="truncate")

    @invariant()
    def rows_read_back(self):
        for row, tokens in self.tokens.items():
            slots = [
                int(self.table[row, p // self.page_size]) * self.page_size + p % self.page_size
                for p in range(len(tokens))
            ]
            assert [self.storage[slot] for slot in slots] == tokens

    @invariant()
    def counters_agree(self):
        assert self.layout.rows_in_use == len(self.tokens)
        assert self.layout.free_pages == self.layout.num_pages - len(self.holders())
        assert all(int(self.lengths[row]) == len(tokens) for row, tokens in self.tokens.items())
        assert int(self.table.min()) >= 0 and int(self.table.max()) < self.layout.num_pages

    @invariant()
    def nothing_moved(self):
        assert (self.layout.page_table.data_ptr(), self.layout.lengths.data_ptr()) == self.addresses


TestLayoutMachine = LayoutMachine.TestCase
TestLayoutMachine.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


@pytest.mark.slow
def test_many_more_operations():
    run_state_machine_as_test(LayoutMachine, settings=settings(TestLayoutMachine.settings, max_examples=2000))


def test_views_are_zero_copy_and_outlive_the_layout():
    layout = CacheLayout(num_pages=8, page_size=4, max_rows=3, max_pages_per_row=5)
    table, lengths = layout.page_table, layout.lengths
    assert table.dtype == lengths.dtype == torch.int32 and table.shape == (3, 5) and lengths.shape == (3,)
    (row,) = layout.alloc(1)
    layout.append([row], [6])
    assert lengths[row] == 6
    expected = table.clone()
    del layout
    gc.collect()
    assert torch.equal(table, expected) and lengths[row] == 6


def test_rows_within_their_share_stay_contiguous():
    layout = CacheLayout(num_pages=4 * 8, page_size=4, max_rows=4)
    rows = layout.alloc(4)
    layout.append(rows, [5, 1, 9, 3])
    for _ in range(20):
        layout.append(rows, [1] * 4)
    for row in rows:
        pages = layout.page_table[row, : -(-int(layout.lengths[row]) // 4)]
        assert torch.equal(pages, torch.arange(len(pages), dtype=torch.int32) + pages[0])


def test_the_last_holder_of_a_shared_page_writes_in_place():
    layout = CacheLayout(num_pages=3, page_size=4, max_rows=3)
    (row,) = layout.alloc(1)
    layout.append([row], [2])
    rows = [row, *layout.fork([row, row])]
    slots, copies = layout.append(rows, [1, 1, 1])
    assert copies[:, 0].tolist() == [0, 0] and sorted([*copies[:, 1].tolist(), 0]) == [0, 1, 2]
    assert slots.tolist() == [4 * page + 2 for page in (*copies[:, 1].tolist(), 0)]
    assert layout.free_pages == 0


def test_a_refused_copy_is_refused_again():
    layout = CacheLayout(num_pages=1, page_size=4, max_rows=2)
    (row,) = layout.alloc(1)
    layout.append([row], [2])
    rows = [row, *layout.fork([row])]
    for _ in range(2):
        refused(layout, layout.append, rows, [1, 1], match="append: 1 pages are needed, 0 of 1 are free")


def test_a_row_holds_at_most_its_pages():
    layout = CacheLayout(num_pages=8, page_size=4, max_rows=2, max_pages_per_row=2)
    (row,) = layout.alloc(1)
    refused(layout, layout.append, [row], [9], match="would be 0 \\+ 9 tokens long, a row holds at most 8")
    refused(layout, layout.append, [row], [2**62], match="a row holds at most 8")
    cache = KVCache(1, num_slots=64, max_rows=2, max_length=16)
    with pytest.raises(ValueError, match="a row holds at most 16"):
        cache.append(cache.alloc(1), [17])


def test_empty_calls_change_nothing():
    layout = CacheLayout(num_pages=2)
    before = snapshot(layout)
    slots, copies = layout.append([], [])
    assert slots.shape == (0,) and copies.shape == (0, 2)
    assert layout.alloc(0) == layout.fork([]) == []
    layout.truncate([], [])
    layout.free([])
    assert snapshot(layout) == before


def test_unequal_lists_are_refused():
    layout = CacheLayout(num_pages=2)
    rows = layout.alloc(2)
    refused(layout, layout.append, rows, [1], match="2 rows but 1 counts")
    refused(layout, layout.truncate, rows, [0, 0, 0], match="2 rows but 3 lengths")
    refused(layout, layout.alloc, -1, match="alloc: n is -1")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_pages": 0}, "num_pages is 0"),
        ({"num_pages": 2**31}, "num_pages is 2147483648"),
        ({"num_pages": 4, "page_size": 0}, "page_size is 0"),
        ({"num_pages": 4, "max_rows": -1}, "max_rows is -1"),
        ({"num_pages": 4, "max_pages_per_row": 0}, "max_pages_per_row is 0"),
        ({"num_pages": 4, "page_size": 2**20, "max_pages_per_row": 2**12}, "max_pages_per_row \\* page_size"),
        ({"num_pages": 4, "max_rows": 2**20, "max_pages_per_row": 2**12}, "max_rows \\* max_pages_per_row"),
    ],
)
def test_impossible_layouts_are_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        CacheLayout(**arguments)


@pytest.mark.parametrize("name", ["num_slots", "max_rows", "max_length", "page_size"])
def test_a_cache_without_room_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name}: found 0, expected a whole number of 1 or more"):
        KVCache(1, **{"num_slots": 8, name: 0})
