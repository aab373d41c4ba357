"""Cross-entropy of rows of raw logits, read once; its derivative is in cross_entropy_backward.py.

    l = scale (x + bias)  (softcap: c tanh(l / c)),   top = max_v l_v,   log = ln sum_v exp(l_v - top)
    loss = log - (l_target - top), and 0 for a target of -100

Shapes: logits x (N, W) with rows of W >= V elements, of which those from V on are ignored; bias (V,) or None; targets
int64 (N,), 0 to V - 1 or -100; losses (N,) and statistics (N, 2), top and log, fp32. The log of a confident row is as
small as its loss, whereas log + top would be rounded like its logits.
Bytes: N V elements once, in 128-bit loads. Bound: memory bandwidth. One program per row; registers at most 128.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import LN2, LOG2E, check_dtypes, check_shape, on_device, register, tanh

BLOCK = 4096


@triton.jit
def scores(x, bias, v, mask, scale, SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr):
    """l of logits x at ids v of the vocabulary, and its derivative by scale (x + bias)."""
    if HAS_BIAS:
        x += tl.load(bias + v, mask=mask, other=0.0).to(tl.float32)
    x = x * scale
    if SOFTCAP > 0:
        bent = tanh(x / SOFTCAP)
        return SOFTCAP * bent, 1 - bent * bent
    return x, tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def _loss(
    logits, bias, targets, losses, statistics, logits_row, scale,
    V: tl.constexpr, WIDTH: tl.constexpr, SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * logits_row
    top = float("-inf")
    total = 0.0
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        mask = v < V
        x = tl.load(base + v, mask=v < WIDTH, other=0.0).to(tl.float32)  # 128-bit loads, also where V is odd
        s, _ = scores(x, bias, v, mask, scale, SOFTCAP, HAS_BIAS)
        s = tl.where(mask, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, axis=0))
        total = total * tl.exp2((top - new_top) * LOG2E) + tl.sum(tl.exp2((s - new_top) * LOG2E), axis=0)
        top = new_top
    log = tl.log2(total) * LN2
    target = tl.load(targets + row)
    counts = target >= 0
    at = tl.where(counts, target, 0)
    s, _ = scores(tl.load(base + at).to(tl.float32), bias, at, counts, scale, SOFTCAP, HAS_BIAS)
    tl.store(losses + row, tl.where(counts, log - (s - top), 0.0))
    tl.store(statistics + 2 * row, top)
    tl.store(statistics + 2 * row + 1, log)


def check(op: str, logits: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None, vocabulary: int) -> None:
    """ValueError for inputs that the kernels would misread."""
    rows, width = logits.shape
    check_dtypes(op, logits=logits, bias=bias)
    check_shape(op, "logits", logits, (rows, width))
    check_shape(op, "targets", targets, (rows,))
    if not 0 < vocabulary <= width:
        raise ValueError(f"{op}: vocabulary is {vocabulary}, expected 1 to {width}, the columns of logits")
    if bias is not None:
        check_shape(op, "bias", bias, (vocabulary,))


def _launch(
    logits: torch.Tensor, targets: torch.Tensor, *, vocabulary: int, bias: torch.Tensor | None = None,
    scale: float = 1.0, softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    check("cross_entropy", logits, targets, bias, vocabulary)
    rows = logits.shape[0]
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    statistics = torch.empty(rows, 2, dtype=torch.float32, device=logits.device)
    if rows:
        with on_device(logits):
            _loss[(rows,)](
                logits=logits,
                bias=bias,
                targets=targets,
                losses=losses,
                statistics=statistics,
                logits_row=logits.stride(0),
                scale=scale,
                V=vocabulary,
                WIDTH=logits.shape[1],
                SOFTCAP=softcap,
                HAS_BIAS=bias is not None,
                BLOCK=BLOCK,
                num_warps=8,
            )
    return losses, statistics


def _fake(logits: torch.Tensor, targets: torch.Tensor, **keywords):  # type: ignore[no-untyped-def]
    rows = logits.shape[0]
    return logits.new_empty(rows, dtype=torch.float32), logits.new_empty(rows, 2, dtype=torch.float32)


_OP = register(
    "cross_entropy(Tensor logits, Tensor targets, *, int vocabulary, Tensor? bias=None, float scale=1.0, "
    "float softcap=0.0) -> (Tensor, Tensor)",
    _launch,
    _fake,
)


def cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, *, vocabulary: int, bias: torch.Tensor | None = None,
    scale: float = 1.0, softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(losses, statistics) as in the module's docstring, without autograd. ValueError for inputs that do not fit."""
    return _OP(logits, targets, vocabulary=vocabulary, bias=bias, scale=scale, softcap=softcap)
