"""Shared by the kernel files: registration with torch, launch guards, and device functions of several kernels.

Device functions compute in fp32. tanh is written out because libdevice exists only on the device, and the tests also
run in the interpreter.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import library

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LIBRARY = library.Library("coconut_fast", "FRAGMENT")
PLANNED = 90  # the architecture assumed where there is no device (interpreter, ahead-of-time compilation)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
TRITON_TYPE = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

# ---- registration and launching --------------------------------------------------------------------------------------


def register(schema: str, launch: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define `coconut_fast::<schema>` with a CUDA and a shape-only implementation; returns the op's overload.

    The low-level Library costs about 2 us a call where `custom_op` costs 12. Under the interpreter the
    launcher serves CPU tensors too, so that opcheck and torch.compile can be tested without a device.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, launch, "CUDA")
    if INTERPRETED:
        LIBRARY.impl(name, launch, "CPU")
    library.register_fake(f"coconut_fast::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.coconut_fast, name).default


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensor's, at no cost if it already is."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def arch(tensor: torch.Tensor) -> int:
    """Compute capability: 80 for an A100, 89 for a 4090, 90 for an H100 or H200, 120 for a 5090."""
    if not tensor.is_cuda:
        return PLANNED
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def generation(tensor: torch.Tensor) -> int:
    """Key of the tables that depend on how tensor cores are fed: 90 by warpgroups, from shared memory; 80 by single
    warps, from registers, as on later consumer cards too (120)."""
    return 90 if 90 <= arch(tensor) < 120 else 80


def shared_memory(tensor: torch.Tensor) -> int:
    """Bytes of shared memory that a block may have."""
    key = arch(tensor)
    return (99 if key in (86, 89) or key >= 120 else 163 if key < 90 else 227) << 10


def overlaps(tensor: torch.Tensor) -> bool:
    """Whether kernels use programmatic dependent launch (sm_90 and later).

    A kernel may then start while its predecessor in the stream runs. It calls `pdl_wait` before any write and before it
    reads what an earlier kernel may still be writing; when `pdl_wait` returns, all earlier kernels have finished.
    Before it, a kernel may read constants, and, if its predecessor calls `pdl_release` only after its own wait,
    everything the predecessor does not write.
    """
    return not INTERPRETED and arch(tensor) >= 90


def check_dtypes(op: str, **tensors: torch.Tensor | None) -> None:
    """ValueError unless every tensor is fp32, fp16 or bf16 (fp64 runs on the torch backend)."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in TRITON_TYPE:
            raise ValueError(f"{op}: {name} is {tensor.dtype}, expected float32, float16 or bfloat16")


def check_shape(
    op: str, name: str, tensor: torch.Tensor, expected: tuple[int, ...], *, contiguous: bool = False
) -> None:
    """ValueError unless the tensor has the expected shape and its last dimension, or all of it, is contiguous.

    `contiguous` is for tensors that a kernel reads without strides. About 0.2 us.
    """
    if tensor.shape != expected:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {expected}")
    if tensor.is_contiguous():
        return
    if contiguous:
        raise ValueError(f"{op}: {name} has strides {tensor.stride()}, expected a contiguous tensor")
    if tensor.stride(-1) != 1 and expected[-1] > 1:
        raise ValueError(f"{op}: {name} has stride {tensor.stride(-1)} in its last dimension, expected 1")


def check_rotary(
    op: str, rows: int, head_dim: int, cos: torch.Tensor | None, sin: torch.Tensor | None,
    positions: torch.Tensor | None, query_norm: torch.Tensor | None, key_norm: torch.Tensor | None,
) -> int:  # fmt: skip
    """ROTARY of load_head, 0 without cos and sin; ValueError unless the other tensors it reads fit the heads."""
    for name, norm in (("query_norm", query_norm), ("key_norm", key_norm)):
        if norm is not None:
            check_shape(op, name, norm, (head_dim,))
    if cos is None and sin is None:
        return 0
    if cos is None or sin is None or positions is None:
        given = {"cos": cos, "sin": sin, "positions": positions}
        missing = ", ".join(name for name, tensor in given.items() if tensor is None)
        raise ValueError(f"{op}: without {missing}, expected cos, sin and positions, or neither cos nor sin")
    half = cos.shape[-1]
    if 2 * half > head_dim:
        raise ValueError(f"{op}: cos has {half} columns, expected at most half of a head's {head_dim} components")
    check_shape(op, "cos", cos, (cos.shape[0], half), contiguous=True)
    check_shape(op, "sin", sin, (cos.shape[0], half), contiguous=True)
    check_shape(op, "positions", positions, (rows,))
    return 2 * half


