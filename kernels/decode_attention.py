"""Attention of one query per row over the paged, ragged cache: one launch, split over the sequence.

    s_j = scaling q.k_j (softcap tanh(s_j / softcap) where set)
    lse = log sum_j exp(s_j),  out = sum_j exp(s_j - lse) v_j
    over j <= p and p - j < window, where p = lengths[b] - 1

Optionally the launch also takes the new token's key and value, as they leave the projection: it norms and rotates query
and key (Qwen3, Llama), attends to them, and writes them to the slot of position p. A layer then needs no kv_append.

Shapes: query (B, H, K); keys (S, Hkv, K), values (S, Hkv, Kv); page_table int32 (R, P); rows, lengths int32 (B,).
Work: one program a (row, kv head, split); splits lie at fixed positions, so a row's result does not depend on the rows
beside it. The programs of one row leave partial sums (fp32) and count up an integer; whoever comes last adds them in
the order of the splits. No float is added atomically.
Rows are the grid's fastest axis: rows that share a prefix read its pages at the same time, once from memory and then
from L2 (60 MB on an H200, 1,600 tokens of GPT-2's 36 KiB), which is why there is no separate path for shared prefixes.
Bytes: sum_b lengths[b] Hkv (K + Kv) elements, in 128-bit loads, plus 1.6% for partial sums (one
fp32 vector a split of 64 positions). Bound: memory bandwidth; at batch 1 latency (two dependent loads, page then key).
Registers at most 200.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import (
    LN2,
    LOG2E,
    check_dtypes,
    check_shape,
    check_turn,
    compute_type,
    load_head,
    on_device,
    register,
    slots_of,
    tanh,
)


@triton.jit
def _decode(
    query, key, value, keys, values, out, lse, partial, partial_lse, counters, page_table, rows, lengths,
    cos, sin, positions, query_norm, key_norm, eps, scaling,
    query_row, query_head, key_row, key_head, value_row, value_head, table_row,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, KV: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, APPEND: tl.constexpr, ROTARY: tl.constexpr,
    NORM_QUERY: tl.constexpr, NORM_KEY: tl.constexpr, DOT: tl.constexpr, TYPE: tl.constexpr,
    SPLITS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    SPLIT: tl.constexpr = BLOCK_N * BLOCKS
    length = tl.load(lengths + b)
    last = (length - 1) // SPLIT
    first = 0
    low = 0
    if WINDOW > 0:
        low = tl.maximum(length - WINDOW, 0)
        first = low // SPLIT
    d = tl.arange(0, BLOCK_K)
    e = tl.arange(0, BLOCK_KV)
    g = tl.arange(0, BLOCK_G)
    h = kv_head * GROUP + g
    if length <= 0:  # a row that is not in use (a padded batch): zeros, and no weight in a later combine
        if split == 0:
            mask_g = g < GROUP
            tl.store(out + (b * (KV_HEADS * GROUP) + h[:, None]) * KV + e[None, :],
                     tl.zeros([BLOCK_G, BLOCK_KV], tl.float32).to(out.dtype.element_ty),
                     mask=mask_g[:, None] & (e < KV)[None, :])  # fmt: skip
            tl.store(lse + b * (KV_HEADS * GROUP) + h, tl.full([BLOCK_G], float("-inf"), tl.float32), mask=mask_g)
        return
    if (split < first) | (split > last):
        return

    # -- the query, and the new token's key and value
    turn = 0
    if ROTARY > 0:
        turn = tl.load(positions + b).to(tl.int64) * (ROTARY // 2)
    mask = (g < GROUP)[:, None] & (d < K)[None, :]
    base = query + b * query_row + h[:, None] * query_head
    q = load_head(base, d[None, :], mask, K, query_norm, eps, cos + turn, sin + turn, NORM_QUERY, ROTARY)
    table = page_table + tl.load(rows + b).to(tl.int64) * table_row
    keys += kv_head * K
    values += kv_head * KV
    if APPEND:
        base = key + b * key_row + kv_head * key_head
        new_key = load_head(base, d[None, :], (d < K)[None, :], K, key_norm, eps, cos + turn, sin + turn, NORM_KEY,
                            ROTARY).to(keys.dtype.element_ty)  # fmt: skip
        new_value = tl.load(
            value + b * value_row + kv_head * value_head + e[None, :], mask=(e < KV)[None, :], other=0.0
        )
        new_value = new_value.to(tl.float32).to(values.dtype.element_ty)
        if split == last:
            page = tl.load(table + (length - 1) // PAGE).to(tl.int64)
            slot = page * PAGE + (length - 1) % PAGE
            tl.store(keys + slot * (KV_HEADS * K) + d[None, :], new_key, mask=(d < K)[None, :])
            tl.store(values + slot * (KV_HEADS * KV) + e[None, :], new_value, mask=(e < KV)[None, :])

    # -- this split: running maximum, sum and weighted values, in base 2
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_KV], tl.float32)
    for start in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, length), BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        stored = (j >= low) & (j < length)
        if APPEND:
            stored = stored & (j < length - 1)
        seen = (j >= low) & (j < length)
        slots = slots_of(table, j, stored, PAGE)
        k = tl.load(keys + slots[:, None] * (KV_HEADS * K) + d[None, :], mask=stored[:, None] & (d < K)[None, :],
                    other=0.0)  # fmt: skip
        v = tl.load(values + slots[:, None] * (KV_HEADS * KV) + e[None, :], mask=stored[:, None] & (e < KV)[None, :],
                    other=0.0)  # fmt: skip
        if APPEND:
            k = tl.where((j == length - 1)[:, None], new_key, k)
            v = tl.where((j == length - 1)[:, None], new_value, v)
        if DOT:
            s = tl.dot(q.to(TYPE), tl.trans(k.to(TYPE)), input_precision="ieee") * scaling
        else:
            s = tl.sum(q * k.to(tl.float32), axis=1)[None, :] * scaling
        if SOFTCAP > 0:
            s = SOFTCAP * tanh(s / SOFTCAP)
        s = tl.where(seen[None, :], s * LOG2E, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        w = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(w, axis=1)
        if DOT:
            acc = tl.dot(w.to(TYPE), v.to(TYPE), acc * shrink[:, None], input_precision="ieee")
        else:
            weighted = tl.sum(tl.trans(w) * v.to(tl.float32), axis=0)
            acc = acc * shrink[:, None] + weighted[None, :]
        top = new_top

    # -- one split: finished; several: leave a partial sum, and the last to arrive adds them all in order
    mask_g = g < GROUP
    mask_e = mask_g[:, None] & (e < KV)[None, :]
    head = b * (KV_HEADS * GROUP) + h
    finish = first <= last
    if SPLITS > 1:  # noqa: SIM102 (the first is a constant, the second is not)
        if first < last:
            row = b * KV_HEADS + kv_head
            sums = partial + row * (SPLITS * GROUP * KV)
            sums_lse = partial_lse + row * (SPLITS * GROUP)
            tl.store(sums + (split * GROUP + g[:, None]) * KV + e[None, :], acc / total[:, None], mask=mask_e)
            tl.store(sums_lse + split * GROUP + g, top + tl.log2(total), mask=mask_g)
            tl.debug_barrier()  # all of this program's stores, then the count that publishes them
            arrived = tl.atomic_add(counters + row, 1, sem="acq_rel", scope="gpu")
            finish = arrived == last - first
            if finish:
                tl.debug_barrier()
                tl.store(counters + row, 0)
                top = tl.full([BLOCK_G], float("-inf"), tl.float32)
                total = tl.zeros([BLOCK_G], tl.float32)
                acc = tl.zeros([BLOCK_G, BLOCK_KV], tl.float32)
                for chunk in range(first, last + 1, CHUNK):
                    # .cg: from L2, past an L1 line that may be older than the partial sums
                    i = chunk + tl.arange(0, CHUNK)
                    mask_i = (i <= last)[:, None] & mask_g[None, :]
                    at = i[:, None] * GROUP + g[None, :]
                    part_lse = tl.load(sums_lse + at, mask=mask_i, other=float("-inf"), cache_modifier=".cg")
                    part = tl.load(sums + at[:, :, None] * KV + e[None, None, :],
                                   mask=mask_i[:, :, None] & (e < KV)[None, None, :], other=0.0,
                                   cache_modifier=".cg")  # fmt: skip
                    new_top = tl.maximum(top, tl.max(part_lse, axis=0))
                    safe = tl.where(new_top == float("-inf"), 0.0, new_top)
                    shrink = tl.exp2(top - safe)
                    share = tl.exp2(part_lse - safe[None, :])
                    total = total * shrink + tl.sum(share, axis=0)
                    acc = acc * shrink[:, None] + tl.sum(part * share[:, :, None], axis=0)
                    top = new_top
    if finish:
        tl.store(out + head[:, None] * KV + e[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=mask_e)
        tl.store(lse + head, (top + tl.log2(total)) * LN2, mask=mask_g)


def _table(head_dim: int, itemsize: int, max_length: int) -> tuple[int, int]:
    """Positions a block (8 KiB of keys) and blocks a split: splits of 64 positions, longer ones from 4,096 on."""
    block_n = max(16, min(64, 8192 // (head_dim * itemsize)))
    split = 64
    while split < 1024 and split * 64 < max_length:
        split *= 2
    return block_n, split // block_n


def num_counters(batch: int, kv_heads: int) -> int:
    """Length of the int32 tensor of zeros that decode_attention counts with (and leaves zero)."""
    return batch * kv_heads


def check_cache(
    op: str, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, page_table: torch.Tensor,
    rows: torch.Tensor, lengths: torch.Tensor, batch: int, window: int, softcap: float,
) -> None:  # fmt: skip
    """ValueError for inputs that fit no kernel of attention over the cache (ragged_attention asks here too)."""
    tokens, heads, head_dim = query.shape
    slots, kv_heads, value_dim = values.shape
    check_dtypes(op, query=query, keys=keys, values=values)
    check_shape(op, "query", query, (tokens, heads, head_dim))
    check_shape(op, "keys", keys, (slots, kv_heads, head_dim), contiguous=True)
    check_shape(op, "values", values, (slots, kv_heads, value_dim), contiguous=True)
    check_shape(op, "page_table", page_table, (page_table.shape[0], page_table.shape[-1]))
    check_shape(op, "rows", rows, (batch,))
    check_shape(op, "lengths", lengths, (batch,))
    if heads % kv_heads:
        raise ValueError(f"{op}: query has {heads} heads, expected a multiple of the cache's {kv_heads}")
    if window < 0 or not softcap >= 0:
        raise ValueError(f"{op}: window is {window} and softcap {softcap}, expected 0 (none) or more")


def _launch(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, page_table: torch.Tensor, rows: torch.Tensor,
    lengths: torch.Tensor, *, page_size: int, scaling: float, window: int = 0, softcap: float = 0.0, max_length: int,
    key: torch.Tensor | None = None, value: torch.Tensor | None = None, cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None, positions: torch.Tensor | None = None, query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None, eps: float = 1e-6, counters: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    batch, heads, head_dim = query.shape
    kv_heads, value_dim = keys.shape[1], values.shape[2]
    check_cache("decode_attention", query, keys, values, page_table, rows, lengths, batch, window, softcap)
    if key is not None and value is not None:
        check_dtypes("decode_attention", key=key, value=value)
        check_shape("decode_attention", "key", key, (batch, kv_heads, head_dim))
        check_shape("decode_attention", "value", value, (batch, kv_heads, value_dim))
    elif key is not None or value is not None:
        raise ValueError("decode_attention: one of key and value is None, expected both or none")
    rotary = check_turn("decode_attention", batch, head_dim, cos, sin, positions, query_norm, key_norm)
    group = heads // kv_heads
    dot = group > 1  # one query a kv head: plain multiplies, since a tensor-core tile would be 15/16 padding
    block_k, block_kv = triton.next_power_of_2(head_dim), triton.next_power_of_2(value_dim)
    block_n, blocks = _table(max(block_k, block_kv), keys.element_size(), max_length)
    # Powers of two: a kernel is compiled for each number of splits, and calls without a graph name the longest row.
    splits = triton.next_power_of_2(max(1, triton.cdiv(max_length, block_n * blocks)))
    block_g = max(16, triton.next_power_of_2(group)) if dot else 1
    out = query.new_empty(batch, heads, value_dim)
    lse = query.new_empty(batch, heads, dtype=torch.float32)
    if batch == 0:
        return out, lse
    partial = partial_lse = lse
    if splits > 1:
        partial = query.new_empty(batch * kv_heads * splits * group * value_dim, dtype=torch.float32)
        partial_lse = query.new_empty(batch * kv_heads * splits * group, dtype=torch.float32)
        if counters is None:
            counters = query.new_zeros(num_counters(batch, kv_heads), dtype=torch.int32)
        elif counters.dtype != torch.int32 or counters.numel() < num_counters(batch, kv_heads):
            raise ValueError(
                f"decode_attention: counters is {counters.dtype} of {counters.numel()} elements, expected int32 zeros, "
                f"at least {num_counters(batch, kv_heads)}"
            )
        else:
            check_shape("decode_attention", "counters", counters, tuple(counters.shape), contiguous=True)
    with on_device(query):
        _decode[(batch, kv_heads, splits)](
            query=query,
            key=query if key is None else key,
            value=query if value is None else value,
            keys=keys,
            values=values,
            out=out,
            lse=lse,
            partial=partial,
            partial_lse=partial_lse,
            counters=rows if counters is None else counters,
            page_table=page_table,
            rows=rows,
            lengths=lengths,
            cos=query if cos is None else cos,
            sin=query if sin is None else sin,
            positions=positions,
            query_norm=query_norm,
            key_norm=key_norm,
            eps=eps,
            scaling=scaling,
            query_row=query.stride(0),
            query_head=query.stride(1),
            key_row=0 if key is None else key.stride(0),
            key_head=0 if key is None else key.stride(1),
            value_row=0 if value is None else value.stride(0),
            value_head=0 if value is None else value.stride(1),
            table_row=page_table.stride(0),
            KV_HEADS=kv_heads,
            GROUP=group,
            K=head_dim,
            KV=value_dim,
            PAGE=page_size,
            WINDOW=window,
            SOFTCAP=softcap,
            APPEND=key is not None,
            ROTARY=rotary,
            NORM_QUERY=query_norm is not None,
            NORM_KEY=key_norm is not None,
            DOT=dot,
            TYPE=compute_type(query.dtype, keys.dtype, values.dtype),
            SPLITS=splits,
            BLOCKS=blocks,
            BLOCK_N=block_n,
            CHUNK=max(1, min(8, 4096 // (block_g * block_kv))),
            BLOCK_G=block_g,
            BLOCK_K=max(16, block_k) if dot else block_k,
            BLOCK_KV=max(16, block_kv) if dot else block_kv,
            num_warps=8 if dot and keys.element_size() == 4 else 4,
            num_stages=2,
        )
    return out, lse


def _fake(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *args, **kwargs):  # type: ignore[no-untyped-def]
    shape = query.shape[:2]
    return query.new_empty(*shape, values.shape[2]), query.new_empty(shape, dtype=torch.float32)


_OP = register(
    "decode_attention(Tensor query, Tensor(a!) keys, Tensor(b!) values, Tensor page_table, Tensor rows, "
    "Tensor lengths, *, int page_size, float scaling, int window=0, float softcap=0.0, SymInt max_length, "
    "Tensor? key=None, Tensor? value=None, Tensor? cos=None, Tensor? sin=None, Tensor? positions=None, "
    "Tensor? query_norm=None, Tensor? key_norm=None, float eps=1e-6, Tensor(c!)? counters=None) -> (Tensor, Tensor)",
    _launch,
    _fake,
)


def decode_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, page_table: torch.Tensor, rows: torch.Tensor,
    lengths: torch.Tensor, *, page_size: int, scaling: float, window: int = 0, softcap: float = 0.0, max_length: int,
    key: torch.Tensor | None = None, value: torch.Tensor | None = None, cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None, positions: torch.Tensor | None = None, query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None, eps: float = 1e-6, counters: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """One query per row: out (B, H, Kv) in the query's dtype, lse (B, H) fp32. lengths include the query's own token.

    Without key and value the token's own must be in the cache already. With them (B, Hkv, K) and (B, Hkv, Kv), they are
    normed, rotated (cos, sin (P, rotary // 2) fp32 at positions (B,)), attended to and written to the row's last slot.
    A row of length 0 gives zeros and lse = -inf, and writes nothing. max_length bounds lengths; it fixes the number of
    splits. counters: int32 zeros of num_counters(B, Hkv), left zero; without it each call fills its own (one memset),
    and calls that may run at the same time must not share one. ValueError for inputs that do not fit.
    """
    return _OP(
        query, keys, values, page_table, rows, lengths, page_size=page_size, scaling=scaling, window=window,
        softcap=softcap, max_length=max_length, key=key, value=value, cos=cos, sin=sin, positions=positions,
        query_norm=query_norm, key_norm=key_norm, eps=eps, counters=counters,
    )  # fmt: skip
