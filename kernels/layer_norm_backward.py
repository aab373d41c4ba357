"""The derivative of layer_norm: grad_x, and sums for weight and bias, added to partial sums.

With xhat = (x - mean) scale, g the sum of the gradients of normed and rounded, and dy = g weight:

    grad_x = scale (dy - mean(dy) - xhat mean(dy xhat)) (+ other),   sums[i, 0] += sum g xhat,   sums[i, 1] += sum g

Shapes: x, grad_normed, grad_rounded, other (N, D), where any gradient may be None: `other` is x's gradient from its
other use, the residual stream; weight (D,); statistics (N, 2) as layer_norm returns them; sums (P, 2, D) fp32. Program
i of at most P adds its consecutive rows to sums[i]: a weight's gradient over several calls is sums.sum(0) after the
last, always in the same order. grad_x is in x's dtype and, on request, also in another, for the product that made x.
Bytes: N D elements of x, of each gradient and of grad_x once, in 128-bit accesses. Bound: memory bandwidth.
Registers at most 128.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import check_dtypes, check_shape, on_device, register

BLOCK_N = 2  # rows per tile: their sums share barriers
STAGES = 2  # tiles of rows whose loads are in flight


@triton.jit(do_not_specialize=["rows", "share"])  # they change from batch to batch
def _gradient(
    grad_normed, grad_rounded, other, x, weight, statistics, grad_x, copy, sums, rows, share, x_row,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, HAS_NORMED: tl.constexpr, HAS_ROUNDED: tl.constexpr,
    HAS_OTHER: tl.constexpr, HAS_COPY: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    into = sums + program.to(tl.int64) * 2 * D + d
    of_weight = tl.load(into, mask=d < D, other=0.0)
    of_bias = tl.load(into + D, mask=d < D, other=0.0)
    end = tl.minimum(program * share + share, rows)
    for start in tl.range(program * share, end, BLOCK_N, num_stages=STAGES):
        n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask = (n < end)[:, None] & (d < D)[None, :]
        at = n[:, None] * D + d[None, :]
        t = tl.load(x + n[:, None] * x_row + d[None, :], mask=mask, other=0.0).to(tl.float32)
        g = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        if HAS_NORMED:
            g += tl.load(grad_normed + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_ROUNDED:
            g += tl.load(grad_rounded + at, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(statistics + 2 * n, mask=n < end, other=0.0)
        scale = tl.load(statistics + 2 * n + 1, mask=n < end, other=0.0)[:, None]
        xhat = tl.where(mask, (t - mean[:, None]) * scale, 0.0)
        dy = g * w[None, :]
        of_weight += tl.sum(g * xhat, axis=0)
        of_bias += tl.sum(g, axis=0)
        dx = scale * (dy - (tl.sum(dy, axis=1) / D)[:, None] - xhat * (tl.sum(dy * xhat, axis=1) / D)[:, None])
        if HAS_OTHER:
            dx += tl.load(other + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_COPY:
            tl.store(copy + at, dx.to(copy.dtype.element_ty), mask=mask)
        tl.store(grad_x + at, dx.to(grad_x.dtype.element_ty), mask=mask)
    tl.store(into, of_weight, mask=d < D)
    tl.store(into + D, of_bias, mask=d < D)


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
                BLOCK_N=BLOCK_N,
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

    Shapes are in the module's docstring; ValueError for others.
    """
    return _OP(grad_normed, grad_rounded, other, x, weight, statistics, sums, dtype=dtype)