def compute_type(*dtypes: torch.dtype) -> Any:
    """The operand type of the matrix products: the inputs' common type, as PyTorch promotes."""
    common = dtypes[0]
    for dtype in dtypes[1:]:
        common = torch.promote_types(common, dtype)
    return TRITON_TYPE[common]


# ---- device functions ------------------------------------------------------------------------------------------------


@triton.jit
def pdl_wait(OVERLAP: tl.constexpr, ready=None):
    """Wait until all earlier kernels have finished, their writes visible (`overlaps`); first compute `ready`, fp32."""
    if OVERLAP:
        if ready is None:
            tl.extra.cuda.gdc_wait()
        else:  # both branches wait, so that the wait needs `ready` and cannot move ahead of it
            tl.inline_asm_elementwise(
                "{ .reg .pred p; setp.eq.b32 p, $1, 0x7fffffff; @p griddepcontrol.wait; @!p griddepcontrol.wait; "
                "mov.b32 $0, $1; }",
                "=r,r", [ready], dtype=tl.float32, is_pure=False, pack=1,
            )  # fmt: skip


@triton.jit
def pdl_release(OVERLAP: tl.constexpr):
    """Let the next kernel start once every program of this one has come here: after `pdl_wait`, or first of all where
    EARLY."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def fetch(base, rows, row, IN: tl.constexpr):
    """Prefetch rows of a matrix into L2, by lines of 128 bytes. Not for the interpreter."""
    LINE: tl.constexpr = 1024 // base.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = triton.next_power_of_2((IN + LINE - 1) // LINE)
    k = tl.minimum(tl.arange(0, LINES) * LINE, IN - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [base + rows[:, None] * row + k[None, :]],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def tanh(x):
    """tanh to a few ulp: the odd series below 1/4, where 1 - 2 / (exp(2x) + 1) would cancel."""
    y = x * x
    series = x * (1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, series, 1 - 2 / (tl.exp(2 * x) + 1))


@triton.jit
def gelu_tanh(x):
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), GPT-2's activation."""
    return 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


@triton.jit
def gelu(x):
    """x/2 (1 + erf(x / sqrt 2)), the exact one: CODI's projection."""
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def silu(x):
    """x sigmoid(x)."""
    return x / (1 + tl.exp(-x))


