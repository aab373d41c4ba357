"""From what a caller passes as prompts to what an engine runs: pieces of tokens with thoughts between them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from operator import index

from coconut_fast.model.coconut import Coconut


@dataclass(frozen=True)
class Piece:
    """Some tokens, then some thoughts. The first piece of a prompt has tokens, the last one has no thoughts."""

    tokens: tuple[int, ...]
    thoughts: int


@dataclass(frozen=True)
class Prompt:
    ids: tuple[int, ...]  # as the model sees them, thoughts marked by their token
    pieces: tuple[Piece, ...]

    @property
    def num_thoughts(self) -> int:
        return sum(p.thoughts for p in self.pieces)


def read_prompts(
    model: Coconut,
    prompts: str | Sequence[str | Sequence[int]],
    num_thoughts: int | Sequence[int] | None,
    max_new_tokens: int,
) -> list[Prompt]:
    """Checks everything before any work: ValueError names the prompt, what was found and what is expected."""
    expected = "prompts: expected a string, strings, or lists of token ids; found"
    if isinstance(prompts, str):
        prompts = [prompts]
    elif not isinstance(prompts, Iterable):
        raise ValueError(f"{expected} {prompts!r}")
    else:
        prompts = list(prompts)
    if any(isinstance(p, int) or getattr(p, "shape", None) == () for p in prompts):
        raise ValueError(f"{expected} one flat list of ints")
    if num_thoughts is None or isinstance(num_thoughts, int):
        counts: list[int | None] = [num_thoughts] * len(prompts)
    elif not isinstance(num_thoughts, Iterable):
        raise ValueError(f"num_thoughts: expected an int, one per prompt, or None; found {num_thoughts!r}")
    else:
        counts = list(num_thoughts)
        if len(counts) != len(prompts):
            raise ValueError(f"num_thoughts: expected one per prompt ({len(prompts)}), found {len(counts)}")
    return [
        _read(model, i, prompt, count, max_new_tokens)
        for i, (prompt, count) in enumerate(zip(prompts, counts, strict=True))
    ]


def _read(model: Coconut, i: int, prompt: str | Sequence[int], count: int | None, max_new_tokens: int) -> Prompt:
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
        raise ValueError(f"num_thoughts: expected an int of at least 0 for prompt {i}, found {count!r}")
    tokens = model.tokens
    if not isinstance(prompt, Collection):
        raise ValueError(f"prompts: prompt {i} is {prompt!r}, expected a string or a list of token ids")
    if not len(prompt):
        raise ValueError(f"prompts: prompt {i} is empty")
    if isinstance(prompt, str):
        ids = _tokenize(model, prompt)
        if count is None and tokens.thought not in ids:
            count = model.settings.num_thoughts
    else:
        try:
            ids = [index(t) for t in prompt]
        except TypeError as error:
            raise ValueError(f"prompts: prompt {i} holds something that is no token id: {error}") from error
    if count is not None:
        ids = with_thoughts(model, ids, count)
    vocabulary = model.hf.get_input_embeddings().weight.shape[0]
    if not ids:
        raise ValueError(f"prompts: prompt {i} is empty")
    wrong = next((t for t in ids if not 0 <= t < vocabulary), None)
    if wrong is not None:
        raise ValueError(f"prompts: prompt {i} holds token id {wrong}, expected 0 to {vocabulary - 1}")
    if ids[0] == tokens.thought:
        raise ValueError(f"prompts: prompt {i} starts with a thought; a thought needs a token in front of it")
    limit = model.max_positions
    if limit is not None and len(ids) + max_new_tokens > limit:
        raise ValueError(
            f"prompts: prompt {i} has {len(ids)} tokens with its thoughts, which with max_new_tokens={max_new_tokens} "
            f"is more than the {limit} positions of the model"
        )
    return Prompt(tuple(ids), cut(ids, tokens.thought))


def with_thoughts(model: Coconut, ids: list[int], count: int) -> list[int]:
    """The prompt with exactly `count` thoughts: in place of its own ones, else between its markers, else at its end."""
    tokens = model.tokens
    if tokens.thought in ids:
        first = ids.index(tokens.thought)
        last = len(ids) - ids[::-1].index(tokens.thought)
        if any(t != tokens.thought for t in ids[first:last]):
            raise ValueError("num_thoughts: the prompt's thoughts stand in several places; mark them all, pass None")
        return [*ids[:first], *[tokens.thought] * count, *ids[last:]]
    if tokens.start is not None and tokens.start in ids:
        at = ids.index(tokens.start) + 1
        return [*ids[:at], *[tokens.thought] * count, *ids[at:]]
    framed = [tokens.thought] * count
    if model.settings.markers and tokens.start is not None and tokens.end is not None:
        framed = [tokens.start, *framed, tokens.end]
    return [*ids, *framed]


def cut(ids: Sequence[int], thought_id: int) -> tuple[Piece, ...]:
    """[a, b, T, T, c] -> (a b, 2 thoughts), (c, none)."""
    pieces: list[Piece] = []
    tokens: list[int] = []
    thoughts = 0
    for t in ids:
        if t == thought_id:
            thoughts += 1
            continue
        if thoughts:
            pieces.append(Piece(tuple(tokens), thoughts))
            tokens, thoughts = [], 0
        tokens.append(t)
    pieces.append(Piece(tuple(tokens), thoughts))
    if thoughts:
        pieces.append(Piece((), 0))
    return tuple(pieces)


def _tokenize(model: Coconut, text: str) -> list[int]:
    if model.tokenizer is None:
        raise ValueError("prompts: this model has no tokenizer; pass lists of token ids")
    has_thoughts = "<|latent|>" in text
    suffix = "" if has_thoughts or text.endswith(model.settings.suffix) else model.settings.suffix
    return model.tokenizer.encode(text + suffix, add_special_tokens=True)
