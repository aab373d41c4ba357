"""Steps by shape: what is launched, captured and replayed, and that gradients are those of plain steps.

On a CPU a "graph" is the step itself, run again from the same static batch; on a GPU it is a CUDA graph.
"""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer

from coconut_fast import Coconut
from coconut_fast.train import graphed
from coconut_fast.train.graphed import GraphedStep
from coconut_fast.train.skipped import SkippedSteps
from coconut_fast.train.trainer import CoconutTrainer
from tests.families import make_pair
from tests.test_buckets import both

EQUAL, MIXED = [(9, 3, 5), (20, 3, 4), (6, 3, 7)], [(9, 3, 5), (40, 0, 4), (6, 1, 7)]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
where = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])])


class Plain:
    """A step without a graph."""

    def __init__(self, model: Coconut) -> None:
        self.model = model

    def __call__(self, batch, num_items) -> tuple[torch.Tensor]:
        loss = self.model(batch=batch, num_items=num_items, loss_only=True).loss
        loss.backward()
        return (loss.detach(),)


def model_on(device: str, **overrides) -> Coconut:
    return make_pair("gpt2", **overrides)[0].to(device).train()


def plain_gradients(model: Coconut, device: str, *shapes: list) -> list[torch.Tensor]:
    """Gradients of steps without graphs, added up."""
    model = copy.deepcopy(model)
    model.zero_grad()
    for shape in shapes:
        Plain(model)(both(shape)[1].to(device), torch.tensor(7, device=device))
    return [p.grad for p in model.parameters()]


@where
def test_every_use_of_a_shape_gives_the_plain_step(device: str) -> None:
    model = model_on(device)
    step = GraphedStep(Plain(model), model.parameters(), torch.device(device))
    for number in range(4):
        model.zero_grad()
        for shape in (EQUAL, MIXED):
            (loss,) = step(both(shape)[1], 7)
        expected = plain_gradients(model, device, EQUAL, MIXED)
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True)), number
        assert torch.isfinite(loss)
        with torch.no_grad():  # a replay uses the weights as they are then
            for p in model.parameters():
                p.add_(p.grad, alpha=-1e-2)
    assert step.captures == 2
    assert step.fallback_reason is None


@where
def test_dropout_differs_from_replay_to_replay_and_follows_the_seed(device: str) -> None:
    model = model_on(device, attn_pdrop=0.2, resid_pdrop=0.2)
    step = GraphedStep(Plain(model), model.parameters(), torch.device(device))
    losses = []
    for seed in (1, 1, 1, 2):  # run eagerly, captured, replayed twice
        torch.manual_seed(seed)
        losses.append(step(both(EQUAL)[1], 7)[0].item())
    losses.append(step(both(EQUAL)[1], 7)[0].item())
    assert losses[0] == losses[1] == losses[2]
    assert len({*losses}) == 3


@where
def test_parameters_that_a_shape_does_not_reach_have_no_gradient(device: str) -> None:
    """AdamW would decay them."""
    model = model_on(device)
    model.feedback = torch.nn.Linear(32, 32).to(device)
    step = GraphedStep(Plain(model), model.parameters(), torch.device(device))
    for _ in range(3):
        model.zero_grad()
        step(both([(9, 0, 5), (20, 0, 4)])[1], 7)
        assert model.feedback.weight.grad is None
        assert model.hf.lm_head.weight.grad is not None


@where
def test_the_shape_used_longest_ago_goes_first(device: str, monkeypatch) -> None:
    monkeypatch.setattr(graphed, "MAX_SHAPES", 2)
    model = model_on(device)
    step = GraphedStep(Plain(model), model.parameters(), torch.device(device))
    for shape in (EQUAL, EQUAL, MIXED, EQUAL, [(70, 2, 3)], EQUAL, EQUAL):
        step(both(shape)[1], 7)
    assert step.captures == 1
    step(both(MIXED)[1], 7)
    assert step.captures == 1, "it was forgotten, so this is the first use again"


@where
def test_a_step_that_cannot_be_captured_runs_as_it_is(device: str, monkeypatch) -> None:
    model = model_on(device, attn_pdrop=0.2, resid_pdrop=0.2)
    plain = Plain(model)
    if device == "cpu":
        monkeypatch.setattr(GraphedStep, "_record", lambda *args: (_ for _ in ()).throw(RuntimeError("not here")))
    else:
        model.hf.transformer.h[1].register_forward_hook(lambda module, given, found: found[0].sum().item() and None)
    step = GraphedStep(plain, model.parameters(), torch.device(device))
    found = []
    for number in range(3):
        model.zero_grad()
        torch.manual_seed(3)
        if number == 1:
            with pytest.warns(UserWarning, match="not captured"):
                step(both(EQUAL)[1], 7)
        else:
            with warnings.catch_warnings():  # said once
                warnings.simplefilter("error")
                step(both(EQUAL)[1], 7)
        found.append([p.grad.clone() for p in model.parameters()])
    assert step.fallback_reason is not None
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*found, strict=True))


@where
def test_gradients_of_other_steps_are_added_to(device: str) -> None:
    """Of an accumulated step, some batches may run eagerly and others be replayed."""
    model = model_on(device)
    step = GraphedStep(Plain(model), model.parameters(), torch.device(device))
    for _ in range(2):
        step(both(EQUAL)[1], 7)
    model.zero_grad()
    step(both(MIXED)[1], 7)
    step(both(EQUAL)[1], 7)
    expected = plain_gradients(model, device, MIXED, EQUAL)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))


def test_a_loss_of_a_subclass_is_not_captured() -> None:
    """It may read the rows of a batch, which a graph does not have."""

    class Own(CoconutTrainer):
        compute_loss = lambda self, *arguments: None  # noqa: E731

    for kind, fits in ((CoconutTrainer, True), (Own, False)):
        trainer = object.__new__(kind)
        trainer.args = SimpleNamespace(device=torch.device("cuda"), n_gpu=1, world_size=1, torch_empty_cache_steps=None)
        trainer.settings = SimpleNamespace(precision="bf16", parallel_rounds=None)
        assert trainer.fits_graphs() == fits


def test_steps_of_a_model_with_hooks_run_eagerly(monkeypatch) -> None:
    """A replay would call none of them."""
    trainer = object.__new__(CoconutTrainer)
    trainer.model = model_on("cpu")
    trainer.graphed = lambda batch, num_items: (torch.tensor(1.0), None)
    monkeypatch.setattr(Trainer, "training_step", lambda *arguments: torch.tensor(2.0))
    trainer.skipped = SkippedSteps(torch.device("cpu"))
    inputs, block = {"batch": both(EQUAL)[1]}, trainer.model.hf.transformer.h[1]
    assert trainer.training_step(trainer.model, inputs, 7) == 1
    for register in (block.register_forward_hook, block.register_full_backward_pre_hook):
        handle = register(lambda *arguments: None)
        assert trainer.training_step(trainer.model, inputs, 7) == 2
        handle.remove()
    assert trainer.training_step(trainer.model, inputs, 7) == 1
