"""What load refuses: models whose own code cannot run ragged and would silently answer wrongly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from coconut_fast import Coconut, KVCache, LatentTokens, load
from coconut_fast.model.attention import attend
from coconut_fast.model.checks import check_ragged
from tests.families import FAMILIES, TOKENS, make_hf

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "pad_token_id": 0,
}
LINEAR_HEADS = {f"linear_{kind}": n for kind, n in (("num_key_heads", 2), ("num_value_heads", 4))}
LINEAR_DIMS = {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
BART = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "is_decoder": True}
# An architecture, what its configuration needs, and the word in the error message that says why.
REFUSED = {
    "bloom": ({"n_layer": 2, "n_head": 4}, "interface"),
    "qwen3_next": ({**LINEAR_HEADS, **LINEAR_DIMS, **MOE}, "layers without attention"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "layers without attention"),
    "mamba": ({"state_size": 8}, "interface|layers without attention"),
    "bart": (BART, "depends on the rows beside it"),
    "qwen2_moe": ({**MOE, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}, "sliding window"),
    "stablelm": ({}, "does not hand keywords on"),
    "gpt_oss": ({"num_local_experts": 4, "num_experts_per_tok": 2}, "attention sinks"),
    "gemma4_text": ({"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97}, "reverse the embedding"),
    "bert": ({"is_decoder": True}, "logits in a way that is not known"),
    "bert-generation": ({"is_decoder": False}, "attends to later positions"),
}


def random_model(family: str, settings: dict[str, Any]) -> Any:
    known = AutoConfig.for_model(family)
    small = {name: value for name, value in SMALL.items() if name in {*known.to_dict(), *known.attribute_map}}
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **small, **settings)).eval()
    with torch.no_grad():
        for weight in hf.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.2)
    return hf


@pytest.mark.parametrize("family", REFUSED)
def test_a_model_that_cannot_run_ragged_is_refused(family: str, tmp_path):
    settings, word = REFUSED[family]
    random_model(family, settings).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=word):
        load(tmp_path, tokens=LatentTokens(start=1, thought=2, end=3))


@pytest.mark.parametrize("keyword", ["s_aux", "position_bias", "block_indices"])
def test_attention_that_does_more_than_ours_is_refused(keyword: str):
    """MiniMax-M3 hands on block_indices, and its short rows, which have too few blocks to select from, are right."""
    cache, x = KVCache(1, num_slots=16, max_rows=1), torch.zeros(1, 1, 1, 8)
    with pytest.raises(ValueError, match="lacks"):
        attend(torch.nn.Module(), x, x, x, None, ragged=cache.append(cache.alloc(1), [1]), **{keyword: x})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_can_is_not(family: str, dtype: torch.dtype):
    check_ragged(Coconut(make_hf(family, dtype), TOKENS), "model")


def test_a_window_as_long_as_the_model_needs_nobody_to_know_it():
    settings = REFUSED["qwen2_moe"][0] | {"sliding_window": 64}
    check_ragged(Coconut(random_model("qwen2_moe", settings), LatentTokens(thought=2)), "model")


@pytest.mark.parametrize("overflows", ["hidden states", "logits"])
def test_a_model_that_overflows_is_told_so(overflows: str, tmp_path):
    hf = make_hf("llama")
    with torch.no_grad():
        hf.lm_head.weight.mul_(1e5)
        if overflows == "hidden states":
            hf.lm_head.weight.copy_(hf.model.embed_tokens.weight)
            for layer in hf.model.layers:
                layer.mlp.up_proj.weight.mul_(1e4)
                layer.mlp.down_proj.weight.mul_(1e4)
        hf.lm_head.weight.clamp_(-6e4, 6e4)
    hf.save_pretrained(tmp_path)
    for dtype in ("float32", "bfloat16"):
        load(tmp_path, tokens=TOKENS, dtype=dtype)
    with pytest.raises(ValueError, match=f"the {overflows} of LlamaForCausalLM are NaN or infinite in torch.float16"):
        load(tmp_path, tokens=TOKENS, dtype="float16")
