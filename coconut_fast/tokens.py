"""The special tokens of latent reasoning, as the field writes them."""

from __future__ import annotations

from dataclasses import dataclass

START_LATENT = "<|start-latent|>"
LATENT = "<|latent|>"
END_LATENT = "<|end-latent|>"


@dataclass(frozen=True)
class LatentTokens:
    """Ids of the special tokens: `start` and `end` frame the thoughts, `thought` marks one, `eos` ends the answer.

    `start` and `end` are None for models trained without markers around their thoughts.
    """

    thought: int
    start: int | None = None
    end: int | None = None
    eos: int | None = None
