"""What a call of the native chain does to the process around it."""

from __future__ import annotations

import sys
import threading
import time

import pytest
import torch

from coconut_fast.infer import native
from tests.families import make_pair

CALLS = ("prefill", "think", "decode")


class Watched:
    """A chain that notes by how much `turns` moved during each of its calls."""

    def __init__(self, chain, turns: list[int]) -> None:
        self.chain, self.turns, self.moved = chain, turns, dict.fromkeys(CALLS, 0)

    def __getattr__(self, name: str):
        def call(*arguments: object) -> object:
            before = self.turns[0]
            result = method(*arguments)
            self.moved[name] += self.turns[0] - before
            return result

        method = getattr(self.chain, name)
        return call


@pytest.fixture
def patient():
    """The interpreter changes threads only where one lets go of it."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    yield
    sys.setswitchinterval(before)


def test_other_python_threads_run_during_a_call(patient) -> None:
    model = native.NativeModel(make_pair("gpt2")[0], threads=1)
    turns, over = [0], threading.Event()
    chain = model.chain = Watched(model.chain, turns)

    def count() -> None:
        while not over.is_set():
            turns[0] += 1
            time.sleep(0)

    other = threading.Thread(target=count)
    other.start()
    try:
        for _ in range(200):  # on a busy machine a call may end before the other thread gets a core
            cache = model.make_cache(num_slots=32 * 64, max_rows=32)
            rows, hidden = cache.alloc(32), torch.zeros(32, 32)
            model.prefill(cache, rows, [list(range(20))] * 32, hidden)
            model.think(cache, rows, [20] * 32, hidden)
            model.decode(cache, rows, hidden, pending=[None] * 32, limits=[20] * 32)
            if all(chain.moved.values()):
                break
    finally:
        over.set()
        other.join()
    assert all(chain.moved.values()), chain.moved
