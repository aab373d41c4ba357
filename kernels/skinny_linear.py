"""A linear layer for few rows: norm before it, bias, activation and residual after it, the weights streamed once.

    y = residual + act(norm(x) W^T + bias)       act: none, gelu_tanh, gelu, or swiglu: silu(gate) * up, W = (gate, up)

Shapes: x (M, IN), M <= 64 (8 with a norm); weight (OUT, IN), (2 OUT, IN) for swiglu, rows contiguous; bias (OUT,) or
(2 OUT,); residual (M, OUT); norm_weight, norm_bias (IN,). y (M, OUT) has the residual's dtype, the weight's without
one: with fp32 rows and 16-bit weights the residual stream stays fp32. Sums are fp32 in a fixed order.

Work: a program owns BLOCK_N outputs and reads their weights once, in 128-bit loads that start before x is read.
    1 or 2 rows, 4 of small weights     plain multiplies; a program is one warp if possible, which needs no barrier
    up to 8                             tensor cores, outputs as the long axis, columns split over the warps
    up to 64                            tensor cores on tiles in shared memory, two axes
The last two are in skinny_linear_dot.py. Every program recomputes the norm's statistics, from registers where they hold
the rows. With `overlap` a kernel starts, and loads its weights, while its predecessor runs (common.py, `overlaps`): in
a chain of layers a product of one row then costs only the time of x through it, 1 to 2 us, instead of launch, weights
and x in sequence.
Bytes: OUT IN weights. Bound: memory bandwidth (GPT-2: 1.2 to 4.7 MB a call, 0.3 to 1.1 us at 4.3 TB/s, so in practice
latency; Llama-1B: 8 to 67 MB, 2 to 16 us). Registers at most 255.
"""

from __future__ import annotations

from typing import NamedTuple

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
    overlaps,
    pdl_release,
    pdl_wait,
    register,
    shared_memory,
    silu,
)
from .skinny_linear_dot import _linear_dot, _linear_wide

MAX_ROWS = 64
NORM_ROWS = 8  # rows up to which a norm is allowed: every program norms all rows again


@triton.jit
def _pair(parts, N: tl.constexpr):
    """(K, N) from N vectors (K,), N 2 or 4: joins registers, moves no data."""
    K: tl.constexpr = parts[0].shape[0]
    if N == 2:
        return tl.join(parts[0], parts[1])
    else:
        return tl.reshape(tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3])), [K, 4])


@triton.jit
def _share(weight, first, weight_row, k, IN: tl.constexpr, OUT: tl.constexpr, N: tl.constexpr):
    """Rows first .. first + N of the weight in registers, as tiles of k.shape: N times ceil(IN / k.shape)."""
    K: tl.constexpr = k.shape[0]
    w = ()
    for i in tl.static_range(N):
        row = weight + (first + i).to(tl.int64) * weight_row
        for start in tl.static_range(0, IN, K):
            mask = start + k < IN
            if OUT % N != 0:
                mask = mask & (first + i < OUT)
            w = w + (tl.load(row + start + k, mask=mask, other=0.0),)
    return w


@triton.jit
def _tiles_of(base, k, IN: tl.constexpr, HAS: tl.constexpr):
    """A vector (IN,) in registers, as tiles of k.shape."""
    K: tl.constexpr = k.shape[0]
    v = ()
    if HAS:
        for start in tl.static_range(0, IN, K):
            v = v + (tl.load(base + start + k, mask=start + k < IN, other=0.0),)
    return v


@triton.jit
def _sums(x, w, N: tl.constexpr, C: tl.constexpr):
    """(N,): C tiles of x times N rows of w. Partial sums are kept per component until the end."""
    parts = ()
    for i in tl.static_range(N):
        acc = x[0].to(tl.float32) * w[i * C].to(tl.float32)
        for c in tl.static_range(1, C):
            acc += x[c].to(tl.float32) * w[i * C + c].to(tl.float32)
        parts = parts + (acc,)
    return tl.sum(_pair(parts, N), axis=0)


