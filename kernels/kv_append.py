"""Write this call's keys and values into their cache slots, normed and rotated on the way where the model does so.

    keys[slots[t]]   = rotate(norm(key[t]), positions[t])      norm: RMS over the head (Qwen3's QK-norm), optional
    values[slots[t]] = value[t]                                rotate: rotary embedding by halves (Llama), optional
    query[t]         = rotate(norm(query[t]), positions[t])    in place, where a query is given

Shapes: key (T, Hkv, K), value (T, Hkv, Kv), query (T, H, K) in any strides with contiguous heads (views of a fused
projection); slots int64 (T,), a negative one skips its token; keys (S, Hkv, K), values (S, Hkv, Kv); cos and sin
(P, rotary // 2) indexed by positions (T,); query_norm and key_norm (K,).
Bytes: 2 T (Hkv (K + Kv) + H K with a query) elements, each moved once in 128-bit accesses. Bound: memory bandwidth,
launch latency below about 2 MB. One program per token and tile of heads; registers at most 128.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import check_dtypes, check_rotary, check_shape, load_head, on_device, register


@triton.jit
def _append(
    key, value, query, slots, keys, values, cos, sin, positions, query_norm, key_norm, eps,
    key_token, key_head, value_token, value_head, query_token, query_head,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, K: tl.constexpr, KV: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_KV: tl.constexpr,
    ROTARY: tl.constexpr, NORM_QUERY: tl.constexpr, NORM_KEY: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    slot = tl.load(slots + token)
    angle = 0
    if ROTARY > 0:
        angle = tl.load(positions + token).to(tl.int64) * (ROTARY // 2)
    d = tl.arange(0, BLOCK_K)[None, :]
    KEY_TILES: tl.constexpr = (KV_HEADS + BLOCK_H - 1) // BLOCK_H
    if tile < KEY_TILES:
        if slot >= 0:
            h = tile * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
            mask = (h < KV_HEADS) & (d < K)
            base = key + token * key_token + h * key_head
            x = load_head(base, d, mask, K, key_norm, eps, cos + angle, sin + angle, NORM_KEY, ROTARY)
            tl.store(keys + slot * (KV_HEADS * K) + h * K + d, x.to(keys.dtype.element_ty), mask=mask)
            e = tl.arange(0, BLOCK_KV)[None, :]
            mask = (h < KV_HEADS) & (e < KV)
            x = tl.load(value + token * value_token + h * value_head + e, mask=mask)
            target = values + slot * (KV_HEADS * KV) + h * KV + e
            tl.store(target, x.to(tl.float32).to(values.dtype.element_ty), mask=mask)
    else:
        h = (tile - KEY_TILES) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
        mask = (h < HEADS) & (d < K)
        base = query + token * query_token + h * query_head
        x = load_head(base, d, mask, K, query_norm, eps, cos + angle, sin + angle, NORM_QUERY, ROTARY)
        tl.debug_barrier()  # in place: every partner of a rotation is read before any is overwritten
        tl.store(base + d, x.to(query.dtype.element_ty), mask=mask)


def _launch(
    key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *,
    query: torch.Tensor | None = None, cos: torch.Tensor | None = None, sin: torch.Tensor | None = None,
    positions: torch.Tensor | None = None, query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None, eps: float = 1e-6,
) -> None:  # fmt: skip
    tokens, kv_heads, head_dim = key.shape
    value_dim = value.shape[-1]
    check_dtypes("kv_append", key=key, value=value, keys=keys, values=values, query=query)
    check_shape("kv_append", "key", key, (tokens, kv_heads, head_dim))
    check_shape("kv_append", "value", value, (tokens, kv_heads, value_dim))
    check_shape("kv_append", "slots", slots, (tokens,))
    check_shape("kv_append", "keys", keys, (keys.shape[0], kv_heads, head_dim), contiguous=True)
    check_shape("kv_append", "values", values, (keys.shape[0], kv_heads, value_dim), contiguous=True)
    rotary = check_rotary("kv_append", tokens, head_dim, cos, sin, positions, query_norm, key_norm)
    heads = 0 if query is None else query.shape[1]
    if query is not None:
        check_shape("kv_append", "query", query, (tokens, heads, head_dim))
    if tokens == 0:
        return
    block_k, block_kv = triton.next_power_of_2(head_dim), triton.next_power_of_2(value_dim)
    block_h = min(triton.next_power_of_2(max(kv_heads, heads)), max(1, 1024 // max(block_k, block_kv)))
    with on_device(key):
        _append[(tokens, triton.cdiv(kv_heads, block_h) + triton.cdiv(heads, block_h))](
            key=key,
            value=value,
            query=key if query is None else query,
            slots=slots,
            keys=keys,
            values=values,
            cos=cos if rotary else key,
            sin=sin if rotary else key,
            positions=positions,
            query_norm=query_norm,
            key_norm=key_norm,
            eps=eps,
            key_token=key.stride(0),
            key_head=key.stride(1),
            value_token=value.stride(0),
            value_head=value.stride(1),
            query_token=0 if query is None else query.stride(0),
            query_head=0 if query is None else query.stride(1),
            HEADS=heads,
            KV_HEADS=kv_heads,
            K=head_dim,
            KV=value_dim,
            BLOCK_H=block_h,
            BLOCK_K=block_k,
            BLOCK_KV=block_kv,
            ROTARY=rotary,
            NORM_QUERY=query_norm is not None,
            NORM_KEY=key_norm is not None,
            num_warps=4 if block_h * block_k >= 1024 else 2,
        )


_OP = register(
    "kv_append(Tensor key, Tensor value, Tensor slots, Tensor(a!) keys, Tensor(b!) values, *, Tensor(c!)? query=None, "
    "Tensor? cos=None, Tensor? sin=None, Tensor? positions=None, Tensor? query_norm=None, Tensor? key_norm=None, "
    "float eps=1e-6) -> ()",
    _launch,
    lambda *args, **kwargs: None,
)


def kv_append(
    key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *,
    query: torch.Tensor | None = None, cos: torch.Tensor | None = None, sin: torch.Tensor | None = None,
    positions: torch.Tensor | None = None, query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None, eps: float = 1e-6,
) -> None:  # fmt: skip
    """Scatter key and value into the cache at slots (the cache's dtype), rotated and normed where asked for.

    Shapes are in the module's docstring. `query`, if given, is changed in place; cos and sin are given together, with
    positions. ValueError for shapes or dtypes that do not fit.
    """
    _OP(
        key, value, slots, keys, values, query=query, cos=cos, sin=sin, positions=positions,
        query_norm=query_norm, key_norm=key_norm, eps=eps,
    )  # fmt: skip
