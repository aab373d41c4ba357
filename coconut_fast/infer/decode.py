"""Decode: answer tokens, one ragged pass each; the LM head runs only where a token is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from coconut_fast.infer.prefill import prefill
from coconut_fast.infer.sampling import Sampling, sample
from coconut_fast.model.cache import KVCache
from coconut_fast.model.coconut import Coconut

DECODE_STEPS = 8  # decode steps between two scheduler checks (finished answers, waiting prompts)


@dataclass
class ActiveAnswer:
    """An answer being written: its cache row, its seed, and its tokens so far, with end-of-text if generated."""

    row: int
    seed: int
    limit: int
    tokens: list[int]

    def done(self, eos_id: int | None) -> bool:
        """Whether the answer is complete."""
        return len(self.tokens) >= self.limit or bool(self.tokens and self.tokens[-1] == eos_id)


def token_passes(answers: Sequence[ActiveAnswer], before: Sequence[int]) -> int:
    """Token passes since the answers had `before` tokens: a pass adds at most one token to each."""
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


def decode(model: Coconut, cache: KVCache, answers: Sequence[ActiveAnswer], steps: int, sampling: Sampling) -> None:
    """Up to `steps` more tokens for every answer; one that is done drops out of the batch at once."""
    for _ in range(steps):
        writing = [a for a in answers if not a.done(model.tokens.eos)]
        if not writing:
            return
        last = [[a.tokens[-1]] for a in writing]  # a prefill of one token a row
        hidden_BD = prefill(model, cache, [a.row for a in writing], last)
        choose(model, hidden_BD, writing, sampling)
