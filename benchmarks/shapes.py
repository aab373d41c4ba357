"""The models, prompts and batches that every benchmark and every peer runs: random weights, no download."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from coconut_fast import Coconut, LatentTokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
SHAPES = {
    # GPT-2 small with the three special tokens of the reference
    "gpt2": ("gpt2", {"vocab_size": 50260, **_NO_DROPOUT}),
    # Llama-3.2-1B
    "llama-1b": (
        "llama",
        {
            "vocab_size": 128256 + 3,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    # families that no engine of ours knows: Hugging Face's layers on our cache
    "opt-125m": ("opt", {"dropout": 0.0}),
    "gemma3-270m": (
        "gemma3_text",
        {
            "vocab_size": 262144,
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_hidden_layers": 18,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 512,
        },
    ),
    # the two-layer model of "Reasoning by Superposition" (arXiv 2505.12514)
    "superposition": ("gpt2", {"vocab_size": 40, "n_layer": 2, "n_head": 8, "n_embd": 768, **_NO_DROPOUT}),
}


def make_hf(shape: str, dtype: torch.dtype = torch.float32, layers: int | None = None) -> PreTrainedModel:
    """A random model of a named shape; `layers` cuts its depth."""
    family, settings = SHAPES[shape]
    config = AutoConfig.for_model(family, bos_token_id=0, eos_token_id=0, pad_token_id=0, **settings)
    if layers:
        config.num_hidden_layers = layers
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def make_tokens(vocab_size: int) -> LatentTokens:
    """The three special tokens are the last three ids; no end-of-text, so that every answer has full length."""
    return LatentTokens(start=vocab_size - 3, end=vocab_size - 2, thought=vocab_size - 1, eos=None)


def make_model(shape: str, dtype: torch.dtype = torch.float32) -> Coconut:
    """Ours, of a named shape."""
    hf = make_hf(shape, dtype)
    return Coconut(hf, make_tokens(hf.config.vocab_size)).to(DEVICE).eval()


def make_prompts(vocab_size: int, count: int, length: int, thoughts: int, seed: int = 0) -> list[list[int]]:
    """`count` prompts of `length` random words, then the framed thoughts."""
    tokens, generator = make_tokens(vocab_size), random.Random(seed)
    return [
        [
            *(generator.randrange(1, vocab_size - 3) for _ in range(length)),
            tokens.start,
            *[tokens.thought] * thoughts,
            tokens.end,
        ]
        for _ in range(count)
    ]


def make_rows(vocab_size: int, count: int, length: int, thoughts: int, labelled: int) -> tuple[list, list]:
    """Training rows and labels: a prompt, then `labelled` words that carry the loss."""
    generator = random.Random(1)
    rows = [
        [*p, *(generator.randrange(1, vocab_size - 3) for _ in range(labelled))]
        for p in make_prompts(vocab_size, count, length, thoughts)
    ]
    return rows, [[-100] * (len(r) - labelled) + r[-labelled:] for r in rows]


def save_for_peers(model: Coconut, directory: Path) -> Path:
    """The same weights as a plain Hugging Face directory, for peers that run in an environment of their own."""
    model.hf.save_pretrained(directory)
    return directory