@triton.jit
def _linear(
    x, weight, bias, residual, norm_weight, norm_bias, out, x_row, weight_row, residual_row, rows, eps,
    IN: tl.constexpr, OUT: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_NORM_BIAS: tl.constexpr,
    OVERLAP: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    if EARLY:
        pdl_release(OVERLAP)
    C: tl.constexpr = (IN + BLOCK_K - 1) // BLOCK_K
    first = tl.program_id(0) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    mask_n = n < OUT
    k = tl.arange(0, BLOCK_K)

    # -- constants: the weights, and their product with the norm's bias
    w = _share(weight, first, weight_row, k, IN, OUT, BLOCK_N)
    b = tl.zeros([BLOCK_N], tl.float32)
    if HAS_BIAS:
        b = tl.load(bias + n, mask=mask_n, other=0.0).to(tl.float32)
    if ACTIVATION == "swiglu":
        w_up = _share(weight + OUT * weight_row, first, weight_row, k, IN, OUT, BLOCK_N)
        b_up = tl.zeros([BLOCK_N], tl.float32)
        if HAS_BIAS:
            b_up = tl.load(bias + OUT + n, mask=mask_n, other=0.0).to(tl.float32)
    gain = _tiles_of(norm_weight, k, IN, NORM != "none")
    if HAS_NORM_BIAS:
        shift = _tiles_of(norm_bias, k, IN, True)
        b += _sums(shift, w, BLOCK_N, C)
        if ACTIVATION == "swiglu":
            b_up += _sums(shift, w_up, BLOCK_N, C)
        pdl_wait(OVERLAP, tl.sum(b, axis=0))
    else:
        pdl_wait(OVERLAP)

    # -- the rows: all loads, then row by row
    xs = ()
    for m in tl.static_range(BLOCK_M):
        for start in tl.static_range(0, IN, BLOCK_K):
            xs = xs + (tl.load(x + m * x_row + start + k, mask=(start + k < IN) & (m < rows), other=0.0),)
    added = ()
    if HAS_RESIDUAL:
        for m in tl.static_range(BLOCK_M):
            added = added + (tl.load(residual + m * residual_row + n, mask=mask_n & (m < rows), other=0.0),)
    pdl_release(OVERLAP)
    for m in tl.static_range(BLOCK_M):
        t = ()
        scale = 1.0
        if NORM == "none":
            for c in tl.static_range(C):
                t = t + (xs[m * C + c],)
        else:
            mean = 0.0
            if NORM == "layer":
                total = xs[m * C].to(tl.float32)
                for c in tl.static_range(1, C):
                    total += xs[m * C + c].to(tl.float32)
                mean = tl.sum(total, axis=0) / IN
            square = tl.zeros([BLOCK_K], tl.float32)
            for c in tl.static_range(C):
                centred = xs[m * C + c].to(tl.float32)
                if NORM == "layer":
                    centred = tl.where(c * BLOCK_K + k < IN, centred - mean, 0.0)
                square += centred * centred
                t = t + (centred * gain[c].to(tl.float32),)
            scale = tl.rsqrt(tl.sum(square, axis=0) / IN + eps)
        y = _sums(t, w, BLOCK_N, C) * scale + b
        if ACTIVATION == "gelu_tanh":
            y = gelu_tanh(y)
        if ACTIVATION == "gelu":
            y = gelu(y)
        if ACTIVATION == "swiglu":
            y = silu(y) * (_sums(t, w_up, BLOCK_N, C) * scale + b_up)
        if HAS_RESIDUAL:
            y += added[m].to(tl.float32)
        tl.store(out + m * OUT + n, y.to(out.dtype.element_ty), mask=mask_n & (m < rows))


class Tiles(NamedTuple):
    """How a launch is tiled. kernel "plain": a program's whole share of the weights in registers; "dot": a warp has
    BLOCK_K columns of a tile, and `ahead` tiles of the weights are in flight; "wide": `ahead` stages."""

    kernel: str
    block_m: int
    block_n: int
    block_k: int
    warps: int
    ahead: int = 0


def tiles(rows: int, outputs: int, inputs: int, row_size: int, itemsize: int, parts: int, shared: int) -> Tiles:
    """row_size, itemsize: bytes of an element of the rows, of the weights. parts: weight rows per output, 2 for swiglu.
    shared: bytes of shared memory that a block may have."""
    width, block_m = triton.next_power_of_2(inputs), triton.next_power_of_2(rows)
    if rows > NORM_ROWS:
        block_n, block_k = 16 if outputs <= 2304 or itemsize == 4 else 32, max(16, min(width, 256 // itemsize))
        stage = block_k * (64 * row_size + block_n * parts * itemsize)
        return Tiles("wide", 64, block_n, block_k, 4, min(4, 1 + shared // stage))
    if rows <= 2 or (rows <= 4 and inputs * outputs * parts < 2**22):
        vector, block_n = 16 // itemsize, 2 if outputs <= 1024 or inputs > 4096 or parts == 2 else 4
        warps, room = 4 if inputs >= 2048 else 1, 200 if parts == 1 else 144
        # registers per thread: the components of x and of the weights, in fp32
        while warps < 16 and triton.cdiv(inputs, 32 * vector * warps) * vector * (block_m + block_n * parts) > room:
            warps *= 2
        return Tiles("plain", block_m, block_n, min(width, 32 * vector * warps), warps)
    warps = 8
    span = max(16 * warps, min(width, (1024 // parts if itemsize == 2 else 256)))
    block_m, block_n = max(8, block_m), 16
    room = shared // (span * itemsize) - block_m  # for tiles of the weights beside one of x; one of them is in use
    ahead = min(triton.cdiv(inputs, span), 1 if itemsize == 4 else 3, room // (block_n * parts) - 1)
    return Tiles("dot", block_m, block_n, span // warps, warps, max(ahead, 1))


def _check(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, activation: str,
    norm: str, norm_weight: torch.Tensor | None, norm_bias: torch.Tensor | None, outputs: int,
) -> None:  # fmt: skip
    """ValueError for inputs that do not fit."""
    op, (rows, inputs) = "skinny_linear", x.shape
    check_dtypes(op, x=x, weight=weight, bias=bias, residual=residual, norm_weight=norm_weight, norm_bias=norm_bias)
    if rows > MAX_ROWS:
        raise ValueError(f"{op}: x has {rows} rows, expected at most {MAX_ROWS} (a library product is faster beyond)")
    if activation not in ("none", "gelu_tanh", "gelu", "swiglu"):
        raise ValueError(f"{op}: activation is {activation!r}, expected 'none', 'gelu_tanh', 'gelu' or 'swiglu'")
    if norm not in ("none", "layer", "rms"):
        raise ValueError(f"{op}: norm is {norm!r}, expected 'none', 'layer' or 'rms'")
    if norm != "none" and rows > NORM_ROWS:
        raise ValueError(f"{op}: x has {rows} rows, expected at most {NORM_ROWS} with a norm (residual_norm has more)")
    if (norm_weight is None) != (norm == "none"):
        raise ValueError(f"{op}: norm_weight is {'absent' if norm_weight is None else 'given'} with norm {norm!r}")
    if norm_bias is not None and norm == "none":
        raise ValueError(f"{op}: norm_bias is given with norm 'none'")
    if activation == "swiglu" and weight.shape[0] % 2:
        raise ValueError(f"{op}: weight has {weight.shape[0]} rows, expected an even number (gate, then up)")
    check_shape(op, "x", x, (rows, inputs))
    check_shape(op, "weight", weight, (weight.shape[0], inputs))
    vectors = (("bias", bias, weight.shape[0]), ("norm_weight", norm_weight, inputs), ("norm_bias", norm_bias, inputs))
    for name, vector, length in vectors:
        if vector is not None:
            check_shape(op, name, vector, (length,))
    if residual is not None:
        check_shape(op, "residual", residual, (rows, outputs))


def _launch(
    x: torch.Tensor, weight: torch.Tensor, *, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None,
    activation: str = "none", norm: str = "none", norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None, eps: float = 1e-5, overlap: bool = False,
    early: bool = False,
) -> torch.Tensor:  # fmt: skip
    rows, inputs = x.shape
    gated = activation == "swiglu"
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    _check(x, weight, bias, residual, activation, norm, norm_weight, norm_bias, outputs)
    out = torch.empty(rows, outputs, dtype=weight.dtype if residual is None else residual.dtype, device=x.device)
    if rows == 0:
        return out
    sizes = x.element_size(), weight.element_size()
    cut = tiles(rows, outputs, inputs, *sizes, 2 if gated else 1, shared_memory(x))
    overlap = overlap and overlaps(x)
    arguments = {
        "x": x,
        "weight": weight,
        "bias": bias,
        "residual": residual,
        "out": out,
        "x_row": x.stride(0),
        "weight_row": weight.stride(0),
        "residual_row": 0 if residual is None else residual.stride(0),
        "rows": rows,
        "IN": inputs,
        "OUT": outputs,
        "ACTIVATION": activation,
        "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None,
        "OVERLAP": overlap,
        "EARLY": early and overlap,
        "BLOCK_M": cut.block_m,
        "BLOCK_N": cut.block_n,
        "BLOCK_K": cut.block_k,
    }
    if cut.kernel == "wide":
        arguments |= {"STAGES": cut.ahead}
    else:
        arguments |= {"norm_weight": norm_weight, "norm_bias": norm_bias, "eps": eps, "NORM": norm}
        arguments |= {"HAS_NORM_BIAS": norm_bias is not None}
    if cut.kernel == "dot":
        keep = inputs * cut.block_m <= 64 * 32 * cut.warps  # the rows stay in registers, at most 64 per thread
        arguments |= {"SLICES": cut.warps, "AHEAD": cut.ahead, "KEEP": keep}
    if cut.kernel != "plain":
        arguments |= {"TYPE": TRITON_TYPE[weight.dtype]}
    kernel = {"plain": _linear, "dot": _linear_dot, "wide": _linear_wide}[cut.kernel]
    with on_device(x):
        kernel[(triton.cdiv(outputs, cut.block_n),)](**arguments, num_warps=cut.warps, num_stages=1, launch_pdl=overlap)
    return out


def _fake(x, weight, *, residual=None, activation="none", **keywords):  # type: ignore[no-untyped-def]
    outputs = weight.shape[0] // 2 if activation == "swiglu" else weight.shape[0]
    dtype = weight.dtype if residual is None else residual.dtype
    return torch.empty(x.shape[0], outputs, dtype=dtype, device=x.device)


_OP = register(
    "skinny_linear(Tensor x, Tensor weight, *, Tensor? bias=None, Tensor? residual=None, str activation='none', "
    "str norm='none', Tensor? norm_weight=None, Tensor? norm_bias=None, float eps=1e-5, "
    "bool overlap=False, bool early=False) -> Tensor",
    _launch,
    _fake,
)


def skinny_linear(
    x: torch.Tensor, weight: torch.Tensor, *, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None,
    activation: str = "none", norm: str = "none", norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None, eps: float = 1e-5, overlap: bool = False,
    early: bool = False,
) -> torch.Tensor:  # fmt: skip
    """y (M, OUT) as in the module's docstring. Forward only. ValueError for inputs that do not fit or over 64 rows.

    norm: "none", "layer" or "rms" (then with norm_weight). overlap: start while the previous kernel in the stream still
    runs; that kernel must not write weight, bias, norm_weight or norm_bias. early: release the next kernel at once
    instead of when x is ready; before its own wait that kernel may read only constants such as weights.
    """
    return _OP(
        x, weight, bias=bias, residual=residual, activation=activation, norm=norm, norm_weight=norm_weight,
        norm_bias=norm_bias, eps=eps, overlap=overlap, early=early,
    )  # fmt: skip
