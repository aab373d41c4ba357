"""A linear layer for few rows: norm before it, bias, activation and residual behind it, the weights streamed once.

    y = residual + act(norm(x) W^T + bias)       act: none, gelu_tanh, gelu, or swiglu: silu(gate) * up, W = (gate, up)

Shapes: x (M, IN), M <= 64; weight (OUT, IN), (2 OUT, IN) for swiglu, rows contiguous; bias (OUT,) or (2 OUT,); residual
(M, OUT); norm_weight, norm_bias (IN,). y (M, OUT) has the residual's dtype, the weight's without one: with fp32 rows
and 16-bit weights the residual stream stays fp32.
Each program owns BLOCK_N outputs and reads their weights once, in 128-bit loads, BLOCK_K columns at a time with the
next ones in flight (8 KiB a stage and program); it recomputes the norm's statistics from x, which lies in L2. Up to 4
rows run on plain multiplies, so that BLOCK_N can be 4 and a layer of 768 outputs still fills 132 processors; more run
on tensor cores. Sums are fp32 in a fixed order.
Bytes: OUT IN weights. Bound: memory bandwidth (GPT-2: 1.2 to 4.7 MB a call, 0.3 to 1.1 us at 4.3 TB/s, so in practice
launch latency; Llama-1B: 8 to 67 MB, 2 to 16 us). Registers at most 255.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import (
    TRITON_TYPE,
    check_dtypes,
    check_shape,
    gelu,
    gelu_tanh,
    on_device,
    products,
    register,
    row_statistics,
    silu,
)

MAX_ROWS = 64


@triton.jit
def _linear(
    x, weight, bias, residual, norm_weight, norm_bias, out, x_row, weight_row, residual_row, rows, eps,
    IN: tl.constexpr, OUT: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_NORM_BIAS: tl.constexpr,
    DOT: tl.constexpr, TYPE: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.arange(0, BLOCK_M)
    mask_m = m < rows
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_n = n < OUT
    mean, scale = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    if NORM != "none":
        mean, scale = row_statistics(x, m, mask_m, x_row, eps, IN, BLOCK_K, NORM)
    y = products(
        x, m, mask_m, x_row, weight, n, mask_n, weight_row, mean, scale, norm_weight, norm_bias,
        IN, BLOCK_K, NORM, HAS_NORM_BIAS, DOT, TYPE, STAGES,
    )  # fmt: skip
    if HAS_BIAS:
        y += tl.load(bias + n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "gelu_tanh":
        y = gelu_tanh(y)
    if ACTIVATION == "gelu":
        y = gelu(y)
    if ACTIVATION == "swiglu":
        up = products(
            x, m, mask_m, x_row, weight, n + OUT, mask_n, weight_row, mean, scale, norm_weight, norm_bias,
            IN, BLOCK_K, NORM, HAS_NORM_BIAS, DOT, TYPE, STAGES,
        )  # fmt: skip
        if HAS_BIAS:
            up += tl.load(bias + OUT + n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        y = silu(y) * up
    mask = mask_m[:, None] & mask_n[None, :]
    if HAS_RESIDUAL:
        y += tl.load(residual + m[:, None] * residual_row + n[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + m[:, None] * OUT + n[None, :], y.to(out.dtype.element_ty), mask=mask)


def tiles(rows: int, outputs: int, inputs: int, itemsize: int) -> tuple[bool, int, int, int, int]:
    """Tensor cores or not, BLOCK_M, BLOCK_N, BLOCK_K, stages."""
    if rows <= 4:
        block_k = min(triton.next_power_of_2(inputs), 1024 * 2 // itemsize)
        return False, triton.next_power_of_2(rows), 4 if rows <= 2 else 2, block_k, 3
    block_m = max(16, triton.next_power_of_2(rows))
    block_k = max(16, min(triton.next_power_of_2(inputs), (256 if block_m <= 16 else 128) * 2 // itemsize))
    return True, block_m, 16 if outputs <= 4096 else 32, block_k, 4


def _launch(
    x: torch.Tensor, weight: torch.Tensor, *, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None,
    activation: str = "none", norm: str = "none", norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None, eps: float = 1e-5,
) -> torch.Tensor:  # fmt: skip
    op, (rows, inputs) = "skinny_linear", x.shape
    check_dtypes(op, x=x, weight=weight, bias=bias, residual=residual, norm_weight=norm_weight, norm_bias=norm_bias)
    if rows > MAX_ROWS:
        raise ValueError(f"{op}: x has {rows} rows, expected at most {MAX_ROWS} (a library product is faster beyond)")
    if activation not in ("none", "gelu_tanh", "gelu", "swiglu"):
        raise ValueError(f"{op}: activation is {activation!r}, expected 'none', 'gelu_tanh', 'gelu' or 'swiglu'")
    if norm not in ("none", "layer", "rms"):
        raise ValueError(f"{op}: norm is {norm!r}, expected 'none', 'layer' or 'rms'")
    if (norm_weight is None) != (norm == "none"):
        raise ValueError(f"{op}: norm_weight is {'absent' if norm_weight is None else 'given'} with norm {norm!r}")
    if norm_bias is not None and norm == "none":
        raise ValueError(f"{op}: norm_bias is given with norm 'none'")
    gated = activation == "swiglu"
    if gated and weight.shape[0] % 2:
        raise ValueError(f"{op}: weight has {weight.shape[0]} rows, expected an even number (gate, then up)")
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    check_shape(op, "x", x, (rows, inputs))
    check_shape(op, "weight", weight, (weight.shape[0], inputs))
    vectors = (("bias", bias, weight.shape[0]), ("norm_weight", norm_weight, inputs), ("norm_bias", norm_bias, inputs))
    for name, vector, length in vectors:
        if vector is not None:
            check_shape(op, name, vector, (length,))
    if residual is not None:
        check_shape(op, "residual", residual, (rows, outputs))
    out = torch.empty(rows, outputs, dtype=weight.dtype if residual is None else residual.dtype, device=x.device)
    if rows == 0:
        return out
    dot, block_m, block_n, block_k, stages = tiles(rows, outputs, inputs, weight.element_size())
    with on_device(x):
        _linear[(triton.cdiv(outputs, block_n),)](
            x=x,
            weight=weight,
            bias=bias,
            residual=residual,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            out=out,
            x_row=x.stride(0),
            weight_row=weight.stride(0),
            residual_row=0 if residual is None else residual.stride(0),
            rows=rows,
            eps=eps,
            IN=inputs,
            OUT=outputs,
            ACTIVATION=activation,
            NORM=norm,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            HAS_NORM_BIAS=norm_bias is not None,
            DOT=dot,
            TYPE=TRITON_TYPE[weight.dtype],
            STAGES=stages,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            num_warps=4,
        )
    return out


def _fake(x, weight, *, residual=None, activation="none", **keywords):  # type: ignore[no-untyped-def]
    outputs = weight.shape[0] // 2 if activation == "swiglu" else weight.shape[0]
    dtype = weight.dtype if residual is None else residual.dtype
    return torch.empty(x.shape[0], outputs, dtype=dtype, device=x.device)


_OP = register(
    "skinny_linear(Tensor x, Tensor weight, *, Tensor? bias=None, Tensor? residual=None, str activation='none', "
    "str norm='none', Tensor? norm_weight=None, Tensor? norm_bias=None, float eps=1e-5) -> Tensor",
    _launch,
    _fake,
)


def skinny_linear(
    x: torch.Tensor, weight: torch.Tensor, *, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None,
    activation: str = "none", norm: str = "none", norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None, eps: float = 1e-5,
) -> torch.Tensor:  # fmt: skip
    """y (M, OUT) as in the module's docstring. Forward only. ValueError for inputs that do not fit or over 64 rows.

    norm: "none", "layer" or "rms" (then with norm_weight).
    """
    return _OP(
        x, weight, bias=bias, residual=residual, activation=activation, norm=norm, norm_weight=norm_weight,
        norm_bias=norm_bias, eps=eps,
    )  # fmt: skip
