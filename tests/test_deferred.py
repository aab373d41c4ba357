"""Deferred weight gradients against autograd's own, use by use."""

from __future__ import annotations

import pytest
import torch

from coconut_fast.data.batch import IGNORE, collate
from coconut_fast.model import deferred
from tests.compare import assert_as_good_as_torch
from tests.families import FAMILIES, TOKENS, make_pair, make_row

ROWS = [make_row(5, 3, 4, 1), make_row(17, 0, 3, 2), make_row(3, 1, 6, 3)]
LABELS = [[IGNORE] * (len(r) - 3) + r[-3:] for r in ROWS]


def _gradients(model, defer: bool, labels=LABELS, **autocast) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.defer_weight_gradients = defer
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(autocast)):
        loss = model(batch=collate(ROWS, TOKENS.thought, labels)).loss
    loss.backward()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("small", [0, 12, 512])
def test_the_same_gradients_in_another_order(monkeypatch, small: int) -> None:
    monkeypatch.setattr(deferred, "SMALL", small)
    model, _ = make_pair("gpt2", torch.float64)
    expected, found = _gradients(model, False), _gradients(model, True)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-11, atol=1e-14, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_gradients_are_as_good_as_autograds(family: str) -> None:
    model, _ = make_pair(family)
    plain, ours = _gradients(model, False, bf16=True), _gradients(model, True, bf16=True)
    truth = _gradients(model.double(), False)
    assert ours.keys() == plain.keys()
    for name, gradient in ours.items():
        assert_as_good_as_torch(gradient, plain[name], truth[name], what=name, working=torch.bfloat16)


@pytest.mark.parametrize("detach_after", [0, 1])
def test_passes_that_backward_never_reaches_lose_nothing(detach_after: int) -> None:
    """With detached thoughts, or labels in the first pass only, some uses of a weight have no gradient at all."""
    model, _ = make_pair("gpt2", torch.float64)
    early = [[IGNORE, r[1], *[IGNORE] * (len(r) - 2)] for r in ROWS]
    model.detach_after = detach_after
    for labels in (LABELS, early):
        expected, found = _gradients(model, False, labels), _gradients(model, True, labels)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-11, atol=1e-14, msg=name)
