"""LayerNorm and the residual stream of a training step on a GPU under autocast.

Autocast computes a norm in fp32, and every product after it casts the result to its own dtype in a kernel that reads
and writes all of it; backward casts the gradient back. Here one kernel writes both results, and the backward kernel
takes a gradient of either. It also takes the gradient of the residual stream, which uses the norm's input too: the
stream's next addition is given an alias of that input, which the norm returns. And it rounds the sum for the product
before the addition that made the input. So a norm, the sum of two gradients and two casts are one kernel.

The gradients of weight and bias are partial sums that all passes add to; autograd would reduce them pass by pass, in
two kernels that for the few rows of a latent pass cost as much as for all tokens.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from coconut_fast import ops

SHARES = 512  # partial sums of a weight's gradient: programs of the backward kernel, about four per multiprocessor


def on_gpu(x: Tensor) -> bool:
    """Whether x is computed by the kernels of a training step that exist only for GPUs."""
    return x.is_cuda and x.dtype != torch.float64


def fuses(x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> bool:
    """Whether `Norm` can compute torch.nn.functional.layer_norm of these arguments, whether trained or not."""
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


class Added:
    """The sum of a product and the residual stream, and its gradient rounded for the product, if a norm has done that.

    The gradient is identified by memory and version: if the sum has other uses too, its gradient is another tensor.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.noted: tuple[Tensor, int, Tensor] | None = None

    def note(self, grad: Tensor, rounded: Tensor) -> None:
        self.noted = (grad, grad._version, rounded)  # kept alive, so that no other tensor can take its place in memory

    def round(self, grad: Tensor) -> Tensor:
        noted, self.noted = self.noted, None
        if noted is None or noted[0].data_ptr() != grad.data_ptr() or noted[0]._version != noted[1]:
            return grad.to(self.dtype)
        return noted[2].view(grad.shape)


def adds(a: Any, b: Any) -> bool:
    """Whether a + b is a product's result and the residual stream, in either order."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor) and on_gpu(a) and a.shape == b.shape):
        return False
    narrow, wide = sorted((a, b), key=lambda x: x.dtype.itemsize)
    return wide.dtype == torch.float32 and narrow.dtype in (torch.bfloat16, torch.float16) and narrow.requires_grad


class Add(torch.autograd.Function):
    """product (16 bits) + stream (fp32), in fp32."""

    @staticmethod
    def forward(ctx: Any, product: Tensor, stream: Tensor, added: Added) -> Tensor:  # type: ignore[override]
        ctx.added = added
        return product + stream

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return ctx.added.round(grad), grad, None


class Norm(torch.autograd.Function):
    """LayerNorm of x (..., D) in fp32 and in `dtype`, and x itself for its other uses.

    sums has weight and bias, alias ties it to their gradients; added: the addition that made x, if known.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, alias: Tensor, sums: Sums, eps: float, dtype: torch.dtype, added: Added | None
    ) -> tuple[Tensor, ...]:
        flat_ND = x.reshape(-1, x.shape[-1]).contiguous()
        normed, rounded, statistics = ops.layer_norm(flat_ND, sums.weight, sums.bias, eps=eps, dtype=dtype)
        ctx.save_for_backward(flat_ND, statistics)
        ctx.sums, ctx.shape, ctx.added = sums, x.shape, added
        ctx.set_materialize_grads(False)
        # Not `view`: a model may write into the result in place, which autograd forbids for views of such functions.
        return tuple(torch.ops.aten._unsafe_view(y, x.shape) for y in (normed, rounded, x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:  # type: ignore[override]
        if grads[0] is None and grads[1] is None:
            return grads[2], None, None, None, None, None
        flat_ND, statistics = ctx.saved_tensors
        flat = (g if g is None else g.reshape(flat_ND.shape).contiguous() for g in grads)
        dtype = None if ctx.added is None else ctx.added.dtype
        weight, sums = ctx.sums.weight, ctx.sums.norm_sums()
        grad_x, copy = ops.layer_norm_backward(*flat, flat_ND, weight, statistics, sums, dtype=dtype)
        grad_x = grad_x.view(ctx.shape)
        if ctx.added is not None:
            ctx.added.note(grad_x, copy)
        return grad_x, None, None, None, None, None


def _is(reference: weakref.ref[Tensor], version: int, x: Any) -> bool:
    found = reference()
    return found is not None and found is x and found._version == version


class Stream:
    """The last sum; the last norm's input and its alias after the norm; and the rounded copy of the norm's result."""

    def __init__(self) -> None:
        self.added: tuple[weakref.ref[Tensor], int, Added] | None = None
        self.read: tuple[weakref.ref[Tensor], int, Tensor] | None = None
        self.normed: tuple[weakref.ref[Tensor], int, Tensor] | None = None

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        product, stream = sorted((a, b), key=lambda x: x.dtype.itemsize)
        added = Added(product.dtype)
        total = Add.apply(product, stream, added)
        self.added = (weakref.ref(total), total._version, added)
        return total

    def norm(self, x: Tensor, alias: Tensor, sums: Sums, eps: float) -> Tensor:
        dtype = torch.get_autocast_dtype(x.device.type)
        added = self.added[2] if self.added is not None and _is(*self.added[:2], x) else None
        normed, rounded, again = Norm.apply(self.behind(x), alias, sums, eps, dtype, added)
        self.read = (weakref.ref(x), x._version, again)
        self.normed = (weakref.ref(normed), normed._version, rounded)
        return normed

    def behind(self, x: Any) -> Any:
        """x, or its alias after the last norm if that norm has read it."""
        return self.read[2] if self.read is not None and _is(*self.read[:2], x) else x

    def rounded(self, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The rounded copy of the last norm's result, if x is that, unmodified, in any shape: for its first product.

        A second product casts for itself, so that their gradients are added up in fp32.
        """
        y, version, rounded = self.normed if self.normed is not None else (lambda: None, 0, None)
        result = y()
        if result is None or rounded is None or rounded.dtype != dtype or not x.is_contiguous():
            return None
        if result.data_ptr() != x.data_ptr() or result.numel() != x.numel() or result._version != version:
            return None
        self.normed = None
        return rounded.view(x.shape)
