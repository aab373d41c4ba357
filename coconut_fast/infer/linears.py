"""Linear layers of the models that have no native chain, on a CPU.

Reading the weights is most of a pass of one token a row. PyTorch's products read them at a fifth to a half of memory's
speed, `ops.few_rows_linear` (csrc/cpu/few_rows_linear.h) at almost all of it. In prefill PyTorch's are as fast, except
for bf16 where the CPU has no instructions for it: `ops.matmul` then computes in fp32, widening a weight at a time.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from coconut_fast import ops
from coconut_fast.model.coconut import Coconut
from coconut_fast.model.plan import modules_of

_lock = threading.RLock()
_users: Counter[nn.Linear] = Counter()  # blocks of `fast_linears` that a layer is in, of all threads


class _Thread(threading.local):
    inside = ""  # which block of `fast_linears` this thread is in: of "tokens" or "prompts"


_thread = _Thread()


def plain_linears(model: Coconut) -> list[nn.Linear]:
    """The layers that `fast_linears` can take.

    Not those of a model on another device or one that is compiled, subclasses, layers with a forward of their own,
    weights other than plain matrices of fp32 or bf16, and bf16 where the CPU has AMX, which PyTorch's library uses.
    """
    if ops.asked() not in (None, "cpu") or ops.why_not("few_rows_linear", "cpu", model.device):
        return []
    modules = modules_of(model)
    if any("_orig_mod" in module._modules or module._compiled_call_impl is not None for module in modules):
        return []
    dtypes = [{torch.float32}] if ops.extension().has_tiles() else [{torch.float32}, {torch.bfloat16}]
    return [m for m in modules if type(m) is nn.Linear and _is_plain(m) and {t.dtype for t in _tensors(m)} in dtypes]


@contextmanager
def fast_linears(layers: Sequence[nn.Linear], passes: str = "tokens") -> Iterator[None]:
    """Within the block, in inference mode, these layers run on our kernel, or in prefill in fp32 (see above).

    passes: "tokens", one a row, or "prompts", whose length must not decide which kernel its rows run on. `forward` is
    replaced meanwhile, so hooks are called as always. Threads may share a model: those outside the block run as before,
    and the last one to leave restores it.
    """
    used: list[nn.Linear] = []
    before, _thread.inside = _thread.inside, passes
    try:
        with _lock:
            for layer in layers:
                used.append(layer)
                _users[layer] += 1
                vars(layer).setdefault("forward", _Forward(layer))
        yield
    finally:
        _thread.inside = before
        with _lock:
            for layer in used:
                _users[layer] -= 1
                if _users[layer] <= 0:
                    del _users[layer]
                    if isinstance(vars(layer).get("forward"), _Forward):
                        del vars(layer)["forward"]


class _Forward:
    """nn.Linear.forward on our kernel, for plain tensors outside torch.compile, torch.func and dispatch modes."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self.product = ops.extension().few_rows_linear

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.layer.weight, self.layer.bias
        if not torch.compiler.is_compiling() and _thread.inside and _reads(x) and x.dtype == weight.dtype:
            if _thread.inside == "tokens":
                return self.product(x, weight, bias)
            if x.dim() > 1 and ops.is_widened(x.dtype):
                return ops.matmul(x.flatten(0, -2), weight.T, bias, backend="onednn").unflatten(0, x.shape[:-1])
        return functional.linear(x, weight, bias)


def _reads(x: Tensor) -> bool:
    plain = type(x) is Tensor and not x.is_neg() and not torch.is_autocast_enabled("cpu")
    modes = torch._C._functorch.maybe_current_level() is not None or torch._C._len_torch_dispatch_stack() > 0
    return plain and not modes and torch.is_inference_mode_enabled()


def _tensors(layer: nn.Linear) -> list[Tensor]:
    return [t for t in (layer.weight, layer.bias) if t is not None]


def _is_plain(layer: nn.Linear) -> bool:
    own_forward = not isinstance(vars(layer).get("forward"), _Forward | None)
    plain = all(type(t) in (nn.Parameter, Tensor) and t.is_cpu and t.is_contiguous() for t in _tensors(layer))
    shaped = layer.weight.dim() == 2 and (layer.bias is None or layer.bias.shape == layer.weight.shape[:1])
    return plain and shaped and not own_forward
