"""Attention of one query per row over the paged, ragged cache: one launch, split over the sequence.

    s_j = scaling q.k_j (softcap tanh(s_j / softcap) where set)
    lse = log sum_j exp(s_j),  out = sum_j exp(s_j - lse) v_j
    over j <= p and p - j < window, where p = lengths[b] - 1

Optionally the launch also takes the new token's key and value from the projection: it norms and rotates query and key
(Qwen3, Llama), attends to them, and writes them to the slot of position p. A layer then needs no kv_append.

Shapes: query (B, H, K); keys (S, Hkv, K), values (S, Hkv, Kv); page_table int32 (R, P); rows, lengths int32 (B,).
Work: one program per (row, head, split); above 16 rows one program takes all heads that share keys, on tensor cores
(decode_attention_group.py). Splits start at fixed positions, so a row's result does not depend on what the other rows
hold. The programs of one head store partial sums (fp32) and increment an integer; the last one adds them in the order
of the splits. No float is added atomically. With `overlap` the kernel starts while its predecessor runs (common.py,
`overlaps`) and has loaded lengths, pages, keys and values when the query is ready.
Rows are the grid's fastest axis: rows that share a prefix read its pages at the same time, once from memory and then
from L2 (60 MB on an H200: 1,600 tokens of GPT-2, 36 KiB each), so shared prefixes need no separate path.
Bytes: sum_b lengths[b] Hkv (K + Kv) elements, in 128-bit loads, plus 0.4% for partial sums (one fp32 vector per split
of 256 positions). Bound: memory bandwidth; at batch 1 latency (two dependent loads, page then key).
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
    check_rotary,
    check_shape,
    combine_splits,
    compute_type,
    load_head,
    on_device,
    overlaps,
    pdl_release,
    pdl_wait,
    register,
    row_split,
    slots_of,
    tanh,
)
from .decode_attention_group import _decode_group

HEAD_BY_HEAD_ROWS = 16  # rows up to which grouped heads run one by one: more programs, no tensor-core tiles to fill


@triton.jit
def _decode(
    query, key, value, keys, values, out, lse, partial, partial_lse, counters, page_table, rows, lengths,
    cos, sin, positions, query_norm, key_norm, eps, scaling,
    query_row, query_head, key_row, key_head, value_row, value_head, table_row,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, KV: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, APPEND: tl.constexpr, ROTARY: tl.constexpr,
    NORM_QUERY: tl.constexpr, NORM_KEY: tl.constexpr, OVERLAP: tl.constexpr, EARLY: tl.constexpr,
    SPLITS: tl.constexpr, SPLIT: tl.constexpr, LANES: tl.constexpr, DEPTH: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """One query head. A lane is the group of threads that load one key or value vector in 128-bit loads. It keeps its
    own positions, running maximum and sums until the end, so threads exchange data only for the last adds of a dot
    product."""
    if EARLY:
        pdl_release(OVERLAP)
    b = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    kv_head = head // GROUP
    split = tl.program_id(2)

    # -- what the kernel before does not write: lengths, pages, and the first stored tokens of this split
    length, table, angle, low, first, last, end = row_split(
        lengths, rows, positions, page_table, table_row, b, split, SPLIT, WINDOW, APPEND, ROTARY
    )
    p = tl.arange(0, LANES)
    d = tl.arange(0, BLOCK_K)
    e = tl.arange(0, BLOCK_KV)
    mask_e = e < KV
    keys += kv_head * K
    values += kv_head * KV
    j = split * SPLIT + tl.arange(0, DEPTH)[:, None] * LANES + p[None, :]
    stored = (j >= low) & (j < end)
    slots = slots_of(table, j, stored, PAGE)[:, :, None] * KV_HEADS
    inside = stored[:, :, None]
    k = tl.load(keys + slots * K + d[None, None, :], mask=inside & (d < K)[None, None, :], other=0.0)
    v = tl.load(values + slots * KV + e[None, None, :], mask=inside & mask_e[None, None, :], other=0.0)
    pdl_wait(OVERLAP)
    at = b * (KV_HEADS * GROUP) + head
    out += at * KV
    lse += at
    if length <= 0:  # an unused row (a padded batch): zeros, and no weight in a later combine
        if split == 0:
            tl.store(out + e, tl.zeros([BLOCK_KV], tl.float32).to(out.dtype.element_ty), mask=mask_e)
            tl.store(lse, float("-inf"))
        return
    if (split < first) | (split > last):
        return

    # -- the query, the same in every lane, and the new token, with which lane 0 of the last split starts its sums
    same = (p * 0)[:, None]
    mask = (p >= 0)[:, None] & (d < K)[None, :]
    base = query + b * query_row + head * query_head + same
    q = load_head(base, d[None, :], mask, K, query_norm, eps, cos + angle, sin + angle, NORM_QUERY, ROTARY)
    top = tl.full([LANES], float("-inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    acc = tl.zeros([LANES, BLOCK_KV], tl.float32)
    if APPEND:
        base = key + b * key_row + kv_head * key_head + same
        new_key = load_head(base, d[None, :], mask, K, key_norm, eps, cos + angle, sin + angle, NORM_KEY,
                            ROTARY).to(keys.dtype.element_ty)  # fmt: skip
        mask_v = (p >= 0)[:, None] & mask_e[None, :]
        new_value = tl.load(value + b * value_row + kv_head * value_head + same + e[None, :], mask=mask_v, other=0.0)
        new_value = new_value.to(tl.float32).to(values.dtype.element_ty)
        pdl_release(OVERLAP)
        here = (p == 0) & (split == last)
        own = tl.sum(q * new_key.to(tl.float32), axis=1) * scaling
        if SOFTCAP > 0:
            own = SOFTCAP * tanh(own / SOFTCAP)
        top = tl.where(here, own * LOG2E, top)
        total = tl.where(here, 1.0, total)
        acc = tl.where(here[:, None], new_value.to(tl.float32), acc)
        if (split == last) & (head % GROUP == 0):
            page = tl.load(table + (length - 1) // PAGE).to(tl.int64)
            slot = (page * PAGE + (length - 1) % PAGE) * KV_HEADS
            tl.store(keys + slot * K + d[None, :] + same, new_key, mask=here[:, None] & mask)
            tl.store(values + slot * KV + e[None, :] + same, new_value, mask=here[:, None] & mask_v)

    # -- this split, exponentials in base 2
    for _ in range(split * SPLIT, end, LANES * DEPTH):
        stored = (j >= low) & (j < end)
        s = tl.sum(q[None, :, :] * k.to(tl.float32), axis=2) * scaling
        w = v.to(tl.float32)
        if LANES * DEPTH < SPLIT:
            j += LANES * DEPTH
            inside = (j >= low) & (j < end)
            slots = slots_of(table, j, inside, PAGE)[:, :, None] * KV_HEADS
            inside = inside[:, :, None]
            k = tl.load(keys + slots * K + d[None, None, :], mask=inside & (d < K)[None, None, :], other=0.0)
            v = tl.load(values + slots * KV + e[None, None, :], mask=inside & mask_e[None, None, :], other=0.0)
        if SOFTCAP > 0:
            s = SOFTCAP * tanh(s / SOFTCAP)
        s = tl.where(stored, s * LOG2E, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, axis=0))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        s = tl.exp2(s - safe[None, :])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(s, axis=0)
        acc = acc * shrink[:, None] + tl.sum(s[:, :, None] * w, axis=0)
        top = new_top

    # -- combine the lanes; one split: done; several: store a partial sum
    highest = tl.max(top, axis=0)
    less = tl.exp2(top - highest)
    all_total = tl.sum(total * less, axis=0)
    all_acc = tl.sum(acc * less[:, None], axis=0) / all_total
    if first == last:
        tl.store(out + e, all_acc.to(out.dtype.element_ty), mask=mask_e)
        tl.store(lse, (highest + tl.log2(all_total)) * LN2)
    elif SPLITS > 1:
        sums = partial + at * (SPLITS * KV)
        tl.store(sums + split * KV + e, all_acc, mask=mask_e)
        tl.store(partial_lse + at * SPLITS + split, highest + tl.log2(all_total))
        combine_splits(sums, partial_lse + at * SPLITS, counters + at, out, lse, e, first, last, 1, KV, CHUNK)


def _split(max_length: int) -> int:
    """Positions per split: 256, more above 16,384."""
    return 256 if max_length <= 64 * 256 else 512 if max_length <= 64 * 512 else 1024


def _lanes(width: int, itemsize: int) -> tuple[int, int, int]:
    """For _decode: lanes, positions per lane and step, warps."""
    warps = 4 if width * itemsize <= 128 else 8
    return max(1, 32 * warps * 16 // (width * itemsize)), 2, warps


def _block(width: int, itemsize: int) -> tuple[int, int]:
    """For _decode_group: positions per step (8 KiB of keys), warps."""
    return max(16, min(64, 8192 // (width * itemsize))), 8


def num_counters(batch: int, heads: int) -> int:
    """Length of the int32 tensor of zeros in which decode_attention counts (it leaves zeros)."""
    return batch * heads


def check_cache(
    op: str, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, page_table: torch.Tensor,
    rows: torch.Tensor, lengths: torch.Tensor, batch: int, window: int, softcap: float,
) -> None:  # fmt: skip
    """ValueError for inputs that fit no attention kernel over the cache (ragged_attention calls this too)."""
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


def _counters(query: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor:
    """The counters that a call with several splits was given, or new ones; ValueError for those that do not fit."""
    needed = num_counters(*query.shape[:2])
    if given is None:
        return query.new_zeros(needed, dtype=torch.int32)
    if given.dtype != torch.int32 or given.numel() < needed:
        raise ValueError(
            f"decode_attention: counters is {given.dtype} of {given.numel()} elements, expected int32 zeros, "
            f"at least {needed}"
        )
    check_shape("decode_attention", "counters", given, tuple(given.shape), contiguous=True)
    return given


def _launch(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, page_table: torch.Tensor, rows: torch.Tensor,
    lengths: torch.Tensor, *, page_size: int, scaling: float, window: int = 0, softcap: float = 0.0, max_length: int,
    key: torch.Tensor | None = None, value: torch.Tensor | None = None, cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None, positions: torch.Tensor | None = None, query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None, eps: float = 1e-6, counters: torch.Tensor | None = None,
    overlap: bool = False, early: bool = False,
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
    rotary = check_rotary("decode_attention", batch, head_dim, cos, sin, positions, query_norm, key_norm)
    group = heads // kv_heads
    block_k, block_kv = triton.next_power_of_2(head_dim), triton.next_power_of_2(value_dim)
    width, split = max(block_k, block_kv), _split(max_length)
    # Powers of two: a kernel is compiled for each number of splits, and eager calls pass their longest row's length.
    splits = triton.next_power_of_2(max(1, triton.cdiv(max_length, split)))
    out = query.new_empty(batch, heads, value_dim)
    lse = query.new_empty(batch, heads, dtype=torch.float32)
    if batch == 0:
        return out, lse
    partial = partial_lse = lse
    if splits > 1:
        partial = query.new_empty(batch * heads * splits * value_dim, dtype=torch.float32)
        partial_lse = query.new_empty(batch * heads * splits, dtype=torch.float32)
        counters = _counters(query, counters)
    overlap = overlap and overlaps(query)
    arguments = {
        "query": query,
        "key": query if key is None else key,
        "value": query if value is None else value,
        "keys": keys,
        "values": values,
        "out": out,
        "lse": lse,
        "partial": partial,
        "partial_lse": partial_lse,
        "counters": rows if counters is None else counters,
        "page_table": page_table,
        "rows": rows,
        "lengths": lengths,
        "cos": query if cos is None else cos,
        "sin": query if sin is None else sin,
        "positions": positions,
        "query_norm": query_norm,
        "key_norm": key_norm,
        "eps": eps,
        "scaling": scaling,
        "query_row": query.stride(0),
        "query_head": query.stride(1),
        "key_row": 0 if key is None else key.stride(0),
        "key_head": 0 if key is None else key.stride(1),
        "value_row": 0 if value is None else value.stride(0),
        "value_head": 0 if value is None else value.stride(1),
        "table_row": page_table.stride(0),
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "K": head_dim,
        "KV": value_dim,
        "PAGE": page_size,
        "WINDOW": window,
        "SOFTCAP": softcap,
        "APPEND": key is not None,
        "ROTARY": rotary,
        "NORM_QUERY": query_norm is not None,
        "NORM_KEY": key_norm is not None,
        "OVERLAP": overlap,
        "EARLY": early and overlap,
        "SPLITS": splits,
        "SPLIT": split,
        "CHUNK": 8,
    }
    with on_device(query):
        if group == 1 or batch <= HEAD_BY_HEAD_ROWS:
            lanes, depth, warps = _lanes(width, keys.element_size())
            _decode[(batch, heads, splits)](
                **arguments,
                LANES=lanes,
                DEPTH=depth,
                BLOCK_K=block_k,
                BLOCK_KV=block_kv,
                num_warps=warps,
                num_stages=1,
                launch_pdl=overlap,
            )
        else:
            block_n, warps = _block(width, keys.element_size())
            _decode_group[(batch, kv_heads, splits)](
                **arguments,
                TYPE=compute_type(query.dtype, keys.dtype, values.dtype),
                BLOCK_N=block_n,
                BLOCK_G=max(16, triton.next_power_of_2(group)),
                BLOCK_K=max(16, block_k),
                BLOCK_KV=max(16, block_kv),
                num_warps=warps,
                num_stages=1,
                launch_pdl=overlap,
            )
    return out, lse


def _fake(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *args, **kwargs):  # type: ignore[no-untyped-def]
    shape = query.shape[:2]
    return query.new_empty(*shape, values.shape[2]), query.new_empty(shape, dtype=torch.float32)


_OP = register(
    "decode_attention(Tensor query, Tensor(a!) keys, Tensor(b!) values, Tensor page_table, Tensor rows, "
    "Tensor lengths, *, int page_size, float scaling, int window=0, float softcap=0.0, SymInt max_length, "
    "Tensor? key=None, Tensor? value=None, Tensor? cos=None, Tensor? sin=None, Tensor? positions=None, "
    "Tensor? query_norm=None, Tensor? key_norm=None, float eps=1e-6, Tensor(c!)? counters=None, "
    "bool overlap=False, bool early=False) -> (Tensor, Tensor)",
    _launch,
    _fake,
)


def decode_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, page_table: torch.Tensor, rows: torch.Tensor,
    lengths: torch.Tensor, *, page_size: int, scaling: float, window: int = 0, softcap: float = 0.0, max_length: int,
    key: torch.Tensor | None = None, value: torch.Tensor | None = None, cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None, positions: torch.Tensor | None = None, query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None, eps: float = 1e-6, counters: torch.Tensor | None = None,
    overlap: bool = False, early: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """One query per row: out (B, H, Kv) in the query's dtype, lse (B, H) fp32. lengths include the query's own token.

    Without key and value, the token's own must be in the cache already. With them, (B, Hkv, K) and (B, Hkv, Kv), they
    are normed, rotated (cos, sin (P, rotary // 2) fp32 at positions (B,)), attended to and written to the row's last
    slot. A row of length 0 gives zeros and lse = -inf, and writes nothing. max_length bounds lengths; it fixes the
    number of splits. counters: int32 zeros of num_counters(B, H), left zero; without it each call makes its own (one
    memset), and calls that may run at the same time must not share one. overlap: start while the previous kernel in the
    stream still runs; that kernel must write nothing but query, key and value. early: release the next kernel at once
    instead of when the query is ready; before its own wait that kernel may read only constants such as weights.
    ValueError for inputs that do not fit.
    """
    return _OP(
        query, keys, values, page_table, rows, lengths, page_size=page_size, scaling=scaling, window=window,
        softcap=softcap, max_length=max_length, key=key, value=value, cos=cos, sin=sin, positions=positions,
        query_norm=query_norm, key_norm=key_norm, eps=eps, counters=counters, overlap=overlap, early=early,
    )  # fmt: skip
