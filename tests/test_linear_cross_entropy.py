"""The fused head and loss against the plain one, in value and gradients."""

from __future__ import annotations

import pytest
import torch

from coconut_fast.kernels import linear_cross_entropy as kernel
from coconut_fast.kernels.reference import linear_cross_entropy_ref
from tests.compare import assert_as_good_as_torch


def _inputs(n: int, bias: bool, dtype: torch.dtype) -> list:
    g = torch.Generator().manual_seed(n)
    hidden, weight = torch.randn(n, 24, generator=g), torch.randn(37, 24, generator=g)
    targets = torch.randint(0, 37, (n,), generator=g)
    b = torch.randn(37, generator=g).to(dtype).requires_grad_() if bias else None
    return [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), b, targets]


def _run(op, inputs: list, **options) -> list[torch.Tensor]:
    loss = op(*inputs, **options)
    (loss * 0.37).backward()
    return [loss.detach(), *(x.grad for x in inputs[:3] if x is not None)]


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n", [0, 1, 5, 64])  # 64: several chunks
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
def test_linear_cross_entropy(monkeypatch, dtype: torch.dtype, n: int, bias: bool, softcap: float) -> None:
    monkeypatch.setattr(kernel, "CHUNK_BYTES", 37 * 4 * 13)
    options = {"scale": 0.6, "softcap": softcap}
    inputs = _inputs(n, bias, dtype)
    double = [x.detach().double().requires_grad_() if x is not None and x.is_floating_point() else x for x in inputs]
    truth = _run(linear_cross_entropy_ref, double, **options)
    plain = _run(linear_cross_entropy_ref, _inputs(n, bias, dtype), **options)
    ours = _run(kernel.linear_cross_entropy, inputs, **options)
    for name, *tensors in zip(["loss", "dhidden", "dweight", "dbias"], ours, plain, truth, strict=False):
        assert_as_good_as_torch(*tensors, what=name, working=dtype)


def test_autocast_computes_in_its_dtype_and_keeps_gradients_in_the_weights() -> None:
    inputs = _inputs(9, False, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = kernel.linear_cross_entropy(*inputs)
    loss.backward()
    exact = linear_cross_entropy_ref(*inputs)
    assert loss.dtype == inputs[1].grad.dtype == torch.float32
    assert 0 < (loss - exact).abs() < 0.02 * exact


def test_without_gradients_none_are_computed() -> None:
    inputs = _inputs(9, True, torch.float32)
    with torch.no_grad():
        loss = kernel.linear_cross_entropy(*inputs)
    assert not loss.requires_grad


def test_wrong_shapes_are_refused() -> None:
    hidden, weight, _, targets = _inputs(9, False, torch.float32)
    with pytest.raises(ValueError, match="expected hidden"):
        kernel.linear_cross_entropy(hidden[None], weight, None, targets)
