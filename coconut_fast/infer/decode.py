"""Decode: answer tokens, one ragged pass each, the LM head only where a token is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from coconut_fast.infer.prefill import prefill
from coconut_fast.infer.sampling import sample
from coconut_fast.model.cache import KVCache
from coconut_fast.model.coconut import Coconut

WRITE_STEPS = 8  # tokens between two looks at who has finished and who waits: what a static batch has room for
PREFILL_TOKENS = 16384  # of one forward; more are read in several


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedily at temperature 0, else from the top_k (0: all) and top_p likeliest."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass
class Draft:
    """An answer being written: its cache row, its seed, and its tokens so far (end-of-text included once it came)."""

    row: int
    seed: int
    limit: int
    tokens: list[int]

    def done(self, eos_id: int | None) -> bool:
        """Whether nothing more is to be written."""
        return len(self.tokens) >= self.limit or bool(self.tokens and self.tokens[-1] == eos_id)


def most_written(drafts: Sequence[Draft], before: Sequence[int]) -> int:
    """Token passes that took drafts on from so many tokens: one writes at most one token of each."""
    return max((len(d.tokens) - n for d, n in zip(drafts, before, strict=True)), default=0)


@torch.inference_mode()
def choose(model: Coconut, hidden_BD: torch.Tensor, drafts: Sequence[Draft], sampling: Sampling) -> None:
    """Appends to each draft the token that follows its last hidden state."""
    seeds = [d.seed for d in drafts]
    steps = [len(d.tokens) for d in drafts]
    logits_BV = model.head(hidden_BD)
    ids = sample(logits_BV, seeds, steps, sampling.temperature, sampling.top_k, sampling.top_p)
    for draft, token in zip(drafts, ids.tolist(), strict=True):
        draft.tokens.append(token)


def decode(
    model: Coconut, cache: KVCache, drafts: Sequence[Draft], steps: int, sampling: Sampling, eos_id: int | None
) -> None:
    """Up to `steps` more tokens for every draft; one that is done drops out of the batch at once."""
    for _ in range(steps):
        writing = [d for d in drafts if not d.done(eos_id)]
        if not writing:
            return
        last = [[d.tokens[-1]] for d in writing]  # a prefill of one token a row
        hidden_BD = prefill(model, cache, [d.row for d in writing], last)
        choose(model, hidden_BD, writing, sampling)
