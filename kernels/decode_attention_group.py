"""decode_attention for many rows, where query heads share keys: a kv head's query heads in one program.

Mathematics, shapes, splits and launch are as in decode_attention.py. A program reads keys and values once for all heads
of its group, in 128-bit loads, a tile ahead, and multiplies on tensor cores, the group padded to 16 rows. It is for
more than 16 rows, which give enough programs, so that reading keys once matters most; with fewer, heads run one by one.
Bound: memory bandwidth. Registers at most 200.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import LN2, LOG2E, combine_splits, load_head, pdl_release, pdl_wait, row_split, slots_of, tanh


@triton.jit
def _decode_group(
    query, key, value, keys, values, out, lse, partial, partial_lse, counters, page_table, rows, lengths,
    cos, sin, positions, query_norm, key_norm, eps, scaling,
    query_row, query_head, key_row, key_head, value_row, value_head, table_row,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, KV: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, APPEND: tl.constexpr, ROTARY: tl.constexpr,
    NORM_QUERY: tl.constexpr, NORM_KEY: tl.constexpr, OVERLAP: tl.constexpr, EARLY: tl.constexpr, TYPE: tl.constexpr,
    SPLITS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """The query heads of one kv head on tensor cores: for many rows, where reading keys once matters."""
    if EARLY:
        pdl_release(OVERLAP)
    b = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length, table, angle, low, first, last, end = row_split(
        lengths, rows, positions, page_table, table_row, b, split, SPLIT, WINDOW, APPEND, ROTARY
    )
    d = tl.arange(0, BLOCK_K)
    e = tl.arange(0, BLOCK_KV)
    g = tl.arange(0, BLOCK_G)
    mask_k = (d < K)[None, :]
    mask_v = (e < KV)[None, :]
    mask_e = (g < GROUP)[:, None] & mask_v
    keys += kv_head * K
    values += kv_head * KV
    j = split * SPLIT + tl.arange(0, BLOCK_N)
    stored = (j >= low) & (j < end)
    slots = slots_of(table, j, stored, PAGE)[:, None] * KV_HEADS
    k = tl.load(keys + slots * K + d[None, :], mask=stored[:, None] & mask_k, other=0.0)
    v = tl.load(values + slots * KV + e[None, :], mask=stored[:, None] & mask_v, other=0.0)
    j += BLOCK_N
    slots = slots_of(table, j, (j >= low) & (j < end), PAGE)[:, None] * KV_HEADS
    pdl_wait(OVERLAP)
    at = b * (KV_HEADS * GROUP) + kv_head * GROUP
    out += at * KV
    lse += at
    if length <= 0:
        if split == 0:
            tl.store(out + g[:, None] * KV + e[None, :],
                     tl.zeros([BLOCK_G, BLOCK_KV], tl.float32).to(out.dtype.element_ty), mask=mask_e)  # fmt: skip
            tl.store(lse + g, tl.full([BLOCK_G], float("-inf"), tl.float32), mask=g < GROUP)
        return
    if (split < first) | (split > last):
        return

    base = query + b * query_row + (kv_head * GROUP + g)[:, None] * query_head
    q = load_head(base, d[None, :], (g < GROUP)[:, None] & mask_k, K, query_norm, eps, cos + angle, sin + angle,
                  NORM_QUERY, ROTARY)  # fmt: skip
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_KV], tl.float32)
    if APPEND:  # noqa: SIM102 (the first is a constant, the second is not)
        if split == last:
            own_key = key + b * key_row + kv_head * key_head
            new_key = load_head(own_key, d[None, :], mask_k, K, key_norm, eps, cos + angle, sin + angle, NORM_KEY,
                                ROTARY).to(keys.dtype.element_ty)  # fmt: skip
            new_value = tl.load(value + b * value_row + kv_head * value_head + e[None, :], mask=mask_v, other=0.0)
            new_value = new_value.to(tl.float32).to(values.dtype.element_ty)
            own = tl.sum(q * new_key.to(tl.float32), axis=1) * scaling
            if SOFTCAP > 0:
                own = SOFTCAP * tanh(own / SOFTCAP)
            top = own * LOG2E
            total += 1.0
            acc += new_value.to(tl.float32)
            page = tl.load(table + (length - 1) // PAGE).to(tl.int64)
            slot = (page * PAGE + (length - 1) % PAGE) * KV_HEADS
            tl.store(keys + slot * K + d[None, :], new_key, mask=mask_k)
            tl.store(values + slot * KV + e[None, :], new_value, mask=mask_v)
    pdl_release(OVERLAP)

    for start in range(split * SPLIT, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        stored = (j >= low) & (j < end)
        k_now, v_now = k.to(TYPE), v.to(TYPE)
        if BLOCK_N < SPLIT:
            j += BLOCK_N
            inside = ((j >= low) & (j < end))[:, None]
            k = tl.load(keys + slots * K + d[None, :], mask=inside & mask_k, other=0.0)
            v = tl.load(values + slots * KV + e[None, :], mask=inside & mask_v, other=0.0)
            j += BLOCK_N
            slots = slots_of(table, j, (j >= low) & (j < end), PAGE)[:, None] * KV_HEADS
        s = tl.dot(q.to(TYPE), tl.trans(k_now), input_precision="ieee") * scaling
        if SOFTCAP > 0:
            s = SOFTCAP * tanh(s / SOFTCAP)
        s = tl.where(stored[None, :], s * LOG2E, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        s = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(s, axis=1)
        acc = tl.dot(s.to(TYPE), v_now, acc * shrink[:, None], input_precision="ieee")
        top = new_top

    acc = acc / total[:, None]
    if first == last:
        tl.store(out + g[:, None] * KV + e[None, :], acc.to(out.dtype.element_ty), mask=mask_e)
        tl.store(lse + g, (top + tl.log2(total)) * LN2, mask=g < GROUP)
    elif SPLITS > 1:
        sums = partial + at * (SPLITS * KV)
        sums_lse = partial_lse + at * SPLITS
        tl.store(sums + (split * GROUP + g)[:, None] * KV + e[None, :], acc, mask=mask_e)
        tl.store(sums_lse + split * GROUP + g, top + tl.log2(total), mask=g < GROUP)
        combine_splits(sums, sums_lse, counters + at, out, lse, e, first, last, GROUP, KV, CHUNK)
