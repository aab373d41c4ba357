"""Tiny random models of every supported family, made on the spot: no download, milliseconds each."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from coconut_fast import Coconut, LatentTokens

VOCAB = 96
TOKENS = LatentTokens(start=93, thought=94, end=95, eos=0)
_SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "llama": _SMALL,
    "mistral": {**_SMALL, "sliding_window": 7},
    "qwen2": {**_SMALL, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen3": {**_SMALL, "head_dim": 12},
    "gemma2": {**_SMALL, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_SMALL, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "phi3": {**_SMALL, "sliding_window": 9},
    "gpt_neox": {k: v for k, v in _SMALL.items() if k != "num_key_value_heads"},
    "granite": {**_SMALL, "embedding_multiplier": 2.0, "logits_scaling": 3.0, "residual_multiplier": 0.7},
}


def make_hf(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model with norms and biases moved away from 1 and 0, so that a dropped one shows; eager attention."""
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    no_dropout = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if family == "gpt2" else {}
    settings = {"vocab_size": VOCAB, **ids, **no_dropout, **FAMILIES[family], **overrides}
    config = AutoConfig.for_model(family, **settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.15 if parameter.dim() > 1 else 0.2
            parameter.add_(torch.randn_like(parameter) * spread)
    return model.to(dtype).eval()


def make_pair(family: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> tuple[Coconut, PreTrainedModel]:
    """(our model, an independent Hugging Face model with eager attention), equal weights."""
    ours, theirs = make_hf(family, dtype, **overrides), make_hf(family, dtype, **overrides)
    return Coconut(ours, TOKENS), theirs


def make_row(length: int, thoughts: int, tail: int, seed: int) -> list[int]:
    """Question, `<|start-latent|>`, thoughts, `<|end-latent|>`, tail."""
    g = torch.Generator().manual_seed(seed)
    words = torch.randint(1, 93, (length + tail,), generator=g).tolist()
    return [*words[:length], TOKENS.start, *[TOKENS.thought] * thoughts, TOKENS.end, *words[length:]]
