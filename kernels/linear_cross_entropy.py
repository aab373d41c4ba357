"""Linear head and cross-entropy in one, chunk by chunk: never (N, V) logits in memory, no word from the device.

    loss = sum_n logsumexp(l_n) - l_n[target_n],   l = scale * (hidden W^T + b)   (softcap: l = c * tanh(l / c))

hidden (N, D), weight (V, D), bias (V,) or None, targets int64 (N,) -> () in fp32 (fp64 for fp64).

Forward computes the gradients as well, while a chunk's logits are at hand: g = scale * (softmax(l) - onehot), then
dhidden = g W, dW += g^T hidden, db += sum g. Backward only multiplies them with the incoming gradient. Three matrix
products of N x V x D, and one chunk of logits: plain PyTorch, since the products are the vendor library's best case
and the rest is a few passes over one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        w, total = weight.to(compute), hidden.new_zeros((), dtype=exact)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight) if wants_weight else None
        grad_bias = torch.zeros_like(bias) if bias is not None and wants_bias else None
        rows = max(1, CHUNK_BYTES // (weight.shape[0] * exact.itemsize))
        with torch.autocast(device, enabled=False):
            for start in range(0, len(hidden), rows):
                piece = slice(start, start + rows)
                h, target_N1 = hidden[piece].to(compute), targets[piece, None]
                logits = (h @ w.T).to(exact)
                if bias is not None:
                    logits += bias
                logits *= scale
                if softcap:
                    logits = softcap * torch.tanh(logits / softcap)
                lse_N1 = torch.logsumexp(logits, -1, keepdim=True)
                total += (lse_N1 - logits.gather(1, target_N1)).sum()
                if not (wants_hidden or wants_weight or wants_bias):
                    continue
                slope = 1 - (logits / softcap).square() if softcap else None
                g = logits.sub_(lse_N1).exp_()
                g.scatter_add_(1, target_N1, g.new_full((1, 1), -1.0).expand_as(target_N1))
                if slope is not None:
                    g *= slope
                g = g.mul_(scale).to(compute)
                if grad_hidden is not None:
                    grad_hidden[piece] = g @ w
                if grad_weight is not None:
                    grad_weight += g.T @ h
                if grad_bias is not None:
                    grad_bias += g.sum(0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> Any:  # type: ignore[override]
        grads = [None if g is None else g * grad_total.to(g.dtype) for g in ctx.saved_tensors]
        return *grads, None, None, None
