"""Checks a caller's prompts and cuts them into what the engine runs: pieces of tokens with thoughts between them."""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import Any

import torch

from coconut_fast.data.curriculum import question_row, saved_curriculum
from coconut_fast.data.examples import TokenizedExample, unknown_word, warn_of_unknown
from coconut_fast.data.graphs import ANSWER, EDGE, EOS
from coconut_fast.model.coconut import Coconut
from coconut_fast.tokens import END_LATENT, LATENT, START_LATENT


@dataclass(frozen=True)
class Piece:
    """Some tokens, then some thoughts. The first piece of a prompt has tokens, the last one has no thoughts."""

    tokens: tuple[int, ...]
    thoughts: int


@dataclass(frozen=True)
class Prompt:
    """A prompt, checked and cut at its thoughts."""

    ids: tuple[int, ...]  # as the model sees them, thoughts marked by their token
    pieces: tuple[Piece, ...]
    max_new_tokens: int  # of each answer

    @property
    def num_thoughts(self) -> int:
        return sum(p.thoughts for p in self.pieces)


def read_prompts(
    model: Coconut,
    prompts: str | Sequence[str | Sequence[int]],
    num_thoughts: int | Sequence[int] | None,
    max_new_tokens: int | Sequence[int],
) -> list[Prompt]:
    """Checks everything before any work: ValueError names the prompt, what was found and what is expected."""
    expected = "prompts: expected a string, strings, or lists of token ids; found"
    if isinstance(prompts, str):
        prompts = [prompts]
    elif not isinstance(prompts, Iterable) or isinstance(prompts, Mapping) or getattr(prompts, "shape", None) == ():
        raise ValueError(f"{expected} {prompts!r}")
    else:
        prompts = list(prompts)
    if any(isinstance(p, int) or (getattr(p, "shape", None) == () and not isinstance(p, str)) for p in prompts):
        raise ValueError(f"{expected} one flat list of ints")
    limits = _each("max_new_tokens", max_new_tokens, 1, len(prompts))
    counts = [None] * len(prompts) if num_thoughts is None else _each("num_thoughts", num_thoughts, 0, len(prompts))
    limit, vocabulary = model.max_positions, model.hf.get_input_embeddings().weight.shape[0]
    each = enumerate(zip(prompts, counts, limits, strict=True))
    read = [_read(model, limit, vocabulary, i, prompt, count, most) for i, (prompt, count, most) in each]
    asked = (
        (prompt, (done.ids,)) if isinstance(prompt, str) else ("", ())
        for prompt, done in zip(prompts, read, strict=True)
    )
    warn_of_unknown(model.tokenizer, asked, "prompts", "prompt", 0)
    bare = sum(isinstance(p, str) and not done.num_thoughts for p, done in zip(prompts, read, strict=True))
    if bare and num_thoughts is None and model.settings.num_thoughts is None and model.settings.stage is None:
        warnings.warn(
            f"num_thoughts: the model does not say how many it was trained with, so {bare} of {len(read)} prompts "
            "get none; num_thoughts=0 says that this is meant",
            stacklevel=3,
        )
    return read


def whole(name: str, value: Any, low: int) -> int:
    """An int of at least `low` from what Python, numpy or torch call an integer; ValueError, naming it, otherwise."""
    try:
        number = index(value)
    except TypeError:
        number = low - 1
    if isinstance(value, bool) or number < low:
        raise ValueError(f"{name}: expected an int of at least {low}, found {value!r}")
    return number


def _each(name: str, value: Any, low: int, prompts: int) -> list[int]:
    """One int per prompt."""
    if not isinstance(value, Iterable) or isinstance(value, str | Mapping) or getattr(value, "shape", None) == ():
        return [whole(name, value, low)] * prompts
    values = list(value)
    if len(values) != prompts:
        raise ValueError(f"{name}: expected one per prompt ({prompts}), found {len(values)}")
    return [whole(f"{name} of prompt {i}", v, low) for i, v in enumerate(values)]


def _read(
    model: Coconut,
    limit: int | None,
    vocabulary: int,
    i: int,
    prompt: str | Sequence[int],
    count: int | None,
    max_new_tokens: int,
) -> Prompt:
    """One prompt, checked. limit: the model's positions; vocabulary: its token ids; count: `num_thoughts` for it."""
    tokens = model.tokens
    ids = _token_ids(model, i, prompt, count)
    if count is not None:
        if limit is not None and count > limit:
            raise ValueError(f"prompts: prompt {i} gets {count} thoughts, more than the {limit} positions of the model")
        try:
            ids = with_thoughts(model, ids, count)
        except ValueError as error:
            raise ValueError(f"prompts: prompt {i}: {error}") from error
    if not ids:
        raise ValueError(f"prompts: prompt {i} is empty")
    if min(ids) < 0 or max(ids) >= vocabulary:
        wrong = next(t for t in ids if not 0 <= t < vocabulary)
        raise ValueError(f"prompts: prompt {i} holds token id {wrong}, expected 0 to {vocabulary - 1}")
    if ids[0] == tokens.thought:
        raise ValueError(f"prompts: prompt {i} starts with a thought; a thought needs a token in front of it")
    if limit is not None and len(ids) + max_new_tokens - 1 > limit:  # an answer's last token is never fed
        raise ValueError(
            f"prompts: prompt {i} has {len(ids)} tokens with its thoughts, which with max_new_tokens={max_new_tokens} "
            f"is more than the {limit} positions of the model"
        )
    return Prompt(tuple(ids), split_at_thoughts(ids, tokens.thought), max_new_tokens)


