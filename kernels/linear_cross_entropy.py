"""Linear head and cross-entropy in one, chunk by chunk: one chunk of logits in memory at most, no host synchronisation.

    loss = sum_n logsumexp(l_n) - l_n[target_n],   l = scale * (hidden W^T + b)   (softcap: l = c * tanh(l / c))

hidden (N, D), weight (V, D), bias (V,) or None, targets int64 (N,), -100 for an ignored row -> () in
fp32 (fp64 for fp64).

Forward computes g = scale * (softmax(l) - onehot) while it has a chunk's logits, and with several chunks also
dhidden = g W, dW += g^T hidden, db += sum g, which backward then only multiplies by the incoming gradient; with a
single chunk it keeps g, in fp32. fp16 cannot hold a small probability before the loss scale has multiplied it (below
6e-8 it is 0): g is cast after that, or, with several chunks, multiplied in fp32. Three matrix products of N x V x D and
one chunk of logits: plain PyTorch, since the products are the vendor library's best case and the rest is a few passes
over one chunk.

On a GPU the passes are two kernels (cross_entropy.py and its backward): logits stay in the products' dtype, forward
reads them once, and backward, which knows the incoming gradient, turns them into g in place; with several chunks it
recomputes them, a fourth product. The weight is padded to whole tiles of 64 rows: with GPT-2's 50,260 the library falls
back to kernels for odd strides, which take 5.5 ms instead of 1.5 for products of 5,120 rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .matmul import matmul
from .reference_dense import cross_entropy_backward_ref, cross_entropy_ref

FP32_ROWS = 256  # rows up to which an fp32 product is cheaper than widening a bf16 one: GPT-2, 112 rows: 23 + 31 ms
CHUNK_BYTES = 128 << 20  # of fp32 logits at a time: 668 rows of GPT-2's vocabulary
DEVICE_CHUNK_BYTES = 640 << 20  # of logits on a GPU: 6,670 rows in 16 bits
TILE = 64  # on a GPU a weight's rows are padded to a multiple of this
OWN_DTYPES = (torch.float32, torch.bfloat16)  # of the operands of weight_gradient
WeightGradient = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    weight_gradient: WeightGradient | None = None,
) -> Tensor:
    """See the module's docstring. Under autocast the products run in its dtype, as nn.Linear's do.

    weight_gradient(g (N, V), hidden (N, D), dW so far or None) -> dW + g^T hidden in fp32, from fp32 or bf16 operands:
    called instead of a library's product, for fp32 weights on a CPU.
    """
    if hidden.dim() != 2 or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: expected hidden (N, D) and targets (N,), found {tuple(hidden.shape)} and "
            f"{tuple(targets.shape)}"
        )
    if hidden.is_cuda and hidden.dtype != torch.float64:
        return _OnDevice.apply(hidden, weight, bias, targets, scale, softcap)
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, scale, softcap, weight_gradient)


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float, softcap: float,
        weight_gradient: WeightGradient | None,
    ) -> Tensor:  # fmt: skip
        device, compute = hidden.device.type, _compute_dtype(hidden)
        exact = torch.promote_types(compute, torch.float32)
        w, total, noted = weight.to(compute), hidden.new_zeros((), dtype=exact), None
        wants_grad = any(ctx.needs_input_grad)
        early = exact if compute == torch.float16 else compute  # for products before the incoming gradient is known
        rows = max(1, CHUNK_BYTES // (weight.shape[0] * exact.itemsize))
        ctx.grads = _Gradients(hidden, weight, bias, ctx.needs_input_grad, weight_gradient)
        with torch.autocast(device, enabled=False):
            for start in range(0, max(len(hidden), 1), rows):
                piece = slice(start, start + rows)
                h = hidden[piece].to(compute)
                loss, g = _chunk(h, w, bias, targets[piece, None], exact, scale, softcap, wants_grad)
                total += loss
                if g is not None and len(hidden) > rows:
                    ctx.grads.add(piece, *(t.to(early) for t in (g, h, w)))
                elif g is not None:
                    noted = (g, h, w)  # one chunk: its products can wait for the incoming gradient
        ctx.save_for_backward(*(noted or ()))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> Any:  # type: ignore[override]
        if not ctx.saved_tensors:
            return *ctx.grads.scaled(grad_total), *[None] * 4
        g, h, w = ctx.saved_tensors
        grads = ctx.grads.fresh()
        grads.add(slice(None), (g * grad_total).to(h.dtype), h, w)
        return *grads.scaled(None), *[None] * 4


class _Gradients:
    """dhidden, dweight and dbias, summed over chunks; None where not needed. Allocated when first added to."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Any, of_weight: WeightGradient | None
    ) -> None:
        self.like, self.wanted = (hidden.detach(), weight.detach(), bias if bias is None else bias.detach()), wanted
        self.of_weight = of_weight
        self.hidden: Tensor | None = None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def fresh(self) -> _Gradients:
        return _Gradients(*self.like, self.wanted, self.of_weight)

    def add(self, piece: slice, g: Tensor, h: Tensor, w: Tensor) -> None:
        hidden, weight, bias = self.like
        if self.wanted[0]:
            if self.hidden is None:
                self.hidden = torch.empty_like(hidden, dtype=torch.promote_types(hidden.dtype, torch.float32))
            self.hidden[piece] = matmul(g, w)
        if self.wanted[1] and self.of_weight and weight.dtype == torch.float32 and h.dtype in OWN_DTYPES:
            self.weight = self.of_weight(g, h, self.weight)
        elif self.wanted[1]:
            if len(h) <= FP32_ROWS and weight.dtype == torch.float32:
                g, h = g.float(), h.float()
            part = matmul(g.T, h)
            wide = torch.promote_types(weight.dtype, torch.float32)  # sums in 16 bits would be rounded once per chunk
            self.weight = part if self.weight is None else self.weight.to(wide).add_(part)
        if bias is not None and self.wanted[2]:
            part = g.sum(0, dtype=torch.promote_types(g.dtype, torch.float32))
            self.bias = part if self.bias is None else self.bias.add_(part)

    def scaled(self, by: Tensor | None) -> list[Tensor | None]:
        grads = [self.hidden, self.weight, self.bias]
        if by is not None:
            grads = [None if g is None else g.to(by.dtype) * by for g in grads]
        return [None if g is None or x is None else g.to(x.dtype) for g, x in zip(grads, self.like, strict=True)]


