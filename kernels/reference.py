"""Every op's mathematics in plain PyTorch: the specification of the Triton, C++ and CUDA code, and its test oracle.

One section per op; `<op>_ref` has the op's signature. Written for reading, not for speed: loops over rows, any device,
any floating dtype. Arithmetic is fp32 (fp64 where the query is fp64) and is rounded once, to the output's dtype.
Shape letters: B rows in the call, T query tokens end to end, S cache slots, H heads, Hkv kv heads, K and Kv head dims,
R rows and P pages of the page table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .reference_dense import *  # noqa: F403 (the ops without a cache; one import path for all references)

# ---- dropout ---------------------------------------------------------------------------------------------------------


def _mix(x: Tensor) -> Tensor:
    """Bijective mixing of 32-bit words held in int64 (`lowbias32` of C. Wellons' hash prospector)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def dropout_keep(seed: int, slots: Tensor, heads: Tensor, positions: Tensor, dropout: float) -> Tensor:
    """Which attention weights survive dropout: a pure function of (seed, the query's cache slot, head, key position).

    slots, heads, positions: integer tensors that broadcast. All arithmetic is on uint32:

        word(query)     = mix(mix(mix(seed_low) ^ seed_high ^ slot) ^ head)
        word(query, j)  = mix(word(query) ^ (j * 0x9E3779B9))
        keep            = (word >> 8) >= floor(dropout * 2^24)

    so that every implementation, however tiled, drops the same weights in forward and backward.
    """
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    slots, heads, positions = slots.long(), heads.long(), positions.long()
    word = _mix(_mix(_mix(torch.full_like(slots, low)) ^ high ^ (slots & 0xFFFFFFFF)) ^ heads)
    word = _mix(word ^ ((positions * 0x9E3779B9) & 0xFFFFFFFF))
    return (word >> 8) >= int(dropout * (1 << 24))


# ---- kv_append -------------------------------------------------------------------------------------------------------


def _turn(
    x: Tensor, positions: Tensor, cos: Tensor | None, sin: Tensor | None, norm: Tensor | None, eps: float
) -> Tensor:
    """x (T, heads, K) RMS-normed over K with weight norm, its first 2 cos.shape[1] components rotated by halves."""
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if norm is not None:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * norm.to(x.dtype)
    if cos is not None and sin is not None:
        c, s = cos[positions][:, None].to(x.dtype), sin[positions][:, None].to(x.dtype)
        low, high, rest = x.split([c.shape[-1], c.shape[-1], x.shape[-1] - 2 * c.shape[-1]], dim=-1)
        x = torch.cat([low * c - high * s, high * c + low * s, rest], dim=-1)
    return x


def kv_append_ref(
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    query: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    positions: Tensor | None = None,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> None:
    """keys[slots] = key, values[slots] = value, converted to the cache's dtype.

    key (T, Hkv, K), value (T, Hkv, Kv), slots int64 (T,) without duplicates (a negative one skips its token),
    keys (S, Hkv, K), values (S, Hkv, Kv). Optional: RMS norm over each head with weights query_norm and key_norm (K,),
    then rotary embedding by halves with cos and sin (P, rotary // 2) at positions (T,); query (T, H, K) in place.
    """
    live = slots >= 0
    keys[slots[live]] = _turn(key, positions, cos, sin, key_norm, eps).to(keys.dtype)[live]
    values[slots[live]] = value.to(values.dtype)[live]
    if query is not None:
        query.copy_(_turn(query, positions, cos, sin, query_norm, eps))


# ---- kv_gather -------------------------------------------------------------------------------------------------------


def kv_gather_ref(keys: Tensor, values: Tensor, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """keys[slots] and values[slots] in a dtype: keys (S, Hkv, K), values (S, Hkv, Kv), slots int64 (T,)."""
    return keys.index_select(0, slots).to(dtype), values.index_select(0, slots).to(dtype)


# ---- ragged_attention ------------------------------------------------------------------------------------------------


def _row_keys(
    page_table: Tensor, row: int, length: int, n: int, page_size: int, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Slots (J,) and positions (J,) of the keys that a row's last n tokens can see, and the mask (n, J)."""
    first = max(0, length - n - window + 1) if window else 0
    j = torch.arange(first, length, device=page_table.device)
    p = torch.arange(length - n, length, device=page_table.device)
    slots = page_table[row].long()[j // page_size] * page_size + j % page_size
    seen = j[None, :] <= p[:, None]
    if window:
        seen = seen & (p[:, None] - j[None, :] < window)
    return slots, j, seen


def _row_weights(
    q: Tensor, k: Tensor, scaling: float, softcap: float, seen: Tensor
) -> tuple[Tensor, Tensor, Tensor | float]:
    """q (H, n, K), k (H, J, K) -> masked scores (H, n, J), their log-sum-exp (H, n), and d score / d(scaling q.k)."""
    scores, slope = scaling * (q @ k.transpose(1, 2)), 1.0
    if softcap:
        bent = torch.tanh(scores / softcap)
        scores, slope = softcap * bent, 1 - bent * bent
    scores = scores.masked_fill(~seen, float("-inf"))
    return scores, torch.logsumexp(scores, dim=-1), slope


def _row_kept(seed: int, dropout: float, slots: Tensor, j: Tensor, n: int, heads: int, work: torch.dtype) -> Tensor:
    """Factors (H, n, J) on the weights of one row: 0 where dropped, 1 / (1 - dropout) where kept."""
    h = torch.arange(heads, device=j.device)
    keep = dropout_keep(seed, slots[-n:][None, :, None], h[:, None, None], j[None, None, :], dropout)
    return keep.to(work) / (1 - dropout)


def ragged_attention_ref(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    rows: Tensor,
    row_offsets: Tensor,
    lengths: Tensor,
    *,
    page_size: int,
    scaling: float,
    window: int = 0,
    softcap: float = 0.0,
    dropout: float = 0.0,
    seed: int = 0,
    max_query: int,
    max_length: int,
) -> tuple[Tensor, Tensor]:
    """Causal attention of ragged queries over a paged cache that already holds their own keys and values.

    query (T, H, K); keys (S, Hkv, K), values (S, Hkv, Kv), Hkv divides H; page_table int32 (R, P); rows int32 (B,);
    row_offsets int32 (B+1,); lengths int32 (B,): tokens of each row in the cache, this call's included. max_query and
    max_length bound the queries and the length of any row. Query i of the n of row b is at p = lengths[b] - n + i:

        s_j = scaling * q.k_j (softcap: softcap * tanh(s_j / softcap)),   j <= p  and  (window == 0 or p - j < window)
        lse = log sum_j exp(s_j),   out = sum_j keep_j / (1 - dropout) * exp(s_j - lse) * v_j

    Returns out (T, H, Kv) in the query's dtype and lse (T, H) in fp32 (fp64 for an fp64 query). Differentiable.
    """
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    heads, group = query.shape[1], query.shape[1] // keys.shape[1]
    offsets, outs, lses = row_offsets.tolist(), [], []
    for b, (row, length) in enumerate(zip(rows.tolist(), lengths.tolist(), strict=True)):
        n = offsets[b + 1] - offsets[b]
        if n == 0:
            continue
        slots, j, seen = _row_keys(page_table, row, length, n, page_size, window)
        q = query[offsets[b] : offsets[b + 1]].to(work).transpose(0, 1)
        k = keys[slots].to(work).repeat_interleave(group, dim=1).transpose(0, 1)
        v = values[slots].to(work).repeat_interleave(group, dim=1).transpose(0, 1)
        scores, lse, _ = _row_weights(q, k, scaling, softcap, seen)
        weights = torch.exp(scores - lse[..., None])
        if dropout:
            weights = weights * _row_kept(seed, dropout, slots, j, n, heads, work)
        outs.append((weights @ v).transpose(0, 1).to(query.dtype))
        lses.append(lse.transpose(0, 1))
    if not outs:
        return query.new_zeros(0, heads, values.shape[2]), query.new_zeros(0, heads, dtype=work)
    return torch.cat(outs), torch.cat(lses)


def ragged_attention_backward_ref(
    grad_out: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    lse: Tensor,
    page_table: Tensor,
    rows: Tensor,
    row_offsets: Tensor,
    lengths: Tensor,
    grad_keys: Tensor,
    grad_values: Tensor,
    *,
    grads_from: Tensor | None = None,
    page_size: int,
    scaling: float,
    window: int = 0,
    softcap: float = 0.0,
    dropout: float = 0.0,
    seed: int = 0,
    max_query: int,
    max_length: int,
) -> Tensor:
    """The derivative of ragged_attention: returns grad_query (T, H, K) and adds to grad_keys and grad_values in place.

    grad_keys (S, Hkv, K) and grad_values (S, Hkv, Kv) are fp32 (fp64 for an fp64 query); different rows of the call
    must not share pages. The weights are recomputed from lse, and with w = exp(s - lse), f = keep / (1 - dropout):

        delta = dout.out,   ds_j = w_j (f_j dout.v_j - delta) * d s_j / d(scaling q.k_j)
        dq = scaling sum_j ds_j k_j,   dk_j += scaling ds_j q,   dv_j += f_j w_j dout

    grads_from int32 (B,): dk and dv of a row's positions before it are left out; another call adds them
    (model/attention.py).
    """
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    heads, kv_heads = query.shape[1], keys.shape[1]
    group = heads // kv_heads
    offsets, grad_query = row_offsets.tolist(), torch.zeros_like(query)
    for b, (row, length) in enumerate(zip(rows.tolist(), lengths.tolist(), strict=True)):
        mine = slice(offsets[b], offsets[b + 1])
        n = offsets[b + 1] - offsets[b]
        if n == 0:
            continue
        slots, j, seen = _row_keys(page_table, row, length, n, page_size, window)
        q = query[mine].to(work).transpose(0, 1)
        k = keys[slots].to(work).repeat_interleave(group, dim=1).transpose(0, 1)
        v = values[slots].to(work).repeat_interleave(group, dim=1).transpose(0, 1)
        do = grad_out[mine].to(work).transpose(0, 1)
        scores, _, slope = _row_weights(q, k, scaling, softcap, seen)
        weights = torch.exp(scores - lse[mine].transpose(0, 1)[..., None])
        delta = (do * out[mine].to(work).transpose(0, 1)).sum(-1, keepdim=True)
        grad_weights, kept = do @ v.transpose(1, 2), weights
        if dropout:
            factor = _row_kept(seed, dropout, slots, j, n, heads, work)
            grad_weights, kept = grad_weights * factor, weights * factor
        grad_scores = scaling * weights * (grad_weights - delta) * slope
        grad_query[mine] = (grad_scores @ k).transpose(0, 1).to(query.dtype)
        if grads_from is not None:
            grad_scores, kept = (x * (j >= grads_from[b]) for x in (grad_scores, kept))
        grad_k, grad_v = grad_scores.transpose(1, 2) @ q, kept.transpose(1, 2) @ do
        grad_keys[slots] += grad_k.reshape(kv_heads, group, len(j), -1).sum(1).transpose(0, 1).to(grad_keys.dtype)
        grad_values[slots] += grad_v.reshape(kv_heads, group, len(j), -1).sum(1).transpose(0, 1).to(grad_values.dtype)
    return grad_query


# ---- linear_cross_entropy --------------------------------------------------------------------------------------------


def linear_cross_entropy_ref(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, scale: float = 1.0, softcap: float = 0.0,
    weight_gradient: object = None,
) -> Tensor:  # fmt: skip
    """The summed cross-entropy of a linear head: sum_n logsumexp(l_n) - l_n[target_n], l = scale * (hidden W^T + b).

    hidden (N, D), weight (V, D), bias (V,) or None, targets int64 (N,), -100 for an ignored row; softcap: l = softcap *
    tanh(l / softcap). Returns () in fp32 (fp64 for fp64); 0 for N = 0. Differentiable by autograd, so weight_gradient,
    by which the fused form computes dW, is not called.
    """
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


# ---- decode_attention ------------------------------------------------------------------------------------------------


def decode_attention_ref(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    rows: Tensor,
    lengths: Tensor,
    *,
    page_size: int,
    scaling: float,
    window: int = 0,
    softcap: float = 0.0,
    max_length: int,
    key: Tensor | None = None,
    value: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    positions: Tensor | None = None,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 1e-6,
    counters: Tensor | None = None,
    overlap: bool = False,
    early: bool = False,
) -> tuple[Tensor, Tensor]:
    """ragged_attention of one query (B, H, K) per row, after kv_append of the token's own key and value if given.

    lengths include the query's token; its slot is that of position lengths[b] - 1. A row of length 0 gives zeros and
    lse = -inf. counters is scratch space of the CUDA implementation.
    """
    live = lengths > 0
    if cos is not None or query_norm is not None:
        query = _turn(query, positions, cos, sin, query_norm, eps).to(query.dtype)
    if key is not None and value is not None:
        last = (lengths.long() - 1).clamp(min=0)
        slots = page_table[rows.long(), last // page_size].long() * page_size + last % page_size
        turned: dict[str, Any] = {"cos": cos, "sin": sin, "positions": positions, "key_norm": key_norm, "eps": eps}
        kv_append_ref(key, value, torch.where(live, slots, -1), keys, values, **turned)
    offsets = torch.arange(int(live.sum()) + 1, dtype=torch.int32, device=query.device)
    some, some_lse = ragged_attention_ref(
        query[live], keys, values, page_table, rows[live], offsets, lengths[live],
        page_size=page_size, scaling=scaling, window=window, softcap=softcap, max_query=1, max_length=max_length,
    )  # fmt: skip
    out = query.new_zeros(*query.shape[:2], values.shape[2])
    lse = some_lse.new_full(query.shape[:2], float("-inf"))
    out[live], lse[live] = some, some_lse
    return out, lse
