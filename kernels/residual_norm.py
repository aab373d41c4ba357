"""Residual add, bias and normalisation in one launch.

    total = x (+ bias) (+ residual)
    LayerNorm: normed = (total - mean) / sqrt(var + eps) * weight (+ norm_bias)
    RMSNorm:   normed = total / sqrt(mean(total^2) + eps) * weight

Shapes: x, residual (N, D); bias, weight, norm_bias (D,). normed has x's dtype, total the residual's (x's without one):
a chain of thoughts keeps its residual stream in fp32, with 16-bit activations.
Bytes: N D elements of each operand and result once, in 128-bit accesses; the row stays in registers between its
statistics and its result. Bound: memory bandwidth, launch latency below about 2 MB. Registers at most 128.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import check_dtypes, check_shape, on_device, overlaps, pdl_release, pdl_wait, register


@triton.jit
def _norm(
    x, residual, bias, weight, norm_bias, normed, total, x_row, residual_row, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, LAYER: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM_BIAS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    pdl_wait(OVERLAP)
    pdl_release(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    mask = d < D
    t = tl.load(x + row * x_row + d, mask=mask, other=0.0).to(tl.float32)
    gain = tl.load(weight + d, mask=mask, other=0.0).to(tl.float32)  # in flight before the sums' barriers
    if HAS_NORM_BIAS:
        shift = tl.load(norm_bias + d, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        t += tl.load(bias + d, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        t += tl.load(residual + row * residual_row + d, mask=mask, other=0.0).to(tl.float32)
    tl.store(total + row * D + d, t.to(total.dtype.element_ty), mask=mask)
    if LAYER:
        t = tl.where(mask, t - tl.sum(t, axis=0) / D, 0.0)
    y = t * tl.rsqrt(tl.sum(t * t, axis=0) / D + eps) * gain
    if HAS_NORM_BIAS:
        y += shift
    tl.store(normed + row * D + d, y.to(normed.dtype.element_ty), mask=mask)


def _launch(
    x: torch.Tensor, weight: torch.Tensor, *, kind: str = "layer", residual: torch.Tensor | None = None,
    bias: torch.Tensor | None = None, norm_bias: torch.Tensor | None = None, eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    rows, dim = x.shape
    check_dtypes("residual_norm", x=x, weight=weight, residual=residual, bias=bias, norm_bias=norm_bias)
    if kind not in ("layer", "rms"):
        raise ValueError(f"residual_norm: kind is {kind!r}, expected 'layer' or 'rms'")
    check_shape("residual_norm", "x", x, (rows, dim))
    check_shape("residual_norm", "weight", weight, (dim,))
    if residual is not None:
        check_shape("residual_norm", "residual", residual, (rows, dim))
    for name, vector in (("bias", bias), ("norm_bias", norm_bias)):
        if vector is not None:
            check_shape("residual_norm", name, vector, (dim,))
    normed = torch.empty(rows, dim, dtype=x.dtype, device=x.device)
    total = torch.empty(rows, dim, dtype=x.dtype if residual is None else residual.dtype, device=x.device)
    if rows == 0:
        return normed, total
    block_d = triton.next_power_of_2(dim)
    with on_device(x):
        _norm[(rows,)](
            x=x,
            residual=residual,
            bias=bias,
            weight=weight,
            norm_bias=norm_bias,
            normed=normed,
            total=total,
            x_row=x.stride(0),
            residual_row=0 if residual is None else residual.stride(0),
            eps=eps,
            D=dim,
            BLOCK_D=block_d,
            LAYER=kind == "layer",
            HAS_RESIDUAL=residual is not None,
            HAS_BIAS=bias is not None,
            HAS_NORM_BIAS=norm_bias is not None,
            OVERLAP=overlaps(x),
            num_warps=max(1, min(16, block_d // 256)),
            launch_pdl=overlaps(x),
        )
    return normed, total


def _fake(x: torch.Tensor, weight: torch.Tensor, *, residual: torch.Tensor | None = None, **keywords):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty(
        x.shape, dtype=x.dtype if residual is None else residual.dtype, device=x.device
    )


_OP = register(
    "residual_norm(Tensor x, Tensor weight, *, str kind='layer', Tensor? residual=None, Tensor? bias=None, "
    "Tensor? norm_bias=None, float eps=1e-5) -> (Tensor, Tensor)",
    _launch,
    _fake,
)


def residual_norm(
    x: torch.Tensor, weight: torch.Tensor, *, kind: str = "layer", residual: torch.Tensor | None = None,
    bias: torch.Tensor | None = None, norm_bias: torch.Tensor | None = None, eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(normed, total), both (N, D); kind is "layer" or "rms". Forward only: training runs the model's own norms.

    ValueError for shapes, dtypes or a kind that do not fit.
    """
    return _OP(x, weight, kind=kind, residual=residual, bias=bias, norm_bias=norm_bias, eps=eps)
