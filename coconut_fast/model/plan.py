"""One description of a model's weights, for engines that run it without Hugging Face's code.

These are the CPU engine, the fused Triton passes and the persistent kernel. `describe(hf_model)` knows GPT-2 and the
Llama family (llama, mistral, qwen2, qwen3) and returns a `ModelPlan`, or the reason why it does not know this model: an
engine that runs a model from its weights alone must be sure that they are the whole model. Nothing is copied: tensors
are the model's own (a layer's merged ones are made on request), so a plan made before training sees the trained
weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as torch_module
from transformers.pytorch_utils import Conv1D

# Static RoPE variants: inv_freq and attention_scaling of the rotary module describe them completely.
STATIC_ROPE = ("default", "linear", "llama3", "yarn")
# Classes of activations -> ours. "gelu_tanh" is the tanh approximation under all its names.
ACTIVATIONS = {
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "GELUActivation": "gelu",
    "GELU": "gelu",  # unless its `approximate` is "tanh"
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "ReLU": "relu",
}
LIBRARIES = ("torch.", "transformers.")
FAMILIES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


@dataclass(frozen=True)
class LayerPlan:
    """One layer. Matrices are (out, in), possibly strided views; parts a model lacks (a bias, a q norm) are None.

    qkv holds the rows of q, then k, then v. up holds the rows of gate, then up, where the plan is `gated`.
    """

    norm1: Tensor
    norm1_bias: Tensor | None
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    norm2: Tensor
    norm2_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None

    def named(self) -> dict[str, Tensor]:
        """The tensors that are not None, by field name."""
        return {f.name: t for f in fields(self) if (t := getattr(self, f.name)) is not None}


@dataclass(frozen=True)
class ModelPlan:
    """All that a forward pass needs. x = embed(ids) (+ positions); layers; final norm; logits = head(x).

    A layer is x += o(attention(qkv(norm1 x))); x += down(act(up(norm2 x))), or down(act(gate) * up) where `gated`.
    """

    model_type: str
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int
    max_positions: int
    norm: str  # "layer" or "rms"
    eps: float
    activation: str  # a value of ACTIVATIONS
    gated: bool
    scaling: tuple[float, ...]  # of the attention scores, per layer
    window: tuple[int, ...]  # per layer: how many positions a query sees, itself included; 0 for all
    embed: Tensor  # (V, D)
    positions: Tensor | None  # (max_positions, D): learned position embeddings
    inv_freq: Tensor | None  # (K / 2,): rotary embedding of q and k, halves paired as (i, i + K/2)
    rope_scaling: float  # multiplies cos and sin
    final_norm: Tensor
    final_norm_bias: Tensor | None
    head: Tensor  # (V, D)
    head_bias: Tensor | None
    blocks: nn.ModuleList

    @property
    def layers(self) -> int:
        return len(self.blocks)

    def layer(self, index: int, into: LayerPlan | None = None) -> LayerPlan:
        """The tensors of one layer; merged ones are copies that the plan does not keep, or are written into `into`."""
        return _gpt2_layer(self.blocks[index]) if self.model_type == "gpt2" else _llama_layer(self.blocks[index], into)

    def fingerprint(self) -> tuple[object, ...]:
        """Changes with a number here, or a weight replaced or written in place: an engine's copy is stale then."""
        values = (getattr(self, f.name) for f in fields(self))
        numbers = tuple(v for v in values if not isinstance(v, Tensor | nn.ModuleList))
        ends = (self.embed, self.positions, self.inv_freq, self.final_norm, self.final_norm_bias)
        blocks = chain.from_iterable((*m._parameters.values(), *m._buffers.values()) for m in modules_of(self.blocks))
        return numbers, versions(t for t in (*blocks, *ends, self.head, self.head_bias) if t is not None)


def versions(tensors: Iterable[Tensor]) -> tuple[tuple[object, ...], ...]:
    """Identity, storage, address, strides and version of each tensor.

    A weak reference to the storage, whose address another may get once it is freed; tensors with one cannot be swapped.
    A new parameter on the same memory counts its versions from 0. For CPU tensors that count none (made in inference
    mode), or that another process may write (shared memory), a sum of their bits takes its place: 3 ms for 100 MB.
    """
    return tuple(map(_state_of, tensors))


