"""Sums of a matrix's columns, added to partial sums: the bias gradient of a product, over several calls.

    sums[i] += sum of the i-th share of x's rows

Shapes: x (N, F), sums (P, F) fp32. The bias gradient is sums.sum(0) after the last call, always in the same order.
Bytes: N F elements once, in 128-bit loads. Bound: memory bandwidth. Registers at most 128.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import check_dtypes, check_shape, on_device, register

BLOCK_N, BLOCK_F, STAGES, WARPS = 32, 128, 4, 4


@triton.jit(do_not_specialize=["rows", "share"])  # they change from batch to batch
def _sums(
    x, sums, rows, share, x_row,
    F: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(1)
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    into = sums + program.to(tl.int64) * F + f
    before = tl.load(into, mask=f < F, other=0.0)
    total = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
    end = tl.minimum(program * share + share, rows)
    for start in tl.range(program * share, end, BLOCK_N, num_stages=STAGES):
        n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask = (n < end)[:, None] & (f < F)[None, :]
        total += tl.load(x + n[:, None] * x_row + f[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(into, before + tl.sum(total, axis=0), mask=f < F)


def _launch(x: torch.Tensor, sums: torch.Tensor) -> None:
    rows, width = x.shape
    check_dtypes("column_sums", x=x)
    check_shape("column_sums", "x", x, (rows, width))
    check_shape("column_sums", "sums", sums, (len(sums), width), contiguous=True)
    if rows and width:
        share = triton.cdiv(rows, len(sums))
        with on_device(x):
            _sums[(triton.cdiv(width, BLOCK_F), triton.cdiv(rows, share))](
                x=x,
                sums=sums,
                rows=rows,
                share=share,
                x_row=x.stride(0),
                F=width,
                BLOCK_N=BLOCK_N,
                BLOCK_F=BLOCK_F,
                STAGES=STAGES,
                num_warps=WARPS,
            )


_OP = register("column_sums(Tensor x, Tensor(a!) sums) -> ()", _launch, lambda *args: None)


def column_sums(x: torch.Tensor, sums: torch.Tensor) -> None:
    """Adds to sums as in the module's docstring. ValueError for shapes that do not fit."""
    _OP(x, sums)