def _token_ids(model: Coconut, i: int, prompt: str | Sequence[int], count: int | None) -> list[int]:
    """The ids of a prompt before `count` thoughts are put into it; for None, a string gets those of its training."""
    if not isinstance(prompt, Collection) or isinstance(prompt, bytes | bytearray | Mapping):
        raise ValueError(f"prompts: prompt {i} is {prompt!r}, expected a string or a list of token ids")
    if not len(prompt):
        raise ValueError(f"prompts: prompt {i} is empty")
    if isinstance(prompt, str):
        ids = _tokenize(model, i, prompt)
        if model.tokens.thought not in ids and (count is None or model.settings.symbols is not None):
            trained = as_trained(model, ids)
            if count is None or model.tokens.thought in trained:  # `count` thoughts replace these, before a graph's cue
                return trained
        return ids
    kind = getattr(prompt, "dtype", None)
    if kind == torch.bool or (kind is None and isinstance(next(iter(prompt)), bool)):
        raise ValueError(f"prompts: prompt {i} holds booleans, expected token ids")  # a mask by mistake
    try:
        return array("q", prompt).tolist()  # 20 ns a token, a Python loop 60
    except OverflowError:
        return [index(t) for t in prompt]
    except TypeError as error:
        raise ValueError(f"prompts: prompt {i} holds something that is no token id: {error}") from error


def as_trained(model: Coconut, ids: list[int]) -> list[int]:
    """A question in the form the checkpoint was trained on: with its thoughts or pauses, framed as in training."""
    saved, tokens = model.settings, model.tokens
    if saved.curriculum is None or saved.stage is None or tokens.start in ids:
        return ids if saved.num_thoughts is None else with_thoughts(model, ids, saved.num_thoughts)
    config = replace(saved_curriculum(saved.curriculum), pad_latent_to_max=True)
    cue = [] if saved.symbols is None else [ANSWER]
    question = TokenizedExample(ids, [], cue, cue=len(cue))
    return question_row(question, saved.stage, config, tokens)


def with_thoughts(model: Coconut, ids: list[int], count: int) -> list[int]:
    """The prompt with exactly `count` thoughts: in place of its own, else between its markers, else at its end."""
    tokens = model.tokens
    if tokens.thought in ids:
        first = ids.index(tokens.thought)
        last = len(ids) - ids[::-1].index(tokens.thought)
        if any(t != tokens.thought for t in ids[first:last]):
            raise ValueError("num_thoughts: the prompt's thoughts stand in several places; mark them all, pass None")
        return [*ids[:first], *[tokens.thought] * count, *ids[last:]]
    if tokens.start is not None and tokens.start in ids:
        at = ids.index(tokens.start) + 1
        end = [] if tokens.end is None or tokens.end in ids[at:] else [tokens.end]
        return [*ids[:at], *[tokens.thought] * count, *end, *ids[at:]]
    framed = [tokens.thought] * count
    if model.settings.markers and tokens.start is not None and tokens.end is not None:
        framed = [tokens.start, *framed, tokens.end]
    return [*ids, *framed]


def split_at_thoughts(ids: Sequence[int], thought_id: int) -> tuple[Piece, ...]:
    """[a, b, T, T, c] -> (a b, 2 thoughts), (c, none)."""
    pieces: list[Piece] = []
    start, ids, left = 0, tuple(ids), ids.count(thought_id)
    while left:
        stop = end = ids.index(thought_id, start)
        while end < len(ids) and ids[end] == thought_id:
            end += 1
        pieces.append(Piece(ids[start:stop], end - stop))
        start, left = end, left - (end - stop)
    return *pieces, Piece(ids[start:], 0)


def _tokenize(model: Coconut, i: int, text: str) -> list[int]:
    if model.tokenizer is None:
        raise ValueError("prompts: this model has no tokenizer; pass lists of token ids")
    framed = any(mark in text for mark in (START_LATENT, LATENT, END_LATENT))
    suffix = "" if framed or text.endswith(model.settings.suffix) else model.settings.suffix
    try:
        ids = model.tokenizer.encode(text + suffix, add_special_tokens=True)
    except (TypeError, UnicodeError) as error:  # a lone surrogate: what a shell's undecodable bytes become
        raise ValueError(f"prompts: prompt {i} is not valid Unicode: {text!r}") from error
    except Exception as error:
        if type(error) is not Exception:
            raise  # tokenizers raises the bare class for an unknown word if it has no token for unknown words
        word = unknown_word(model.tokenizer, text) or text
        size = len(model.tokenizer.get_vocab())
        raise ValueError(
            f"prompts: prompt {i} holds {word!r}, which is none of the {size} words of the model's tokenizer"
        ) from error
    if not (model.settings.symbols or {}).get("separators", True):
        # Questions in files have separators, which this model never saw in training: it got none of 200 right.
        ids = [token for token in ids if token not in (EDGE, EOS)]
    return ids
