"""What a graph replays: passes over a batch at fixed addresses, here with Hugging Face's own body.

A graph repeats fixed launches on fixed addresses. So a `StaticBatch` holds everything that a pass reads or writes:
rows, lengths, hidden states, tokens. A pass looks up its slots in the page table, advances the lengths of the rows that
are still active, and leaves the others unchanged: rows with fewer thoughts, rows that reached end-of-text, and rows
that pad the batch to its bucket. Nothing is copied to the host.

The passes are plain functions on tensors: on a CPU they run without a graph, which is how they are tested.
"""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Protocol

import numpy as np
import torch

from coconut_fast.infer.sampling import Sampling, sample_at
from coconut_fast.model.cache import KVCache, Ragged
from coconut_fast.model.coconut import Coconut

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # sizes of a StaticBatch
ALIGNMENT = 16  # bytes: kernels load vectors where an address allows it


class Staged:
    """Integers at addresses that never change, side by side, so that one copy from the host fills them all."""

    def __init__(self, device: torch.device, **fields: tuple[int, torch.dtype]) -> None:
        """fields: by name, number of elements and dtype."""
        self.places: dict[str, tuple[int, int, torch.dtype]] = {}
        stop = 0
        for name, (count, dtype) in fields.items():
            self.places[name] = (stop, stop + count * dtype.itemsize, dtype)
            stop += -(-count * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        self.block = torch.zeros(stop, dtype=torch.uint8, device=device)

    def views(self, block: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: block[start:stop].view(dtype) for name, (start, stop, dtype) in self.places.items()}

    @contextmanager
    def filling(self) -> Iterator[dict[str, np.ndarray]]:
        """Yields zeros on the host, by name, to be filled; after the block they are copied to the device."""
        pinned = self.block.device.type == "cuda"  # pinned memory is kept until the copy is done
        host = torch.zeros(self.block.shape, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        yield {name: view.numpy() for name, view in self.views(host).items()}
        self.block.copy_(host, non_blocking=True)


class StaticBatch:
    """B rows at addresses that never change. hidden: the state of each row's last position after the final norm, in at
    least fp32."""

    rows: torch.Tensor  # (B,) int32
    lengths: torch.Tensor  # (B,) int32: cached tokens
    remaining: torch.Tensor  # (B,) int32: passes left
    tails: torch.Tensor  # (B,) int32: passes left for `feed`: 1 for a row with a token after its thoughts
    attended: torch.Tensor  # (B,) int32: length attended to in the current pass, 0 for an inactive row
    none: torch.Tensor  # (B,) int32 zeros: the remaining counts of a pass that nothing follows
    positions: torch.Tensor  # (B,) int64: of the last token in the cache
    tokens: torch.Tensor  # (B,) int64
    step: torch.Tensor  # (1,) int64: the next column of `written`

    def __init__(self, size: int, dim: int, steps: int, dtype: torch.dtype, device: torch.device) -> None:
        self.size = size
        small, large = (size, torch.int32), (size, torch.int64)
        self.staged = Staged(
            device,
            rows=small,
            lengths=small,
            remaining=small,
            tails=small,
            attended=small,
            none=small,
            positions=large,
            tokens=large,
            step=(1, torch.int64),
        )
        vars(self).update(self.staged.views(self.staged.block))
        self.index = torch.arange(size, device=device)
        self.stream = torch.zeros(size, dim, dtype=torch.float32, device=device)  # input of the current pass
        self.offsets = torch.arange(size + 1, dtype=torch.int32, device=device)
        self.written = torch.zeros(size, steps, dtype=torch.int64, device=device)
        self.numbers = torch.zeros(size, steps, dtype=torch.float64, device=device)
        self.hidden = torch.zeros(size, dim, dtype=dtype, device=device)

    def fill(
        self,
        rows: Sequence[int],
        lengths: Sequence[int],
        passes: Sequence[int],
        tokens: Sequence[int | None] = (),
        fresh: int = 0,
    ) -> None:
        """Row i becomes the cache's row `rows[i]`, which holds `lengths[i]` tokens, with `passes[i]` passes left.

        tokens: the input of `feed` or of the first `decode`; None for a row without a tail. `begin` chooses the first
        tokens of the last `fresh` rows.
        """
        count = len(rows)
        with self.staged.filling() as host:
            host["rows"][:count], host["lengths"][:count], host["remaining"][:count] = rows, lengths, passes
            host["positions"][:] = host["lengths"] - 1
            host["tails"][: len(tokens)] = [token is not None for token in tokens]
            host["tokens"][: len(tokens)] = [token or 0 for token in tokens]
            host["attended"][count - fresh : count] = 1

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """In the block no row is active: passes may run and change nothing that is used."""
        saved = self.staged.block.clone()
        for counts in (self.remaining, self.tails, self.attended):
            counts.zero_()
        self.step.clamp_(max=self.written.shape[1] - 1)  # the column that is overwritten next anyway
        try:
            yield
        finally:
            self.staged.block.copy_(saved)


class StaticPrompts:
    """Tokens of several rows, concatenated, to be prefilled after what the cache holds of these rows.

    size: upper bounds on the tokens, the rows, and the tokens of any row. Keys and values of unused tokens are written
    nowhere (slot -1), unused rows have no tokens. hidden: the state of each row's last token after the final norm, as
    in a StaticBatch.
    """

    ids: torch.Tensor  # (T,) int64
    positions: torch.Tensor  # (T,) int64: of the token before; `prefill` advances it by one
    slots: torch.Tensor  # (T,) int64
    last: torch.Tensor  # (B,) int64: index of each row's last token
    into: torch.Tensor  # (B,) int64: the row of a StaticBatch that gets the state
    rows: torch.Tensor  # (B,) int32
    offsets: torch.Tensor  # (B + 1,) int32
    lengths: torch.Tensor  # (B,) int32: tokens in the cache, these included
    unused: torch.Tensor  # (T,) int32

    def __init__(self, size: tuple[int, int, int], dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.size = size
        tokens, rows, _ = size
        self.staged = Staged(
            device,
            ids=(tokens, torch.int64),
            positions=(tokens, torch.int64),
            slots=(tokens, torch.int64),
            last=(rows, torch.int64),
            into=(rows, torch.int64),
            rows=(rows, torch.int32),
            offsets=(rows + 1, torch.int32),
            lengths=(rows, torch.int32),
        )
        vars(self).update(self.staged.views(self.staged.block))
        self.unused = torch.zeros(tokens, dtype=torch.int32, device=device)
        self.hidden = torch.zeros(rows, dim, dtype=dtype, device=device)

    def fill(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        lengths: Sequence[int],
        slots: torch.Tensor,
        into: Sequence[int],
    ) -> None:
        """Appends `tokens[i]` to `rows[i]`, which then holds `lengths[i]` tokens; the tokens go to `slots`."""
        count, counts = len(rows), np.fromiter(map(len, tokens), np.int64, len(tokens))
        ends = counts.cumsum()
        total = int(ends[-1])
        with self.staged.filling() as host:
            host["ids"][:total] = np.frombuffer(array("q", chain.from_iterable(tokens)), np.int64)
            host["positions"][:] = -1
            host["positions"][:total] += np.arange(total) + (np.asarray(lengths) - ends).repeat(counts)
            host["slots"][:total], host["slots"][total:] = slots.numpy(), -1
            host["last"][:count], host["into"][:count] = ends - 1, into
            host["rows"][:count], host["lengths"][:count] = rows, lengths
            host["offsets"][1 : count + 1], host["offsets"][count + 1 :] = ends, total

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """In the block nothing is written to the cache; hidden states are meaningless."""
        saved = self.staged.block.clone()
        self.slots.fill_(-1)
        try:
            yield
        finally:
            self.staged.block.copy_(saved)


class Passes(Protocol):
    """The passes of a model over a StaticBatch. Each can be captured: fixed launches, no host sync."""

    reason: str  # how they are implemented, and why
    graphed_tokens: int  # the most prompt tokens worth a graph; more are prefilled without one

    def prefill(self, prompts: StaticPrompts) -> None:
        """One pass over given tokens, up to the hidden state of each row's last token."""

    def think(self, batch: StaticBatch, count: int) -> None:
        """`count` latent passes: hidden -> feedback -> body -> hidden."""

    def feed(self, batch: StaticBatch) -> None:
        """One pass over `tokens` of the rows with `tails`, up to the hidden state."""

    def begin(self, batch: StaticBatch) -> None:
        """Chooses first tokens from `hidden` in rows with `attended` above 0: the end of `decode`, without its pass."""

    def decode(self, batch: StaticBatch) -> None:
        """One pass over `tokens`, and the tokens that follow; a row that reaches end-of-text becomes inactive."""


class HuggingFacePasses:
    """For any model: its own body, over our attention. Inactive rows write to the only slot of a spare row."""

    graphed_tokens = 1024  # beyond, the device is the bottleneck, and a graph would keep its activations' memory

    def __init__(self, model: Coconut, cache: KVCache, sampling: Sampling, why: str) -> None:
        self._model = weakref.ref(model)
        self.cache, self.sampling = cache, sampling
        self.reason = f"passes run Hugging Face's body: {why}"
        self.spare = cache.alloc(1)[0]
        cache.append([self.spare], [1])

    @property
    def model(self) -> Coconut:
        model = self._model()
        assert model is not None, "the model is gone, and its passes run"
        return model

    def prefill(self, prompts: StaticPrompts) -> None:
        prompts.positions.add_(1)
        limit = self.cache.page_table.shape[1] * self.cache.page_size
        ragged = Ragged(
            self.cache,
            prompts.rows,
            prompts.offsets,
            prompts.lengths,
            prompts.slots,
            max_query=prompts.size[2],
            max_length=limit,
        )
        hidden_TD = self.model.body(self.model.embed(prompts.ids), prompts.positions, ragged)
        prompts.hidden.copy_(hidden_TD.index_select(0, prompts.last))

    def think(self, batch: StaticBatch, count: int) -> None:
        dtype = self.model.dtype
        for _ in range(count):
            active = batch.remaining > 0
            self._pass(batch, self.model.feedback(batch.hidden.to(dtype)).to(dtype), active)
            batch.remaining.sub_(active.int())

    def feed(self, batch: StaticBatch) -> None:
        active = batch.tails > 0
        self._pass(batch, self.model.embed(batch.tokens), active)
        batch.tails.sub_(active.int())

    def begin(self, batch: StaticBatch) -> None:
        self._choose(batch, batch.attended > 0)

    def decode(self, batch: StaticBatch) -> None:
        active = batch.remaining > 0
        self._pass(batch, self.model.embed(batch.tokens), active)
        batch.remaining.sub_(active.int())
        self._choose(batch, active)

    def _choose(self, batch: StaticBatch, active: torch.Tensor) -> None:
        """Chooses the tokens that follow `hidden` in active rows; end-of-text ends a row."""
        logits_BV = self.model.head(batch.hidden.to(self.model.dtype))  # as the body left it: the copy is exact
        if self.sampling.temperature == 0:
            chosen = logits_BV.argmax(-1)
        else:
            numbers_B = batch.numbers.index_select(1, batch.step)[:, 0]
            chosen = sample_at(
                logits_BV, numbers_B, self.sampling.temperature, self.sampling.top_k, self.sampling.top_p
            )
        batch.tokens.copy_(torch.where(active, chosen, batch.tokens))
        batch.written.index_copy_(1, batch.step, torch.where(active, chosen, -1)[:, None])
        ended = chosen == self.model.tokens.eos if self.model.tokens.eos is not None else torch.zeros_like(active)
        batch.remaining.copy_(torch.where(active & ended, 0, batch.remaining))
        batch.step.add_(1)

    def _pass(self, batch: StaticBatch, embeds_BD: torch.Tensor, active: torch.Tensor) -> None:
        rows = torch.where(active, batch.rows, self.spare)
        lengths = torch.where(active, batch.lengths + 1, 1)
        positions = lengths.long() - 1
        size = self.cache.page_size
        slots = self.cache.page_table[rows.long(), positions // size].long() * size + positions % size
        limit = self.cache.page_table.shape[1] * size
        ragged = Ragged(self.cache, rows, batch.offsets, lengths, slots, max_query=1, max_length=limit)
        hidden = self.model.body(embeds_BD, positions, ragged)
        batch.hidden.copy_(torch.where(active[:, None], hidden, batch.hidden))
        batch.lengths.copy_(torch.where(active, lengths, batch.lengths))
