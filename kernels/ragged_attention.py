"""Causal attention of ragged queries over the paged cache that holds their keys and values.

Query i of the n of row b is at p = lengths[b] - n + i and sees positions j <= p with p - j < window (0: all):

    s_j = scaling q.k_j (softcap tanh(s_j / softcap) where set),  lse = log sum_j exp(s_j),  w_j = exp(s_j - lse)
    out = sum_j f_j w_j v_j,   f_j = keep(seed, slot of the query, head, j) / (1 - dropout)  (reference.dropout_keep)

Shapes: query (T, H, K); keys (S, Hkv, K), values (S, Hkv, Kv); page_table int32 (R, P); rows, lengths int32 (B,);
row_offsets int32 (B+1,). A tile holds BLOCK_M pairs (query, head of the group), so grouped heads share their loads and
short rows still fill tensor-core tiles; keys come through the page table in 128-bit loads.
4 T H L K flops (half under the causal mask): bound by the tensor cores for prompts, by latency for a few queries.
A call with one query in every row and no dropout goes to decode_attention.
Registers at most 242 (240 with Triton 3.7.1); in fp32 heads wider than 64 may spill some words.
The derivative is in ragged_attention_backward.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from . import decode_attention as decode
from .common import LN2, LOG2E, check_shape, compute_type, generation, mix, on_device, register, slots_of, tanh

SPLIT_FROM = 128  # BLOCK_M from which unmasked positions have their own loop; smaller tiles spilled, and are short


@triton.jit
def bend(s, SOFTCAP: tl.constexpr):
    """Soft-capped scores, and their derivative by the uncapped ones."""
    if SOFTCAP > 0:
        bent = tanh(s / SOFTCAP)
        return SOFTCAP * bent, 1 - bent * bent
    return s, tl.full(s.shape, 1.0, tl.float32)


@triton.jit
def words(table, p, valid, h, seed, PAGE: tl.constexpr):
    """The dropout hash's word of each query: mix(mix(mix(seed_low) ^ seed_high ^ slot) ^ head)."""
    slot = slots_of(table, p, valid, PAGE).to(tl.uint32)
    whole = tl.load(seed)
    word = mix(whole.to(tl.uint32)) ^ (whole >> 32).to(tl.uint32)
    return mix(mix(slot ^ word) ^ h.to(tl.uint32))


@triton.jit
def kept(words, j, threshold):
    """Whether the weight of (query, j) survives; broadcasts."""
    word = mix(words ^ (j.to(tl.uint32) * 0x9E3779B9))
    return (word >> 8) >= threshold.to(tl.uint32)


@triton.jit
def load(base, at, stride, d, mask, D: tl.constexpr, TYPE: tl.constexpr):
    """Rows `at` of a matrix of D columns, as TYPE; masked rows and columns beyond D are zero."""
    return tl.load(base + at[:, None] * stride + d[None, :], mask=mask[:, None] & (d < D)[None, :], other=0.0).to(TYPE)


