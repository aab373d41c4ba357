"""Ragged batches: rows laid end to end, cut into passes at their thoughts.

A row is cut before each of its thoughts. Segment 0 runs up to the first thought; segment j starts with the j-th thought
and runs up to the next one (or to the end of the row). Pass j computes segment j of every row that has one, so a batch
needs 1 + (most thoughts of any row) passes, no token is computed twice and no pad exists.

The flat token axis is pass-major: pass 0 of all rows, then pass 1, ... so each pass is one contiguous slice.

Where every token's key and value go is planned here as well: a row's cache slots are one run of whole pages. All
tensors of a batch are views of one buffer, so that it reaches a device in one copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from coconut_fast.tokens import IGNORE

PAGE_SIZE = 16  # tokens of a page of the cache
ALIGNMENT = 4  # words of 32 bits at which a batch's tensors start


@dataclass(frozen=True)
class Reads:
    """The tokens of a pass whose last hidden states are read: of every row those from the first such token on."""

    at: torch.Tensor  # (R,) int64: where they stand in the pass
    row_offsets: torch.Tensor  # (B + 1,) int32: where each row's begin among them
    max_query: int  # most of any row


@dataclass(frozen=True)
class Pass:
    """One forward through the model: flat tokens `start:stop`, `counts[i]` of them from row `rows[i]`."""

    start: int
    stop: int
    rows: tuple[int, ...]
    counts: tuple[int, ...]
    rows_R: torch.Tensor  # int32: `rows`
    row_offsets: torch.Tensor  # (R + 1,) int32: where each row's tokens start in this pass
    lengths: torch.Tensor  # (R,) int32: tokens of each row up to the end of this pass
    slots: torch.Tensor  # (T of the pass,) int64: of the cache, for the pass's keys and values
    max_query: int  # at least the most tokens of a row in this pass,
    max_length: int  # and the longest of its rows
    thought_at: torch.Tensor  # (len(rows),) int64: where in this pass the thoughts stand; empty for pass 0
    source: torch.Tensor  # (len(rows),) int64: the position in the previous pass whose hidden state is fed back
    detachable: torch.Tensor  # (len(rows),) int64: how many thoughts of the row come after this one
    loss_index: torch.Tensor  # (N,) int64: positions in this pass that predict a labelled token
    targets: torch.Tensor  # (N,) int64: those tokens
    reads: Reads | None  # by the loss and the next thoughts; None where that is more than half of the pass


@dataclass(frozen=True)
class RaggedBatch:
    """B rows of token ids as one flat axis of T tokens, with the plan of passes over them."""

    input_ids: torch.Tensor  # (T,) int64, pass-major
    position_ids: torch.Tensor  # (T,) int64
    passes: tuple[Pass, ...]
    lengths: tuple[int, ...]  # tokens of each row
    padded_at: torch.Tensor  # (T,) int64: where each token stands in the padded (B, width) layout, flattened
    width: int
    num_targets: int  # without those that are IGNORE
    page_table: torch.Tensor  # (B, pages) int32
    num_slots: int
    words: torch.Tensor | None = None  # (W,) int32: what all tensors above are views of, once they are

    @property
    def num_thoughts(self) -> int:
        """Thoughts fed back in this batch, all rows together."""
        return sum(len(p.rows) for p in self.passes[1:])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RaggedBatch:
        """The same batch with its tensors on `device`."""
        words = packed(self)
        moved = words.to(device, non_blocking=non_blocking)
        return self if moved is self.words else unpacked(moved, self)

    def pin_memory(self) -> RaggedBatch:
        """The same batch in page-locked memory, for the data loader."""
        return unpacked(packed(self).pin_memory(), self)


def tensors(part: Any) -> Iterator[torch.Tensor]:
    """The tensors of a batch, or of a part of one, in the order of its fields."""
    if isinstance(part, torch.Tensor):
        yield part
    elif isinstance(part, tuple):
        for value in part:
            yield from tensors(value)
    elif isinstance(part, (RaggedBatch, Pass, Reads)):
        for field in fields(part):
            if field.name != "words":
                yield from tensors(getattr(part, field.name))


def packed(batch: RaggedBatch) -> torch.Tensor:
    """(W,) int32: all tensors of a batch one behind the other."""
    if batch.words is not None:
        return batch.words
    parts = list(tensors(batch))
    words = torch.zeros(sum(_room(part) for part in parts), dtype=torch.int32, device=batch.input_ids.device)
    start = 0
    for part in parts:
        words[start : start + _room(part)].view(part.dtype)[: part.numel()] = part.flatten()
        start += _room(part)
    return words


def unpacked(words: torch.Tensor, like: RaggedBatch) -> RaggedBatch:
    """A batch of the same shapes whose tensors are views of `words`."""
    start = 0

    def view(part: Any) -> Any:
        nonlocal start
        if isinstance(part, torch.Tensor):
            taken = words[start : start + part.numel() * part.element_size() // 4]
            start += _room(part)
            return taken.view(part.dtype).view(part.shape)
        if isinstance(part, tuple):
            return tuple(view(value) for value in part)
        if isinstance(part, (RaggedBatch, Pass, Reads)):
            return replace(part, **{f.name: view(getattr(part, f.name)) for f in fields(part) if f.name != "words"})
        return part

    return replace(view(like), words=words)


def _room(part: torch.Tensor) -> int:
    """Words a tensor takes, up to where the next one starts."""
    return -(-part.numel() * part.element_size() // 4 // ALIGNMENT) * ALIGNMENT


def collate(
    input_ids: Sequence[Sequence[int]],
    thought_id: int,
    labels: Sequence[Sequence[int]] | None = None,
    position_ids: Sequence[Sequence[int]] | None = None,
    columns: Sequence[Sequence[int]] | None = None,
    width: int | None = None,
) -> RaggedBatch:
    """Rows of token ids -> RaggedBatch.

    `labels[b][t]` is the target for token t (predicted from t - 1; -100 for none), `position_ids` default to 0, 1, ...;
    `columns` and `width` say where each token stood in a padded layout (default: left-aligned).
    Raises ValueError, naming the row, for an empty row, a thought in front of which no token stands, or labels of
    another length than the row.
    """
    rows = [np.asarray(row, dtype=np.int64) for row in input_ids]
    lengths = [len(row) for row in rows]
    if not rows or min(lengths) == 0:
        raise ValueError(f"input_ids: row {lengths.index(0) if rows else 0} is empty; a row needs at least one token")
    segments = []  # per row: its cut points, len = thoughts + 2
    for b, row in enumerate(rows):
        thoughts = np.flatnonzero(row == thought_id)
        if len(thoughts) and thoughts[0] == 0:
            raise ValueError(f"input_ids: row {b} starts with a thought; a thought needs a token in front of it")
        if labels is not None and len(labels[b]) != len(row):
            raise ValueError(f"labels: row {b} has {len(labels[b])} labels for {len(row)} tokens")
        segments.append([0, *thoughts.tolist(), len(row)])

    width = width or max(lengths)
    target_rows = [_shifted(labels[b]) if labels is not None else None for b in range(len(rows))]
    pages = [-(-n // PAGE_SIZE) for n in lengths]
    first_pages = np.cumsum([0, *pages])
    flat, positions, padded, passes = [], [], [], []
    ends: dict[int, int] = {}  # row -> position, within the previous pass, of its last token
    stop = 0
    for j in range(max(len(s) for s in segments) - 1):
        members = [b for b, s in enumerate(segments) if j < len(s) - 1]
        start, offset = stop, 0
        thought_at, source, index, targets, counts, unread, slots = [], [], [], [], [], [], []
        for b in members:
            low, high = segments[b][j], segments[b][j + 1]
            flat.append(rows[b][low:high])
            positions.append(position_ids[b][low:high] if position_ids is not None else np.arange(low, high))
            column = columns[b][low:high] if columns is not None else np.arange(low, high)
            padded.append(np.asarray(column) + b * width)
            slots.append(np.arange(low, high) + first_pages[b] * PAGE_SIZE)
            if j:
                thought_at.append(offset)
                source.append(ends[b])
            goes_on = j + 2 < len(segments[b])
            unread.append(high - low - goes_on)  # the last one feeds the next thought
            row_targets = target_rows[b]
            if row_targets is not None:
                labelled = np.flatnonzero(row_targets[low:high] != IGNORE)
                index.append(labelled + offset)
                targets.append(row_targets[low:high][labelled])
                unread[-1] = min([unread[-1], *labelled[:1].tolist()])
            counts.append(high - low)
            offset += high - low
        ends = dict(zip(members, (np.cumsum(counts) - 1).tolist(), strict=True))
        stop = start + offset
        passes.append(
            Pass(
                start=start,
                stop=stop,
                rows=tuple(members),
                counts=tuple(counts),
                rows_R=_int32(members),
                row_offsets=_int32(np.cumsum([0, *counts])),
                lengths=_int32([segments[b][j + 1] for b in members]),
                slots=_int64(np.concatenate(slots)),
                max_query=max(counts),
                max_length=max(segments[b][j + 1] for b in members),
                thought_at=_int64(thought_at),
                source=_int64(source),
                detachable=_int64([len(segments[b]) - 2 - j for b in members] if j else []),
                loss_index=_int64(np.concatenate(index) if index else []),
                targets=_int64(np.concatenate(targets) if targets else []),
                reads=make_reads(counts, unread),
            )
        )
    batch = RaggedBatch(
        input_ids=_int64(np.concatenate(flat)),
        position_ids=_int64(np.concatenate(positions)),
        passes=tuple(passes),
        lengths=tuple(lengths),
        padded_at=_int64(np.concatenate(padded)),
        width=width,
        num_targets=sum(p.targets.numel() for p in passes),
        page_table=_page_table(first_pages),
        num_slots=int(first_pages[-1]) * PAGE_SIZE,
    )
    return unpacked(packed(batch), batch)


def from_padded(
    input_ids: torch.Tensor,
    thought_id: int,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
) -> RaggedBatch:
    """Padded (B, T) tensors, pads left, right or both (attention_mask 0) -> RaggedBatch on the CPU."""
    shape = tuple(input_ids.shape)
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids: expected shape (batch, tokens), found {shape}")
    for name, tensor in {"attention_mask": attention_mask, "position_ids": position_ids, "labels": labels}.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected the shape of input_ids {shape}, found {tuple(tensor.shape)}")
    for name, tensor in {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}.items():
        if tensor is not None and tensor.is_floating_point():
            raise ValueError(f"{name}: expected integers, found {tensor.dtype}")
    ids = input_ids.cpu().numpy()
    columns: list[Any] = [np.arange(shape[1])] * shape[0]
    if attention_mask is not None:
        columns = [np.flatnonzero(m) for m in attention_mask.cpu().numpy()]

    def pick(tensor: torch.Tensor | None) -> list[Any] | None:
        return None if tensor is None else [v[c] for v, c in zip(tensor.cpu().numpy(), columns, strict=True)]

    return collate(
        [row[c] for row, c in zip(ids, columns, strict=True)],
        thought_id,
        labels=pick(labels),
        position_ids=pick(position_ids),
        columns=columns,
        width=shape[1],
    )


def check_range(batch: RaggedBatch, vocabulary: int, max_positions: int | None) -> None:
    """ValueError for token ids, labels and positions that a model with so many does not have. On the CPU."""
    targets = torch.cat([p.targets for p in batch.passes])
    limits = {"input_ids": (batch.input_ids, vocabulary), "labels": (targets, vocabulary)}
    if max_positions is not None:
        limits["position_ids"] = (batch.position_ids, max_positions)
    for name, (values, limit) in limits.items():
        wrong = values[(values < 0) | (values >= limit)]
        if len(wrong):
            raise ValueError(f"{name}: found {int(wrong[0])}, expected 0 to {limit - 1}")


def _shifted(labels: Sequence[int]) -> np.ndarray:
    """The target of each position: the label of the next one; the last position predicts nothing."""
    return np.append(np.asarray(labels, dtype=np.int64)[1:], IGNORE)


def make_reads(counts: list[int], unread: list[int]) -> Reads | None:
    """Of rows with so many tokens each, of which the first so many are unread."""
    offsets = np.cumsum([0, *(n - m for n, m in zip(counts, unread, strict=True))])
    if not 0 < 2 * offsets[-1] <= sum(counts):
        return None
    starts = np.cumsum([0, *counts[:-1]])
    at = np.concatenate([start + np.arange(m, n) for start, n, m in zip(starts, counts, unread, strict=True)])
    return Reads(_int64(at), _int32(offsets), int(np.diff(offsets).max()))


def _page_table(first_pages: np.ndarray) -> torch.Tensor:
    """(B, pages of the longest row): page after page from each row's first; what stands behind a row is not read."""
    pages = np.arange(np.diff(first_pages).max())
    return _int32(np.minimum(first_pages[:-1, None] + pages, first_pages[-1] - 1))


def _int32(values: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.int32))


def _int64(values: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.int64))