def _state_of(tensor: Tensor) -> tuple[object, ...]:
    storage = tensor.untyped_storage()
    uncounted = tensor.is_cpu and (tensor.is_inference() or storage.is_shared())
    where = id(tensor), StorageWeakRef(storage), tensor.data_ptr(), tensor.stride()
    return *where, _bits(tensor) if uncounted else tensor._version


def _bits(tensor: Tensor) -> int:
    raw = tensor.detach().reshape(-1).view(torch.uint8)
    words = raw.view(torch.int64) if raw.numel() % 8 == 0 and raw.data_ptr() % 8 == 0 else raw
    return int(words.sum(dtype=torch.int64))


def describe(hf_model: nn.Module) -> ModelPlan | str:
    """The plan of a Hugging Face causal LM, or one sentence saying why it has none."""
    config = getattr(hf_model, "config", None)
    model_type = getattr(config, "model_type", type(hf_model).__name__)
    if model_type not in FAMILIES:
        return f"model type {model_type!r} is not one of {', '.join(FAMILIES)}"
    cls = type(hf_model)
    if cls.__name__ != FAMILIES[model_type] or not cls.__module__.startswith("transformers.models."):
        return f"the model is a {cls.__module__}.{cls.__name__}, not transformers' {FAMILIES[model_type]}"
    if not hf_model.config.num_hidden_layers:
        return "the model has no layers"
    return (_describe_gpt2 if model_type == "gpt2" else _describe_llama)(hf_model)


def _describe_gpt2(model: nn.Module) -> ModelPlan | str:
    config, body = model.config, model.transformer
    if config.add_cross_attention:
        return "cross attention is not supported"
    plain = {"Embedding", "Dropout", "ModuleList", "LayerNorm", "Linear", "Conv1D"}
    plain |= {"GPT2LMHeadModel", "GPT2Model", "GPT2Block", "GPT2Attention", "GPT2MLP"}
    odd = _unusual_module(model, plain, act="act", eps="eps")
    if odd:
        return odd
    return ModelPlan(
        model_type="gpt2",
        dim=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        inner=body.h[0].mlp.c_fc.weight.shape[1],
        norm="layer",
        eps=float(body.ln_f.eps),
        activation=_formula(body.h[0].mlp.act),
        gated=False,
        scaling=tuple(block.attn.scaling for block in body.h),
        window=(0,) * len(body.h),
        positions=body.wpe.weight,
        max_positions=body.wpe.num_embeddings,
        inv_freq=None,
        rope_scaling=1.0,
        final_norm=body.ln_f.weight,
        final_norm_bias=body.ln_f.bias,
        blocks=body.h,
        **_embedding_and_head(body.wte, model.lm_head),
    )


def _describe_llama(model: nn.Module) -> ModelPlan | str:
    config, body = model.config, model.model
    kind = type(model).__name__.removesuffix("ForCausalLM")
    plain = {"Embedding", "ModuleList", "Linear", f"{kind}ForCausalLM", f"{kind}Model", f"{kind}DecoderLayer"}
    plain |= {f"{kind}Attention", f"{kind}MLP", f"{kind}RMSNorm", f"{kind}RotaryEmbedding"}
    odd = _unusual_module(model, plain, act="act_fn", eps="variance_epsilon")
    if odd:
        return odd
    rope = body.rotary_emb
    if rope.rope_type not in STATIC_ROPE:
        return f"rope type {rope.rope_type!r} changes with the length; only {', '.join(STATIC_ROPE)} are supported"
    count = config.num_hidden_layers  # transformers runs no more; a slice of all would take 0.1 ms
    layers = body.layers[:count] if count < len(body.layers) else body.layers
    attention = [layer.self_attn for layer in layers]
    head_dim = attention[0].head_dim
    if rope.inv_freq.numel() * 2 != head_dim:
        return f"rotary embedding covers {rope.inv_freq.numel() * 2} of the {head_dim} dimensions of a head"
    return ModelPlan(
        model_type=config.model_type,
        dim=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        inner=layers[0].mlp.up_proj.weight.shape[0],
        norm="rms",
        eps=float(body.norm.variance_epsilon),
        activation=_formula(layers[0].mlp.act_fn),
        gated=True,
        scaling=tuple(layer.scaling for layer in attention),
        window=tuple(_window(model, layer) for layer in attention),
        positions=None,
        max_positions=config.max_position_embeddings,
        inv_freq=rope.inv_freq,
        rope_scaling=float(rope.attention_scaling),
        final_norm=body.norm.weight,
        final_norm_bias=None,
        blocks=layers,
        **_embedding_and_head(body.embed_tokens, model.lm_head),
    )


