"""The persistent kernel's schedule, run in Python: it thinks as the model does, without races, and terminates."""

from __future__ import annotations

import copy

import pytest
import torch

from coconut_fast.infer.persistent import FIELDS, OPCODES, schedule
from tests.compare import assert_as_good_as_torch
from tests.persistent_setup import MODELS, last_states, machine, plan_of, start
from tests.persistent_vm import Deadlock, Race, validate
from tests.test_native import random_model, wrap


@pytest.mark.parametrize("name", MODELS)
def test_the_schedule_thinks_as_the_model_does(name: str) -> None:
    hf = random_model(name)
    model = wrap(hf)
    program = schedule(plan_of(model), batch=3, blocks=4, splits=1)
    validate(program)
    ours = machine(model, program, start(model)).run(3)
    assert_as_good_as_torch(ours, last_states(hf), last_states(copy.deepcopy(hf).double()), what=name)


@pytest.mark.parametrize("split", [4, 5, 64])
@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_any_split_gives_the_same_attention(name: str, split: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.persistent_vm.SPLIT", split)
    hf = random_model(name)
    model = wrap(hf)
    program = schedule(plan_of(model), batch=3, blocks=40, splits=-(-64 // split))
    ours = machine(model, program, start(model)).run(3)
    assert_as_good_as_torch(ours, last_states(hf), last_states(copy.deepcopy(hf).double()), what=name)


@pytest.mark.parametrize("blocks", [1, 2, 7, 150])
def test_any_number_of_blocks_in_any_order(blocks: int) -> None:
    model = wrap(random_model("llama"))
    at = start(model)
    program = schedule(plan_of(model), batch=3, blocks=blocks, splits=1)
    validate(program)
    results = [machine(model, program, at).run(3, order) for order in (range(blocks), list(reversed(range(blocks))))]
    assert torch.equal(*results), "the order in which blocks run shows in the result"
    for i, last in enumerate(program[-1, :, FIELDS.index("last")]):
        op = program[0, i, 0]
        first = program[1:, i, FIELDS.index("first")]
        assert torch.equal(first, program[:-1, i, FIELDS.index("last")]), f"{OPCODES[op]} leaves tiles out"
        assert last > 0 and program[0, i, FIELDS.index("first")] == 0


def field(name: str) -> int:
    return FIELDS.index(name)


def swap_phases(program: torch.Tensor) -> None:
    program[:, [1, 2], :6] = program[:, [2, 1], :6]


BROKEN = {
    # the change to the program, and the error that must follow
    "a block waits for a phase too many": (lambda p: p[1, 3, field("wait")].add_(1), Deadlock),
    "a block never arrives": (lambda p: p[2, 4, field("arrive")].zero_(), Deadlock),
    "a block arrives twice": (lambda p: p[0, 5, field("arrive")].fill_(2), Deadlock),
    "a block runs ahead of the others": (lambda p: p[3, 2, field("wait")].sub_(1), Deadlock),
    "nobody waits for the attention": (lambda p: p[:, 3, field("wait")].sub_(1), Race),
    "nobody waits before writing x again": (lambda p: p[:, 5, field("wait")].sub_(2), Race),
    "phases in the wrong order": (swap_phases, Race),
    "a share left out": (lambda p: p[1, 1, field("last")].sub_(1), Race),
    "a share done twice": (lambda p: p[1, 3, field("first")].sub_(1), Race),
    "a buffer that the instruction does not name": (lambda p: p[:, 4, field("writes")].zero_(), Race),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_schedule_is_found(what: str) -> None:
    breaks, error = BROKEN[what]
    model = wrap(random_model("llama"))
    program = schedule(plan_of(model), batch=3, blocks=4, splits=1)
    breaks(program)
    with pytest.raises(error):
        if error is Deadlock:
            validate(program)
        machine(model, program, start(model)).run(3)


def test_a_count_that_never_comes_is_a_deadlock_when_run() -> None:
    model = wrap(random_model("gpt2"))
    program = schedule(plan_of(model), batch=3, blocks=4, splits=1)
    program[2, 4, field("arrive")] = 0
    with pytest.raises(Deadlock, match="blocks stand at"):
        machine(model, program, start(model)).run(3)