@triton.jit(do_not_specialize=["seed", "threshold"])
def _forward(
    query, keys, values, out, lse, page_table, rows, row_offsets, lengths,
    query_token, query_head, table_row, scaling, seed, threshold, keep_scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, KV: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, TYPE: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2)
    kv_head = tl.program_id(1)
    start_row = tl.load(row_offsets + b)
    n = tl.load(row_offsets + b + 1) - start_row
    tile = tl.cdiv(n * GROUP, BLOCK_M) - 1 - tl.program_id(0)  # the longest tiles first
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
    d = tl.arange(0, BLOCK_K)
    e = tl.arange(0, BLOCK_KV)
    q = load(query, token * query_token + h * query_head, 1, d, valid, K, TYPE)
    hashed = p
    if DROPOUT:
        hashed = words(table, p, valid, h, seed, PAGE)
    low = 0
    if WINDOW > 0:
        low = tl.maximum(length - n + (tile * BLOCK_M) // GROUP - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    high = length - n + tl.minimum(n, (tile * BLOCK_M + BLOCK_M - 1) // GROUP + 1)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_KV], tl.float32)
    # Positions that every query of the tile sees need no mask; the first query's position says how many they are.
    middle = low
    if SPLIT:
        middle = tl.maximum(length - n + (tile * BLOCK_M) // GROUP + 1, 0) // BLOCK_N * BLOCK_N
    for masked in tl.static_range(0 if SPLIT else 1, 2):
        for start in range(middle if masked else low, high if masked else middle, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            stored = j < high
            slots = slots_of(table, j, stored, PAGE) * KV_HEADS + kv_head
            k = load(keys, slots, K, d, stored, K, TYPE)
            s, _ = bend(tl.dot(q, tl.trans(k), input_precision="ieee") * scaling, SOFTCAP)
            s = s * LOG2E
            if masked:
                seen = j[None, :] <= p[:, None]
                if WINDOW > 0:
                    seen = seen & (p[:, None] - j[None, :] < WINDOW)
                s = tl.where(seen, s, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, axis=1))
            safe = tl.where(new_top == float("-inf"), 0.0, new_top)
            w = tl.exp2(s - safe[:, None])
            shrink = tl.exp2(top - safe)
            total = total * shrink + tl.sum(w, axis=1)
            if DROPOUT:
                w = tl.where(kept(hashed[:, None], j[None, :], threshold), w * keep_scale, 0.0)
            v = load(values, slots, KV, e, stored, KV, TYPE)
            acc = tl.dot(w.to(TYPE), v, acc * shrink[:, None], input_precision="ieee")
            top = new_top
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    head = token * (KV_HEADS * GROUP) + h
    mask = valid[:, None] & (e < KV)[None, :]
    tl.store(out + head[:, None] * KV + e[None, :], acc.to(out.dtype.element_ty), mask=mask)
    tl.store(lse + head, (top + tl.log2(total)) * LN2, mask=valid)


def seed_on(query: torch.Tensor, seed: int | torch.Tensor, dropout: float) -> torch.Tensor | None:
    """The seed as a tensor for the kernels, None without dropout: a graph replay uses the value it then holds."""
    if not dropout or isinstance(seed, torch.Tensor):
        return seed if dropout else None  # type: ignore[return-value]
    return torch.full((), seed, dtype=torch.int64, device=query.device)


def _tiles(pairs: int, width: int, itemsize: int, generation: int) -> tuple[int, int, int, int]:
    """BLOCK_M, BLOCK_N, warps, stages for `pairs` queries x heads of a group and head vectors of `width` elements."""
    m = max(16, triton.next_power_of_2(pairs))
    if itemsize == 4:
        return min(m, 32), 16 if m == 16 or width > 64 else 32, 4 if width <= 64 else 8, 1
    if width > 128 or (width > 64 and generation < 90):
        return min(m, 64), 32, 4, 2
    if width <= 64 and m <= 512:
        return min(m, 64), 64, 4, 3
    return min(m, 128), 64, 4 if m <= 64 else 8, 3 if width <= 64 else 2


def arguments(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, page_table: torch.Tensor, rows: torch.Tensor,
    row_offsets: torch.Tensor, lengths: torch.Tensor, page_size: int, scaling: float, window: int, softcap: float,
    dropout: float, seed: torch.Tensor | None, op: str,
) -> dict[str, Any]:  # fmt: skip
    """The keywords that the forward and backward kernels share, after checking the inputs; op names it in errors."""
    batch, (_, heads, head_dim), (_, kv_heads, value_dim) = rows.shape[0], query.shape, values.shape
    decode.check_cache(op, query, keys, values, page_table, rows, lengths, batch, window, softcap)
    check_shape(op, "row_offsets", row_offsets, (batch + 1,))
    if not 0 <= dropout < 1:
        raise ValueError(f"{op}: dropout is {dropout}, expected 0 <= dropout < 1")
    if dropout and (seed is None or seed.dtype != torch.int64):
        raise ValueError(f"{op}: expected an int64 seed for dropout, found {seed if seed is None else seed.dtype}")
    group = heads // kv_heads
    return {
        "query": query,
        "keys": keys,
        "values": values,
        "page_table": page_table,
        "rows": rows,
        "row_offsets": row_offsets,
        "lengths": lengths,
        "query_token": query.stride(0),
        "query_head": query.stride(1),
        "table_row": page_table.stride(0),
        "scaling": scaling,
        "seed": seed if dropout else None,
        "threshold": int(dropout * (1 << 24)),
        "keep_scale": 1 / (1 - dropout),
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "K": head_dim,
        "KV": value_dim,
        "PAGE": page_size,
        "WINDOW": window,
        "SOFTCAP": softcap,
        "DROPOUT": dropout > 0,
        "TYPE": compute_type(query.dtype, keys.dtype, values.dtype),
        "BLOCK_K": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_KV": max(16, triton.next_power_of_2(value_dim)),
    }


def _launch(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, page_table: torch.Tensor, rows: torch.Tensor,
    row_offsets: torch.Tensor, lengths: torch.Tensor, *, page_size: int, scaling: float, window: int = 0,
    softcap: float = 0.0, dropout: float = 0.0, seed: torch.Tensor | None = None, max_query: int, max_length: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    tokens, heads, _ = query.shape
    batch = rows.shape[0]
    if max_query == 1 and tokens == batch and not dropout:
        return decode._launch(
            query, keys, values, page_table, rows, lengths, page_size=page_size, scaling=scaling, window=window,
            softcap=softcap, max_length=max_length,
        )  # fmt: skip
    shared = arguments(
        query, keys, values, page_table, rows, row_offsets, lengths, page_size, scaling, window, softcap, dropout, seed,
        "ragged_attention",
    )  # fmt: skip
    pairs, width = max_query * shared["GROUP"], max(shared["BLOCK_K"], shared["BLOCK_KV"])
    block_m, block_n, warps, stages = _tiles(pairs, width, shared["TYPE"].primitive_bitwidth // 8, generation(query))
    out = query.new_empty(tokens, heads, values.shape[2])
    lse = query.new_empty(tokens, heads, dtype=torch.float32)
    if tokens:
        with on_device(query):
            _forward[(triton.cdiv(pairs, block_m), shared["KV_HEADS"], batch)](
                out=out,
                lse=lse,
                **shared,
                SPLIT=not window and block_m >= SPLIT_FROM,
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                num_warps=warps,
                num_stages=stages,
            )
    return out, lse


KEYWORDS = (
    "*, int page_size, float scaling, int window=0, float softcap=0.0, float dropout=0.0, Tensor? seed=None, "
    "SymInt max_query, SymInt max_length"
)
LAYOUT = "Tensor page_table, Tensor rows, Tensor row_offsets, Tensor lengths"
_OP = register(
    f"ragged_attention(Tensor query, Tensor keys, Tensor values, {LAYOUT}, {KEYWORDS}) -> (Tensor, Tensor)",
    _launch,
    decode._fake,
)


def ragged_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, page_table: torch.Tensor, rows: torch.Tensor,
    row_offsets: torch.Tensor, lengths: torch.Tensor, *, page_size: int, scaling: float, window: int = 0,
    softcap: float = 0.0, dropout: float = 0.0, seed: int | torch.Tensor = 0, max_query: int, max_length: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """out (T, H, Kv) in the query's dtype and lse (T, H) fp32; shapes and meaning as in the module's docstring.

    lengths count this call's tokens, which are in the cache already. max_query and max_length bound the queries and
    the length of any row (they size the grid; larger ones only add programs that exit at once). ValueError for inputs
    that do not fit. seed: an int, or an int64 tensor () on the device.
    """
    return _OP(
        query, keys, values, page_table, rows, row_offsets, lengths, page_size=page_size, scaling=scaling,
        window=window, softcap=softcap, dropout=dropout, seed=seed_on(query, seed, dropout), max_query=max_query,
        max_length=max_length,
    )  # fmt: skip
