"""The derivative of layer_norm: grad_x, and sums for weight and bias added to partial ones.

With xhat = (x - mean) scale, g the sum of the gradients of normed and rounded, and dy = g weight:

    grad_x = scale (dy - mean(dy) - xhat mean(dy xhat)) (+ other),   sums[i, 0] += sum g xhat,   sums[i, 1] += sum g

Shapes: x, grad_normed, grad_rounded, other (N, D), each gradient may be None: `other` is that of x from what else reads
it, the residual stream; weight (D,); statistics (N, 2) as layer_norm leaves them; sums (P, 2, D) fp32. Program i of at
most P adds its consecutive rows to sums[i]: a weight's gradient over several calls is sums.sum(0) at their end, in one
order always. grad_x comes in x's dtype and, where asked for, once more in another for the product that x came from.
Bytes: N D elements of x, of each gradient and of grad_x once, in 128-bit accesses. Bound: memory bandwidth.
Registers at most 128.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import check_dtypes, check_shape, on_device, register

STAGES = 2  # rows whose loads are under way


@triton.jit
def _gradient(
    grad_normed, grad_rounded, other, x, weight, statistics, grad_x, copy, sums, rows, share, x_row,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_NORMED: tl.constexpr, HAS_ROUNDED: tl.constexpr,
    HAS_OTHER: tl.constexpr, HAS_COPY: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    mask = d < D
    w = tl.load(weight + d, mask=mask, other=0.0).to(tl.float32)
    of_weight = tl.zeros([BLOCK_D], tl.float32)
    of_bias = tl.zeros([BLOCK_D], tl.float32)
    first = program * share
    for i in tl.range(0, tl.minimum(share, rows - first), num_stages=STAGES):
        row = (first + i).to(tl.int64)
        t = tl.load(x + row * x_row + d, mask=mask, other=0.0).to(tl.float32)
        g = tl.zeros([BLOCK_D], tl.float32)
        if HAS_NORMED:
            g += tl.load(grad_normed + row * D + d, mask=mask, other=0.0).to(tl.float32)
        if HAS_ROUNDED:
            g += tl.load(grad_rounded + row * D + d, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(statistics + 2 * row + 1)
        xhat = tl.where(mask, (t - tl.load(statistics + 2 * row)) * scale, 0.0)
        dy = g * w
        of_weight += g * xhat
        of_bias += g
        dx = scale * (dy - tl.sum(dy, axis=0) / D - xhat * (tl.sum(dy * xhat, axis=0) / D))
        if HAS_OTHER:
            dx += tl.load(other + row * D + d, mask=mask, other=0.0).to(tl.float32)
        if HAS_COPY:
            tl.store(copy + row * D + d, dx.to(copy.dtype.element_ty), mask=mask)
        tl.store(grad_x + row * D + d, dx.to(grad_x.dtype.element_ty), mask=mask)
    into = sums + program.to(tl.int64) * 2 * D + d
    tl.store(into, tl.load(into, mask=mask, other=0.0) + of_weight, mask=mask)
    tl.store(into + D, tl.load(into + D, mask=mask, other=0.0) + of_bias, mask=mask)


def _launch(
    grad_normed: torch.Tensor | None, grad_rounded: torch.Tensor | None, other: torch.Tensor | None, x: torch.Tensor,
    weight: torch.Tensor, statistics: torch.Tensor, sums: torch.Tensor, *, dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    op, (rows, dim) = "layer_norm_backward", x.shape
    check_dtypes(op, grad_normed=grad_normed, grad_rounded=grad_rounded, other=other, x=x, weight=weight)
    check_shape(op, "x", x, (rows, dim))
    check_shape(op, "weight", weight, (dim,))
    check_shape(op, "statistics", statistics, (rows, 2), contiguous=True)
    check_shape(op, "sums", sums, (len(sums), 2, dim), contiguous=True)
    for name, grad in (("grad_normed", grad_normed), ("grad_rounded", grad_rounded), ("other", other)):
        if grad is not None:
            check_shape(op, name, grad, (rows, dim), contiguous=True)
    grad_x, copy = _fake(grad_normed, grad_rounded, other, x, weight, statistics, sums, dtype=dtype)
    if rows:
        block_d = triton.next_power_of_2(dim)
        share = triton.cdiv(rows, len(sums))
        with on_device(x):
            _gradient[(triton.cdiv(rows, share),)](
                grad_normed=grad_normed,
                grad_rounded=grad_rounded,
                other=other,
                x=x,
                weight=weight,
                statistics=statistics,
                grad_x=grad_x,
                copy=copy,
                sums=sums,
                rows=rows,
                share=share,
                x_row=x.stride(0),
                D=dim,
                BLOCK_D=block_d,
                HAS_NORMED=grad_normed is not None,
                HAS_ROUNDED=grad_rounded is not None,
                HAS_OTHER=other is not None,
                HAS_COPY=dtype is not None,
                STAGES=STAGES,
                num_warps=max(1, min(16, block_d // 256)),
            )
    return grad_x, copy


def _fake(grad_normed, grad_rounded, other, x, weight, statistics, sums, *, dtype=None):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), x.new_empty((0,) if dtype is None else x.shape, dtype=dtype or x.dtype)


_OP = register(
    "layer_norm_backward(Tensor? grad_normed, Tensor? grad_rounded, Tensor? other, Tensor x, Tensor weight, "
    "Tensor statistics, Tensor(a!) sums, *, ScalarType? dtype=None) -> (Tensor, Tensor)",
    _launch,
    _fake,
)


def layer_norm_backward(
    grad_normed: torch.Tensor | None, grad_rounded: torch.Tensor | None, other: torch.Tensor | None, x: torch.Tensor,
    weight: torch.Tensor, statistics: torch.Tensor, sums: torch.Tensor, *, dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """grad_x (N, D) in x's dtype and in `dtype` (None: an empty tensor); adds to sums.

    Shapes stand in the module's docstring; ValueError for others.
    """
    return _OP(grad_normed, grad_rounded, other, x, weight, statistics, sums, dtype=dtype)
