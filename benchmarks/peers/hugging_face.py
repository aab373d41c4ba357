"""Hugging Face with a key-value cache, batch 1: the loop an experienced user writes today."""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedModel


@torch.inference_mode()
def generate(model: PreTrainedModel, prompt: list[int], thought_id: int, max_new_tokens: int) -> list[int]:
    """Prefill, one pass per thought without the LM head, one per token."""
    ids = torch.tensor([prompt], device=model.device)
    cut = prompt.index(thought_id) if thought_id in prompt else len(prompt)
    cache = DynamicCache(config=model.config)
    body, embed = model.base_model, model.get_input_embeddings()
    hidden = body(input_ids=ids[:, :cut], past_key_values=cache, use_cache=True).last_hidden_state[:, -1:]
    for _ in range(prompt.count(thought_id)):
        hidden = body(inputs_embeds=hidden, past_key_values=cache, use_cache=True).last_hidden_state
    tail = prompt[cut + prompt.count(thought_id) :]
    if tail:
        tail_ids = torch.tensor([tail], device=model.device)
        hidden = body(input_ids=tail_ids, past_key_values=cache, use_cache=True).last_hidden_state[:, -1:]
    answer = []
    while True:
        token = model.lm_head(hidden[:, -1]).argmax(-1)
        answer.append(int(token))
        if len(answer) == max_new_tokens:
            return answer
        hidden = body(inputs_embeds=embed(token)[None], past_key_values=cache, use_cache=True).last_hidden_state


@torch.inference_mode()
def prefilled(model: PreTrainedModel, length: int) -> tuple[DynamicCache, torch.Tensor]:
    """A cache of `length` tokens and the last hidden state, to time latent and token passes from."""
    cache = DynamicCache(config=model.config)
    ids = torch.arange(1, length + 1, device=model.device)[None]
    hidden = model.base_model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state[:, -1:]
    return cache, hidden


@torch.inference_mode()
def latent_pass(model: PreTrainedModel, cache: DynamicCache, hidden: torch.Tensor) -> torch.Tensor:
    """One thought: no LM head."""
    return model.base_model(inputs_embeds=hidden, past_key_values=cache, use_cache=True).last_hidden_state


@torch.inference_mode()
def token_pass(model: PreTrainedModel, cache: DynamicCache) -> torch.Tensor:
    """One token in, the next one out: with the LM head."""
    ids = torch.ones(1, 1, dtype=torch.long, device=model.device)
    return model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1)


def static_generate(model: PreTrainedModel, batch: int, length: int, new: int) -> None:
    """`new` greedy tokens by `generate` with a static cache, which on a GPU compiles the forward into CUDA graphs."""
    ids = torch.arange(1, length + 1, device=model.device).expand(batch, length).contiguous()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=new,
        max_new_tokens=new,
        do_sample=False,
        cache_implementation="static",
        pad_token_id=0,
    )
