"""Weight gradients of all passes at once.

A forward through k thoughts uses every weight k + 1 times. Autograd would make one weight gradient per use, and add
them up: for the single-position passes that is a product of a few rows each, and three times the weights' size through
memory to accumulate it (GPT-2: 1 GB a pass). Here a use only notes its input and its output's gradient; when backward
has been through all uses of a weight, the large ones are multiplied one by one and the small ones together.

A mode around the passes routes `torch.nn.functional.linear` and `torch.addmm` (GPT-2's Conv1D) through it, so the model
code stays as it is. Exact: the same products, summed in another order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

SMALL = 512  # rows of uses that are multiplied together; above, the copy costs more than it saves


class DeferredWeightGradients(TorchFunctionMode):
    """Within the block, products with parameters defer their weight gradients. One block per forward."""

    def __init__(self) -> None:
        super().__init__()
        self.uses: dict[int, tuple[Tensor, _Uses]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.linear and len(args) >= 2:
            x, weight, bias = args[0], args[1], args[2] if len(args) > 2 else kwargs.get("bias")
            if _deferrable(weight):
                return self._product(x, weight, bias, transposed=True)
        if func is torch.addmm and not kwargs and len(args) == 3:
            bias, x, weight = args
            if _deferrable(weight):
                return self._product(x, weight, bias, transposed=False)
        return func(*args, **kwargs)

    def _product(self, x: Tensor, weight: nn.Parameter, bias: Tensor | None, transposed: bool) -> Tensor:
        device = x.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if id(weight) not in self.uses:
            uses = _Uses(weight.detach().to(compute), transposed)
            self.uses[id(weight)] = (_Collect.apply(weight, uses), uses)
        alias, uses = self.uses[id(weight)]
        return _Use.apply(x.to(compute), alias, None if bias is None else bias.to(compute), uses)


def _deferrable(weight: Any) -> bool:
    return isinstance(weight, nn.Parameter) and weight.requires_grad and torch.is_grad_enabled()


class _Uses:
    """A weight in the dtype it is multiplied in, and what backward has noted of its uses."""

    def __init__(self, weight: Tensor, transposed: bool) -> None:
        self.weight = weight  # (out, in) where transposed, else (in, out)
        self.transposed = transposed
        self.noted: list[tuple[Tensor, Tensor]] = []  # input (N, in), gradient of the output (N, out)

    def gradient(self, like: Tensor) -> Tensor:
        """The sum over all noted uses, in the parameter's dtype; forgets them."""
        noted, self.noted = self.noted, []
        large = [pair for pair in noted if len(pair[0]) > SMALL]
        small = [pair for pair in noted if len(pair[0]) <= SMALL]
        if len(small) > 1:
            small = [(torch.cat([x for x, _ in small]), torch.cat([g for _, g in small]))]
        total = None
        for x, grad in large + small:
            left, right = (grad, x) if self.transposed else (x, grad)
            if total is not None and total.dtype == x.dtype:
                total.addmm_(left.T, right)
                continue
            part = left.T @ right
            total = part.to(like.dtype) if total is None else total.add_(part)
        assert total is not None
        return total


class _Use(torch.autograd.Function):
    """y = x W + b, or x W^T + b; backward leaves the weight's gradient to _Collect."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alias: Tensor, bias: Tensor | None, uses: _Uses) -> Tensor:  # type: ignore[override]
        flat = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(flat)
        ctx.uses, ctx.shape = uses, x.shape
        matrix = uses.weight.T if uses.transposed else uses.weight
        with torch.autocast(x.device.type, enabled=False):
            y = flat @ matrix if bias is None else torch.addmm(bias, flat, matrix)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        (flat,) = ctx.saved_tensors
        grad_NO = grad.reshape(-1, grad.shape[-1])
        uses = ctx.uses
        uses.noted.append((flat, grad_NO))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_NO @ (uses.weight if uses.transposed else uses.weight.T)).view(ctx.shape)
        grad_bias = grad_NO.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias, None


class _Collect(torch.autograd.Function):
    """The weight itself; its backward runs when that of every use has, whatever order autograd chose."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, uses: _Uses) -> Tensor:  # type: ignore[override]
        ctx.uses = uses
        ctx.set_materialize_grads(False)
        ctx.like = weight.detach()
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:  # type: ignore[override]
        return (ctx.uses.gradient(ctx.like) if ctx.uses.noted else None), None
