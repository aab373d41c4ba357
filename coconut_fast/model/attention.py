"""Attention over the ragged cache, registered with transformers as `attn_implementation="coconut_fast"`.

Every attention layer of a Hugging Face model calls `attend` with query, key and value of the flattened batch,
(1, heads, T, head dim), and passes our `ragged` keyword through untouched. Keys and values go to our cache; queries
attend to their own row there. Prefill, latent pass, decode and training are this one call.

Gradients go through the cache without copies. A pass writes its keys and values once and saves only query, output and
log-sum-exp. In backward it adds dK and dV of everything it attended to into one buffer per layer; its own rows of that
buffer are complete when its turn comes, because all later passes ran before it. A dummy tensor, passed from each call
to the next of the same layer, makes autograd keep that order even where a thought is detached.

A latent pass's backward is memory-bound: most of its traffic (on a GPU 16 of 20 bytes) reads and rewrites dK and dV of
the prompt for one query per row. Several latent passes therefore leave these to the backward of the first pass, which
adds them for all their queries at once (`Ragged.joined`).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface

from coconut_fast import ops
from coconut_fast.model.batch import RaggedBatch
from coconut_fast.model.cache import Ragged, Storage

NAME = "coconut_fast"
# Keywords of other attention functions in transformers, which would change the result.
MORE_THAN_SOFTMAX = {
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a bias by position",
    "indices": "a selection of keys",
    "block_indices": "a selection of keys",
}
VIEWED_QUERIES = 512  # queries up to which a strided view is kept: the keys and values it pins cost less than a copy
# Fewest passes for which joining pays: on a CPU a joined call of up to 16 costs as much as 4 to 6 separate ones, on a
# GPU, by its bytes, as much as 2.
WORTH_JOINING = {"cpu": 8, "triton": 3}


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    ragged: Ragged | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query (1, H, T, K), key and value (1, Hkv, T, K) of a ragged batch -> output (1, T, H, K).

    Raises ValueError when called without `ragged`, with a mask, or for attention we do not compute (sinks, a bias, a
    selection of keys, attention to later positions).
    """
    ragged = _checked(module, attention_mask, ragged, kwargs)
    layer: int = module.layer_idx  # type: ignore[assignment]
    if ragged.calls is not None:
        ragged.calls.append((layer, sliding_window))
    used = ragged.used if layer == len(ragged.cache.keys) - 1 else None
    asked = used or ragged
    keywords = {
        "page_size": ragged.cache.page_size,
        "scaling": query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        "window": sliding_window or 0,
        "softcap": softcap or 0.0,
        "dropout": dropout if module.training else 0.0,
        "seed": 0 if ragged.seeds is None else int(ragged.seeds[layer]) if query.is_cpu else ragged.seeds[layer],
        "max_query": asked.max_query,
        "max_length": ragged.max_length,
    }
    if used:
        query = query.index_select(2, used.at)
    query_THK, key_THK, value_THK = (x.squeeze(0).transpose(0, 1).to(value.dtype) for x in (query, key, value))
    if not query_THK.is_cuda or len(query_THK) > VIEWED_QUERIES or query_THK.stride(-1) != 1:
        query_THK = query_THK.contiguous()  # a view would pin the keys and values beside it, which the cache also holds
    # Keys and values are copied to the cache in the layout they have, if each head is contiguous.
    key_THK, value_THK = (x if x.stride(-1) == 1 else x.contiguous() for x in (key_THK, value_THK))
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query_THK, key_THK, value_THK)):
        orders = ragged.cache.order  # None in a sealed cache, when a checkpointed pass is recomputed
        before = orders[layer] if orders is not None else None
        order = query_THK.new_zeros((), dtype=torch.float32) if before is None else before
        output_THK, after = _CachedAttention.apply(
            query_THK, key_THK, value_THK, order, before is None, ragged, asked.row_offsets, layer, keywords
        )
        if orders is not None:
            orders[layer] = after
    else:
        output_THK, _ = _forward(query_THK, key_THK, value_THK, ragged, asked.row_offsets, layer, keywords)
    if used:
        output_THK = output_THK.new_zeros(len(key_THK), *output_THK.shape[1:]).index_copy(0, used.at, output_THK)
    return output_THK[None], None


def _checked(
    module: nn.Module, attention_mask: torch.Tensor | None, ragged: Ragged | None, others: dict[str, Any]
) -> Ragged:
    """`ragged`; ValueError for a call that `attend` does not compute. others: its further keywords."""
    if ragged is None:
        raise ValueError(
            f"attn_implementation={NAME!r} was called without the keyword `ragged`: either the Hugging Face model was "
            "called by itself (model.set_attn_implementation('sdpa') allows that), or its code does not hand keywords "
            "on to attention"
        )
    if attention_mask is not None:
        raise ValueError(f"attn_implementation={NAME!r} takes no attention mask, rows are ragged")
    for name, meaning in MORE_THAN_SOFTMAX.items():
        if others.get(name) is not None:
            raise ValueError(f"{type(module).__name__} uses {meaning}, which attn_implementation={NAME!r} lacks")
    if others.get("is_causal", getattr(module, "is_causal", True)) is False:
        raise ValueError(
            f"{type(module).__name__} attends to later positions too (is_causal is False), "
            f"attn_implementation={NAME!r} only to earlier ones"
        )
    return ragged


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ragged: Ragged,
    row_offsets: torch.Tensor,
    layer: int,
    keywords: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    cache = ragged.cache
    keys, values = cache.storage(layer, key, value)
    ops.kv_append(key, value, ragged.slots, keys, values)
    if query.is_cuda and keywords["max_query"] == 1 and len(query) == len(ragged.rows) and not keywords["dropout"]:
        # One query per row: split over the sequence; the general kernel does a row's work in one block.
        options = {k: v for k, v in keywords.items() if k not in ("dropout", "seed", "max_query")}
        return ops.decode_attention(query, keys, values, cache.page_table, ragged.rows, ragged.lengths, **options)
    where = (cache.page_table, ragged.rows, row_offsets, ragged.lengths)
    return ops.ragged_attention(query, keys, values, *where, **keywords)


