"""The one place that chooses an implementation of an op, and can say why.

An op has one name everywhere it exists: `x_ref` in kernels/reference*.py, `kernels/x.py` (Triton; `matmul` and
`linear_cross_entropy` are PyTorch), `x` in the C++ module (CPU).
`ops.x(...)` runs the first backend of BACKENDS[x] that the tensors' device allows; `use("torch")` or the environment
variable COCONUT_FAST_BACKEND asks for one by name, and an explicit choice that cannot be honoured is an error. Only
"torch" has every op: "triton" and "cpu" can generate, but lack ops of a training step.

Nothing here probes a device at import; the C++ module and the kernels load on first use.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# op -> its backends, fastest first. "cpu" is the C++ module, "onednn" the library of that name, "chunked" PyTorch in
# bounded memory, "torch" the plain mathematics (the last two on any device).
BACKENDS: dict[str, tuple[str, ...]] = {
    "ragged_attention": ("triton", "cpu", "torch"),
    "ragged_attention_backward": ("triton", "cpu", "torch"),
    "kv_append": ("triton", "cpu", "torch"),
    "kv_gather": ("triton", "torch"),
    "decode_attention": ("triton", "torch"),
    "latent_feedback": ("triton", "torch"),
    "residual_norm": ("triton", "torch"),
    "layer_norm": ("triton", "torch"),
    "layer_norm_backward": ("triton", "torch"),
    "column_sums": ("triton", "torch"),
    "transpose": ("triton", "torch"),
    "gated_mlp": ("triton", "torch"),
    "skinny_linear": ("triton", "torch"),
    "few_rows_linear": ("cpu", "torch"),
    "lm_head_sample": ("triton", "torch"),
    "accept_tokens": ("triton", "torch"),
    "linear_cross_entropy": ("chunked", "torch"),
    "cross_entropy": ("triton", "torch"),
    "cross_entropy_backward": ("triton", "torch"),
    "matmul": ("onednn", "torch"),
    "pack_matrix": ("cpu", "torch"),
    "packed_matmul": ("cpu", "torch"),
    "few_rows_matmul": ("cpu", "torch"),
    "weight_gradient": ("cpu", "torch"),
    "gelu": ("cpu", "torch"),
    "gelu_backward": ("cpu", "torch"),
}
OWN_PRODUCTS = ("pack_matrix", "packed_matmul", "few_rows_matmul", "weight_gradient")
DEVICE_OF = {"triton": "cuda", "cpu": "cpu", "onednn": "cpu", "chunked": None, "torch": None}

_forced: str | None = None


@functools.cache
def extension() -> Any:
    """The C++ module, or ImportError with what to do about it."""
    try:
        return importlib.import_module("coconut_fast._C")
    except ImportError as error:
        raise ImportError(
            f"the C++ module coconut_fast._C does not load ({error}); build it with `pip install .` "
            "or, in a checkout, `python setup.py build_ext --inplace`"
        ) from error


class BackendError(ValueError):
    """A backend that was asked for by name and cannot run an op."""


@contextmanager
def use(backend: str | None) -> Iterator[None]:
    """Within the block every op runs on `backend` ("triton", "cpu", "torch"), or raises where it cannot.

    "triton" and "cpu" have what generation needs, but no `linear_cross_entropy`: training needs "torch" or None.
    """
    global _forced
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


def asked() -> str | None:
    """The backend that `use` or COCONUT_FAST_BACKEND names for every op."""
    return _forced or os.environ.get("COCONUT_FAST_BACKEND") or None


def why_not(op: str, backend: str, device: torch.device) -> str | None:
    """The reason `backend` cannot run `op` on `device`; None where it can."""
    if backend not in BACKENDS[op]:
        return f"{op} has no {backend} implementation (it has {', '.join(BACKENDS[op])})"
    wanted = DEVICE_OF[backend]
    if wanted is not None and device.type != wanted:
        interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
        if not interpreted:
            return f"{backend} needs tensors on {wanted}, these are on {device.type}"
    try:
        _implementation(op, backend)
    except (ImportError, AttributeError) as error:
        return str(error)
    if backend == "cpu" and op in OWN_PRODUCTS and not extension().gemm_runs():
        return "it needs a CPU with AVX512-BF16 and without AMX"
    return None


def choose(op: str, device: torch.device, backend: str | None = None) -> tuple[str, str]:
    """(backend, reason) for `op` on `device`; ValueError where an explicit choice cannot be honoured."""
    if op not in BACKENDS:
        raise ValueError(f"ops has no op {op!r}; it has {', '.join(BACKENDS)}")
    wanted = backend or asked()
    if wanted:
        reason = why_not(op, wanted, device)
        if reason:
            raise BackendError(f"ops.{op}: backend {wanted!r} was asked for, but {reason}")
        return wanted, "asked for"
    passed_over: list[str] = []
    for candidate in BACKENDS[op]:
        # TRITON_INTERPRET lets Triton run on a CPU, but only when asked for by name.
        if candidate == "triton" and device.type != "cuda":
            reason = f"triton needs tensors on cuda, these are on {device.type}"
        else:
            reason = why_not(op, candidate, device)
        if reason is None:
            return candidate, "; ".join(passed_over) or "first choice"
        passed_over.append(f"not {candidate}: {reason}")
    raise ValueError(f"ops.{op}: no backend runs on {device.type}: {'; '.join(passed_over)}")


def is_widened(dtype: torch.dtype) -> bool:
    """Whether `matmul` computes products of this type in fp32, as this CPU has no instructions for it."""
    return dtype in importlib.import_module("coconut_fast.kernels.matmul").WIDENED


@functools.cache
def _implementation(op: str, backend: str) -> Callable[..., Any]:
    if backend == "torch":
        return getattr(importlib.import_module("coconut_fast.kernels.reference"), f"{op}_ref")
    if backend in ("triton", "chunked", "onednn"):
        return getattr(importlib.import_module(f"coconut_fast.kernels.{op}"), op)
    return getattr(extension(), op)


def call(op: str, *args: Any, backend: str | None = None, **kwargs: Any) -> Any:
    """Run `op` on the backend chosen for its first tensor argument's device."""
    given = (a[0] if isinstance(a, list) and a else a for a in (*args, *kwargs.values()))
    device = next(a.device for a in given if isinstance(a, torch.Tensor))
    chosen, _ = choose(op, device, backend)
    return _implementation(op, chosen)(*args, **kwargs)


def __getattr__(op: str) -> Callable[..., Any]:
    if op in BACKENDS:
        return functools.partial(call, op)
    raise AttributeError(f"ops has no op {op!r}; it has {', '.join(BACKENDS)}")