def _embedding_and_head(embed: nn.Embedding, head: nn.Linear) -> dict[str, Any]:
    return {
        "embed": embed.weight,
        "head": head.weight,
        "head_bias": head.bias,
        "vocab": embed.num_embeddings,
    }


def _window(model: nn.Module, attention: nn.Module) -> int:
    if model.config.model_type == "mistral":
        return model.config.sliding_window or 0
    return getattr(attention, "sliding_window", None) or 0


def _unusual_module(model: nn.Module, plain: set[str], act: str, eps: str) -> str | None:
    """Why this is not the plain model: an adapter, a quantised layer, a hook, a parametrisation, a replaced module.

    act: the name of an MLP's activation, eps: that of a norm's epsilon. A plan has one of each for all layers.
    """
    modules = modules_of(model)
    mlps = [module for module in modules if type(module).__name__.endswith("MLP")]
    activations = {mlp._modules.get(act): mlp for mlp in mlps}
    for module in modules:
        kind = type(module)
        ours = kind.__module__.startswith(("torch.nn.modules.", "transformers."))
        if not ours or not (kind.__name__ in plain or module in activations):
            return f"module {_name(model, module)} is a {kind.__module__}.{kind.__name__}"
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            return f"module {_name(model, module)} has max_norm {module.max_norm}"
    formulas = {_formula(activation) for activation in activations}
    if "" in formulas:
        found, mlp = next((a, mlp) for a, mlp in activations.items() if not _formula(a))
        known = ", ".join(ACTIVATIONS)
        return f"the activation of module {_name(model, mlp)} is a {type(found).__name__}, not one of {known}"
    if len(formulas) > 1:
        return f"its layers have different activations: {', '.join(sorted(formulas))}"
    if len({tuple(m.weight.shape for m in mlp._modules.values() if m._parameters) for mlp in mlps}) > 1:
        return "its MLPs have different widths"
    epsilons = {getattr(m, eps, None) for m in modules if type(m).__name__.endswith("Norm")}
    if len(epsilons) > 1:
        return f"its norms have different eps: {', '.join(sorted(map(str, epsilons)))}"
    return hooked(model)


def _formula(activation: nn.Module | None) -> str:
    """What an activation module computes, as a value of ACTIVATIONS; empty if it is not one of these."""
    kind = type(activation)
    if kind.__module__ not in ("transformers.activations", "torch.nn.modules.activation"):
        return ""
    if isinstance(activation, nn.GELU) and activation.approximate == "tanh":
        return "gelu_tanh"
    return ACTIVATIONS.get(kind.__name__, "")


def modules_of(model: nn.Module) -> list[nn.Module]:
    """`model.modules()` in a fifth of its time: 40 us for GPT-2's 166."""
    found = {model: None}
    waiting = [model]
    for module in waiting:
        for child in module._modules.values():
            if child is not None and child not in found:
                found[child] = None
                waiting.append(child)
    return waiting


