"""Batches made ahead of time: the same, in the same order."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from coconut_fast.train.prefetch import AHEAD, Prefetcher
from tests.test_trainer import assert_equal, make_trainer, weights


def test_items_come_in_order_and_the_end_stays() -> None:
    prefetcher = Prefetcher(iter(range(10)), lambda item: item * item)
    assert list(prefetcher) == [n * n for n in range(10)]
    assert list(prefetcher) == []


def test_another_thread_makes_the_next_ones_while_one_is_used() -> None:
    made, enough = [], threading.Event()

    def ready(item: int) -> str:
        made.append(item)
        if len(made) == 1 + AHEAD:
            enough.set()
        return threading.current_thread().name

    prefetcher = Prefetcher(iter(range(100)), ready)
    assert next(prefetcher) != threading.current_thread().name
    assert enough.wait(10)
    prefetcher.thread.shutdown()
    assert made == [0, 1, 2], "only what is due"


def test_an_error_comes_where_the_item_would() -> None:
    def items():
        yield 1
        raise ValueError("a broken problem")

    prefetcher = Prefetcher(items(), lambda item: item)
    assert next(prefetcher) == 1
    with pytest.raises(ValueError, match="a broken problem"):
        next(prefetcher)


def test_batches_made_by_a_thread_change_nothing(tmp_path: Path) -> None:
    """Dropout, random rows, accumulation and the borders of epochs: bit for bit."""
    results = []
    for beside in (False, True):
        trainer = make_trainer(
            tmp_path, debug=True, uniform_prob=0.3, batch_size_training=4, gradient_accumulation_steps=3
        )
        trainer.prefetches = beside
        trainer.train()
        assert (trainer.prefetcher is not None) == beside
        results.append(weights(trainer))
    assert_equal(*results)
