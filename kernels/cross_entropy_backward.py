"""The derivative of cross_entropy, written over the logits.

    x_v = grad scale slope_v (exp(l_v - top - log) - [v is the target]),   slope = 1 - (l / softcap)^2 or 1

Shapes as in cross_entropy.py; grad () fp32, the gradient of the sum of the losses, which multiplies before x is rounded
to the logits' dtype (in fp16 a probability below 6e-8 is 0 unless a loss scale has multiplied it). Rows with a target
of -100 and columns from V on become 0, so that products with x need no mask.
Bytes: N W elements read and written once, in 128-bit accesses. Bound: memory bandwidth. Registers at most 128.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import LOG2E, check_shape, on_device, register
from .cross_entropy import check, scores

BLOCK = 4096


@triton.jit
def _gradient(
    logits, bias, targets, statistics, grad, logits_row, scale,
    V: tl.constexpr, WIDTH: tl.constexpr, SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = logits + row * logits_row + v
    target = tl.load(targets + row)
    counts = target >= 0
    top = tl.load(statistics + 2 * row)
    log = tl.load(statistics + 2 * row + 1)
    mask = v < V
    x = tl.load(at, mask=v < WIDTH, other=0.0).to(tl.float32)
    s, slope = scores(x, bias, v, mask, scale, SOFTCAP, HAS_BIAS)
    share = tl.exp2((s - top - log) * LOG2E)
    g = (share - tl.where(v == target, 1.0, 0.0)) * slope * (tl.load(grad).to(tl.float32) * scale)
    g = tl.where(mask & counts, g, 0.0)  # not multiplied by 0: an ignored row may hold an infinity
    tl.store(at, g.to(logits.dtype.element_ty), mask=v < WIDTH)


def _launch(
    logits: torch.Tensor, targets: torch.Tensor, statistics: torch.Tensor, grad: torch.Tensor, *, vocabulary: int,
    bias: torch.Tensor | None = None, scale: float = 1.0, softcap: float = 0.0,
) -> None:  # fmt: skip
    op = "cross_entropy_backward"
    check(op, logits, targets, bias, vocabulary)
    rows, width = logits.shape
    check_shape(op, "statistics", statistics, (rows, 2), contiguous=True)
    check_shape(op, "grad", grad, ())
    if rows:
        with on_device(logits):
            _gradient[(rows, triton.cdiv(width, BLOCK))](
                logits=logits,
                bias=bias,
                targets=targets,
                statistics=statistics,
                grad=grad,
                logits_row=logits.stride(0),
                scale=scale,
                V=vocabulary,
                WIDTH=width,
                SOFTCAP=softcap,
                HAS_BIAS=bias is not None,
                BLOCK=BLOCK,
                num_warps=8,
            )


_OP = register(
    "cross_entropy_backward(Tensor(a!) logits, Tensor targets, Tensor statistics, Tensor grad, *, int vocabulary, "
    "Tensor? bias=None, float scale=1.0, float softcap=0.0) -> ()",
    _launch,
    lambda *args, **kwargs: None,
)


def cross_entropy_backward(
    logits: torch.Tensor, targets: torch.Tensor, statistics: torch.Tensor, grad: torch.Tensor, *, vocabulary: int,
    bias: torch.Tensor | None = None, scale: float = 1.0, softcap: float = 0.0,
) -> None:  # fmt: skip
    """Overwrites logits as in the module's docstring. ValueError for inputs that do not fit."""
    _OP(logits, targets, statistics, grad, vocabulary=vocabulary, bias=bias, scale=scale, softcap=softcap)
