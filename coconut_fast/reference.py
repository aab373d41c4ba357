"""Coconut the slow way: no cache, everything recomputed for every thought and every token. The oracle of the tests.

One row at a time, any Hugging Face causal language model, any dtype; imports nothing of this project.
Section numbers are those of arXiv 2412.06769.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def fill_thoughts(
    model: nn.Module,
    input_ids: torch.Tensor,
    thought_id: int,
    feedback: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """(T,) token ids -> (T, D) input embeddings with every thought filled in (section 3, "Method").

    For each thought in turn: run the model over everything before it, and put the last hidden state, after the final
    norm, in its place.
    """
    embeds_TD = model.get_input_embeddings()(input_ids)
    for t in (input_ids == thought_id).nonzero().flatten().tolist():
        thought_D = last_hidden(model, embeds_TD[:t])[-1]
        if feedback is not None:
            thought_D = feedback(thought_D[None])[0]
        embeds_TD = torch.cat([embeds_TD[:t], thought_D[None], embeds_TD[t + 1 :]])
    return embeds_TD


def last_hidden(model: nn.Module, embeds_TD: torch.Tensor) -> torch.Tensor:
    """(T, D) input embeddings -> (T, D) hidden states after the final norm."""
    return model.base_model(inputs_embeds=embeds_TD[None], use_cache=False).last_hidden_state[0]


def forward(
    model: nn.Module,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    thought_id: int,
    feedback: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(T,) ids and labels -> summed cross-entropy of the labelled tokens, logits (T, V), embeddings (T, D)."""
    embeds_TD = fill_thoughts(model, input_ids, thought_id, feedback)
    logits_TV = model(inputs_embeds=embeds_TD[None], use_cache=False).logits[0]
    loss = nn.functional.cross_entropy(logits_TV[:-1], labels[1:], ignore_index=-100, reduction="sum")
    return loss, logits_TV, embeds_TD


@torch.no_grad()
def generate(
    model: nn.Module,
    input_ids: torch.Tensor,
    thought_id: int,
    eos_id: int | None,
    max_new_tokens: int,
) -> list[int]:
    """(T,) prompt with its thoughts marked -> the greedy answer, without end-of-text."""
    embeds_TD = fill_thoughts(model, input_ids, thought_id)
    answer: list[int] = []
    while len(answer) < max_new_tokens:
        token = model(inputs_embeds=embeds_TD[None], use_cache=False).logits[0, -1].argmax()
        if token.item() == eos_id:
            break
        answer.append(token.item())
        embeds_TD = torch.cat([embeds_TD, model.get_input_embeddings()(token[None])])
    return answer