class _CachedAttention(torch.autograd.Function):
    """`_forward` with its derivative; see the module docstring for why the order of backward matters."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        order: torch.Tensor,
        is_first: bool,
        ragged: Ragged,
        row_offsets: torch.Tensor,
        layer: int,
        keywords: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        output, lse = _forward(query, key, value, ragged, row_offsets, layer, keywords)
        # Slots that a later pass overwrites must be restored before this pass reads them in backward.
        ctx.save_for_backward(query, output, lse, *((key, value) if ragged.rewritten else ()))
        ctx.ragged, ctx.row_offsets, ctx.layer, ctx.keywords = ragged, row_offsets, layer, keywords
        ctx.is_first = is_first
        ctx.set_materialize_grads(False)
        return output, torch.empty_like(order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor | None, grad_order: torch.Tensor | None) -> Any:  # type: ignore
        query, output, lse, *rewritten = ctx.saved_tensors
        ragged, layer = ctx.ragged, ctx.layer
        cache = ragged.cache
        grad_keys, grad_values = cache.gradients(layer)
        waiting = cache.waiting[layer]
        if waiting and ctx.is_first and ragged.joined is None:  # if set, the first pass itself needs no gradients
            _add_joined(ragged, layer, ctx.keywords)
        if rewritten:
            ops.kv_append(*rewritten, ragged.slots, cache.keys[layer], cache.values[layer])
        if grad_output is None:  # nothing uses this pass's output, but later passes may use its keys and values
            grad_query = torch.zeros_like(query)
        else:
            grad_output, where = grad_output.contiguous(), (ragged.rows, ctx.row_offsets, ragged.lengths)
            only = {} if ragged.joined is None else {"grads_from": ragged.joined}
            grad_query = _backward(cache, layer, (grad_output, query, output, lse), where, ctx.keywords | only)
        if ragged.joined is not None:
            # Detached: their graph holds the cache, and if no first pass clears the list, neither would ever be freed.
            of = (torch.zeros_like(output) if grad_output is None else grad_output, query, output, lse)
            waiting.append((ragged.rows, *(x.detach() for x in of)))
        grad_key, grad_value = ops.kv_gather(grad_keys, grad_values, ragged.slots, query.dtype)
        if rewritten:  # these gradients were for this pass's keys and values; the pass before starts from zero
            grad_keys[ragged.slots] = 0
            grad_values[ragged.slots] = 0
        if ctx.is_first:  # the last to run backward; a second backward through the same graph starts from zero
            cache.grad_keys[layer] = cache.grad_values[layer] = None
            cache.waiting[layer] = []
        return grad_query, grad_key, grad_value, *[None] * 6


def _backward(
    cache: Storage, layer: int, of: tuple[torch.Tensor, ...], where: tuple[torch.Tensor, ...], keywords: dict[str, Any]
) -> torch.Tensor:
    """of: the output's gradient, query, output, lse; where: rows, row offsets, lengths -> the query's gradient."""
    grad_output, query, output, lse = of
    cached, grads = (cache.keys[layer], cache.values[layer]), cache.gradients(layer)
    return ops.ragged_attention_backward(
        grad_output, query, *cached, output, lse, cache.page_table, *where, *grads, **keywords
    )


def num_joined(batch: RaggedBatch, loss_only: bool) -> int:
    """How many passes after the first leave dK and dV of its slots to it: they have one token per row, all used."""
    worth = WORTH_JOINING.get(ops.choose("ragged_attention_backward", batch.input_ids.device)[0])
    single = (max(p.counts) == 1 and not (loss_only and p.used) for p in batch.passes[1:])
    count = sum(itertools.takewhile(bool, single))
    return count if worth is not None and count >= worth else 0


def _add_joined(first: Ragged, layer: int, keywords: dict[str, Any]) -> None:
    """dK and dV of all waiting passes, in one call that takes each row's tokens, concatenated, as its queries.

    It also adds to the slots of those tokens, which nothing reads any more.
    """
    cache = first.cache
    rows, *of = zip(*reversed(cache.waiting[layer]), strict=True)
    if len(rows) not in cache.joins:  # the same for every layer
        cache.joins[len(rows)] = _joined_layout(first, torch.cat(rows))
    order, offsets, lengths = cache.joins[len(rows)]
    keywords = keywords | {"max_query": len(rows), "max_length": first.max_length + len(rows)}
    joined = tuple(torch.cat(tensors).index_select(0, order) for tensors in of)
    _backward(cache, layer, joined, (first.rows, offsets, lengths), keywords)


def _joined_layout(first: Ragged, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Orders tokens that are given pass by pass (`rows`: the row of each) by the rows of the first pass, `first`.

    Returns their new order, the row offsets in it, and the row lengths with them. Never synchronises with the device.
    """
    place = torch.empty(len(first.cache.page_table), dtype=torch.int64, device=rows.device)
    place[first.rows.long()] = torch.arange(len(first.rows), device=rows.device)
    at = place[rows.long()]
    counts = torch.zeros_like(first.rows).index_add_(0, at, torch.ones_like(rows))
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0, dtype=torch.int32)])
    return at.argsort(stable=True), offsets, first.lengths + counts


AttentionInterface.register(NAME, attend)
