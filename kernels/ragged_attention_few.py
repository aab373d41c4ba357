"""The derivative of ragged_attention for few queries in every row: dq, dk and dv in one launch.

Mathematics and shapes are as in ragged_attention_backward.py. A program owns a row and a kv head: it holds all queries,
loops over the positions once, and adds dk and dv of each tile to the buffers at once. No atomics.
A single query, with a kv head for each query head, takes plain multiplies; up to 64 queries x heads of a group take
tensor cores, in 16 bits, with heads up to 64 wide, from sm_90 on, and only with enough programs to fill a GPU.
Bound by memory: keys and values read once, the buffers read and written once (16 bytes per position, head and
component), in 128-bit accesses. Registers at most 255.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .common import LOG2E, generation, on_device, slots_of
from .ragged_attention import bend, kept, load, words

MAX_PAIRS = 64  # queries x heads of a group that one program takes at once, for all positions of its row and kv head
PROGRAMS = 256  # how many such programs are enough to fill a GPU


@triton.jit(do_not_specialize=["seed", "threshold"])
def _backward_few(
    grad_out, query, keys, values, out, lse, grad_query, grad_keys, grad_values, page_table, rows, row_offsets, lengths,
    grads_from, grad_token, grad_head, query_token, query_head, table_row, scaling, seed, threshold, keep_scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, KV: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, TYPE: tl.constexpr, HAS_FROM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0)
    b = tl.program_id(1)
    start_row = tl.load(row_offsets + b)
    n = tl.load(row_offsets + b + 1) - start_row
    if n == 0:
        return
    length = tl.load(lengths + b)
    added = 0  # the first position whose gradients are added here
    if HAS_FROM:
        added = tl.load(grads_from + b)
    table = page_table + tl.load(rows + b).to(tl.int64) * table_row
    m = tl.arange(0, BLOCK_M)
    i = m // GROUP
    h = kv_head * GROUP + m % GROUP
    valid = i < n
    p = length - n + i
    token = (start_row + i).to(tl.int64)
    head = token * (KV_HEADS * GROUP) + h
    d = tl.arange(0, BLOCK_K)
    e = tl.arange(0, BLOCK_KV)
    q = load(query, token * query_token + h * query_head, 1, d, valid, K, TYPE)
    do = load(grad_out, token * grad_token + h * grad_head, 1, e, valid, KV, TYPE)
    o = load(out, head, KV, e, valid, KV, tl.float32)
    dd = tl.sum(do.to(tl.float32) * o, axis=1)
    norm = tl.load(lse + head, mask=valid, other=0.0) * LOG2E
    hashed = p
    if DROPOUT:
        hashed = words(table, p, valid, h, seed, PAGE)
    low = 0
    if WINDOW > 0:
        low = tl.maximum(length - n - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    dq = tl.zeros([BLOCK_K, BLOCK_M], tl.float32)  # transposed, as ds is
    for start in range(low, length, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        stored = j < length
        slots = slots_of(table, j, stored, PAGE) * KV_HEADS + kv_head
        k = load(keys, slots, K, d, stored, K, TYPE)
        v = load(values, slots, KV, e, stored, KV, TYPE)
        s, slope = bend(tl.dot(k, tl.trans(q), input_precision="ieee") * scaling, SOFTCAP)
        seen = stored[:, None] & valid[None, :] & (j[:, None] <= p[None, :])
        if WINDOW > 0:
            seen = seen & (p[None, :] - j[:, None] < WINDOW)
        w = tl.where(seen, tl.exp2(s * LOG2E - norm[None, :]), 0.0)
        dw = tl.dot(v, tl.trans(do), input_precision="ieee")
        dropped = w
        if DROPOUT:
            keep = kept(hashed[None, :], j[:, None], threshold)
            dw = tl.where(keep, dw * keep_scale, 0.0)
            dropped = tl.where(keep, w * keep_scale, 0.0)
        ds = (w * (dw - dd[None, :]) * slope).to(TYPE)
        dq = tl.dot(tl.trans(k), ds, dq, input_precision="ieee")
        if start + BLOCK_N > added:
            adds = (stored & (j >= added))[:, None]
            into = grad_keys + slots[:, None] * K + d[None, :]
            mask = adds & (d < K)[None, :]
            dk = tl.dot(ds, q, input_precision="ieee") * scaling
            tl.store(into, tl.load(into, mask=mask, other=0.0) + dk, mask=mask)
            into = grad_values + slots[:, None] * KV + e[None, :]
            mask = adds & (e < KV)[None, :]
            dv = tl.dot(dropped.to(TYPE), do, input_precision="ieee")
            tl.store(into, tl.load(into, mask=mask, other=0.0) + dv, mask=mask)
    mask = valid[:, None] & (d < K)[None, :]
    dq = tl.trans(dq) * scaling
    tl.store(grad_query + head[:, None] * K + d[None, :], dq.to(grad_query.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["seed", "threshold"])
def _backward_one(
    grad_out, query, keys, values, out, lse, grad_query, grad_keys, grad_values, page_table, rows, lengths, grads_from,
    grad_token, grad_head, query_token, query_head, table_row, scaling, seed, threshold, keep_scale,
    HEADS: tl.constexpr, K: tl.constexpr, KV: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, HAS_FROM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_KV: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + b)
    if length == 0:
        return
    p = length - 1
    table = page_table + tl.load(rows + b).to(tl.int64) * table_row
    d = tl.arange(0, BLOCK_K)
    e = tl.arange(0, BLOCK_KV)
    head = b * HEADS + h
    q = tl.load(query + b * query_token + h * query_head + d, mask=d < K, other=0.0).to(tl.float32)
    do = tl.load(grad_out + b * grad_token + h * grad_head + e, mask=e < KV, other=0.0).to(tl.float32)
    o = tl.load(out + head * KV + e, mask=e < KV, other=0.0).to(tl.float32)
    dd = tl.sum(do * o, axis=0)
    norm = tl.load(lse + head) * LOG2E
    added = 0  # the first position whose gradients are added here
    if HAS_FROM:
        added = tl.load(grads_from + b)
    hashed = p
    if DROPOUT:
        hashed = words(table, p, p >= 0, h, seed, PAGE)
    low = 0
    if WINDOW > 0:
        low = tl.maximum(length - WINDOW, 0)
    dq = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in tl.range(low // BLOCK_N * BLOCK_N, length, BLOCK_N, num_stages=STAGES):
        j = start + tl.arange(0, BLOCK_N)
        seen = (j >= low) & (j < length)
        slots = slots_of(table, j, seen, PAGE) * HEADS + h
        k = load(keys, slots, K, d, seen, K, tl.float32)
        v = load(values, slots, KV, e, seen, KV, tl.float32)
        s, slope = bend(tl.sum(k * q[None, :], axis=1) * scaling, SOFTCAP)
        w = tl.where(seen, tl.exp2(s * LOG2E - norm), 0.0)
        dw = tl.sum(v * do[None, :], axis=1)
        dropped = w
        if DROPOUT:
            keep = kept(hashed, j, threshold)
            dw = tl.where(keep, dw * keep_scale, 0.0)
            dropped = tl.where(keep, w * keep_scale, 0.0)
        ds = w * (dw - dd) * slope * scaling
        dq += ds[:, None] * k
        if start + BLOCK_N > added:
            adds = (seen & (j >= added))[:, None]
            into = grad_keys + slots[:, None] * K + d[None, :]
            mask = adds & (d < K)[None, :]
            tl.store(into, tl.load(into, mask=mask, other=0.0) + ds[:, None] * q[None, :], mask=mask)
            into = grad_values + slots[:, None] * KV + e[None, :]
            mask = adds & (e < KV)[None, :]
            tl.store(into, tl.load(into, mask=mask, other=0.0) + dropped[:, None] * do[None, :], mask=mask)
    tl.store(grad_query + head * K + d, tl.sum(dq, axis=0).to(grad_query.dtype.element_ty), mask=d < K)


def _few_tiles(pairs: int) -> tuple[int, int, int, int]:
    """BLOCK_M, BLOCK_N, warps, stages of the kernel for few queries: two programs fit on a multiprocessor."""
    return max(16, triton.next_power_of_2(pairs)), 32, 8, 2


def _one_tiles(width: int, programs: int) -> tuple[int, int, int]:
    """BLOCK_N, warps, stages of the kernel for one query: 16 elements of each tile per thread.

    A program of one warp has no barriers, and a large batch's all fit at once; a small batch has too few of them.
    """
    warps = 1 if programs >= 512 else 8
    return max(1, 512 * warps // width), warps, 3


def launch(shared: dict[str, Any], one: bool, pairs: int, width: int, batch: int) -> bool:
    """Launches the kernel for `pairs` queries x heads of a group per row, heads `width` wide; False where none fits.

    one: every row has one query. shared: the keywords of ragged_attention_backward.py's kernels, and out, grad_query.
    """
    query, kv_heads = shared["query"], shared["KV_HEADS"]
    if one and shared["GROUP"] == 1:
        block_n, warps, stages = _one_tiles(width, kv_heads * batch)
        shared = {k: v for k, v in shared.items() if k not in ("row_offsets", "KV_HEADS", "GROUP", "TYPE")}
        with on_device(query):
            _backward_one[(kv_heads, batch)](**shared, HEADS=kv_heads, BLOCK_N=block_n, STAGES=stages, num_warps=warps)
        return True
    narrow = shared["TYPE"].primitive_bitwidth == 16 and width <= 64
    if pairs > MAX_PAIRS or not narrow or kv_heads * batch < PROGRAMS or generation(query) < 90:
        return False
    block_m, block_n, warps, stages = _few_tiles(pairs)
    with on_device(query):
        _backward_few[(kv_heads, batch)](**shared, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages)
    return True
