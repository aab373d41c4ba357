"""Freed memory kept for reuse: no tensor's content changes, sizes fit, and the total stays bounded."""

from __future__ import annotations

import random
import resource
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coconut_fast import ops

MIB = 1 << 20


@pytest.fixture(autouse=True, scope="module")
def keeping() -> None:
    """For the rest of this process, as in training."""
    ops.extension().keep_freed_memory()


def tensor(mib: float) -> torch.Tensor:
    return torch.empty(int(mib * MIB), dtype=torch.uint8)


def test_freed_memory_is_used_again_without_faults() -> None:
    faults = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.ones(6 << 20) for _ in range(8)]  # 24 MiB each, 49,152 pages together
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        del blocks
    assert faults[2] < 1000, faults


@pytest.mark.parametrize(("mib", "again"), [(64, True), (57, True), (56, False), (65, False), (8, False)])
def test_a_block_serves_its_size_and_up_to_an_eighth_less(mib: int, again: bool) -> None:
    first = tensor(64)
    address = first.data_ptr()
    del first
    second = tensor(mib)
    assert (second.data_ptr() == address) == again
    assert address % 4096 == 0


@settings(max_examples=30, deadline=None)
@given(steps=st.lists(st.tuples(st.booleans(), st.integers(1, 40), st.randoms(use_true_random=False)), max_size=60))
def test_contents_and_bounds(steps: list[tuple[bool, int, random.Random]]) -> None:
    held: list[tuple[torch.Tensor, int]] = []
    for number, (free, mib, rng) in enumerate(steps):
        if free and held:
            block, value = held.pop(rng.randrange(len(held)))
            assert (block == value).all()
            del block
        else:
            held.append((tensor(mib).fill_(number % 251), number % 251))
        in_use, waiting, peak = ops.extension().kept_memory()
        assert in_use >= sum(block.numel() for block, _ in held)
        assert peak >= in_use and in_use + waiting <= peak + peak // 8 + 64 * MIB
    assert all((block == value).all() for block, value in held)


def test_nothing_waits_once_it_is_switched_off() -> None:
    """As at the end of training: what is freed later goes to the system too."""
    held, early = tensor(40), tensor(40)
    del early
    assert ops.extension().kept_memory()[1] >= 40 * MIB
    ops.extension().keep_freed_memory(False)
    assert ops.extension().kept_memory()[1] == 0
    del held
    assert ops.extension().kept_memory()[1] == 0
    ops.extension().keep_freed_memory()
    later = tensor(40)
    del later
    assert ops.extension().kept_memory()[1] >= 40 * MIB


def test_threads_never_share_a_block() -> None:
    def work(seed: int) -> bool:
        rng, held = random.Random(seed), []
        for _ in range(60):
            value = rng.randrange(256)
            held.append((tensor(rng.choice([1, 2, 2.5, 3])).fill_(value), value))
            if len(held) > 4:
                block, value = held.pop(rng.randrange(len(held)))
                if not (block == value).all():
                    return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_too_large_a_tensor_is_pytorchs_error() -> None:
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        torch.empty(1 << 60, dtype=torch.uint8)
    assert tensor(2).fill_(1).sum() == 2 * MIB


def test_small_tensors_are_not_kept() -> None:
    before = ops.extension().kept_memory()[0]
    small = torch.empty(MIB - 1, dtype=torch.uint8)
    assert ops.extension().kept_memory()[0] == before
    large = torch.empty(MIB, dtype=torch.uint8)
    assert ops.extension().kept_memory()[0] == before + MIB
    del small, large
