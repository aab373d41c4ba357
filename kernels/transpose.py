"""Transposes several matrices of one shape, each into its own tensor, in one launch.

    out[i] = x[i].T

Shapes: x (R, C) and out (C, R), contiguous, of one dtype. GPT-2 keeps its weights as (in, out); passes over few rows
read (out, in), from copies that every call of `generate` writes again.
Bytes: every element read and written once, 128-bit accesses on both sides. Bound: memory bandwidth, which is why all
layers' matrices go in one launch: one of GPT-2's alone is less than a wave of tiles. Registers at most 64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .common import check_dtypes, check_shape, on_device, register


@triton.jit
def _turn(x, out, R: tl.constexpr, C: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    source, target = x[0], out[0]
    for i in tl.static_range(1, COUNT):
        here = tl.program_id(2) == i
        source = tl.where(here, x[i], source)
        target = tl.where(here, out[i], target)
    r = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = (r < R)[:, None] & (c < C)[None, :]
    tile = tl.load(source + r.to(tl.int64)[:, None] * C + c[None, :], mask=mask)
    mask = (c < C)[:, None] & (r < R)[None, :]
    tl.store(target + c.to(tl.int64)[:, None] * R + r[None, :], tl.trans(tile), mask=mask)


def _launch(x: Sequence[torch.Tensor], out: Sequence[torch.Tensor]) -> None:
    if len(x) != len(out):
        raise ValueError(f"transpose: found {len(x)} matrices and {len(out)} to write, expected as many")
    rows, columns = x[0].shape
    for source, target in zip(x, out, strict=True):
        check_dtypes("transpose", x=source)
        check_shape("transpose", "x", source, (rows, columns), contiguous=True)
        check_shape("transpose", "out", target, (columns, rows), contiguous=True)
        if source.dtype != x[0].dtype or target.dtype != x[0].dtype:
            raise ValueError(f"transpose: found {source.dtype} and {target.dtype}, expected {x[0].dtype} throughout")
    if not rows or not columns:
        return
    with on_device(x[0]):
        _turn[(triton.cdiv(columns, 64), triton.cdiv(rows, 64), len(x))](
            x=tuple(x), out=tuple(out), R=rows, C=columns, COUNT=len(x), BLOCK=64, num_warps=4
        )


_OP = register("transpose(Tensor[] x, Tensor(a!)[] out) -> ()", _launch, lambda *args: None)


def transpose(x: Sequence[torch.Tensor], out: Sequence[torch.Tensor]) -> None:
    """Writes `out` as in the module's docstring. ValueError for matrices that do not fit."""
    _OP(list(x), list(out))
