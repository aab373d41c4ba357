"""Linear head and cross-entropy in one, chunk by chunk: never (N, V) logits in memory, no word from the device.

    loss = sum_n logsumexp(l_n) - l_n[target_n],   l = scale * (hidden W^T + b)   (softcap: l = c * tanh(l / c))

hidden (N, D), weight (V, D), bias (V,) or None, targets int64 (N,), -100 for a row that counts for nothing -> () in
fp32 (fp64 for fp64).

Forward computes g = scale * (softmax(l) - onehot) while a chunk's logits are at hand, and of several chunks also
dhidden = g W, dW += g^T hidden, db += sum g, which backward then only multiplies with the incoming gradient; of a
single chunk it keeps g, in fp32. fp16 has no room for a probability that no loss scale has multiplied yet (it is 0
below 6e-8): g is cast after that, or, of several chunks, multiplied in fp32. Three matrix products of N x V x D, and
one chunk of logits: plain PyTorch, since the products are the vendor library's best case and the rest is a few passes
over one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .matmul import matmul

FEW = 256  # rows up to which an fp32 product is cheaper than widening one in bf16: for GPT-2 23 + 31 ms at 112 rows
CHUNK_BYTES = 128 << 20  # of fp32 logits at a time: 668 rows of GPT-2's vocabulary


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
) -> Tensor:
    """See the head of this file. Under autocast the products run in its dtype, as those of nn.Linear do."""
    if hidden.dim() != 2 or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: expected hidden (N, D) and targets (N,), found {tuple(hidden.shape)} and "
            f"{tuple(targets.shape)}"
        )
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, scale, softcap)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float, softcap: float
    ) -> Tensor:
        device = hidden.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        exact = torch.promote_types(compute, torch.float32)
        w, total, noted = weight.to(compute), hidden.new_zeros((), dtype=exact), None
        wants_grad = any(ctx.needs_input_grad)
        early = exact if compute == torch.float16 else compute  # of products before the incoming gradient is known
        rows = max(1, CHUNK_BYTES // (weight.shape[0] * exact.itemsize))
        ctx.grads = _Gradients(hidden, weight, bias, ctx.needs_input_grad)
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
            return *ctx.grads.scaled(grad_total), None, None, None
        g, h, w = ctx.saved_tensors
        grads = ctx.grads.fresh()
        grads.add(slice(None), (g * grad_total).to(h.dtype), h, w)
        return *grads.scaled(None), None, None, None


class _Gradients:
    """dhidden, dweight and dbias, summed over chunks; None where nobody wants one. Made when first added to."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Any) -> None:
        self.like, self.wanted = (hidden.detach(), weight.detach(), bias if bias is None else bias.detach()), wanted
        self.hidden: Tensor | None = None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def fresh(self) -> _Gradients:
        return _Gradients(*self.like, self.wanted)

    def add(self, piece: slice, g: Tensor, h: Tensor, w: Tensor) -> None:
        hidden, weight, bias = self.like
        if self.wanted[0]:
            if self.hidden is None:
                self.hidden = torch.empty_like(hidden, dtype=torch.promote_types(hidden.dtype, torch.float32))
            self.hidden[piece] = matmul(g, w)
        if self.wanted[1]:
            if len(h) <= FEW and weight.dtype == torch.float32:
                g, h = g.float(), h.float()
            part = matmul(g.T, h)
            self.weight = part.to(weight.dtype) if self.weight is None else self.weight.add_(part)
        if bias is not None and self.wanted[2]:
            part = g.sum(0)
            self.bias = part.to(bias.dtype) if self.bias is None else self.bias.add_(part)

    def scaled(self, by: Tensor | None) -> list[Tensor | None]:
        grads = [self.hidden, self.weight, self.bias]
        if by is not None:
            grads = [None if g is None else g.to(by.dtype) * by for g in grads]
        return [None if g is None or x is None else g.to(x.dtype) for g, x in zip(grads, self.like, strict=True)]


def _chunk(
    h: Tensor, w: Tensor, bias: Tensor | None, target_N1: Tensor, exact: torch.dtype, scale: float, softcap: float,
    wants_grad: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The loss of some rows and its derivative by (h W^T + b), in `exact`."""
    logits = matmul(h, w.T).to(exact)
    if bias is not None:
        logits += bias
    logits *= scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    slope = 1 - (logits / softcap).square() if softcap and wants_grad else None
    logits -= logits.amax(
        -1, keepdim=True
    )  # a sure row's lse is then as small as its loss, not rounded like its logits
    lse_N1 = torch.logsumexp(logits, -1, keepdim=True)
    ignored_N1 = target_N1 < 0
    target_N1 = target_N1.clamp_min(0)
    loss = (lse_N1 - logits.gather(1, target_N1)).masked_fill(ignored_N1, 0.0).sum()
    if not wants_grad:
        return loss, None
    g = logits.sub_(lse_N1.masked_fill(ignored_N1, torch.inf)).exp_()  # of ignored rows 0
    g.scatter_add_(1, target_N1, ignored_N1.to(g.dtype) - 1)
    return loss, g.mul_(scale) if slope is None else g.mul_(slope).mul_(scale)
