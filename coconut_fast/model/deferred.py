"""Weight gradients of all passes at once, with fewer activations kept for them.

A forward through k thoughts uses every weight k + 1 times. Autograd would compute one weight gradient per use and add
them up: for a single-position pass that is a product of a few rows, whose accumulation moves three times the weights'
size through memory (GPT-2: 1 GB a pass). Here a use only notes its input and its output's gradient; once backward has
been through all uses of a weight, the large ones are multiplied one by one and the small ones together. A token
embedding notes ids and gradients, which are added to the gradient of the tied head: autograd would make a (V, D)
gradient per use, zero but for a few rows (GPT-2: 154 MB), and add that.

If the input of a product is the result of LayerNorm or GELU, it is not kept but recomputed from their input, which
autograd keeps anyway: on GPT-2 this saves a third of all activations for a few hundredths of the time. On a GPU it is
kept: memory is not what limits a step there, and LayerNorm is computed by model/layer_norm.py.

A mode around the passes routes `linear`, `embedding`, `layer_norm` and `gelu` of torch.nn.functional, `torch.addmm`
(GPT-2's Conv1D) and additions through it, so the model code stays as it is. Exact: the same products, summed in another
order.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from coconut_fast.model import layer_norm
from coconut_fast.model.gelu import gelu
from coconut_fast.model.weight import Weight

SMALL = 512  # rows of uses that are multiplied together; above, the copy costs more than it saves
functional = nn.functional
ADDITIONS = (torch.add, torch.Tensor.add)


class DeferredWeightGradients(TorchFunctionMode):
    """Within the block, products with parameters defer their weight gradients. One block per forward."""

    def __init__(self) -> None:
        super().__init__()
        self.uses: dict[tuple[int, int], tuple[Tensor, _Uses]] = {}
        self.cheap: _Cheap | None = None  # the last result that is cheaper to recompute than to keep
        self.stream = layer_norm.Stream()
        self.parts: dict[Any, tuple[Tensor, ...]] = {}  # parts of the parameters that are split
        self.known: set[int] = set()  # the ids of these parts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        trained = len(args) >= 2 and self._is_trained(args[1])
        if func is functional.linear and trained:
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            if self._is_bias(bias, width=args[1].shape[0]):
                return self._product(args[0], args[1], bias, transposed=True)
        if func is torch.addmm and len(args) == 3 and not kwargs:
            bias, x, weight = args
            if self._is_trained(weight) and self._is_bias(bias, width=weight.shape[1]):
                return self._product(x, weight, bias, transposed=False)
        if func is torch.Tensor.split and self._is_trained(args[0]):
            return self._split(args[0], func, args, kwargs)
        if func is functional.embedding and trained and _is_plain(*args[2:], **kwargs):
            return _Lookup.apply(args[0], *self._uses(args[1], None))
        if func is functional.layer_norm and layer_norm.fuses(*args, **kwargs):
            return self._norm(*args, **kwargs)
        if func in ADDITIONS and len(args) == 2 and not kwargs:
            args = tuple(self.stream.behind(x) for x in args)
            if layer_norm.adds(*args):
                return self.stream.add(*args)
        if func is functional.gelu:
            func = gelu
        result = func(*args, **kwargs)
        if (func is gelu or func is functional.layer_norm) and not layer_norm.on_gpu(result):
            self.cheap = _Cheap(result, func, args, kwargs)
        return result

    def alias(self, weight: Tensor) -> Tensor:
        """The weight, for a use that computes its gradient itself; embeddings add theirs to that in place."""
        return self._uses(weight, None)[0] if self._is_trained(weight) else weight

    def _split(self, whole: Tensor, func: Callable[..., Any], args: tuple, kwargs: dict) -> tuple[Tensor, ...]:
        """The parts of a parameter, the same tensors each time: uses of a part, too, are identified by its id."""
        key = (id(whole), str(args[1:]), str(kwargs))
        if key not in self.parts:
            self.parts[key] = func(*args, **kwargs)
            self.known.update(id(part) for part in self.parts[key])
        return self.parts[key]

    def _is_known(self, x: Any) -> bool:
        """Whether x can be identified by its id; that of a temporary tensor may be reused."""
        return isinstance(x, nn.Parameter) or id(x) in self.known

    def _is_trained(self, weight: Any) -> bool:
        return self._is_known(weight) and weight.requires_grad and torch.is_grad_enabled()

    def _is_bias(self, bias: Any, width: int) -> bool:
        """Whether `bias` is None, or known and not broadcast."""
        return bias is None or (self._is_known(bias) and bias.shape == (width,))

    def _uses(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, _Uses]:
        key = (id(weight), id(bias))
        if key not in self.uses:
            uses = _Uses(weight, bias)
            self.uses[key] = (_Collect.apply(weight, bias, uses), uses)
        return self.uses[key]

    def _norm(self, x: Tensor, shape: Any, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
        if not (self._is_trained(weight) and self._is_bias(bias, width=weight.shape[0])):
            return functional.layer_norm(x, shape, weight, bias, eps)
        return self.stream.norm(x, *self._uses(weight, bias), eps)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
        device = x.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        alias, uses = self._uses(weight, bias)
        uses.prepare(compute, transposed)
        cheap = self.cheap if self.cheap is not None and self.cheap.made(x) else None
        rounded = self.stream.rounded(x, compute)
        return _Use.apply(x.to(compute) if rounded is None else rounded, alias, uses, cheap)


def _is_plain(
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> bool:
    """Whether an embedding with these arguments is a lookup and nothing else."""
    return padding_idx is None and max_norm is None and not scale_grad_by_freq and not sparse


class _Cheap:
    """How a result was computed, so that it can be computed again; does not keep the result itself alive."""

    def __init__(self, result: Tensor, func: Callable[..., Tensor], args: tuple, kwargs: dict) -> None:
        self.result, self.version = weakref.ref(result), result._version
        self.tensors = [x.detach() if isinstance(x, Tensor) else None for x in args]
        self.func, self.args, self.kwargs = func, [None if isinstance(x, Tensor) else x for x in args], kwargs
        device = result.device.type
        self.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    def made(self, x: Tensor) -> bool:
        """Whether x is the result, unmodified, in any shape; and large enough to be worth recomputing."""
        y = self.result()
        same = y is not None and y.data_ptr() == x.data_ptr() and y.numel() == x.numel() and y._version == self.version
        return same and x.is_contiguous() and x.numel() > SMALL * x.shape[-1]

    def again(self, tensors: list[Tensor | None]) -> Tensor:
        device, dtype, enabled = self.autocast
        with torch.no_grad(), torch.autocast(device, dtype, enabled=enabled):
            pairs = zip(tensors, self.args, strict=True)
            return self.func(*(a if t is None else t for t, a in pairs), **self.kwargs)


class _Uses:
    """A weight in the dtype of its products, and what backward has noted of its uses."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight.detach(), bias if bias is None else bias.detach()
        self.multiplied: Any = None  # a Weight, once the first use gives dtype and layout
        self.noted: list[tuple[Callable[[], Tensor] | Tensor, Tensor]] = []  # input (N, in), output's gradient (N, out)
        self.looked_up: list[tuple[Tensor, Tensor]] = []  # ids (N,), gradient (N, D)
        self.sums: Tensor | None = None  # for a norm, see norm_sums
        self.task = -1  # the backward call that noted them

    def enter_task(self) -> None:
        """Drops what an earlier backward noted but never collected because it ended at an activation."""
        task = torch._C._current_graph_task_id()
        if task != self.task:
            self.noted, self.looked_up, self.sums, self.task = [], [], None, task

    def norm_sums(self) -> Tensor:
        """Where the norm of this weight adds its gradients, pass by pass."""
        self.enter_task()
        if self.sums is None:
            self.sums = self.weight.new_zeros(layer_norm.SHARES, 2, len(self.weight), dtype=torch.float32)
        return self.sums

    def prepare(self, compute: torch.dtype, transposed: bool) -> None:
        if self.multiplied is None:
            self.multiplied = Weight(self.weight, self.bias, compute, transposed)

    def gradients(self, total: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of weight and bias: `total`, computed elsewhere, plus the sum over noted uses, which it drops."""
        self.enter_task()
        bias = None
        if self.noted:
            product, bias = self._products()
            total = product if total is None else total.add_(product)
        if self.sums is not None:
            of_weight, bias = self.sums.sum(0)
            total = of_weight if total is None else total.add_(of_weight)
            self.sums = None
        if self.looked_up:
            total = torch.zeros_like(self.weight) if total is None else total
            looked_up, self.looked_up = self.looked_up, []
            if not total.is_cpu:  # each call sorts its ids and adds duplicates serially, so make only one
                looked_up = [(torch.cat([ids for ids, _ in looked_up]), torch.cat([grad for _, grad in looked_up]))]
            for ids, grad in looked_up:
                _add_rows(total, ids, grad.to(total.dtype))
        return total, bias

    def _products(self) -> tuple[Tensor, Tensor | None]:
        noted, self.noted = self.noted, []
        large = [pair for pair in noted if len(pair[1]) > SMALL]
        small = [(x() if callable(x) else x, g) for x, g in noted if len(g) <= SMALL]
        if len(small) > 1:
            small = [(torch.cat([x for x, _ in small]), torch.cat([g for _, g in small]))]
        return self.multiplied.gradients((x() if callable(x) else x, grad) for x, grad in large + small)


def _add_rows(total: Tensor, ids: Tensor, rows: Tensor) -> None:
    """total[ids] += rows in a fixed order: on each device one of the two ops does so, one adds atomically."""
    if total.is_cpu:
        total.index_add_(0, ids, rows)
    else:
        total.index_put_((ids,), rows, accumulate=True)


class _Use(torch.autograd.Function):
    """y = x W + b; backward leaves the gradients of W and b to _Collect."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alias: Tensor, uses: _Uses, cheap: _Cheap | None) -> Tensor:  # type: ignore
        # Detached: a view of x holds the graph, which a backward that ends early would leave in `noted`.
        flat = x.detach().reshape(-1, x.shape[-1])
        ctx.save_for_backward(*([flat] if cheap is None else cheap.tensors))
        ctx.uses, ctx.cheap, ctx.shape, ctx.compute = uses, cheap, x.shape, x.dtype
        y = uses.multiplied.times(flat)
        # Not `view`: a model may write into the result in place, which autograd forbids for views of such functions.
        return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        saved, cheap, uses = ctx.saved_tensors, ctx.cheap, ctx.uses
        grad_NO = grad.reshape(-1, grad.shape[-1])
        uses.enter_task()
        if cheap is None:
            uses.noted.append((saved[0], grad_NO))
        else:
            shape, compute = (-1, ctx.shape[-1]), ctx.compute
            uses.noted.append((lambda: cheap.again(saved).view(shape).to(compute), grad_NO))
        grad_x = uses.multiplied.times_transposed(grad_NO).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None


class _Lookup(torch.autograd.Function):
    """Rows of a weight; backward leaves their gradient to _Collect."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, alias: Tensor, uses: _Uses) -> Tensor:  # type: ignore[override]
        ctx.uses, ctx.ids = uses, ids
        return functional.embedding(ids, uses.weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        ctx.uses.enter_task()
        ctx.uses.looked_up.append((ctx.ids.flatten(), grad.reshape(-1, grad.shape[-1])))
        return None, None, None


class _Collect(torch.autograd.Function):
    """The weight itself; its backward runs after that of every use, whatever order autograd chooses."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, uses: _Uses) -> Tensor:  # type: ignore[override]
        ctx.uses = uses
        ctx.set_materialize_grads(False)
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> Any:  # type: ignore[override]
        return *ctx.uses.gradients(grad), None
