"""The middle of an MLP: bias and activation between its two products, where a library computes those.

    "gelu_tanh": out = gelu(x + bias)                        x (N, F)      GPT-2, by tanh; "gelu" by erf
    "swiglu":    out = silu(gate + bias) * (up + bias)       x (N, 2 F), gate then up      the Llama family

Bytes: x read once and out written once, 128-bit accesses. Bound: memory bandwidth. For few rows skinny_linear does the
same in its epilogue, without a round trip through memory. Registers at most 64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import (
    check_dtypes,
    check_shape,
    gelu,
    gelu_tanh,
    on_device,
    overlaps,
    pdl_release,
    pdl_wait,
    register,
    silu,
)


@triton.jit
def _activate(
    x, bias, out, x_row, F: tl.constexpr, BLOCK_F: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    pdl_wait(OVERLAP)
    pdl_release(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = f < F
    base = x + row * x_row
    a = tl.load(base + f, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        a += tl.load(bias + f, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION == "swiglu":
        up = tl.load(base + F + f, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            up += tl.load(bias + F + f, mask=mask, other=0.0).to(tl.float32)
        a = silu(a) * up
    elif ACTIVATION == "gelu":
        a = gelu(a)
    else:
        a = gelu_tanh(a)
    tl.store(out + row * F + f, a.to(out.dtype.element_ty), mask=mask)


def _launch(x: torch.Tensor, *, activation: str, bias: torch.Tensor | None = None) -> torch.Tensor:
    rows, width = x.shape
    check_dtypes("gated_mlp", x=x, bias=bias)
    if activation not in ("gelu_tanh", "gelu", "swiglu"):
        raise ValueError(f"gated_mlp: activation is {activation!r}, expected 'gelu_tanh', 'gelu' or 'swiglu'")
    gated = activation == "swiglu"
    if gated and width % 2:
        raise ValueError(f"gated_mlp: x has {width} columns, expected an even number (gate, then up)")
    check_shape("gated_mlp", "x", x, (rows, width))
    if bias is not None:
        check_shape("gated_mlp", "bias", bias, (width,))
    inner = width // 2 if gated else width
    out = torch.empty(rows, inner, dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    with on_device(x):
        _activate[(rows, triton.cdiv(inner, 1024))](
            x=x,
            bias=bias,
            out=out,
            x_row=x.stride(0),
            F=inner,
            BLOCK_F=1024,
            ACTIVATION=activation,
            HAS_BIAS=bias is not None,
            OVERLAP=overlaps(x),
            num_warps=4,
            launch_pdl=overlaps(x),
        )
    return out


_OP = register(
    "gated_mlp(Tensor x, *, str activation, Tensor? bias=None) -> Tensor",
    _launch,
    lambda x, *, activation, bias=None: x.new_empty(
        x.shape[0], x.shape[1] // 2 if activation == "swiglu" else x.shape[1]
    ),
)


def gated_mlp(x: torch.Tensor, *, activation: str, bias: torch.Tensor | None = None) -> torch.Tensor:
    """out (N, F) in x's dtype; x is (N, F) for "gelu_tanh", (N, 2 F) for "swiglu", bias as wide as x. Forward only."""
    return _OP(x, activation=activation, bias=bias)
