"""model/plan.py: what it describes, and what it declines with which reason."""

from __future__ import annotations

from functools import partial, wraps

import pytest
import torch
import transformers
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

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
    odd = describe(gpt2(activation_function="quick_gelu"))
    assert "the activation of module transformer.h.0.mlp is a QuickGELUActivation, not one of" in odd
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


@pytest.mark.parametrize(("make", "width"), [(gpt2, "n_inner"), (partial(llama_like, "Llama"), "intermediate_size")])
def test_pruned_mlps(make, width: str) -> None:
    """Their widths are those of the weights, whatever the configuration says."""
    model = make()
    blocks, narrow = plan_of(model).blocks, plan_of(make(**{width: 40})).blocks
    blocks[1].mlp = narrow[1].mlp
    assert describe(model) == "its MLPs have different widths"
    blocks[0].mlp = narrow[0].mlp
    assert plan_of(model).inner == 40


@pytest.mark.parametrize("make", [gpt2, partial(llama_like, "Qwen3")])
def test_activation_and_eps_are_those_of_the_modules(make) -> None:
    """Code may change them after the model was made from its configuration."""
    model = make()
    norms = [m for m in model.modules() if type(m).__name__.endswith("Norm")]
    eps = "eps" if hasattr(norms[0], "eps") else "variance_epsilon"
    mlps = [m for m in model.modules() if type(m).__name__.endswith("MLP")]
    act = "act" if hasattr(mlps[0], "act") else "act_fn"
    for norm in norms[1:]:
        setattr(norm, eps, 0.5)
    assert "its norms have different eps: 0.5, 1e-0" in describe(model)
    setattr(norms[0], eps, 0.5)
    setattr(mlps[1], act, nn.GELU())
    assert "its layers have different activations: gelu, " in describe(model)
    setattr(mlps[0], act, nn.GELU())
    plan = plan_of(model)
    assert (plan.eps, plan.activation) == (0.5, "gelu")
    for mlp in mlps:
        setattr(mlp, act, nn.GELU(approximate="tanh"))
    assert plan_of(model).activation == "gelu_tanh"
    setattr(mlps[1], act, nn.Tanh())
    assert "the activation of module " in describe(model)


@pytest.mark.parametrize(
    "name, activation",
    [
        ("gelu_new", "gelu_tanh"),
        ("gelu_fast", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_python_tanh", "gelu_tanh"),
        ("gelu", "gelu"),
        ("gelu_python", "gelu"),
        ("silu", "silu"),
        ("swish", "silu"),
        ("relu", "relu"),
    ],
)
def test_names_of_activations(name: str, activation: str) -> None:
    assert plan_of(gpt2(activation_function=name)).activation == activation


def test_declines_code_that_is_not_the_familys_own(monkeypatch) -> None:
    model = llama_like("Llama")
    assert isinstance(describe(model), ModelPlan)
    hook = nn.modules.module.register_module_forward_pre_hook(lambda *_: None)
    assert describe(model) == "a forward hook is registered for all modules"
    hook.remove()
    forward = LlamaMLP.forward
    for patched in (lambda self, x: -forward(self, x), wraps(forward)(lambda self, x: -forward(self, x))):
        with monkeypatch.context() as patch:
            patch.setattr(LlamaMLP, "forward", patched)
            assert describe(model) == "module model.layers.0.mlp has had its forward replaced"
    model.model.embed_tokens.max_norm = 1.0
    assert describe(model) == "module model.embed_tokens has max_norm 1.0"
    model.model.embed_tokens.max_norm = None
    model.model.norm = nn.ReLU()
    assert "module model.norm is a torch.nn.modules.activation.ReLU" in describe(model)


def test_fingerprint_sees_training_and_replacement() -> None:
    model = gpt2()
    plan = plan_of(model)
    before = plan.fingerprint()
    assert plan.fingerprint() == before
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.add_(1.0)
    assert plan.fingerprint() != before
