"""Deferred weight gradients against autograd's own, use by use."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from coconut_fast.model import deferred
from coconut_fast.model.batch import collate
from coconut_fast.tokens import IGNORE
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


@pytest.mark.parametrize("small", [0, 1, 12, 512])  # 1: some uses have just one row
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


def test_gradients_repeat_bit_for_bit_on_several_threads() -> None:
    """Some ways to sum the gradients of a frequent token use atomics, which add in any order."""
    model, _ = make_pair("gpt2")
    rows = [make_row(60, 2, 3, seed) for seed in range(40)]
    labels = [[IGNORE] * (len(row) - 3) + row[-3:] for row in rows]
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        found = []
        for _ in range(6):
            model.zero_grad()
            model(batch=collate(rows, TOKENS.thought, labels)).loss.backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    finally:
        torch.set_num_threads(threads)
    for name, gradient in found[0].items():
        assert all(torch.equal(gradient, again[name]) for again in found[1:]), name


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


@pytest.mark.parametrize("defer", [False, True])
def test_a_backward_that_ends_at_a_thought_leaves_nothing_to_the_next(defer: bool) -> None:
    """It computes gradients of later passes' weights, keys and values, but never reaches where those are collected."""
    model, _ = make_pair("gpt2", torch.float64)
    expected = _gradients(model, defer)
    model.zero_grad()
    output = model(batch=collate(ROWS, TOKENS.thought, LABELS))
    first = [torch.autograd.grad(output.loss, output.hidden_TD[0], retain_graph=True)[0] for _ in range(2)]
    assert first[0].abs().max() > 0 and torch.equal(*first)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-11, atol=1e-14, msg=name)


@pytest.mark.parametrize("tied", [True, False])
def test_token_gradients_join_the_heads(tied: bool) -> None:
    """With tied or separate weights of embedding and head, and with a frozen embedding, which gets no gradient."""
    model, _ = make_pair("gpt2", torch.float64, tie_word_embeddings=tied)
    expected, found = _gradients(model, False), _gradients(model, True)
    assert found.keys() == expected.keys() and ("hf.lm_head.weight" in found) != tied
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-11, atol=1e-14, msg=name)
    model.hf.get_input_embeddings().weight.requires_grad_(False)
    assert _gradients(model, True).keys() == _gradients(model, False).keys()


def _kept(model, defer: bool) -> int:
    """Bytes that a forward keeps for its backward, weights apart."""
    storages: dict[int, int] = {}
    model.defer_weight_gradients = defer
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(x: torch.Tensor) -> torch.Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss = model(batch=collate(ROWS, TOKENS.thought, LABELS)).loss
    assert loss.requires_grad
    return sum(size for at, size in storages.items() if at not in weights)


def test_neither_normed_inputs_nor_gelus_outputs_are_kept(monkeypatch) -> None:
    model, _ = make_pair("gpt2")
    monkeypatch.setattr(deferred, "SMALL", 512)
    everything = _kept(model, True)
    monkeypatch.setattr(deferred, "SMALL", 0)
    tokens = sum(map(len, ROWS))
    layers, width = model.num_layers, model.config.n_embd
    # per layer two norms of (T, D) and one GELU of (T, 4 D)
    assert everything - _kept(model, True) >= 0.9 * layers * tokens * width * 6 * 4


def test_a_result_changed_in_place_is_kept_as_it_is() -> None:
    """A result that can be recomputed is recognised by its memory: a later write into it must be noticed."""
    weight = torch.nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    bias = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    x = torch.randn(deferred.SMALL + 1, 4, dtype=torch.float64, requires_grad=True)
    gradients = []
    for defer in (False, True):
        with deferred.DeferredWeightGradients() if defer else nullcontext():
            y = torch.nn.functional.gelu(x)
            with torch.no_grad():
                y.mul_(2.0)
            torch.addmm(bias, y, weight).square().sum().backward()
        gradients.append(weight.grad)
        weight.grad = None
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_other_than_a_parameters_products_are_left_to_autograd() -> None:
    """Temporary biases that share an address, biases with a value for each row, keyword arguments, and padding."""
    weight, table = (torch.nn.Parameter(torch.randn(4, 4, dtype=torch.float64)) for _ in range(2))
    bias = torch.nn.Parameter(torch.randn(4, dtype=torch.float64))
    wide = torch.nn.Parameter(torch.randn(5, 4, dtype=torch.float64))
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    leaves, ids = (weight, table, bias, wide, x), torch.tensor([0, 3, 3])
    gradients = []
    for defer in (False, True):
        with deferred.DeferredWeightGradients() if defer else nullcontext():
            y = x
            for factor in (1.0, 2.0, 3.0):
                y = torch.addmm(bias * factor, torch.tanh(y), weight)
                y = torch.nn.functional.linear(y, weight, bias=bias + factor)
            y = torch.addmm(wide, y, weight) + torch.addmm(x + bias, y, weight)
            looked_up = torch.nn.functional.embedding(ids, weight=table)
            padded = torch.nn.functional.embedding(ids, table, 3)  # row 3 gets no gradient
        loss = y.square().sum() + looked_up.square().sum() + padded.square().sum()
        gradients.append(torch.autograd.grad(loss, leaves))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