@triton.jit
def mix(x):
    """Bijective mixing of uint32 words: lowbias32, the hash of dropout (reference.py, `_mix`)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def slots_of(table_row, j, mask, PAGE: tl.constexpr):
    """Cache slots (int64) of positions j of the row whose pages start at table_row; masked positions give a slot of
    page 0 and must not be read."""
    pages = tl.load(table_row + j // PAGE, mask=mask, other=0)
    return pages.to(tl.int64) * PAGE + j % PAGE


@triton.jit
def load_head(base, d, mask, K: tl.constexpr, weight, eps, cos, sin, NORM: tl.constexpr, ROTARY: tl.constexpr):
    """Head vectors in fp32, RMS-normed over K where NORM, their first ROTARY components rotated by halves.

    base: pointers to the vectors' first elements, broadcastable against d (components) to the shape of mask; weight:
    pointer to (K,); cos, sin: pointers to the ROTARY // 2 values of the vector's position.
    """
    x = tl.load(base + d, mask=mask, other=0.0).to(tl.float32)
    scale = 1.0
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, axis=-1, keep_dims=True) / K + eps)
        x = x * scale * tl.load(weight + d, mask=d < K, other=0.0).to(tl.float32)
    if ROTARY > 0:
        HALF: tl.constexpr = ROTARY // 2
        other = tl.where(d < HALF, d + HALF, d - HALF)
        rotated = d < ROTARY
        y = tl.load(base + other, mask=mask & rotated, other=0.0).to(tl.float32)
        if NORM:
            y = y * scale * tl.load(weight + other, mask=rotated, other=0.0).to(tl.float32)
        c = tl.load(cos + d % HALF, mask=rotated, other=1.0).to(tl.float32)
        s = tl.load(sin + d % HALF, mask=rotated, other=0.0).to(tl.float32)
        x = tl.where(rotated, tl.where(d < HALF, x * c - y * s, x * c + y * s), x)
    return x


@triton.jit
def row_statistics(x, rows, mask_m, x_row, eps, IN: tl.constexpr, BLOCK_K: tl.constexpr, NORM: tl.constexpr):
    """Mean (0 unless LayerNorm) and reciprocal deviation of rows of x: one pass each, over a row that is in L2."""
    BLOCK_M: tl.constexpr = rows.shape[0]
    mean = tl.zeros([BLOCK_M], tl.float32)
    if NORM == "layer":
        for start in range(0, IN, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            mask = mask_m[:, None] & (k < IN)[None, :]
            t = tl.load(x + rows[:, None] * x_row + k[None, :], mask=mask, other=0.0)
            mean += tl.sum(t.to(tl.float32), axis=1)
        mean = mean / IN
    square = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, IN, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = mask_m[:, None] & (k < IN)[None, :]
        t = tl.load(x + rows[:, None] * x_row + k[None, :], mask=mask, other=0.0)
        centred = tl.where(mask, t.to(tl.float32) - mean[:, None], 0.0)
        square += tl.sum(centred * centred, axis=1)
    return mean, tl.rsqrt(square / IN + eps)


@triton.jit
def products(
    x, rows, mask_m, x_row, weight, n, mask_n, weight_row,
    IN: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr, TYPE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x[rows] @ weight[n].T in fp32, (BLOCK_M, BLOCK_N): the weights' rows are streamed once, in order.

    DOT: tensor cores, rows padded to 16. Else plain multiplies, for up to 4 rows: partial sums are kept per component
    until the end, so the loop has no shuffles and its loads run STAGES ahead.
    """
    BLOCK_M: tl.constexpr = rows.shape[0]
    BLOCK_N: tl.constexpr = n.shape[0]
    if DOT:  # noqa: SIM108 (a constant, and the branches differ in shape)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_K], tl.float32)
    for start in tl.range(0, IN, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < IN
        w = tl.load(weight + n[:, None] * weight_row + k[None, :], mask=mask_n[:, None] & inside[None, :], other=0.0)
        mask = mask_m[:, None] & inside[None, :]
        t = tl.load(x + rows[:, None] * x_row + k[None, :], mask=mask, other=0.0)
        if DOT:
            acc = tl.dot(t.to(TYPE), tl.trans(w.to(TYPE)), acc, input_precision="ieee")
        else:
            acc += t.to(tl.float32)[:, None, :] * w.to(tl.float32)[None, :, :]
    if not DOT:
        acc = tl.sum(acc, axis=2)
    return acc


@triton.jit
def row_split(
    lengths, rows, positions, page_table, table_row, b, split,
    SPLIT: tl.constexpr, WINDOW: tl.constexpr, APPEND: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """Of row b: its length, its pages, its offset in cos and sin, the first position it sees, the first and last split
    with positions it sees, and the end of its stored positions in `split`."""
    length = tl.load(lengths + b)
    table = page_table + tl.load(rows + b).to(tl.int64) * table_row
    angle = tl.zeros([], tl.int64)
    if ROTARY > 0:
        angle = tl.load(positions + b).to(tl.int64) * (ROTARY // 2)
    low = length * 0
    if WINDOW > 0:
        low = tl.maximum(length - WINDOW, 0)
    end = tl.minimum((split + 1) * SPLIT, length)
    if APPEND:
        end = tl.minimum(end, length - 1)
    return length, table, angle, low, low // SPLIT, (length - 1) // SPLIT, end


@triton.jit
def combine_splits(
    sums, sums_lse, counter, out, lse, e, first, last,
    HEADS: tl.constexpr, KV: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The end of a program that stored partial sums of HEADS heads: the last program to arrive adds all, in order."""
    tl.debug_barrier()  # all of this program's stores come before the count that publishes them
    arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    if arrived == last - first:
        tl.debug_barrier()
        tl.store(counter, 0)
        for g in tl.static_range(HEADS):
            top = tl.full([], float("-inf"), tl.float32)
            total = tl.full([], 0.0, tl.float32)
            acc = tl.zeros([e.shape[0]], tl.float32)
            for chunk in range(first, last + 1, CHUNK):
                # .cg: from L2, since a line in L1 may be older than the partial sums
                i = chunk + tl.arange(0, CHUNK)
                at = i * HEADS + g
                part_lse = tl.load(sums_lse + at, mask=i <= last, other=float("-inf"), cache_modifier=".cg")
                part = tl.load(sums + at[:, None] * KV + e[None, :], mask=(i <= last)[:, None] & (e < KV)[None, :],
                               other=0.0, cache_modifier=".cg")  # fmt: skip
                new_top = tl.maximum(top, tl.max(part_lse, axis=0))
                shrink = tl.exp2(top - new_top)
                share = tl.exp2(part_lse - new_top)
                total = total * shrink + tl.sum(share, axis=0)
                acc = acc * shrink + tl.sum(part * share[:, None], axis=0)
                top = new_top
            tl.store(out + g * KV + e, (acc / total).to(out.dtype.element_ty), mask=e < KV)
            tl.store(lse + g, (top + tl.log2(total)) * LN2)
