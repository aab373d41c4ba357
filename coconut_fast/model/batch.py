"""Ragged batches: rows laid end to end, cut into passes at their thoughts.

A row is cut before each of its thoughts. Segment 0 runs up to the first thought; segment j starts with the j-th thought
and runs up to the next one (or to the end of the row). Pass j computes segment j of every row that has one, so a batch
needs 1 + (most thoughts of any row) passes, no token is computed twice and there is no padding.

The flat token axis is pass-major: pass 0 of all rows, then pass 1, ... so each pass is one contiguous slice.

Cache slots are planned here as well: a row's keys and values go to one run of whole pages. All tensors of a batch are
views of one buffer, so that it reaches a device in one copy.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain, pairwise
from typing import Any

import numpy as np
import torch

from coconut_fast.tokens import IGNORE

PAGE_SIZE = 16  # tokens per page of the cache
ALIGNMENT = 4  # a batch's tensors start at multiples of this many 32-bit words


@dataclass(frozen=True)
class UsedPositions:
    """Positions of a pass whose final hidden state is used (by the loss or the next thought).

    In each row these are its first such position and all positions after it.
    """

    at: torch.Tensor  # (R,) int64: their indices in the pass
    row_offsets: torch.Tensor  # (B + 1,) int32: where each row's start among them
    max_query: int  # upper bound on those of a row


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
    slots: torch.Tensor  # (T of the pass,) int64: cache slots of the pass's keys and values
    max_query: int  # upper bound on tokens per row
    max_length: int  # upper bound on row lengths
    thought_at: torch.Tensor  # (len(rows),) int64: indices of the thoughts in this pass; empty for pass 0
    source: torch.Tensor  # (len(rows),) int64: the position in the previous pass whose hidden state is fed back
    thoughts_after: torch.Tensor  # (len(rows),) int64: thoughts left in the row; negative: padding, train/buckets.py
    loss_index: torch.Tensor  # (N,) int64: positions in this pass that predict a labelled token
    targets: torch.Tensor  # (N,) int64: those tokens
    used: UsedPositions | None  # None: more than half of the pass is used, or nothing


@dataclass(frozen=True)
class RaggedBatch:
    """B rows of token ids as one flat axis of T tokens, with the plan of passes over them."""

    input_ids: torch.Tensor  # (T,) int64, pass-major
    position_ids: torch.Tensor  # (T,) int64
    passes: tuple[Pass, ...]
    lengths: tuple[int, ...]  # tokens of each row
    padded_at: torch.Tensor  # (T,) int64: each token's index in the padded (B, width) layout, flattened
    width: int
    num_targets: int  # targets other than IGNORE
    page_table: torch.Tensor  # (B, pages) int32
    num_slots: int
    words: torch.Tensor | None = None  # (W,) int32: the buffer that all tensors above are views of, if they are

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RaggedBatch:
        """The same batch with its tensors on `device`."""
        words = to_buffer(self)
        moved = words.to(device, non_blocking=non_blocking)
        return self if moved is self.words else from_buffer(moved, self)

    def padded(self, flat_TX: torch.Tensor) -> torch.Tensor:
        """(T, X) of the flat axis -> (B, width, X) in the padded layout, zero on pads."""
        padded = flat_TX.new_zeros(len(self.lengths) * self.width, flat_TX.shape[-1])
        return padded.index_copy(0, self.padded_at, flat_TX).view(len(self.lengths), self.width, -1)

    def pin_memory(self) -> RaggedBatch:
        """The same batch in page-locked memory, which `to` can copy to a GPU without waiting."""
        return from_buffer(to_buffer(self).pin_memory(), self)


def tensors(part: RaggedBatch | Pass | UsedPositions) -> Iterator[torch.Tensor]:
    """The tensors of a batch, or of a part of one, in the order of its fields."""
    for field in FIELDS[type(part)]:
        value = getattr(part, field)
        if isinstance(value, torch.Tensor):
            yield value
        elif value is not None:
            for inner in value if isinstance(value, tuple) else (value,):
                yield from tensors(inner)


def to_buffer(batch: RaggedBatch) -> torch.Tensor:
    """(W,) int32: all tensors of a batch, concatenated."""
    if batch.words is not None:
        return batch.words
    pieces = []
    for part in tensors(batch):
        if part.numel():
            words = part.flatten().view(torch.int32)
            pieces += [words, words.new_zeros(-len(words) % ALIGNMENT)]
    return torch.cat(pieces)


def from_buffer(words: torch.Tensor, like: RaggedBatch) -> RaggedBatch:
    """A batch of the same shapes whose tensors are views of `words`."""
    sizes = [part.numel() * part.element_size() // 4 for part in tensors(like)]
    pieces = iter(words.split([n for size in sizes for n in (size, -size % ALIGNMENT)])[::2])

    def view(part: Any) -> Any:
        found: dict[str, Any] = {}
        for field in FIELDS[type(part)]:
            value = getattr(part, field)
            if isinstance(value, torch.Tensor):
                found[field] = next(pieces).view(value.dtype).view(value.shape)
            elif value is not None:
                found[field] = tuple(map(view, value)) if isinstance(value, tuple) else view(value)
        return replace(part, **found)

    return replace(view(like), words=words)


# The fields that hold a batch's tensors, in this order.
FIELDS = {
    kind: [f.name for f in fields(kind) if f.name != "words" and ("Tensor" in f.type or f.name in ("passes", "used"))]
    for kind in (RaggedBatch, Pass, UsedPositions)
}


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
    `columns` and `width` give each token's place in a padded layout (default: left-aligned).
    Raises ValueError, naming the row, for an empty row, a thought with no token before it, or labels whose length
    differs from the row's or that are negative and not -100. The model's limits are the caller's to check.
    """
    lengths = [len(row) for row in input_ids]
    if not lengths or min(lengths) == 0:
        raise ValueError(
            f"input_ids: row {lengths.index(0) if lengths else 0} is empty; a row needs at least one token"
        )
    for b, row in enumerate(labels or ()):
        if len(row) != lengths[b]:
            raise ValueError(f"labels: row {b} has {len(row)} labels for {lengths[b]} tokens")
    labels_T = None if labels is None else flattened(labels)
    if labels_T is not None and (wrong := np.flatnonzero((labels_T < 0) & (labels_T != IGNORE))).size:
        b = int(np.searchsorted(np.cumsum(lengths), wrong[0], side="right"))
        raise ValueError(f"labels: row {b} has {labels_T[wrong[0]]}, expected token ids, or {IGNORE} for none")
    batch = split_into_passes(
        np.asarray(lengths),
        flattened(input_ids),
        thought_id,
        labels_T=labels_T,
        positions_T=None if position_ids is None else flattened(position_ids),
        columns_T=None if columns is None else flattened(columns),
        width=width,
    )
    return from_buffer(to_buffer(batch), batch)


