"""The stage schedule: by count, by metric, skipped epochs, the end of a run, optimizer resets, and learning rates."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from types import SimpleNamespace

import pytest

from coconut_fast.train.learning_rate import learning_rate_factor
from coconut_fast.train.schedule import EpochRecord, StageSchedule


def play(schedule: StageSchedule, metrics: list[float | None] | None = None) -> tuple[list[int], list[bool]]:
    """Stages of a whole run and, for each epoch, whether the optimizer was reset before it."""
    history: list[EpochRecord] = []
    resets = []
    while (stage := schedule.next_stage(history)) is not None:
        resets.append(schedule.resets(history, stage))
        history.append(EpochRecord(stage, metrics[len(history)] if metrics else None))
    return [record.stage for record in history], resets


def test_by_count_as_the_official_code() -> None:
    """Official: epoch // epochs_per_stage, and every stage past the maximum is the same."""
    stages, _ = play(StageSchedule(last_stage=7, epochs_per_stage=5, num_epochs=50))
    assert stages == [min(epoch // 5, 7) for epoch in range(50)]
    stages, _ = play(StageSchedule(last_stage=4, epochs_per_stage=3, num_epochs=25, first_epoch=3))
    assert stages == [min(epoch // 3, 4) for epoch in range(3, 25)]


def test_first_stage_may_last_longer() -> None:
    stages, _ = play(StageSchedule(last_stage=2, epochs_per_stage=2, first_stage_epochs=4, num_epochs=10))
    assert stages == [0, 0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert play(StageSchedule(last_stage=1, first_stage_epochs=0, num_epochs=2))[0] == [1, 1]


def test_no_stages() -> None:
    assert play(StageSchedule(last_stage=0, num_epochs=4))[0] == [0, 0, 0, 0]


def test_advances_when_the_metric_passes_and_by_count_at_the_latest() -> None:
    schedule = StageSchedule(last_stage=3, epochs_per_stage=3, num_epochs=20, advance_at=0.9, final_epochs=2)
    stages, _ = play(schedule, [0.1, 0.95, 0.2, 0.3, 0.4, 0.9, 0.99, 0.0])
    assert stages == [0, 0, 1, 1, 1, 2, 3, 3]
    assert schedule.final_start([EpochRecord(s) for s in stages]) == 6
    assert schedule.final_start([EpochRecord(0, 0.1)]) is None


def test_skipped_epochs_of_the_first_stage_count_with_and_without_a_metric() -> None:
    plan = {"last_stage": 6, "epochs_per_stage": 5, "num_epochs": 50}
    for skipped in (3, 5, 7):
        by_count, _ = play(StageSchedule(**plan, first_epoch=skipped))
        assert play(StageSchedule(**plan, first_epoch=skipped, advance_at=1.0))[0] == by_count
    stages, _ = play(StageSchedule(1, epochs_per_stage=2, num_epochs=4, first_epoch=1, advance_at=1.0), [0.0] * 3)
    assert stages == [0, 1, 1]


def test_a_list_names_the_first_stages_alone() -> None:
    schedule = StageSchedule(
        last_stage=3, epochs_per_stage=2, first_stage_epochs=4, num_epochs=20, advance_at=[0.6], final_epochs=1
    )
    assert play(schedule, [0.5, 0.7, 0.9, 0.9, 0.9, 0.9, 0.9])[0] == [0, 0, 1, 1, 2, 2, 3]
    assert play(schedule, [0.5] * 9)[0] == [0, 0, 0, 0, 1, 1, 2, 2, 3]
    with pytest.raises(ValueError, match="advance_at: found 'much', expected numbers"):
        StageSchedule(last_stage=1, advance_at=["much"])  # type: ignore[list-item]


def test_final_epochs_end_a_run_by_count() -> None:
    schedule = StageSchedule(last_stage=2, epochs_per_stage=1, num_epochs=99, final_epochs=3)
    assert play(schedule)[0] == [0, 1, 2, 2, 2]
    schedule = StageSchedule(last_stage=1, epochs_per_stage=3, num_epochs=99, final_epochs=1, advance_at=0.0)
    assert play(schedule)[0] == [0, 0, 0, 1], "what it lasts at the most"


def test_epochs_of_stages_are_those_of_the_longest_run() -> None:
    plans = itertools.product((0, 1, 3), (1, 2), (1, 2, 9), (None, 0, 3), (0, 1, 4, 8), (None, 2), (None, 1.0))
    for last, each, end, first, skipped, final, advance in plans:
        if skipped < end:
            schedule = StageSchedule(last, each, end, first, skipped, final, advance)
            assert schedule.epochs_by_count() == Counter(play(schedule)[0]), schedule


def test_a_plan_of_any_number_of_epochs_or_stages_is_made_at_once() -> None:
    start, end = time.perf_counter(), 10**11
    assert StageSchedule(last_stage=end, num_epochs=3, advance_at=0.5).epochs_by_count() == {0: 1, 1: 1, 2: 1}
    assert StageSchedule(last_stage=3, num_epochs=end).epochs_by_count() == {0: 1, 1: 1, 2: 1, 3: end - 3}
    skipped = StageSchedule(1, epochs_per_stage=end, num_epochs=2 * end, first_epoch=end - 1, advance_at=1.0)
    assert (skipped.next_stage([]), skipped.next_stage([EpochRecord(0)])) == (0, 1)
    assert len(play(StageSchedule(last_stage=3, num_epochs=20_000))[0]) == 20_000
    assert time.perf_counter() - start < 5, "some 0.1 s"


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"last_stage": 7, "epochs_per_stage": 5, "num_epochs": 50}, "0 to 6: 5 epochs each; 7: 15 epochs"),
        (
            {"last_stage": 4, "epochs_per_stage": 3, "num_epochs": 25, "first_epoch": 3},
            "1 to 3: 3 epochs each; 4: 13 epochs",
        ),
        ({"last_stage": 0, "num_epochs": 1}, "0: 1 epoch"),
        (
            {"last_stage": 3, "epochs_per_stage": 2, "first_stage_epochs": 6, "num_epochs": 20, "advance_at": [0.9]},
            "0: at most 6 epochs, until accuracy 0.9; 1 to 2: 2 epochs each; 3: the rest of 20 epochs",
        ),
        (
            {"last_stage": 7, "epochs_per_stage": 2, "num_epochs": 16, "advance_at": [0.5]},
            "0: at most 2 epochs, until accuracy 0.5; 1 to 6: 2 epochs each; 7: the rest of 16 epochs",
        ),
        (
            {"last_stage": 2, "epochs_per_stage": 2, "num_epochs": 20, "advance_at": 0.9, "final_epochs": 3},
            "0 to 1: at most 2 epochs each, until accuracy 0.9; 2: 3 epochs",
        ),
    ],
)
def test_a_plan_in_words(plan: dict, words: str) -> None:
    assert StageSchedule(**plan).in_words() == words


def test_optimizer_resets() -> None:
    def at(how: str) -> list[int]:
        schedule = StageSchedule(last_stage=2, epochs_per_stage=2, num_epochs=6, reset_optimizer=how)
        return [epoch for epoch, reset in enumerate(play(schedule)[1]) if reset]

    assert at("stage") == [2, 4]
    assert at("epoch") == [1, 2, 3, 4, 5]
    assert at("never") == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs_per_stage": 0}, "epochs_per_stage: found 0, expected 1 or more"),
        ({"first_epoch": 5, "num_epochs": 5}, "resume: found 5, expected fewer than num_epochs = 5"),
        ({"reset_optimizer": "daily"}, "reset_optimizer: found 'daily', expected one of stage, epoch, never"),
        ({"final_epochs": 0}, "final_epochs: found 0"),
    ],
)
def test_refuses(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StageSchedule(**{"last_stage": 3, **wrong})


@pytest.mark.parametrize(
    ("kind", "behind"), [("constant", [1, 1, 1]), ("linear", [1, 0.5, 0]), ("cosine", [1, 0.5, 0])]
)
def test_learning_rates_of_steps(kind: str, behind: list[float]) -> None:
    """Warm-up ends at the full rate; `behind`: the factor at its end, half-way, and at the run's end."""
    settings = SimpleNamespace(warmup_steps=3, lr_schedule=kind)
    factor = learning_rate_factor(SimpleNamespace(settings=settings), 23)
    assert [factor(step) for step in (0, 1, 2)] == [0.25, 0.5, 0.75]
    assert [factor(step) for step in (3, 13, 23)] == pytest.approx(behind)


def test_a_final_cosine_spans_all_steps_of_the_final_epochs() -> None:
    trainer = SimpleNamespace(
        settings=SimpleNamespace(warmup_steps=0, lr_schedule="cosine_final", final_epochs=2),
        schedule=StageSchedule(last_stage=1, epochs_per_stage=1, num_epochs=3, final_epochs=2),
        run_state=SimpleNamespace(history=[EpochRecord(0)]),
        sampler=SimpleNamespace(updates=5),
    )
    factor = learning_rate_factor(trainer, 15)
    assert [factor(step) for step in (4, 5, 10, 15)] == pytest.approx([1, 1, 0.5, 0])
