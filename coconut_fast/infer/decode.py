"""Decode: answer tokens, one ragged pass each, the LM head only where a token is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from coconut_fast.infer.prefill import prefill
from coconut_fast.infer.sampling import Sampling, sample
from coconut_fast.model.cache import KVCache
from coconut_fast.model.coconut import Coconut

DECODE_STEPS = 8  # tokens between two looks at who has finished and who waits: what a static batch has room for


@dataclass
class ActiveAnswer:
    """An answer being written: its cache row, its seed, and its tokens so far (end-of-text included once it came)."""

    row: int
    seed: int
    limit: int
    tokens: list[int]

    def done(self, eos_id: int | None) -> bool:
        """Whether nothing more is to be written."""
        return len(self.tokens) >= self.limit or bool(self.tokens and self.tokens[-1] == eos_id)


def token_passes(answers: Sequence[ActiveAnswer], before: Sequence[int]) -> int:
    """Token passes that took answers on from so many tokens: one writes at most one token of each."""
    return max((len(a.tokens) - n for a, n in zip(answers, before, strict=True)), default=0)


@torch.inference_mode()
def choose(model: Coconut, hidden_BD: torch.Tensor, answers: Sequence[ActiveAnswer], sampling: Sampling) -> None:
    """Appends to each answer the token that follows its last hidden state."""
    seeds = [a.seed for a in answers]
    steps = [len(a.tokens) for a in answers]
    logits_BV = model.head(hidden_BD)
    ids = sample(logits_BV, seeds, steps, sampling.temperature, sampling.top_k, sampling.top_p)
    for answer, token in zip(answers, ids.tolist(), strict=True):
        answer.tokens.append(token)


def decode(
    model: Coconut, cache: KVCache, answers: Sequence[ActiveAnswer], steps: int, sampling: Sampling, eos_id: int | None
) -> None:
    """Up to `steps` more tokens for every answer; one that is done drops out of the batch at once."""
    for _ in range(steps):
        writing = [a for a in answers if not a.done(eos_id)]
        if not writing:
            return
        last = [[a.tokens[-1]] for a in writing]  # a prefill of one token a row
        hidden_BD = prefill(model, cache, [a.row for a in writing], last)
        choose(model, hidden_BD, writing, sampling)