def _chunk(
    h: Tensor, w: Tensor, bias: Tensor | None, target_N1: Tensor, exact: torch.dtype, scale: float, softcap: float,
    wants_grad: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The loss of some rows and its derivative by (h W^T + b), in dtype `exact`."""
    logits = matmul(h, w.T).to(exact)
    if bias is not None:
        logits += bias
    if scale != 1:
        logits *= scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    slope = 1 - (logits / softcap).square() if softcap and wants_grad else None
    # The lse of a confident row is then as small as its loss, not rounded like its logits.
    logits -= logits.amax(-1, keepdim=True)
    lse_N1 = torch.logsumexp(logits, -1, keepdim=True)
    ignored_N1 = target_N1 < 0
    target_N1 = target_N1.clamp_min(0)
    loss = (lse_N1 - logits.gather(1, target_N1)).masked_fill(ignored_N1, 0.0).sum()
    if not wants_grad:
        return loss, None
    g = logits.sub_(lse_N1.masked_fill(ignored_N1, torch.inf)).exp_()  # 0 in ignored rows
    g.scatter_add_(1, target_N1, ignored_N1.to(g.dtype) - 1)
    if slope is not None:
        g *= slope
    return loss, g if scale == 1 else g.mul_(scale)


class _OnDevice(torch.autograd.Function):
    """Keeps the logits of a single chunk for backward; with several, what it takes to recompute them."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float, softcap: float
    ) -> Tensor:
        compute = _compute_dtype(hidden)
        h_ND, w_WD, logits = hidden.to(compute), _padded(weight, compute), None
        chunk = max(1, DEVICE_CHUNK_BYTES // (len(w_WD) * compute.itemsize))
        ctx.pieces = [slice(start, start + chunk) for start in range(0, len(hidden), chunk)]
        ctx.options = {"vocabulary": len(weight), "bias": bias, "scale": scale, "softcap": softcap}
        ctx.dtypes = (hidden.dtype, weight.dtype)
        total, statistics = hidden.new_zeros((), dtype=torch.float32), []
        with torch.autocast(hidden.device.type, enabled=False):
            for piece in ctx.pieces:
                logits = h_ND[piece] @ w_WD.T
                losses, kept = _passes()[0](logits, targets[piece], **ctx.options)
                total += losses.sum()
                statistics.append(kept)
        ctx.save_for_backward(h_ND, w_WD, targets, *statistics)
        ctx.logits = logits if len(ctx.pieces) == 1 and any(ctx.needs_input_grad) else None
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> Any:  # type: ignore[override]
        h_ND, w_WD, targets, *statistics = ctx.saved_tensors
        vocabulary, bias = ctx.options["vocabulary"], ctx.options["bias"]
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        like = {"dtype": torch.float32, "device": h_ND.device}
        of_hidden = torch.empty(h_ND.shape, **like) if wants_hidden else None
        of_weight = torch.zeros(vocabulary, h_ND.shape[1], **like) if wants_weight and not ctx.pieces else None
        of_bias = torch.zeros(vocabulary, **like) if wants_bias else None
        with torch.autocast(h_ND.device.type, enabled=False):
            for piece, kept in zip(ctx.pieces, statistics, strict=True):
                g, ctx.logits = ctx.logits, None  # overwritten: another backward through this graph recomputes them
                g = h_ND[piece] @ w_WD.T if g is None else g
                _passes()[1](g, targets[piece], kept, grad_total, **ctx.options)
                if of_hidden is not None:
                    _exact_product(g, w_WD, of_hidden[piece])
                if wants_weight:
                    part = _exact_product(g.T, h_ND[piece])[:vocabulary]
                    of_weight = part if of_weight is None else of_weight.add_(part)
                if of_bias is not None:
                    of_bias += g.sum(0, dtype=torch.float32)[:vocabulary]
        grads = zip((of_hidden, of_weight, of_bias), (*ctx.dtypes, None if bias is None else bias.dtype), strict=True)
        return *(None if grad is None else grad.to(dtype) for grad, dtype in grads), None, None, None


@functools.cache
def _passes() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The passes over the logits: forward and backward."""
    try:
        from .cross_entropy import cross_entropy
        from .cross_entropy_backward import cross_entropy_backward
    except ImportError:  # no triton for this CUDA
        return cross_entropy_ref, cross_entropy_backward_ref
    return cross_entropy, cross_entropy_backward


def _padded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (V, D) in a dtype, with rows of zeros appended up to a multiple of TILE."""
    more = -len(weight) % TILE
    if not more:
        return weight.to(dtype)
    padded = weight.new_empty(len(weight) + more, weight.shape[1], dtype=dtype)
    padded[: len(weight)] = weight
    padded[len(weight) :] = 0
    return padded


def _exact_product(a: Tensor, b: Tensor, into: Tensor | None = None) -> Tensor:
    """a @ b in fp32, not rounded to their dtype where the library supports that; written to `into` if given."""
    if a.is_cuda and a.dtype != torch.float32:
        return (
            torch.mm(a, b, out_dtype=torch.float32)
            if into is None
            else torch.mm(a, b, out_dtype=torch.float32, out=into)
        )
    product = (a @ b).float()
    return product if into is None else into.copy_(product)
