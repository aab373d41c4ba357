"""The order of training problems: complete, seeded, dealt without loss, the same steps on any number of processes."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coconut_fast.data.curriculum import METHODS, CurriculumConfig, training_row
from coconut_fast.data.examples import TokenizedExample
from coconut_fast.tokens import IGNORE, LatentTokens
from coconut_fast.train.order import EpochBatches, epoch_order
from coconut_fast.train.rows import Collate, StageRows, end_with_parent


def steps(num_examples: int, accumulation: int, processes: int, batch_size: int, epoch: int = 0) -> list[list[int]]:
    """The problems of every optimizer step, from all processes."""
    batches = []
    for process in range(processes):
        sampler = EpochBatches(
            num_examples, batch_size=batch_size, accumulation=accumulation, processes=processes, process=process, seed=5
        )
        sampler.epoch = epoch
        sampler.lengths = [(7 * i) % 13 for i in range(num_examples)]
        batches.append([[key[0] for key in batch] for batch in sampler])
        assert len(batches[-1]) == len(sampler)
    assert len({len(b) for b in batches}) == 1, "processes have equally many batches"
    together = [list(chain(*parts)) for parts in zip(*batches, strict=True)]
    return [sorted(chain(*together[i : i + accumulation])) for i in range(0, len(together), accumulation)]


@settings(max_examples=60, deadline=None)
@given(st.integers(4, 90), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_every_problem_once(num_examples: int, accumulation: int, processes: int, batch_size: int) -> None:
    seen = sorted(chain(*steps(num_examples, accumulation, processes, batch_size)))
    assert seen == list(range(num_examples))


def test_same_steps_however_dealt() -> None:
    expected = steps(50, accumulation=1, processes=1, batch_size=8)
    assert steps(50, accumulation=1, processes=2, batch_size=4) == expected
    assert steps(50, accumulation=4, processes=1, batch_size=2) == expected
    assert steps(50, accumulation=2, processes=2, batch_size=2) == expected
    assert steps(50, 1, 1, 8, epoch=1) != expected


def test_rows_of_a_step_are_of_like_length() -> None:
    lengths = np.random.default_rng(0).integers(10, 500, size=2048)
    sampler = EpochBatches(2048, batch_size=16, accumulation=1)
    sampler.lengths = lengths
    spreads = [np.ptp(lengths[[key[0] for key in batch]]) for batch in sampler]
    assert np.mean(spreads) < 30, "of 490 without buckets"
    means = [lengths[[key[0] for key in batch]].mean() for batch in sampler]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3, "steps are not sorted among themselves"


def test_short_epochs_go_on_where_the_last_one_ended() -> None:
    one_round = np.concatenate([epoch_order(20, epoch, seed=1, epoch_size=5) for epoch in range(4)])
    assert sorted(one_round) == list(range(20))
    assert sorted(epoch_order(20, 0, seed=1, epoch_size=40)) == sorted([*range(20), *range(20)])
    across = np.concatenate([epoch_order(7, epoch, seed=1, epoch_size=3) for epoch in range(7)])
    assert np.bincount(across).tolist() == [3] * 7


def test_every_round_is_shuffled_anew() -> None:
    rounds = [epoch_order(50, 0, seed=0), epoch_order(50, 0, seed=1), *np.split(epoch_order(50, 1, 0, 100), 2)]
    assert len(set(map(tuple, rounds))) == 4


def test_keys_name_epoch_and_stage() -> None:
    sampler = EpochBatches(4, batch_size=4, accumulation=1)
    sampler.epoch, sampler.stage = 3, 2
    assert sorted(next(iter(sampler))) == [(i, 3, 2) for i in range(4)]


def _parent(pipe: Any) -> None:
    def worker() -> None:
        end_with_parent(0)
        pipe.send(os.getpid())
        time.sleep(60)

    multiprocessing.get_context("fork").Process(target=worker).start()
    time.sleep(60)


def test_a_worker_ends_with_a_killed_trainer() -> None:
    ours, theirs = multiprocessing.Pipe()
    trainer = multiprocessing.get_context("fork").Process(target=_parent, args=(theirs,), daemon=False)
    trainer.start()
    assert ours.poll(20)
    worker = ours.recv()
    trainer.kill()
    trainer.join()
    for _ in range(100):
        if not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    psutil.Process(worker).kill()
    pytest.fail("the worker lives on")


@pytest.mark.parametrize("method", [m for m in METHODS if m != "icot"])  # which removes tokens, not steps
def test_rows_are_sorted_by_what_is_not_the_same_for_all(method: str) -> None:
    rng = random.Random(0)
    examples = [
        TokenizedExample([1] * rng.randint(3, 30), [[2] * rng.randint(1, 9) for _ in range(6)], [3] * rng.randint(1, 5))
        for _ in range(20)
    ]
    config = CurriculumConfig(method=method, max_latent_stage=4)
    tokens = LatentTokens(start=5, thought=6, end=7, eos=0, pause=8)
    rows = StageRows(SimpleNamespace(fixed=examples), config, tokens, seed=0)
    for stage in (0, 2, 5):
        found = [len(training_row(e, stage, config, tokens)[0]) for e in examples]
        assert len({a - b for a, b in zip(found, rows.lengths(stage), strict=True)}) == 1


def test_chance_draws_anew_in_every_epoch_and_for_every_seed() -> None:
    problems = SimpleNamespace(at=lambda idx, epoch: TokenizedExample([1], [[2]] * 9, [3, 0]))
    config = CurriculumConfig(uniform_prob=1.0, max_latent_stage=9, markers=False)

    def drawn(seed: int, epoch: int) -> tuple[int, ...]:
        rows = StageRows(problems, config, LatentTokens(thought=6), seed)
        return tuple(rows[idx, epoch, 0][1].count(6) for idx in range(20))

    assert len({drawn(0, 0), drawn(0, 1), drawn(1, 0)}) == 3


def test_rows_that_markers_make_too_long_are_refused() -> None:
    tokens = LatentTokens(start=5, thought=6, end=7, eos=0)
    example = TokenizedExample([1] * 5, [[2], [2]], [3, 0])
    config = CurriculumConfig(max_latent_stage=1)
    rows = StageRows(SimpleNamespace(fixed=[example], where="data"), config, tokens, seed=0)
    longest = max(len(training_row(example, stage, config, tokens)[0]) for stage in range(3))
    rows.check(range(3), longest)
    with pytest.raises(ValueError, match=f"problem 1 has {longest} tokens"):
        rows.check(range(3), longest - 1)


@pytest.mark.parametrize(("passes", "idle"), [(1, 0), (2, 0), (3, 1), (4, 1)])
def test_an_idle_row_is_added_where_passes_are_missing(passes: int, idle: int) -> None:
    collate = Collate(LatentTokens(thought=6, eos=0))
    batch = collate([((0, 0, 0), [1, 6, 3], [IGNORE, IGNORE, 3])], passes)["batch"]
    assert len(batch.passes) == max(passes, 2)
    assert (len(batch.lengths), batch.num_targets) == (1 + idle, 1)
    assert len(collate([], passes)["batch"].passes) == passes
