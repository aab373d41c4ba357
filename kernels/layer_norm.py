"""LayerNorm of a training step under autocast, with the rounded copy that the next product reads.

    normed = (x - mean) / sqrt(var + eps) * weight (+ bias),   rounded = normed in another dtype

Shapes: x (N, D), weight, bias (D,); normed in x's dtype, rounded in `dtype`; statistics (N, 2) fp32, the mean and the
reciprocal deviation, for layer_norm_backward.py. The row stays in registers between statistics and results.
Bytes: N D elements of x once and of each result once, in 128-bit accesses. Bound: memory bandwidth.
Registers at most 128.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import check_dtypes, check_shape, on_device, register


@triton.jit
def _norm(
    x, weight, bias, normed, rounded, statistics, x_row, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    mask = d < D
    t = tl.load(x + row * x_row + d, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(t, axis=0) / D
    t = tl.where(mask, t - mean, 0.0)
    scale = tl.rsqrt(tl.sum(t * t, axis=0) / D + eps)
    y = t * scale * tl.load(weight + d, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias + d, mask=mask, other=0.0).to(tl.float32)
    tl.store(normed + row * D + d, y.to(normed.dtype.element_ty), mask=mask)
    tl.store(rounded + row * D + d, y.to(rounded.dtype.element_ty), mask=mask)
    tl.store(statistics + 2 * row, mean)
    tl.store(statistics + 2 * row + 1, scale)


def _launch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, dim = x.shape
    check_dtypes("layer_norm", x=x, weight=weight, bias=bias)
    check_shape("layer_norm", "x", x, (rows, dim))
    check_shape("layer_norm", "weight", weight, (dim,))
    if bias is not None:
        check_shape("layer_norm", "bias", bias, (dim,))
    normed, rounded, statistics = _fake(x, weight, bias, eps=eps, dtype=dtype)
    if rows:
        block_d = triton.next_power_of_2(dim)
        with on_device(x):
            _norm[(rows,)](
                x=x,
                weight=weight,
                bias=bias,
                normed=normed,
                rounded=rounded,
                statistics=statistics,
                x_row=x.stride(0),
                eps=eps,
                D=dim,
                BLOCK_D=block_d,
                HAS_BIAS=bias is not None,
                num_warps=max(1, min(16, block_d // 256)),
            )
    return normed, rounded, statistics


def _fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[0], 2, dtype=torch.float32)


_OP = register(
    "layer_norm(Tensor x, Tensor weight, Tensor? bias, *, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    _launch,
    _fake,
)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(normed, rounded, statistics) as in the module's docstring, without autograd. ValueError for other shapes."""
    return _OP(x, weight, bias, eps=eps, dtype=dtype)
