"""The special tokens of latent reasoning, as the field writes them, and the label of a token without a loss."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from numbers import Integral
from typing import Any

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


def check_same_tokens(tokens: LatentTokens, tokenizer: Any, where: str) -> None:
    """ValueError, starting with `where`, for a tokenizer (or None) in which special tokens have other ids."""
    vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
    for name, number in ((START_LATENT, tokens.start), (LATENT, tokens.thought), (END_LATENT, tokens.end)):
        if number is not None and vocabulary.get(name, number) != number:
            raise ValueError(f"{where}: {name} is {vocabulary[name]} in the tokenizer and {number} in its tokens")


def check_tokens(tokens: LatentTokens, rows: int) -> LatentTokens:
    """The tokens, as plain ints. ValueError for tokens that a model with so many embeddings cannot have."""
    if not isinstance(tokens, LatentTokens):
        raise ValueError(f"tokens: found {tokens!r}, expected LatentTokens(thought=..., ...)")
    for name, value in asdict(tokens).items():
        if value is not None and not (isinstance(value, Integral) and 0 <= int(value) < rows):
            raise ValueError(f"tokens.{name}: expected an id below the model's {rows} embeddings, found {value!r}")
        if name != "thought" and value == tokens.thought:
            raise ValueError(f"tokens.{name}: found {value}, which is tokens.thought; expected another id")
    return replace(tokens, **{name: int(value) for name, value in asdict(tokens).items() if value is not None})
