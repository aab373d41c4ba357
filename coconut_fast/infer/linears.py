"""Linear layers of the models that have no native chain, while they generate on a CPU.

Reading the weights is most of the time of a pass of few rows. PyTorch's products read them at a quarter to a half of
memory's speed, `ops.few_rows_linear` (csrc/cpu/few_rows_linear.h) at almost all of it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from coconut_fast import ops
from coconut_fast.model.coconut import Coconut
from coconut_fast.model.plan import modules_of

MOST_ROWS = 64  # from there on PyTorch's products are as fast in bf16 (two Zen 4 cores)

_lock = threading.Lock()


@contextmanager
def fast_linears(model: Coconut) -> Iterator[None]:
    """Within the block the model's nn.Linear layers run few rows on our kernel, in inference mode and on a CPU.

    Their `forward` is replaced meanwhile, so hooks are called as always. Left as they are: subclasses, layers with a
    forward of their own, weights other than plain matrices of fp32 or bf16, and compiled models. Threads may share a
    model; the last one to leave restores it.
    """
    layers = _layers(model)
    with _lock:
        for layer in layers:
            forward = vars(layer).setdefault("forward", _Forward(layer))
            forward.users += 1
    try:
        yield
    finally:
        with _lock:
            for layer in layers:
                forward = vars(layer)["forward"]
                forward.users -= 1
                if not forward.users:
                    del vars(layer)["forward"]


class _Forward:
    """nn.Linear.forward, faster for few rows."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer, self.users = layer, 0
        self.product = ops.extension().few_rows_linear

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.layer.weight, self.layer.bias
        few = x.numel() <= MOST_ROWS * weight.shape[1] and x.dtype == weight.dtype and type(x) is Tensor
        if few and torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu"):
            return self.product(x, weight, bias)
        return functional.linear(x, weight, bias)


def _layers(model: Coconut) -> list[nn.Linear]:
    if ops.choose("few_rows_linear", model.device)[0] != "cpu":
        return []
    modules = modules_of(model)
    if any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in modules):
        return []
    return [module for module in modules if type(module) is nn.Linear and _is_plain(module)]


def _is_plain(layer: nn.Linear) -> bool:
    if not isinstance(vars(layer).get("forward"), _Forward | None):
        return False
    tensors = [t for t in (layer.weight, layer.bias) if t is not None]
    kinds = all(type(t) in (nn.Parameter, Tensor) and t.is_cpu and t.is_contiguous() for t in tensors)
    return kinds and {t.dtype for t in tensors} in ({torch.float32}, {torch.bfloat16})
