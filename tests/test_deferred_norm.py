"""What a training step does only on a GPU (norms with a rounded copy, partial sums), here with the plain ops."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from coconut_fast.model import deferred, layer_norm, weight
from coconut_fast.model.batch import collate
from tests.compare import assert_as_good_as_torch
from tests.families import make_pair
from tests.test_deferred import LABELS, ROWS, TOKENS, _gradients


@pytest.fixture
def as_on_a_gpu(monkeypatch) -> list[torch.Tensor]:
    """Results of norms, call by call."""
    norms: list[torch.Tensor] = []
    apply = layer_norm.Norm.apply
    monkeypatch.setattr(layer_norm, "on_gpu", lambda x: x.dtype != torch.float64)
    monkeypatch.setattr(weight, "on_gpu", lambda x: x.dtype != torch.float64)
    monkeypatch.setattr(layer_norm.Norm, "apply", lambda *args: norms.append((y := apply(*args))[0]) or y)
    return norms


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_autocast_gradients_are_as_good_as_autograds(as_on_a_gpu, family: str) -> None:
    model, _ = make_pair(family)
    plain, ours = _gradients(model, False, bf16=True), _gradients(model, True, bf16=True)
    assert bool(as_on_a_gpu) == (family != "llama")
    truth = _gradients(model.double(), False)
    assert ours.keys() == plain.keys()
    for name, gradient in ours.items():
        assert_as_good_as_torch(gradient, plain[name], truth[name], what=name, working=torch.bfloat16)


def test_a_backward_that_ends_at_a_thought_leaves_nothing_to_the_next(as_on_a_gpu) -> None:
    model, _ = make_pair("gpt2")
    expected = _gradients(model, True, bf16=True)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch=collate(ROWS, TOKENS.thought, LABELS))
    torch.autograd.grad(output.loss, output.hidden_TD[0], retain_graph=True)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


@pytest.mark.parametrize("readers", [1, 2])
def test_the_streams_gradient_is_rounded_once(as_on_a_gpu, monkeypatch, readers: int) -> None:
    """A sum used by more than the norm and the next sum has a gradient that no norm has seen."""
    rounded: list[bool] = []
    take = layer_norm.Added.round
    monkeypatch.setattr(layer_norm.Added, "round", lambda s, g: rounded.append(s.noted is not None) or take(s, g))
    norm, bias = torch.nn.LayerNorm(8), torch.nn.Parameter(torch.randn(8))
    weights = [torch.nn.Parameter(torch.randn(8, 8)) for _ in range(2)]
    x = torch.randn(5, 8, requires_grad=True)

    def run() -> list[torch.Tensor]:
        total = x + functional.linear(x, weights[0], bias)
        last = total + functional.linear(norm(total), weights[1], bias)
        out = last.square().sum() if readers == 1 else last.square().sum() + total.sin().sum()
        return list(torch.autograd.grad(out, (x, norm.weight, norm.bias, bias, *weights)))

    with torch.autocast("cpu", torch.bfloat16):
        plain = run()
        with deferred.DeferredWeightGradients():
            ours = run()
    assert rounded == [False, True]
    for a, b in zip(ours, plain, strict=True):
        assert (a - b).abs().max() < 0.02 * b.abs().max()


def test_what_else_reads_a_norm_reads_it_in_fp32(as_on_a_gpu) -> None:
    """Two products, a residual, and a product after an in-place change: gradients are autograd's, up to rounding."""
    norm = torch.nn.LayerNorm(8)
    first, second = (torch.nn.Parameter(torch.randn(8, 8)) for _ in range(2))
    bias = torch.nn.Parameter(torch.randn(8))
    x = torch.randn(5, 8, requires_grad=True)
    leaves = (x, norm.weight, norm.bias, first, second, bias)

    def run() -> list[torch.Tensor]:
        y = norm(x)
        assert y.dtype == x.dtype
        total = y + functional.linear(y, first, bias) + functional.linear(y, second)
        z = norm(total)
        with torch.no_grad():
            z *= 2
        return list(torch.autograd.grad(functional.linear(z, first, bias).float().square().sum(), leaves))

    with torch.autocast("cpu", torch.bfloat16):
        plain = run()
        with deferred.DeferredWeightGradients():
            ours = run()
    assert len(as_on_a_gpu) == 2
    for a, b in zip(ours, plain, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert (a - b).abs().max() < 0.02 * b.abs().max()
