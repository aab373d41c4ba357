"""model/plan.py: what it describes, and what it declines with which reason."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from coconut_fast.model.plan import ModelPlan, describe

SMALL = {
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "vocab_size": 99,
    "max_position_embeddings": 128,
}
ROPES = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
]


def gpt2(**changes: object) -> transformers.GPT2LMHeadModel:
    config = {"n_embd": 48, "n_head": 4, "n_layer": 2, "vocab_size": 99, "n_positions": 64, **changes}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**config))


def llama_like(kind: str, **changes: object) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **changes})
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def plan_of(model: nn.Module) -> ModelPlan:
    plan = describe(model)
    assert isinstance(plan, ModelPlan), plan
    return plan


def test_gpt2() -> None:
    plan = plan_of(gpt2(n_inner=72, scale_attn_by_inverse_layer_idx=True))
    assert (plan.dim, plan.heads, plan.kv_heads, plan.head_dim, plan.inner) == (48, 4, 4, 12, 72)
    assert (plan.norm, plan.activation, plan.gated) == ("layer", "gelu_tanh", False)
    assert plan.scaling == pytest.approx((12**-0.5, 12**-0.5 / 2))
    shapes = {name: tuple(t.shape) for name, t in plan.layer(1).named().items()}
    assert shapes["qkv"] == (144, 48) and shapes["up"] == (72, 48) and shapes["down"] == (48, 72)


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_llama_family(kind: str) -> None:
    plan = plan_of(llama_like(kind))
    assert (plan.dim, plan.heads, plan.kv_heads, plan.head_dim, plan.inner) == (48, 4, 2, 16, 80)
    assert (plan.norm, plan.activation, plan.gated) == ("rms", "silu", True)
    layer = plan.layer(0).named()
    assert layer["qkv"].shape == (128, 48) and layer["up"].shape == (160, 48) and layer["o"].shape == (48, 64)
    assert ("qkv_bias" in layer) == (kind == "Qwen2")
    assert ("q_norm" in layer) == (kind == "Qwen3")
    assert plan.window == ((4096, 4096) if kind == "Mistral" else (0, 0))


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_static_rope_comes_from_the_models_own_module(rope: dict[str, object]) -> None:
    model = llama_like("Llama", rope_parameters={"rope_theta": 10000.0, **rope})
    plan = plan_of(model)
    assert torch.equal(plan.inv_freq, model.model.rotary_emb.inv_freq)
    assert plan.rope_scaling == model.model.rotary_emb.attention_scaling


def test_declines_with_a_reason() -> None:
    assert "is not one of gpt2" in describe(llama_like("Gemma2"))
    assert "activation 'quick_gelu'" in describe(gpt2(activation_function="quick_gelu"))
    assert "cross attention" in describe(gpt2(add_cross_attention=True))
    assert describe(gpt2(num_hidden_layers=0)) == "the model has no layers"
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert "rope type 'dynamic'" in describe(llama_like("Llama", rope_parameters=dynamic))

    class Lora(nn.Linear):
        pass

    adapted = llama_like("Llama")
    adapted.model.layers[0].mlp.up_proj = Lora(48, 80)
    assert "model.layers.0.mlp.up_proj is a" in describe(adapted)

    hooked = gpt2()
    hooked.transformer.h[1].register_forward_hook(lambda *_: None)
    assert "transformer.h.1 has a forward hook" in describe(hooked)

    class Mine(transformers.GPT2LMHeadModel):
        pass

    assert "not transformers' GPT2LMHeadModel" in describe(Mine(gpt2().config))


def test_fingerprint_sees_training_and_replacement() -> None:
    model = gpt2()
    plan = plan_of(model)
    before = plan.fingerprint()
    assert plan.fingerprint() == before
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.add_(1.0)
    assert plan.fingerprint() != before