def hooked(model: nn.Module, prefix: str = "") -> str | None:
    """The first module with a forward hook, a replaced forward or a plain tensor as weight, as a sentence; or None."""
    if has_global_hooks():
        return "a forward hook is registered for all modules"
    modules = modules_of(model)
    patched = {kind for kind in set(map(type, modules)) if _is_patched(kind)}
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks:
            return f"module {_name(model, module, prefix)} has a forward hook"
        if "forward" in (own := vars(module)) or type(module) in patched:
            return f"module {_name(model, module, prefix)} has had its forward replaced"
        if isinstance(own.get("weight"), Tensor) or isinstance(own.get("bias"), Tensor):
            return f"module {_name(model, module, prefix)} has a weight that is no parameter"
    return None


def has_global_hooks() -> bool:
    """Whether torch's register_module_forward_hook or register_module_forward_pre_hook is in use."""
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def _is_patched(kind: type[nn.Module]) -> bool:
    """Whether the class has got a forward that was not written with it.

    A wrapper may bear the name and module of what it wraps (functools.wraps), but its globals are those of its own.
    """
    owner = next(c for c in kind.__mro__ if "forward" in vars(c))
    forward = vars(owner)["forward"]
    if getattr(forward, "__module__", None) != owner.__module__:
        return True
    while forward is not None and owner.__module__.startswith(LIBRARIES):
        if not getattr(forward, "__globals__", {}).get("__name__", "").startswith(LIBRARIES):
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False


def _name(model: nn.Module, module: nn.Module, prefix: str = "") -> str:
    return next(n for n, m in model.named_modules(prefix=prefix) if m is module) or type(module).__name__


def _gpt2_layer(block: nn.Module) -> LayerPlan:
    def matrix(conv: Conv1D) -> Tensor:
        return conv.weight.detach().t()  # Conv1D stores (in, out)

    return LayerPlan(
        norm1=block.ln_1.weight.detach(),
        norm1_bias=_detached(block.ln_1.bias),
        qkv=matrix(block.attn.c_attn),
        qkv_bias=_detached(block.attn.c_attn.bias),
        q_norm=None,
        k_norm=None,
        o=matrix(block.attn.c_proj),
        o_bias=_detached(block.attn.c_proj.bias),
        norm2=block.ln_2.weight.detach(),
        norm2_bias=_detached(block.ln_2.bias),
        up=matrix(block.mlp.c_fc),
        up_bias=_detached(block.mlp.c_fc.bias),
        down=matrix(block.mlp.c_proj),
        down_bias=_detached(block.mlp.c_proj.bias),
    )


def _llama_layer(layer: nn.Module, into: LayerPlan | None) -> LayerPlan:
    attention, mlp = layer.self_attn, layer.mlp
    qkv_into, up_into = (None, None) if into is None else ((into.qkv, into.qkv_bias), (into.up, into.up_bias))
    qkv, qkv_bias = _merged(attention.q_proj, attention.k_proj, attention.v_proj, into=qkv_into)
    up, up_bias = _merged(mlp.gate_proj, mlp.up_proj, into=up_into)
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return LayerPlan(
        norm1=layer.input_layernorm.weight.detach(),
        norm1_bias=None,
        qkv=qkv,
        qkv_bias=qkv_bias,
        q_norm=q_norm.weight.detach() if q_norm is not None else None,
        k_norm=k_norm.weight.detach() if k_norm is not None else None,
        o=attention.o_proj.weight.detach(),
        o_bias=_detached(attention.o_proj.bias),
        norm2=layer.post_attention_layernorm.weight.detach(),
        norm2_bias=None,
        up=up,
        up_bias=up_bias,
        down=mlp.down_proj.weight.detach(),
        down_bias=_detached(mlp.down_proj.bias),
    )


def _merged(*linears: nn.Linear, into: tuple[Tensor, Tensor | None] | None) -> tuple[Tensor, Tensor | None]:
    """Their weights and biases, concatenated, in new tensors or in those of `into`."""
    weight_into, bias_into = into or (None, None)
    weight = torch.cat([linear.weight.detach() for linear in linears], out=weight_into)
    if all(linear.bias is None for linear in linears):
        return weight, None
    biases = [
        linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
        for linear in linears
    ]
    return weight, torch.cat(biases, out=bias_into)


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
