"""The special tokens of latent reasoning, as the field writes them, and the label of a token without a loss."""

from __future__ import annotations

from dataclasses import dataclass

START_LATENT = "<|start-latent|>"
LATENT = "<|latent|>"
END_LATENT = "<|end-latent|>"
PAUSE = "<|pause|>"
IGNORE = -100  # as everywhere in PyTorch


@dataclass(frozen=True, kw_only=True)  # five numbers in a row would be mixed up
class LatentTokens:
    """Ids of the special tokens: `start` and `end` frame the thoughts, `thought` marks one, `eos` ends the answer.

    `start` and `end` are None for models trained without markers around their thoughts. `pause` is an ordinary token
    with a trainable embedding, which the pause rows of the paper's Table 1 put where thoughts would be.
    """

    thought: int
    start: int | None = None
    end: int | None = None
    eos: int | None = None
    pause: int | None = None
