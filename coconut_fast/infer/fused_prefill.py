"""Prefill with the fused passes' kernels and weights: nine launches a layer for any number of tokens.

    latent_feedback     token and position embeddings of all tokens, the fp32 stream
    each layer, nine launches:
      residual_norm     adds the previous layer's output, norm        (cuBLAS)   q, k and v
      kv_append         QK-norm, rotation, append to the cache
      ragged_attention  over the cache: the rows' earlier tokens and these
      (cuBLAS)          residual_norm   (cuBLAS)   gated_mlp   (cuBLAS)

The last layer computes attention, output product and MLP only for each row's last token, since no other state is used;
with one query a row, attention is decode_attention. This saves 6% of the work of GPT-2's matrix products.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from coconut_fast import ops
from coconut_fast.infer.passes import StaticPrompts

if TYPE_CHECKING:
    from coconut_fast.infer.fused import FusedPasses


def prefill(passes: FusedPasses, prompts: StaticPrompts) -> None:
    """Appends the keys and values of all tokens; `prompts.hidden` gets each row's last state, after the final norm."""
    plan = passes.plan
    x_TD = torch.empty(prompts.size[0], plan.dim, dtype=torch.float32, device=prompts.ids.device)
    kind = {"kind": plan.norm, "eps": plan.eps}
    ops.latent_feedback(
        plan.embed, prompts.ids, x_TD, prompts.positions, prompts.unused, position_embedding=plan.positions
    )
    delta_TD, bias_D = None, None  # what the previous layer adds to the stream
    for index, w in enumerate(passes.layers):
        norm1 = {"norm_bias": w.norm1_bias, **kind}
        if delta_TD is None:
            normed_TD, _ = ops.residual_norm(x_TD, w.norm1, **norm1)
        else:
            normed_TD, x_TD = ops.residual_norm(delta_TD, w.norm1, residual=x_TD, bias=bias_D, **norm1)
        out_TX = _attend(passes, prompts, index, F.linear(normed_TD.to(passes.dtype), w.qkv, w.qkv_bias))
        if index == plan.layers - 1:
            x_TD = x_TD.index_select(0, prompts.last)
        normed_TD, x_TD = ops.residual_norm(
            F.linear(out_TX, w.o), w.norm2, residual=x_TD, bias=w.o_bias, norm_bias=w.norm2_bias, **kind
        )
        inner_TF = ops.gated_mlp(F.linear(normed_TD, w.up), activation=passes.activation, bias=w.up_bias)
        delta_TD, bias_D = F.linear(inner_TF, w.down), w.down_bias
    assert delta_TD is not None, "a plan has layers"
    _, x_BD = ops.residual_norm(delta_TD, plan.final_norm, residual=x_TD, bias=bias_D, **kind)
    hidden_BD, _ = ops.residual_norm(x_BD, plan.final_norm, norm_bias=plan.final_norm_bias, **kind)
    prompts.hidden.copy_(hidden_BD)


def _attend(passes: FusedPasses, prompts: StaticPrompts, index: int, qkv_TX: torch.Tensor) -> torch.Tensor:
    """The projection's (T, (H + 2 Hkv) K) -> attention's (T, H K), in the last layer (B, H K)."""
    plan, cache, w = passes.plan, passes.cache, passes.layers[index]
    qkv_THK = qkv_TX.view(len(qkv_TX), plan.heads + 2 * plan.kv_heads, plan.head_dim)
    query_THK, key, value = qkv_THK.split([plan.heads, plan.kv_heads, plan.kv_heads], dim=1)
    keys, values = cache.storage(index, key, value)
    on_cpu = ops.choose("kv_append", key.device)[0] == "cpu"  # whose kernels do not rotate and take no strided queries
    turns: dict[str, Any] = {}
    if passes.cos is not None or w.q_norm is not None:
        turns = {"query": query_THK, "query_norm": w.q_norm, "key_norm": w.k_norm, "eps": plan.eps}
        turns |= {"cos": passes.cos, "sin": passes.sin, "positions": prompts.positions}
        turns |= {"backend": "torch"} if on_cpu else {}
    ops.kv_append(key, value, prompts.slots, keys, values, **turns)
    _, _, longest = prompts.size
    keywords = {
        "page_size": cache.page_size,
        "scaling": plan.scaling[index],
        "window": plan.window[index],
        "max_length": passes.limit,
    }
    where = (cache.page_table, prompts.rows)
    if index == plan.layers - 1:
        query_BHK = query_THK.index_select(0, prompts.last)
        out_BHK, _ = ops.decode_attention(
            query_BHK, keys, values, *where, prompts.lengths, **keywords, counters=passes.counters
        )
        return out_BHK.flatten(1)
    if on_cpu:
        query_THK = query_THK.contiguous()
    out_THK, _ = ops.ragged_attention(
        query_THK, keys, values, *where, prompts.offsets, prompts.lengths, **keywords, max_query=longest
    )
    return out_THK.flatten(1)