def flattened(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """(T,) int64: rows of numbers, concatenated."""
    if all(isinstance(row, list) for row in rows):  # array() reads one list faster than NumPy reads many
        return np.frombuffer(array("q", list(chain.from_iterable(rows))), dtype=np.int64)
    return np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])


def split_into_passes(
    lengths_B: np.ndarray,
    ids_T: np.ndarray,
    thought_id: int,
    *,
    labels_T: np.ndarray | None,
    positions_T: np.ndarray | None,
    columns_T: np.ndarray | None = None,
    width: int | None = None,
) -> RaggedBatch:
    """`collate` for rows that are concatenated, none of them empty; its tensors are not in one buffer yet.

    A segment (suffix S) is what one row has in one pass: its tokens before the first thought, or those from one thought
    up to the next. Segments are ordered by pass and, within a pass, by row; so are the tokens from `order_T` on.
    """
    starts_B, number_T, at_T, pass_T = row_major(lengths_B, ids_T, thought_id)
    thoughts_B = pass_T[starts_B + lengths_B - 1]
    width = width or int(lengths_B.max())
    pages_B = -(-lengths_B // PAGE_SIZE)
    first_pages = np.append(0, np.cumsum(pages_B))
    shape = int(thoughts_B.max()) + 1, len(lengths_B)
    counts_PB = np.bincount(pass_T * shape[1] + number_T, minlength=shape[0] * shape[1]).reshape(shape)

    order_T = np.argsort(pass_T.astype(np.min_scalar_type(len(counts_PB))), kind="stable")
    targets_T = np.full(len(ids_T), IGNORE) if labels_T is None else shifted(labels_T, starts_B)
    ids_T, number_T, at_T, targets_T = ids_T[order_T], number_T[order_T], at_T[order_T], targets_T[order_T]
    slots_T = at_T + first_pages[number_T] * PAGE_SIZE
    padded_T = (at_T if columns_T is None else columns_T[order_T]) + number_T * width
    positions_T = at_T if positions_T is None else positions_T[order_T]

    pass_S, row_S = np.nonzero(counts_PB)
    count_S = counts_PB[pass_S, row_S]
    start_S = np.cumsum(count_S) - count_S
    stop_S = np.cumsum(counts_PB, axis=0)[pass_S, row_S]  # within the row
    left_S = thoughts_B[row_S] - pass_S
    # Unread are the tokens before the first labelled position, but never a last token that feeds a thought.
    labelled_T = np.where(targets_T != IGNORE, np.arange(len(ids_T)), len(ids_T))
    unread_S = np.minimum(count_S - (left_S > 0), np.minimum.reduceat(labelled_T, start_S) - start_S)
    ends_PB = np.cumsum(counts_PB, axis=1) - 1  # index of each row's last token in its pass

    passes: list[Pass] = []
    bounds = np.searchsorted(pass_S, np.arange(len(counts_PB) + 1)).tolist()
    stop = 0
    for j, (low, high) in enumerate(pairwise(bounds)):
        members, counts = row_S[low:high], count_S[low:high]
        offsets = np.append(0, np.cumsum(counts))
        start, stop = stop, stop + int(offsets[-1])
        index = np.flatnonzero(targets_T[start:stop] != IGNORE)
        passes.append(
            Pass(
                start=start,
                stop=stop,
                rows=tuple(members.tolist()),
                counts=tuple(counts.tolist()),
                rows_R=_int32(members),
                row_offsets=_int32(offsets),
                lengths=_int32(stop_S[low:high]),
                slots=_int64(slots_T[start:stop]),
                max_query=int(counts.max()),
                max_length=int(stop_S[low:high].max()),
                thought_at=_int64(offsets[:-1] if j else []),
                source=_int64(ends_PB[j - 1, members] if j else []),
                thoughts_after=_int64(left_S[low:high] if j else []),
                loss_index=_int64(index),
                targets=_int64(targets_T[start:stop][index]),
                used=used_positions(counts, unread_S[low:high]),
            )
        )
    return RaggedBatch(
        input_ids=_int64(ids_T),
        position_ids=_int64(positions_T),
        passes=tuple(passes),
        lengths=tuple(lengths_B.tolist()),
        padded_at=_int64(padded_T),
        width=width,
        num_targets=sum(p.targets.numel() for p in passes),
        page_table=_page_table(first_pages),
        num_slots=int(first_pages[-1]) * PAGE_SIZE,
    )


def row_major(
    lengths_B: np.ndarray, ids_T: np.ndarray, thought_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Where rows begin (B,), and each token's row, position in it, and pass (T,).

    ValueError, naming the row, for a thought with no token before it.
    """
    starts_B = np.cumsum(lengths_B) - lengths_B
    is_thought_T = ids_T == thought_id
    wrong = np.flatnonzero(is_thought_T[starts_B])
    if len(wrong):
        raise ValueError(f"input_ids: row {wrong[0]} starts with a thought; a thought needs a token in front of it")
    number_T = np.repeat(np.arange(len(lengths_B)), lengths_B)
    thoughts_T = np.cumsum(is_thought_T)
    return starts_B, number_T, np.arange(len(ids_T)) - starts_B[number_T], thoughts_T - thoughts_T[starts_B][number_T]


def shifted(labels_T: np.ndarray, starts_B: np.ndarray) -> np.ndarray:
    """The target of each position: the label of the next one; the last position of a row predicts nothing."""
    targets_T = np.append(labels_T[1:], IGNORE)
    targets_T[starts_B[1:] - 1] = IGNORE
    return targets_T


def from_padded(
    input_ids: torch.Tensor,
    thought_id: int,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
) -> RaggedBatch:
    """Padded (B, T) tensors, pads left, right or both (attention_mask 0) -> RaggedBatch on the CPU."""
    tensors = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, "labels": labels}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name}: expected a (batch, tokens) tensor, found a {type(tensor).__name__}")
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids: expected shape (batch, tokens), found {tuple(input_ids.shape)}")
        if tensor.shape != input_ids.shape:
            raise ValueError(
                f"{name}: expected the shape of input_ids {tuple(input_ids.shape)}, found {tuple(tensor.shape)}"
            )
        if tensor.is_floating_point() and name != "attention_mask":
            raise ValueError(f"{name}: expected integers, found {tensor.dtype}")
    shape = tuple(input_ids.shape)
    ids = input_ids.cpu().numpy()
    columns: list[Any] = [np.arange(shape[1])] * shape[0]
    if attention_mask is not None:
        mask = attention_mask.detach().cpu().float().numpy()
        if not np.isin(mask, (0, 1)).all():
            raise ValueError("attention_mask: expected 1 for tokens and 0 for pads, found other values")
        columns = [np.flatnonzero(m) for m in mask]

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
    """ValueError for token ids, labels and positions outside the range of the model. For batches on the CPU."""
    targets = torch.cat([p.targets for p in batch.passes])
    limits = {"input_ids": (batch.input_ids, vocabulary), "labels": (targets, vocabulary)}
    if max_positions is not None:
        limits["position_ids"] = (batch.position_ids, max_positions)
    for name, (values, limit) in limits.items():
        wrong = values[(values < 0) | (values >= limit)]
        if len(wrong):
            raise ValueError(f"{name}: found {int(wrong[0])}, expected 0 to {limit - 1}")


def used_positions(counts: np.ndarray, unread: np.ndarray) -> UsedPositions | None:
    """Those of rows of `counts` tokens whose first `unread` are unused; None if none or more than half are used."""
    read = counts - unread
    offsets = np.append(0, np.cumsum(read))
    if not 0 < 2 * offsets[-1] <= counts.sum():
        return None
    at = np.repeat(np.cumsum(counts) - offsets[1:], read) + np.arange(offsets[-1])
    return UsedPositions(_int64(at), _int32(offsets), int(read.max()))


def _page_table(first_pages: np.ndarray) -> torch.Tensor:
    """(B, pages of the longest row): consecutive pages from each row's first; those after its end are not read."""
    pages = np.arange(np.diff(first_pages).max())
    return _int32(np.minimum(first_pages[:-1, None] + pages, first_pages[-1] - 1))


def _int32(values: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.int32))


def _int64(values: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.int64))
