"""What a graph replays: passes over a batch that lies at addresses which never change, on Hugging Face's own body.

A graph repeats fixed launches on fixed addresses. So everything a pass reads or writes lies in a `StaticBatch`: rows,
lengths, hidden states, tokens. A pass finds its own slots from the page table, advances the lengths of the rows that
are still active, and leaves the others as they are: rows with fewer thoughts, rows that met end-of-text, and the rows
that fill a bucket. Nothing returns to the host.

The passes are plain functions on tensors: on a CPU they run as they stand, which is how they are tested.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

from coconut_fast.infer.decode import Sampling
from coconut_fast.infer.sampling import sample_at
from coconut_fast.model.cache import KVCache, Ragged
from coconut_fast.model.coconut import Coconut

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # sizes of a StaticBatch


class StaticBatch:
    """B rows at addresses that never change. hidden is the state after the final norm, of each row's last position, in
    at least fp32."""

    def __init__(self, size: int, dim: int, steps: int, dtype: torch.dtype, device: torch.device) -> None:
        def ints(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.size = size
        self.rows, self.lengths, self.remaining = ints(size), ints(size), ints(size)
        self.positions = ints(size, dtype=torch.int64)  # of the last token in the cache
        self.attended = ints(size)  # positions that each row attends to in the pass that runs; 0 for one that stands
        self.none = ints(size)  # passes that remain where none follows
        self.index = torch.arange(size, device=device)
        self.stream = torch.zeros(size, dim, dtype=torch.float32, device=device)  # the input of the pass that runs
        self.offsets = torch.arange(size + 1, dtype=torch.int32, device=device)
        self.tokens = ints(size, dtype=torch.int64)
        self.written = ints(size, steps, dtype=torch.int64)
        self.step = ints(1, dtype=torch.int64)
        self.numbers = torch.zeros(size, steps, dtype=torch.float64, device=device)
        self.hidden = torch.zeros(size, dim, dtype=dtype, device=device)

    def fill(self, rows: Sequence[int], lengths: Sequence[int], passes: Sequence[int]) -> None:
        """Row i of the cache `rows[i]`, holding `lengths[i]` tokens, is to go through `passes[i]` passes."""
        values = torch.zeros(3, self.size, dtype=torch.int32, device="cpu")
        values[:, : len(rows)] = torch.tensor(
            [list(rows), list(lengths), list(passes)], dtype=torch.int32, device="cpu"
        )
        for static, value in zip((self.rows, self.lengths, self.remaining), values, strict=True):
            static.copy_(value, non_blocking=True)
        self.positions.copy_(values[1] - 1, non_blocking=True)
        self.step.zero_()

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Within the block no row is active: passes may run and change nothing that is read."""
        saved = self.remaining.clone(), self.step.clone()
        self.remaining.zero_()
        self.step.zero_()
        try:
            yield
        finally:
            self.remaining.copy_(saved[0])
            self.step.copy_(saved[1])


class Passes(Protocol):
    """The passes of a model over a StaticBatch. Each can be captured: fixed launches, no word to the host."""

    reason: str  # what they are made of, and why

    def refresh(self) -> None:
        """Takes up weights that were written in place since the last call; addresses stay."""

    def think(self, batch: StaticBatch, count: int) -> None:
        """`count` latent passes: hidden -> feedback -> body -> hidden."""

    def feed(self, batch: StaticBatch) -> None:
        """One pass over `tokens`, up to the hidden state."""

    def write(self, batch: StaticBatch) -> None:
        """One pass over `tokens`, and the tokens that follow; a row that meets end-of-text becomes inactive."""


class HuggingFacePasses:
    """For any model: its own body, over our attention. What an inactive row computes goes to a spare row's one slot."""

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

    def refresh(self) -> None:
        """Nothing: a pass reads the model's own weights."""

    def think(self, batch: StaticBatch, count: int) -> None:
        dtype = self.model.dtype
        for _ in range(count):
            active = batch.remaining > 0
            self._pass(batch, self.model.feedback(batch.hidden.to(dtype)).to(dtype), active)
            batch.remaining.sub_(active.int())

    def feed(self, batch: StaticBatch) -> None:
        active = batch.remaining > 0
        self._pass(batch, self.model.embed(batch.tokens), active)
        batch.remaining.sub_(active.int())

    def write(self, batch: StaticBatch) -> None:
        active = batch.remaining > 0
        self._pass(batch, self.model.embed(batch.tokens), active)
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
        batch.remaining.copy_(torch.where(active & ended, 0, batch.remaining - active.int()))
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
