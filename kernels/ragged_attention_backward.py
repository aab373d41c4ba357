"""The derivative of ragged_attention: grad_query, and sums added to one fp32 gradient buffer each for keys and values.

With the weights w recomputed from lse, f the dropout factors, and s, keep, scaling as in ragged_attention.py:

    delta = dout.out,   ds_j = w_j (f_j dout.v_j - delta) (1 - (s_j / softcap)^2)
    dq = scaling sum_j ds_j k_j,   dk_j += scaling sum_q ds_j q,   dv_j += sum_q f_j w_j dout

Shapes: grad_out and out (T, H, Kv), query (T, H, K), lse (T, H); keys, grad_keys (S, Hkv, K); values, grad_values
(S, Hkv, Kv). One launch for dq (it stores delta), one for dk and dv: each program owns BLOCK_N positions of one row and
kv head, loops over their queries in order, and adds its sums to the buffers once. No atomics: the result is bitwise
reproducible, and rows of one call must not share pages. For few queries in every row one launch computes all three
(ragged_attention_few.py).
10 T H L K flops (half under the causal mask), bound by the tensor cores for prompts. For a few queries bound by memory:
the buffers are read and written once per call (16 bytes per position, head and component), in 128-bit accesses.
Registers at most 255; heads wider than 64 may spill some words.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import LOG2E, check_dtypes, check_shape, generation, on_device, register, slots_of
from .ragged_attention import KEYWORDS, LAYOUT, arguments, bend, kept, load, seed_on, words
from .ragged_attention_few import launch


@triton.jit(do_not_specialize=["seed", "threshold"])
def _backward_query(
    grad_out, query, keys, values, out, lse, delta, grad_query, page_table, rows, row_offsets, lengths,
    grad_token, grad_head, query_token, query_head, table_row, scaling, seed, threshold, keep_scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, KV: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, TYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2)
    kv_head = tl.program_id(1)
    start_row = tl.load(row_offsets + b)
    n = tl.load(row_offsets + b + 1) - start_row
    tile = tl.cdiv(n * GROUP, BLOCK_M) - 1 - tl.program_id(0)
    if tile < 0:
        return
    length = tl.load(lengths + b)
    table = page_table + tl.load(rows + b).to(tl.int64) * table_row
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    i = m // GROUP
    h = kv_head * GROUP + m % GROUP
    valid = i < n
    p = length - n + i
    token = (start_row + i).to(tl.int64)
    head = token * (KV_HEADS * GROUP) + h
    d = tl.arange(0, BLOCK_K)
    e = tl.arange(0, BLOCK_KV)
    do = load(grad_out, token * grad_token + h * grad_head, 1, e, valid, KV, TYPE)
    o = load(out, head, KV, e, valid, KV, tl.float32)
    dd = tl.sum(do.to(tl.float32) * o, axis=1)
    tl.store(delta + head, dd, mask=valid)
    q = load(query, token * query_token + h * query_head, 1, d, valid, K, TYPE)
    norm = tl.load(lse + head, mask=valid, other=0.0) * LOG2E
    hashed = p
    if DROPOUT:
        hashed = words(table, p, valid, h, seed, PAGE)
    low = 0
    if WINDOW > 0:
        low = tl.maximum(length - n + (tile * BLOCK_M) // GROUP - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    high = length - n + tl.minimum(n, (tile * BLOCK_M + BLOCK_M - 1) // GROUP + 1)
    dq = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in range(low, high, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        stored = j < high
        slots = slots_of(table, j, stored, PAGE) * KV_HEADS + kv_head
        k = load(keys, slots, K, d, stored, K, TYPE)
        s, slope = bend(tl.dot(q, tl.trans(k), input_precision="ieee") * scaling, SOFTCAP)
        seen = j[None, :] <= p[:, None]
        if WINDOW > 0:
            seen = seen & (p[:, None] - j[None, :] < WINDOW)
        w = tl.where(seen, tl.exp2(s * LOG2E - norm[:, None]), 0.0)
        v = load(values, slots, KV, e, stored, KV, TYPE)
        dw = tl.dot(do, tl.trans(v), input_precision="ieee")
        if DROPOUT:
            dw = tl.where(kept(hashed[:, None], j[None, :], threshold), dw * keep_scale, 0.0)
        ds = w * (dw - dd[:, None]) * slope
        dq = tl.dot(ds.to(TYPE), k, dq, input_precision="ieee")
    mask = valid[:, None] & (d < K)[None, :]
    tl.store(grad_query + head[:, None] * K + d[None, :], (dq * scaling).to(grad_query.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["seed", "threshold"])
def _backward_keys(
    grad_out, query, keys, values, lse, delta, grad_keys, grad_values, page_table, rows, row_offsets, lengths,
    grads_from, grad_token, grad_head, query_token, query_head, table_row, scaling, seed, threshold, keep_scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, KV: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, TYPE: tl.constexpr, HAS_FROM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2)
    kv_head = tl.program_id(1)
    start = tl.program_id(0) * BLOCK_N
    start_row = tl.load(row_offsets + b)
    n = tl.load(row_offsets + b + 1) - start_row
    length = tl.load(lengths + b)
    first = tl.maximum(start - (length - n), 0)  # the first query that sees a position of this tile
    end = n  # the end of those queries
    if WINDOW > 0:
        end = tl.minimum(n, start + BLOCK_N - 1 + WINDOW - (length - n))
    added = 0  # the first position whose gradients are added here
    if HAS_FROM:
        added = tl.load(grads_from + b)
    if (start >= length) | (first >= end) | (start + BLOCK_N <= added):
        return
    table = page_table + tl.load(rows + b).to(tl.int64) * table_row
    j = start + tl.arange(0, BLOCK_N)
    stored = j < length
    slots = slots_of(table, j, stored, PAGE) * KV_HEADS + kv_head
    d = tl.arange(0, BLOCK_K)
    e = tl.arange(0, BLOCK_KV)
    k = load(keys, slots, K, d, stored, K, TYPE)
    v = load(values, slots, KV, e, stored, KV, TYPE)
    dk = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_KV], tl.float32)
    for m_start in range(first * GROUP // BLOCK_M * BLOCK_M, end * GROUP, BLOCK_M):
        m = m_start + tl.arange(0, BLOCK_M)
        i = m // GROUP
        h = kv_head * GROUP + m % GROUP
        valid = i < n
        p = length - n + i
        token = (start_row + i).to(tl.int64)
        head = token * (KV_HEADS * GROUP) + h
        q = load(query, token * query_token + h * query_head, 1, d, valid, K, TYPE)
        do = load(grad_out, token * grad_token + h * grad_head, 1, e, valid, KV, TYPE)
        norm = tl.load(lse + head, mask=valid, other=0.0) * LOG2E
        dd = tl.load(delta + head, mask=valid, other=0.0)
        s, slope = bend(tl.dot(k, tl.trans(q), input_precision="ieee") * scaling, SOFTCAP)
        seen = stored[:, None] & valid[None, :] & (j[:, None] <= p[None, :])
        if WINDOW > 0:
            seen = seen & (p[None, :] - j[:, None] < WINDOW)
        w = tl.where(seen, tl.exp2(s * LOG2E - norm[None, :]), 0.0)
        dw = tl.dot(v, tl.trans(do), input_precision="ieee")
        dropped = w
        if DROPOUT:
            hashed = words(table, p, valid, h, seed, PAGE)
            keep = kept(hashed[None, :], j[:, None], threshold)
            dw = tl.where(keep, dw * keep_scale, 0.0)
            dropped = tl.where(keep, w * keep_scale, 0.0)
        dv = tl.dot(dropped.to(TYPE), do, dv, input_precision="ieee")
        ds = w * (dw - dd[None, :]) * slope
        dk = tl.dot(ds.to(TYPE), q, dk, input_precision="ieee")
    adds = (stored & (j >= added))[:, None]
    into = grad_keys + slots[:, None] * K + d[None, :]
    mask = adds & (d < K)[None, :]
    tl.store(into, tl.load(into, mask=mask, other=0.0) + dk * scaling, mask=mask)
    into = grad_values + slots[:, None] * KV + e[None, :]
    mask = adds & (e < KV)[None, :]
    tl.store(into, tl.load(into, mask=mask, other=0.0) + dv, mask=mask)


def _query_tiles(pairs: int, width: int, itemsize: int) -> tuple[int, int, int, int]:
    """BLOCK_M, BLOCK_N, warps, stages of the dq kernel, for `pairs` queries x heads of a group."""
    m = max(16, triton.next_power_of_2(pairs))
    if itemsize == 4:
        return 16, 16, 4 if width <= 64 else 8, 1
    if width > 128:
        return min(m, 32), 32, 8, 1
    return (min(m, 64), 64, 4, 3) if width <= 64 else (min(m, 64), 64, 8, 2)


def _key_tiles(pairs: int, width: int, itemsize: int, generation: int) -> tuple[int, int, int, int]:
    """The same for dk and dv; a program owns BLOCK_N positions and takes steps of BLOCK_M."""
    m = max(16, triton.next_power_of_2(pairs))
    if itemsize == 4:
        return min(m, 32), 32 if width <= 64 else 16, 4 if width <= 64 else 8, 1
    if width > 128:
        return min(m, 32), 32, 8, 1
    if generation < 90:
        return (min(m, 64), 32, 4, 2) if width <= 64 else (min(m, 32), 64, 8, 2)
    return (min(m, 32), 64, 4, 2) if width <= 64 else (min(m, 64), 64, 8, 2)


def _launch(
    grad_out: torch.Tensor, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor, page_table: torch.Tensor, rows: torch.Tensor, row_offsets: torch.Tensor, lengths: torch.Tensor,
    grad_keys: torch.Tensor, grad_values: torch.Tensor, *, grads_from: torch.Tensor | None = None, page_size: int,
    scaling: float, window: int = 0, softcap: float = 0.0, dropout: float = 0.0, seed: torch.Tensor | None = None,
    max_query: int, max_length: int,
) -> torch.Tensor:  # fmt: skip
    op = "ragged_attention_backward"
    shared = arguments(
        query, keys, values, page_table, rows, row_offsets, lengths, page_size, scaling, window, softcap, dropout, seed,
        op,
    )  # fmt: skip
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()  # an expanded gradient, such as that of a sum
    out, lse = out.contiguous(), lse.contiguous()
    check_dtypes(op, grad_out=grad_out)
    tokens, heads, _ = query.shape
    check_shape(op, "out", out, (tokens, heads, values.shape[2]))
    check_shape(op, "lse", lse, (tokens, heads))
    check_shape(op, "grad_out", grad_out, tuple(out.shape))
    for name, tensor, like in (("grad_keys", grad_keys, keys), ("grad_values", grad_values, values)):
        check_shape(op, name, tensor, tuple(like.shape), contiguous=True)
        if tensor.dtype != torch.float32:
            raise ValueError(f"{op}: {name} is {tensor.dtype}, expected float32")
    itemsize, kv_heads, batch = shared["TYPE"].primitive_bitwidth // 8, shared["KV_HEADS"], rows.shape[0]
    if grads_from is not None:
        check_shape(op, "grads_from", grads_from, (batch,))
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    if tokens == 0:
        return grad_query
    shared |= {
        "grad_out": grad_out,
        "lse": lse,
        "grad_token": grad_out.stride(0),
        "grad_head": grad_out.stride(1),
    }
    width = max(shared["BLOCK_K"], shared["BLOCK_KV"])
    into = {
        "grad_keys": grad_keys,
        "grad_values": grad_values,
        "grads_from": grads_from,
        "HAS_FROM": grads_from is not None,
    }
    pairs = max_query * shared["GROUP"]
    one = max_query == 1 and tokens == batch
    if launch(shared | into | {"out": out, "grad_query": grad_query}, one, pairs, width, batch):
        return grad_query
    shared["delta"] = torch.empty_like(lse)
    with on_device(query):
        block_m, block_n, warps, stages = _query_tiles(pairs, width, itemsize)
        _backward_query[(triton.cdiv(pairs, block_m), kv_heads, batch)](
            out=out,
            grad_query=grad_query,
            **shared,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=warps,
            num_stages=stages,
        )
        block_m, block_n, warps, stages = _key_tiles(pairs, width, itemsize, generation(query))
        _backward_keys[(triton.cdiv(max_length, block_n), kv_heads, batch)](
            **into,
            **shared,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=warps,
            num_stages=stages,
        )
    return grad_query


_OP = register(
    "ragged_attention_backward(Tensor grad_out, Tensor query, Tensor keys, Tensor values, Tensor out, Tensor lse, "
    f"{LAYOUT}, Tensor(a!) grad_keys, Tensor(b!) grad_values, {KEYWORDS}, Tensor? grads_from=None) -> Tensor",
    _launch,
    lambda grad_out, query, *args, **kwargs: query.new_empty(query.shape),
)


def ragged_attention_backward(
    grad_out: torch.Tensor, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor, page_table: torch.Tensor, rows: torch.Tensor, row_offsets: torch.Tensor, lengths: torch.Tensor,
    grad_keys: torch.Tensor, grad_values: torch.Tensor, *, grads_from: torch.Tensor | None = None, page_size: int,
    scaling: float, window: int = 0, softcap: float = 0.0, dropout: float = 0.0, seed: int | torch.Tensor = 0,
    max_query: int, max_length: int,
) -> torch.Tensor:  # fmt: skip
    """grad_query (T, H, K) in the query's dtype; adds to grad_keys (S, Hkv, K) and grad_values (S, Hkv, Kv), both fp32.

    grads_from int32 (B,): dk and dv of a row's positions before it are left to another call. out and lse are the
    forward's. Rows of one call must not share pages. The result is bitwise reproducible. ValueError for inputs that do
    not fit.
    """
    return _OP(
        grad_out, query, keys, values, out, lse, page_table, rows, row_offsets, lengths, grad_keys, grad_values,
        page_size=page_size, scaling=scaling, window=window, softcap=softcap, dropout=dropout,
        seed=seed_on(query, seed, dropout), max_query=max_query, max_length=max_length, grads_from=grads_from,
    )  # fmt: skip
