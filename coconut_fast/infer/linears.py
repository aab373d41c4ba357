"""Linear layers of the models that have no native chain, in passes of one token a row on a CPU.

Reading the weights is most of such a pass. PyTorch's products read them at a quarter to a half of memory's speed,
`ops.few_rows_linear` (csrc/cpu/few_rows_linear.h) at almost all of it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from coconut_fast import ops
from coconut_fast.model.coconut import Coconut
from coconut_fast.model.plan import modules_of

_lock = threading.Lock()


class _Thread(threading.local):
    inside = False  # whether this thread is in a block of `fast_linears`


_thread = _Thread()


def plain_linears(model: Coconut) -> list[nn.Linear]:
    """The layers that `fast_linears` can take.

    Not those of a model on another device or one that is compiled, subclasses, layers with a forward of their own,
    weights other than plain matrices of fp32 or bf16, and bf16 where the CPU has AMX, which PyTorch's library uses.
    """
    if ops.choose("few_rows_linear", model.device)[0] != "cpu":
        return []
    modules = modules_of(model)
    if any("_orig_mod" in module._modules or module._compiled_call_impl is not None for module in modules):
        return []
    dtypes = [{torch.float32}] if ops.extension().has_tiles() else [{torch.float32}, {torch.bfloat16}]
    return [m for m in modules if type(m) is nn.Linear and _is_plain(m) and {t.dtype for t in _tensors(m)} in dtypes]


@contextmanager
def fast_linears(layers: Sequence[nn.Linear]) -> Iterator[None]:
    """Within the block, in inference mode, these layers run on our kernel.

    For passes with one token a row: in longer ones PyTorch's products are as fast, and the length of a prompt must not
    decide which kernel its rows run on. `forward` is replaced meanwhile, so hooks are called as always. Threads may
    share a model: those outside the block run as before, and the last one to leave restores it.
    """
    with _lock:
        for layer in layers:
            forward = vars(layer).setdefault("forward", _Forward(layer))
            forward.users += 1
    before, _thread.inside = _thread.inside, True
    try:
        yield
    finally:
        _thread.inside = before
        with _lock:
            for layer in layers:
                forward = vars(layer)["forward"]
                forward.users -= 1
                if not forward.users:
                    del vars(layer)["forward"]


class _Forward:
    """nn.Linear.forward on our kernel."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer, self.users = layer, 0
        self.product = ops.extension().few_rows_linear

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.layer.weight, self.layer.bias
        plain = type(x) is Tensor and x.dtype == weight.dtype and not torch.is_autocast_enabled("cpu")
        if plain and _thread.inside and torch.is_inference_mode_enabled():
            return self.product(x, weight, bias)
        return functional.linear(x, weight, bias)


def _tensors(layer: nn.Linear) -> list[Tensor]:
    return [t for t in (layer.weight, layer.bias) if t is not None]


def _is_plain(layer: nn.Linear) -> bool:
    own_forward = not isinstance(vars(layer).get("forward"), _Forward | None)
    plain = all(type(t) in (nn.Parameter, Tensor) and t.is_cpu and t.is_contiguous() for t in _tensors(layer))
    return plain and not own_forward
