"""GELU of the training step against fp64, every instruction set, and PyTorch's own."""

from __future__ import annotations

import pytest
import torch

from coconut_fast import ops
from coconut_fast.kernels import reference
from coconut_fast.model.gelu import gelu
from tests.compare import assert_as_good_as_torch

HALVES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", HALVES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", [(0,), (1,), (255,), (3, 259), (2, 3, 40_000)])
def test_gelu(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=g).mul_(4).to(dtype) for _ in range(2))
    truth = reference.gelu_ref(x.double()), reference.gelu_backward_ref(grad.double(), x.double())
    assert_as_good_as_torch(ops.call("gelu", x, backend="cpu"), reference.gelu_ref(x), truth[0], what="gelu")
    ours = ops.call("gelu_backward", grad, x, backend="cpu")
    assert_as_good_as_torch(ours, reference.gelu_backward_ref(grad, x), truth[1], what="its gradient")


@pytest.mark.usefixtures("isa")
def test_gelu_far_out() -> None:
    x = torch.tensor([-1e4, -30.0, -12.0, 0.0, 12.0, 1e4, -3e38, float("inf"), float("-inf"), float("nan")])
    torch.testing.assert_close(ops.gelu(x), reference.gelu_ref(x), equal_nan=True, rtol=1e-6, atol=1e-6)
    x = torch.tensor([-1e15, -1e12, *x[:6]])  # the first two are cubed, so that a gate that is not quite 0 shows
    torch.testing.assert_close(ops.gelu_backward(torch.ones(8), x), (x > 0).float() + 0.5 * (x == 0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_autograd_goes_through_it(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(2, 5, 24, generator=g).to(dtype).requires_grad_()
    for turned in (x, x.transpose(0, 1)):
        for form in ("tanh", "none"):
            ours, plain = gelu(turned, approximate=form), torch.nn.functional.gelu(turned, approximate=form)
            torch.testing.assert_close(ours, plain)
            seed = torch.randn(plain.shape, generator=g).to(dtype)
            mine, theirs = (torch.autograd.grad(y, x, seed) for y in (ours, plain))
            torch.testing.assert_close(mine, theirs)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="gelu: x is Double"):
        ops.call("gelu", torch.zeros(2, dtype=torch.float64), backend="cpu")
    with pytest.raises(ValueError, match="gelu_backward: grad is Float"):
        ops.call("gelu_backward", torch.zeros(3), torch.zeros(2), backend="cpu")
