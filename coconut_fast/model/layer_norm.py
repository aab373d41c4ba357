"""LayerNorm of a training step on a GPU under autocast.

Autocast norms in fp32, and every product behind a norm rounds the result to its own dtype, in a kernel that reads and
writes all of it; backward widens the gradient again. Here one kernel writes both, and the one of backward takes a
gradient of either. The gradients of weight and bias are partial sums that all passes add to; autograd would reduce them
pass by pass, in two kernels that for the few rows of a latent pass cost as much as for all tokens.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from coconut_fast import ops

SHARES = 512  # partial sums of a weight's gradient: programs of the backward kernel, about four a multiprocessor


def on_gpu(x: Tensor) -> bool:
    """Whether the kernels of a training step that exist for GPUs alone compute x."""
    return x.is_cuda and x.dtype != torch.float64


def fuses(x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> bool:
    """Whether `Norm` computes torch.nn.functional.layer_norm of these arguments, those of weights aside."""
    return (
        on_gpu(x)
        and torch.is_autocast_enabled(x.device.type)
        and weight is not None
        and x.dtype == weight.dtype == torch.float32
        and len(shape) == 1
    )


class Sums(Protocol):
    """Where `Norm` leaves the gradients of weight and bias."""

    weight: Tensor
    bias: Tensor | None

    def norm_sums(self) -> Tensor:
        """(SHARES, 2, D) fp32, zero before the first norm of this backward."""


class Norm(torch.autograd.Function):
    """LayerNorm of x (..., D) in fp32 and in `dtype`; sums has weight and bias, alias ties it to their gradients."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, alias: Tensor, sums: Sums, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        flat_ND = x.reshape(-1, x.shape[-1])
        normed, rounded, statistics = ops.layer_norm(flat_ND, sums.weight, sums.bias, eps=eps, dtype=dtype)
        ctx.save_for_backward(flat_ND, statistics)
        ctx.sums, ctx.shape = sums, x.shape
        ctx.set_materialize_grads(False)
        # Not `view`: a model may write into the result in place, which autograd forbids for views of such functions.
        return tuple(torch.ops.aten._unsafe_view(y, x.shape) for y in (normed, rounded))  # type: ignore[return-value]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_normed: Tensor | None, grad_rounded: Tensor | None) -> Any:  # type: ignore[override]
        if grad_normed is None and grad_rounded is None:
            return None, None, None, None, None
        flat_ND, statistics = ctx.saved_tensors
        grads = (g if g is None else g.reshape(flat_ND.shape).contiguous() for g in (grad_normed, grad_rounded))
        grad_x = ops.layer_norm_backward(*grads, flat_ND, ctx.sums.weight, statistics, ctx.sums.norm_sums())
        return grad_x.view(ctx.shape), None, None, None, None


class Rounded:
    """The rounded copy of a norm's result, for the first product that reads the result and nothing else of it.

    A second one rounds for itself, so that their gradients are added up in fp32.
    """

    def __init__(self, normed: Tensor, rounded: Tensor) -> None:
        self.normed, self.version = weakref.ref(normed), normed._version
        self.rounded: Tensor | None = rounded

    def take(self, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The copy in x's shape, where x is the result, untouched, in whatever shape."""
        y, rounded = self.normed(), self.rounded
        if y is None or rounded is None or rounded.dtype != dtype or not x.is_contiguous():
            return None
        if y.data_ptr() != x.data_ptr() or y.numel() != x.numel() or y._version != self.version:
            return None
        self.rounded = None
        return rounded.view(x.shape)
