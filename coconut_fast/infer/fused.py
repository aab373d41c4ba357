"""Passes of GPT-2 and the Llama family from fused kernels, five launches a layer, for graphs to replay.

    latent_feedback     ends the pass before and starts this one: final norm, feedback, position, lengths
    each layer, five launches:
      skinny_linear     norm, q, k and v
      decode_attention  QK-norm, rotation, append to the cache, attention
      skinny_linear     output product, residual
      skinny_linear     norm, up (and gate) product, activation
      skinny_linear     down product, residual
    lm_head_sample, accept_tokens      after a token pass: next tokens, end-of-text

A latent pass of GPT-2 is thus 61 launches, where Hugging Face's body takes several hundred. The residual stream is fp32
from one thought to the next. Above 8 rows norms are separate launches, before qkv and up, and products of large
matrices go to cuBLAS, with their activation as another launch.

On sm_90 the kernels of a pass overlap by programmatic dependent launch (PDL; kernels/common.py, `overlaps`): each
starts while its predecessor runs and prefetches weights, keys and values before it waits for its input. Why this is
safe: latent_feedback, the first kernel of a pass, prefetches nothing and releases the next kernel only after its own
wait, when everything before the pass has finished. So all kernels of the pass may prefetch what was written before it
(`refresh`, host copies, earlier keys), and none writes weights. Only decode_attention prefetches anything that
latent_feedback writes; the qkv product before it therefore does not release it `early`.

The weights are described as for the CPU chain (model/plan.py). Kernels need contiguous (out, in) rows: GPT-2's
transposed matrices and Llama's merged ones are copies, rewritten in place before every call, so that captured graphs
stay valid and see the current weights. Under autocast all matrices are copies in its dtype.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F

from coconut_fast import ops
from coconut_fast.infer.fused_prefill import prefill
from coconut_fast.infer.passes import BUCKETS, StaticBatch, StaticPrompts
from coconut_fast.infer.prefill import PREFILL_TOKENS
from coconut_fast.infer.sampling import Sampling
from coconut_fast.model.cache import KVCache
from coconut_fast.model.coconut import Coconut
from coconut_fast.model.feedback import Identity, Projection, Rescale
from coconut_fast.model.plan import LayerPlan, ModelPlan, describe

SKINNY_ROWS = 8  # rows up to which skinny_linear computes the norms too
OWN_ROWS, OWN_BYTES = 64, 2**24  # rows and weight bytes up to which skinny_linear beats cuBLAS
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (the plan's activation, gated) -> the kernels' activation
ACTIVATIONS = {("gelu_tanh", False): "gelu_tanh", ("gelu", False): "gelu", ("silu", True): "swiglu"}


def reason_not(model: Coconut) -> str | None:
    """Why this model has no fused passes; None where it has them."""
    plan = describe(model.hf)
    if isinstance(plan, str):
        return plan
    if model.dtype not in DTYPES:
        return f"the model is {model.dtype}, the kernels take float32, bfloat16 and float16"
    if (plan.activation, plan.gated) not in ACTIVATIONS:
        return f"activation {plan.activation!r} {'with' if plan.gated else 'without'} a gate has no fused kernel"
    return None


class FusedPasses:
    """Passes over a StaticBatch and a cache; infer/passes.py describes each. ValueError where `reason_not` has one."""

    graphed_tokens = PREFILL_TOKENS

    def __init__(self, model: Coconut, cache: KVCache, sampling: Sampling) -> None:
        reason = reason_not(model)
        plan = describe(model.hf)
        if reason or not isinstance(plan, ModelPlan):
            raise ValueError(f"model: has no fused passes: {reason}")
        self._model = weakref.ref(model)  # keeping the passes does not keep the model alive
        self.plan, self.cache, self.sampling, self.dtype = plan, cache, sampling, compute_dtype(model)
        self.reason = f"passes are fused kernels, five launches a layer (seven or eight above {SKINNY_ROWS} rows)"
        self.activation = ACTIVATIONS[plan.activation, plan.gated]
        self.eos = -1 if model.tokens.eos is None else model.tokens.eos
        self.target = float(model.feedback.mean_norm) if isinstance(model.feedback, Rescale) else 0.0
        self.fused_feedback = type(model.feedback) in (Identity, Rescale)  # part of the launch between two passes
        self.limit = cache.page_table.shape[1] * cache.page_size
        self.cos, self.sin = rotations(plan, self.limit)
        like = torch.empty(0, plan.kv_heads, plan.head_dim, dtype=self.dtype, device=cache.device)
        for index in range(plan.layers):  # the cache first: without memory for packed weights other passes run
            cache.storage(index, like, like)
        self.layers = [_packed(plan.layer(i), self.dtype) for i in range(plan.layers)]
        self.head = plan.head.detach().to(self.dtype)
        body = sum(t.nbytes for layer in self.layers for t in layer.named().values())
        self.bytes_per_pass = (body, body + self.head.nbytes)  # weights read by a latent pass, by a token pass
        # decode_attention counts in it and resets it to zero; graphs of one runner never run concurrently
        self.counters = torch.zeros(BUCKETS[-1] * plan.heads, dtype=torch.int32, device=cache.device)

    @torch.inference_mode()
    def refresh(self) -> None:
        """Picks up weights written in place since the last call; addresses do not change.

        Copies always: a write through `.data` (weights averaged or swapped) leaves no trace in version counters.
        """
        transposed: dict[torch.Size, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for index, packed in enumerate(self.layers):
            for name, tensor in self.plan.layer(index, into=packed).named().items():
                kept = getattr(packed, name)
                if kept.data_ptr() == tensor.data_ptr():
                    continue
                if kept.dtype == tensor.dtype and tensor.t().is_contiguous():
                    sources, copies = transposed.setdefault(kept.shape, ([], []))
                    sources.append(tensor.t())
                    copies.append(kept)
                else:
                    kept.copy_(tensor)
        for sources, copies in transposed.values():
            ops.transpose(sources, copies)
        if self.head.data_ptr() != self.plan.head.data_ptr():
            self.head.copy_(self.plan.head)

    def prefill(self, prompts: StaticPrompts) -> None:
        prefill(self, prompts)

    def think(self, batch: StaticBatch, count: int) -> None:
        if self.fused_feedback:
            self._begin_pass(batch, batch.hidden, batch.index, target=self.target)
            for _ in range(count - 1):
                self._begin_pass(batch, self._layers(batch), batch.index, target=self.target, thought=batch.hidden)
            self._end_pass(batch, self._layers(batch))
            return
        model = self._model()
        assert model is not None, "the model is gone, and its passes run"
        for _ in range(count):
            if type(model.feedback) is Projection and batch.size <= SKINNY_ROWS:
                into, _, out, norm = model.feedback
                inner_BF = ops.skinny_linear(batch.hidden, into.weight, bias=into.bias, activation="gelu")
                fed_BD = ops.skinny_linear(inner_BF, out.weight, bias=out.bias)
                last = {"norm": "layer", "weight": norm.weight, "bias": norm.bias, "eps": norm.eps}
                self._begin_pass(batch, fed_BD, batch.index, **last)
            else:
                self._begin_pass(batch, model.feedback(batch.hidden.to(self.dtype)), batch.index)
            self._end_pass(batch, self._layers(batch))

    def feed(self, batch: StaticBatch) -> None:
        self._begin_pass(batch, self.plan.embed, batch.tokens, remaining=batch.tails)
        self._end_pass(batch, self._layers(batch))

    def begin(self, batch: StaticBatch) -> None:
        self._choose(batch, batch.hidden)

    def decode(self, batch: StaticBatch) -> None:
        plan = self.plan
        self._begin_pass(batch, plan.embed, batch.tokens)
        hidden_BD, _ = ops.residual_norm(
            self._layers(batch), plan.final_norm, kind=plan.norm, norm_bias=plan.final_norm_bias, eps=plan.eps
        )
        self._choose(batch, hidden_BD)

    def _choose(self, batch: StaticBatch, hidden_BD: torch.Tensor) -> None:
        """Chooses the tokens that follow these states, in rows with `attended` above 0."""
        plan, sampling = self.plan, self.sampling
        numbers_B = None if sampling.temperature == 0 else batch.numbers.index_select(1, batch.step)[:, 0]
        ids_B = ops.lm_head_sample(
            hidden_BD,
            self.head,
            bias=plan.head_bias,
            numbers=numbers_B,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
        )
        ops.accept_tokens(ids_B, batch.tokens, batch.written, batch.remaining, batch.attended, batch.step, eos=self.eos)

    def _begin_pass(
        self,
        batch: StaticBatch,
        source: torch.Tensor,
        last_B: torch.Tensor,
        *,
        target: float = 0.0,
        thought: torch.Tensor | None = None,
        remaining: torch.Tensor | None = None,
        **norm: Any,
    ) -> None:
        """Makes source[last], normed if a norm is given, the next input of active rows. With `thought`, source is the
        output of the layers and the norm the final one; its result goes to `thought` in rows that were in that pass.
        """
        plan = self.plan
        if thought is not None:
            norm = {"norm": plan.norm, "weight": plan.final_norm, "bias": plan.final_norm_bias, "eps": plan.eps}
        ops.latent_feedback(
            source,
            last_B,
            batch.stream,
            batch.positions,
            batch.lengths,
            target=target,
            position_embedding=plan.positions,
            remaining=batch.remaining if remaining is None else remaining,
            thought=thought,
            attended=batch.attended,
            **norm,
        )

    def _end_pass(self, batch: StaticBatch, stream_BD: torch.Tensor) -> None:
        """Applies the final norm to the rows that were in this pass, without starting another."""
        self._begin_pass(batch, stream_BD, batch.index, thought=batch.hidden, remaining=batch.none)

    def _layers(self, batch: StaticBatch) -> torch.Tensor:
        """The residual stream after all layers, (B, D) fp32; rows with attended 0 are meaningless."""
        return self._skinny_layers(batch) if batch.size <= SKINNY_ROWS else self._wide_layers(batch)

    def _skinny_layers(self, batch: StaticBatch) -> torch.Tensor:
        plan, x_BD = self.plan, batch.stream
        ahead = {"overlap": True, "early": True}  # the next kernel prefetches only weights
        for index, w in enumerate(self.layers):
            norm1 = {"norm": plan.norm, "norm_weight": w.norm1, "norm_bias": w.norm1_bias, "eps": plan.eps}
            norm2 = {"norm": plan.norm, "norm_weight": w.norm2, "norm_bias": w.norm2_bias, "eps": plan.eps}
            qkv_BX = ops.skinny_linear(x_BD, w.qkv, bias=w.qkv_bias, overlap=True, **norm1)
            out_BX = self._attend(batch, index, qkv_BX)
            x_BD = ops.skinny_linear(out_BX, w.o, bias=w.o_bias, residual=x_BD, **ahead)
            inner_BF = ops.skinny_linear(x_BD, w.up, bias=w.up_bias, activation=self.activation, **norm2, **ahead)
            x_BD = ops.skinny_linear(inner_BF, w.down, bias=w.down_bias, residual=x_BD, **ahead)
        return x_BD

    def _wide_layers(self, batch: StaticBatch) -> torch.Tensor:
        plan, x_BD = self.plan, batch.stream
        kind = {"kind": plan.norm, "eps": plan.eps}
        delta_BD, bias_D = None, None  # what the previous layer adds to the stream
        for index, w in enumerate(self.layers):
            norm1 = {"norm_bias": w.norm1_bias, **kind}
            if delta_BD is None:
                normed_BD, _ = ops.residual_norm(x_BD, w.norm1, **norm1)
            else:
                normed_BD, x_BD = ops.residual_norm(delta_BD, w.norm1, residual=x_BD, bias=bias_D, **norm1)
            out_BX = self._attend(batch, index, self._product(normed_BD.to(self.dtype), w.qkv, w.qkv_bias))
            delta_BD = self._product(out_BX, w.o, early=True)
            normed_BD, x_BD = ops.residual_norm(
                delta_BD, w.norm2, residual=x_BD, bias=w.o_bias, norm_bias=w.norm2_bias, **kind
            )
            inner_BF = self._product(normed_BD, w.up, w.up_bias, activation=self.activation, early=True)
            delta_BD, bias_D = self._product(inner_BF, w.down, early=True), w.down_bias
        assert delta_BD is not None, "a plan has layers"
        return ops.residual_norm(delta_BD, plan.final_norm, residual=x_BD, bias=bias_D, **kind)[1]

    def _product(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, activation: str = "none",
        early: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """act(x W^T + bias): by skinny_linear where launches cost more than cuBLAS's better tiles save."""
        if len(x) <= OWN_ROWS and weight.nbytes <= OWN_BYTES and self.dtype != torch.float32:
            return ops.skinny_linear(x, weight, bias=bias, activation=activation, overlap=True, early=early)
        if activation == "none":
            return F.linear(x, weight, bias)
        return ops.gated_mlp(F.linear(x, weight), activation=activation, bias=bias)

    def _attend(self, batch: StaticBatch, index: int, qkv_BX: torch.Tensor) -> torch.Tensor:
        """The projection's (B, (H + 2 Hkv) K) -> attention's (B, H K); keys and values go to the cache."""
        plan, w = self.plan, self.layers[index]
        qkv_BHK = qkv_BX.view(batch.size, plan.heads + 2 * plan.kv_heads, plan.head_dim)
        query, key, value = qkv_BHK.split([plan.heads, plan.kv_heads, plan.kv_heads], dim=1)
        keys, values = self.cache.storage(index, key, value)
        out_BHK, _ = ops.decode_attention(
            query,
            keys,
            values,
            self.cache.page_table,
            batch.rows,
            batch.attended,
            page_size=self.cache.page_size,
            scaling=plan.scaling[index],
            window=plan.window[index],
            max_length=self.limit,
            key=key,
            value=value,
            cos=self.cos,
            sin=self.sin,
            positions=batch.positions,
            query_norm=w.q_norm,
            key_norm=w.k_norm,
            eps=plan.eps,
            counters=self.counters,
            overlap=True,
            early=True,
        )
        return out_BHK.flatten(1)


def rotations(plan: ModelPlan, length: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """cos and sin of the rotary embedding, (length, K / 2) fp32; None for a model without one."""
    if plan.inv_freq is None:
        return None, None
    at = torch.arange(length, dtype=torch.float32, device=plan.inv_freq.device)
    angles = at[:, None] * plan.inv_freq.float()
    return angles.cos() * plan.rope_scaling, angles.sin() * plan.rope_scaling


def compute_dtype(model: Coconut) -> torch.dtype:
    """The dtype of the products: autocast's where it is on, else the weights'."""
    kind = model.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else model.dtype


def _packed(layer: LayerPlan, dtype: torch.dtype) -> LayerPlan:
    """The layer with contiguous tensors, all but the norms in the dtype of the products."""
    named = {name: t.contiguous() if "norm" in name else t.to(dtype).contiguous() for name, t in layer.named().items()}
    return replace(layer, **named)
