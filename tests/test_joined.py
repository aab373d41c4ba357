"""Latent passes that leave dK and dV of the prompt to the first pass, against the same passes adding their own."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from coconut_fast.model import attention, coconut
from coconut_fast.model.batch import collate
from coconut_fast.tokens import IGNORE
from tests.compare import assert_as_good_as_torch
from tests.families import TOKENS, make_pair, make_row

# (question, thoughts, tail): the first nine latent passes have one token a row, in three rows of four
ROWS = [make_row(*shape, seed=i) for i, shape in enumerate([(5, 10, 4), (17, 0, 3), (3, 12, 6), (21, 10, 2)])]
LABELS = [[IGNORE] * (len(r) - 3) + r[-3:] for r in ROWS]


@pytest.fixture
def joined(monkeypatch) -> list[int]:
    """How many passes were joined, call by call."""
    calls: list[int] = []
    add = attention._add_joined
    monkeypatch.setattr(
        attention, "_add_joined", lambda r, layer, k: calls.append(len(r.cache.waiting[layer])) or add(r, layer, k)
    )
    return calls


def _gradients(model, monkeypatch, join: bool, **keywords) -> dict[str, torch.Tensor]:
    monkeypatch.setitem(attention.WORTH_JOINING, "cpu", 2 if join else 10**9)
    torch.manual_seed(4)
    model.zero_grad()
    model(batch=collate(ROWS, TOKENS.thought, LABELS), **keywords).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss_only", [False, True], ids=["whole", "loss_only"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("detach_after", [None, 4])
def test_the_same_gradients(joined, monkeypatch, dropout: float, detach_after: int | None, loss_only: bool) -> None:
    model, _ = make_pair("gpt2", torch.float64, attn_pdrop=dropout, resid_pdrop=dropout)
    model.train()
    model.detach_after = detach_after
    expected = _gradients(model, monkeypatch, False, loss_only=loss_only)
    assert not joined
    found = _gradients(model, monkeypatch, True, loss_only=loss_only)
    assert joined == [9] * model.num_layers
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-11, atol=1e-13, msg=name)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "qwen3"])  # a window; window and softcap; grouped heads
def test_the_same_gradients_in_every_kind_of_attention(joined, monkeypatch, family: str) -> None:
    model, _ = make_pair(family)
    expected, found = (_gradients(model, monkeypatch, join) for join in (False, True))
    assert joined == [9] * model.num_layers
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_autocast_gradients_are_as_good_as_without(joined, monkeypatch) -> None:
    model, _ = make_pair("gpt2")
    with torch.autocast("cpu", torch.bfloat16):
        plain, found = (_gradients(model, monkeypatch, join) for join in (False, True))
    assert joined == [9] * model.num_layers
    truth = _gradients(model.double(), monkeypatch, False)
    for name, gradient in found.items():
        assert_as_good_as_torch(gradient, plain[name], truth[name], what=name, working=torch.bfloat16)


@pytest.mark.parametrize("worth", [2, 10**9], ids=["joined", "apart"])
def test_a_backward_that_ended_at_a_thought_leaves_nothing_behind(worth: int, monkeypatch) -> None:
    """Gradients that wait for the first pass, or for all uses of a weight, must not keep the graph that keeps them."""
    monkeypatch.setitem(attention.WORTH_JOINING, "cpu", worth)
    caches = []
    make = coconut.Storage
    monkeypatch.setattr(coconut, "Storage", lambda *a, **k: caches.append(weakref.ref(c := make(*a, **k))) or c)
    output = make_pair("gpt2")[0](batch=collate(ROWS, TOKENS.thought, LABELS))
    torch.autograd.grad(output.loss, output.hidden_TD[4], retain_graph=True)
    assert all(bool(waiting) == (worth == 2) for waiting in caches[0]().waiting)
    del output
    gc.collect()
    assert caches[0]() is None


def test_a_backward_after_one_that_ended_at_a_thought(joined, monkeypatch) -> None:
    model, _ = make_pair("gpt2", torch.float64)
    expected = _gradients(model, monkeypatch, True)
    output = model(batch=collate(ROWS, TOKENS.thought, LABELS))
    torch.autograd.grad(output.loss, output.hidden_TD[4], retain_graph=True)
    model.zero_grad()
    output.loss.backward()
    assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters())


def test_only_the_feedback_is_trained(joined, monkeypatch) -> None:
    """Then the first pass has no backward, and no gradients of its keys and values are requested."""
    model, _ = make_pair("gpt2", torch.float64)
    model.requires_grad_(False)
    model.feedback = torch.nn.Linear(model.config.hidden_size, model.config.hidden_size).double()
    expected, found = (_gradients(model, monkeypatch, join) for join in (False, True))
    assert not joined and expected.keys() == {"feedback.weight", "feedback.bias"}
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-11, atol=1e-13, msg=name)


def test_few_passes_are_not_joined() -> None:
    def count(*shapes: tuple[int, int, int]) -> int:
        return attention.num_joined(collate([make_row(*s, seed=0) for s in shapes], TOKENS.thought), False)

    worth = attention.WORTH_JOINING["cpu"]
    assert count((5, worth, 3)) == 0 and count((5, worth + 1, 3)) == worth
    assert count((5, worth + 3, 3), (9, 0, 2)) == worth + 2
    assert count((5, worth + 3, 3), (9, 2, 2)) == 0  # the second row's tail comes early
