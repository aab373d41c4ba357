"""skinny_linear on tensor cores: up to 8 rows with columns split over warps, up to 64 by tiles in shared memory.

Mathematics, shapes and launch are as in skinny_linear.py.
    _linear_dot     outputs are the long axis of a product, so that few rows waste little of it, and each warp has its
                    own columns until the sums are added at the end; tiles of the weights are loaded before x is read
    _linear_wide    two axes, stages of rows and weights, no norm; prefetches its weights into L2 before pdl_wait
Weights are read once, in 128-bit loads. Bound: memory bandwidth. Registers at most 255.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import fetch, gelu, gelu_tanh, pdl_release, pdl_wait, row_statistics, silu


@triton.jit
def _columns(base, rows, mask, row, k, IN: tl.constexpr):
    """Columns k (SLICES, BLOCK_K) of rows of a matrix: (SLICES, rows, BLOCK_K)."""
    return tl.load(
        base + rows[None, :, None] * row + k[:, None, :], mask=mask[None, :, None] & (k < IN)[:, None, :], other=0.0
    )


@triton.jit
def _vector(base, k, IN: tl.constexpr):
    """Components k (SLICES, BLOCK_K) of a vector: (SLICES, 1, BLOCK_K)."""
    return tl.load(base + k[:, None, :], mask=(k < IN)[:, None, :], other=0.0)


@triton.jit
def _over_columns(t):
    """(rows,): the sum of (SLICES, rows, BLOCK_K) over columns."""
    return tl.sum(tl.sum(t, axis=2), axis=0)


@triton.jit
def _linear_dot(
    x, weight, bias, residual, norm_weight, norm_bias, out, x_row, weight_row, residual_row, rows, eps,
    IN: tl.constexpr, OUT: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_NORM_BIAS: tl.constexpr, OVERLAP: tl.constexpr,
    EARLY: tl.constexpr, TYPE: tl.constexpr, SLICES: tl.constexpr, AHEAD: tl.constexpr, KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As _linear, on tensor cores. Outputs are the tile's long axis; each warp has its own columns, BLOCK_K at a time,
    and the SLICES of sums are added up at the end. Weights are loaded AHEAD tiles in advance."""
    if EARLY:
        pdl_release(OVERLAP)
    SPAN: tl.constexpr = SLICES * BLOCK_K
    C: tl.constexpr = (IN + SPAN - 1) // SPAN
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_n = n < OUT
    m = tl.arange(0, BLOCK_M)
    mask_m = m < rows
    k = tl.arange(0, SLICES)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    w = ()
    w_up = ()
    weight_up = weight + OUT * weight_row
    for c in tl.static_range(AHEAD):
        w = w + (_columns(weight, n, mask_n, weight_row, c * SPAN + k, IN),)
        if ACTIVATION == "swiglu":
            w_up = w_up + (_columns(weight_up, n, mask_n, weight_row, c * SPAN + k, IN),)
    b = tl.zeros([BLOCK_N], tl.float32)
    b_up = tl.zeros([BLOCK_N], tl.float32)
    if HAS_BIAS:
        b = tl.load(bias + n, mask=mask_n, other=0.0).to(tl.float32)
        if ACTIVATION == "swiglu":
            b_up = tl.load(bias + OUT + n, mask=mask_n, other=0.0).to(tl.float32)
    gain = ()
    shift = ()
    if NORM != "none":
        for c in tl.static_range(C):
            gain = gain + (_vector(norm_weight, c * SPAN + k, IN),)
            if HAS_NORM_BIAS:
                shift = shift + (_vector(norm_bias, c * SPAN + k, IN),)
    pdl_wait(OVERLAP)

    xs = ()
    for c in tl.static_range(C if KEEP else AHEAD):
        xs = xs + (_columns(x, m, mask_m, x_row, c * SPAN + k, IN),)
    mask = mask_n[:, None] & mask_m[None, :]
    if HAS_RESIDUAL:
        added = tl.load(residual + m[None, :] * residual_row + n[:, None], mask=mask, other=0.0).to(tl.float32)
    pdl_release(OVERLAP)
    mean, scale = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    if NORM != "none":
        if KEEP:
            if NORM == "layer":
                total = xs[0].to(tl.float32)
                for c in tl.static_range(1, C):
                    total += xs[c].to(tl.float32)
                mean = _over_columns(total) / IN
            square = tl.zeros([SLICES, BLOCK_M, BLOCK_K], tl.float32)
            for c in tl.static_range(C):
                inside = (c * SPAN + k < IN)[:, None, :]
                centred = tl.where(inside, xs[c].to(tl.float32) - mean[None, :, None], 0.0)
                square += centred * centred
            scale = tl.rsqrt(_over_columns(square) / IN + eps)
        else:
            mean, scale = row_statistics(x, m, mask_m, x_row, eps, IN, SPAN, NORM)
    acc = tl.zeros([SLICES, BLOCK_N, BLOCK_M], tl.float32)
    acc_up = tl.zeros([SLICES, BLOCK_N, BLOCK_M], tl.float32)
    for c in tl.static_range(C):
        if c + AHEAD < C:
            w = w + (_columns(weight, n, mask_n, weight_row, (c + AHEAD) * SPAN + k, IN),)
            if ACTIVATION == "swiglu":
                w_up = w_up + (_columns(weight_up, n, mask_n, weight_row, (c + AHEAD) * SPAN + k, IN),)
            if not KEEP:
                xs = xs + (_columns(x, m, mask_m, x_row, (c + AHEAD) * SPAN + k, IN),)
        t = xs[c]
        if NORM != "none":
            t = (t.to(tl.float32) - mean[None, :, None]) * scale[None, :, None] * gain[c].to(tl.float32)
            if HAS_NORM_BIAS:
                t += shift[c].to(tl.float32)
        t = tl.permute(t.to(TYPE), (0, 2, 1))
        acc = tl.dot(w[c].to(TYPE), t, acc, input_precision="ieee")
        if ACTIVATION == "swiglu":
            acc_up = tl.dot(w_up[c].to(TYPE), t, acc_up, input_precision="ieee")
    y = tl.sum(acc, axis=0) + b[:, None]
    if ACTIVATION == "gelu_tanh":
        y = gelu_tanh(y)
    if ACTIVATION == "gelu":
        y = gelu(y)
    if ACTIVATION == "swiglu":
        y = silu(y) * (tl.sum(acc_up, axis=0) + b_up[:, None])
    if HAS_RESIDUAL:
        y += added
    tl.store(out + m[None, :] * OUT + n[:, None], y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _linear_wide(
    x, weight, bias, residual, out, x_row, weight_row, residual_row, rows,
    IN: tl.constexpr, OUT: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    OVERLAP: tl.constexpr, EARLY: tl.constexpr, TYPE: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """For more than 8 rows: tiles of rows and weights through shared memory, the weights prefetched into L2."""
    if EARLY:
        pdl_release(OVERLAP)
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_n = n < OUT
    m = tl.arange(0, BLOCK_M)
    mask_m = m < rows
    weight_up = weight + OUT * weight_row
    if OVERLAP:
        fetch(weight, tl.minimum(n, OUT - 1), weight_row, IN)
        if ACTIVATION == "swiglu":
            fetch(weight_up, tl.minimum(n, OUT - 1), weight_row, IN)
    pdl_wait(OVERLAP)
    pdl_release(OVERLAP)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, IN, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        mask = mask_n[:, None] & (k < IN)[None, :]
        t = tl.load(x + m[:, None] * x_row + k[None, :], mask=mask_m[:, None] & (k < IN)[None, :], other=0.0).to(TYPE)
        w = tl.load(weight + n[:, None] * weight_row + k[None, :], mask=mask, other=0.0).to(TYPE)
        acc = tl.dot(t, tl.trans(w), acc, input_precision="ieee")
        if ACTIVATION == "swiglu":
            w = tl.load(weight_up + n[:, None] * weight_row + k[None, :], mask=mask, other=0.0).to(TYPE)
            acc_up = tl.dot(t, tl.trans(w), acc_up, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        if ACTIVATION == "swiglu":
            acc_up += tl.load(bias + OUT + n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "gelu_tanh":
        acc = gelu_tanh(acc)
    if ACTIVATION == "gelu":
        acc = gelu(acc)
    if ACTIVATION == "swiglu":
        acc = silu(acc) * acc_up
    mask = mask_m[:, None] & mask_n[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual + m[:, None] * residual_row + n[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + m[:, None] * OUT + n[None, :], acc.to(out.dtype.element_ty), mask=mask)
