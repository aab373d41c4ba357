"""The graph runner: the chain of thoughts as one CUDA graph, and decoding as graphed steps.

A graph replays fixed launches on fixed addresses. So everything a pass reads or writes lies in a `StaticBatch`: rows,
lengths, hidden states, tokens. A pass finds its own slots from the page table, advances the lengths of the rows that
are still active, and leaves the others as they are: rows with fewer thoughts, rows that met end-of-text, and the rows
that fill a bucket. The host reserves pages beforehand and looks at the results once, behind the last replay.

The passes are plain functions on tensors: on a CPU they run as they stand, which is how they are tested.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from coconut_fast.infer.decode import Draft, Sampling
from coconut_fast.infer.eager import EagerRunner
from coconut_fast.infer.prefill import prefill
from coconut_fast.infer.sampling import sample_at, uniform
from coconut_fast.model.cache import KVCache, Ragged
from coconut_fast.model.coconut import Coconut

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LONGEST_CHAIN = 16  # passes of one graph; a longer chain replays it


class StaticBatch:
    """B rows at addresses that never change, and the passes over them."""

    def __init__(self, model: Coconut, cache: KVCache, size: int, spare: int, sampling: Sampling, steps: int) -> None:
        self.model, self.cache, self.sampling, self.spare = model, cache, sampling, spare
        device = cache.device

        def ints(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.rows, self.lengths, self.remaining = ints(size), ints(size), ints(size)
        self.offsets = torch.arange(size + 1, dtype=torch.int32, device=device)
        self.tokens = ints(size, dtype=torch.int64)
        self.written = ints(size, steps, dtype=torch.int64)
        self.step = ints(1, dtype=torch.int64)
        self.numbers = torch.zeros(size, steps, dtype=torch.float64, device=device)
        dim = model.hf.get_input_embeddings().weight.shape[1]
        self.hidden = torch.zeros(size, dim, dtype=model.dtype, device=device)

    def fill(self, rows: Sequence[int], lengths: Sequence[int], passes: Sequence[int]) -> None:
        """Row i of the cache `rows[i]`, holding `lengths[i]` tokens, is to go through `passes[i]` passes."""
        values = torch.zeros(3, len(self.rows), dtype=torch.int32)
        values[:, : len(rows)] = torch.tensor([list(rows), list(lengths), list(passes)], dtype=torch.int32)
        for static, value in zip((self.rows, self.lengths, self.remaining), values, strict=True):
            static.copy_(value, non_blocking=True)
        self.step.zero_()

    def think(self) -> None:
        """One latent pass: hidden -> feedback -> body -> hidden."""
        active = self.remaining > 0
        self._pass(self.model.feedback(self.hidden).to(self.hidden.dtype), active)
        self.remaining.sub_(active.int())

    def feed(self) -> None:
        """One pass over `tokens`, without the LM head."""
        active = self.remaining > 0
        self._pass(self.model.embed(self.tokens), active)
        self.remaining.sub_(active.int())

    def write(self) -> None:
        """One pass over `tokens`, and the tokens that follow; a row that meets end-of-text becomes inactive."""
        active = self.remaining > 0
        self._pass(self.model.embed(self.tokens), active)
        logits_BV = self.model.head(self.hidden)
        if self.sampling.temperature == 0:
            chosen = logits_BV.argmax(-1)
        else:
            numbers_B = self.numbers.gather(1, self.step.expand(len(self.rows))[:, None])[:, 0]
            chosen = sample_at(
                logits_BV, numbers_B, self.sampling.temperature, self.sampling.top_k, self.sampling.top_p
            )
        self.tokens.copy_(torch.where(active, chosen, self.tokens))
        self.written.index_copy_(1, self.step, torch.where(active, chosen, -1)[:, None])
        ended = chosen == self.model.tokens.eos if self.model.tokens.eos is not None else torch.zeros_like(active)
        self.remaining.copy_(torch.where(active & ended, 0, self.remaining - active.int()))
        self.step.add_(1)

    def _pass(self, embeds_BD: torch.Tensor, active: torch.Tensor) -> None:
        # What an inactive row computes goes to the spare row's one slot, and nobody reads it.
        rows = torch.where(active, self.rows, self.spare)
        lengths = torch.where(active, self.lengths + 1, 1)
        positions = lengths.long() - 1
        size = self.cache.page_size
        slots = self.cache.page_table[rows.long(), positions // size].long() * size + positions % size
        limit = self.cache.page_table.shape[1] * size
        ragged = Ragged(self.cache, rows, self.offsets, lengths, slots, max_query=1, max_length=limit)
        hidden = self.model.body(embeds_BD, positions, ragged)
        self.hidden.copy_(torch.where(active[:, None], hidden, self.hidden))
        self.lengths.copy_(torch.where(active, lengths, self.lengths))


class GraphRunner(EagerRunner):
    """Prefill as the eager runner does it; thoughts and tokens by replay. First use captures, later uses replay."""

    name = "graph"

    def __init__(
        self,
        model: Coconut,
        *,
        num_slots: int,
        max_rows: int,
        max_length: int,
        sampling: Sampling,
        steps: int = 8,
    ) -> None:
        super().__init__(
            model,
            num_slots=num_slots + 16,
            max_rows=max_rows + 1,
            max_length=max_length,
            sampling=sampling,
        )
        self.steps = steps
        self.spare = self.cache.alloc(1)[0]
        self.cache.append([self.spare], [1])
        self.batches: dict[int, StaticBatch] = {}
        self.graphs: dict[tuple[int, str, int], Callable[[], None]] = {}
        self.pool = torch.cuda.graph_pool_handle() if model.device.type == "cuda" else None

    @torch.inference_mode()
    def read(self, rows, prompts, thoughts):  # type: ignore[no-untyped-def]
        """As EagerRunner.read. Prompts that end `thoughts, one token`, the usual ones, are replayed from there on."""
        usual = all([len(p.tokens) for p in prompt.pieces[1:]] == [1] for prompt in prompts)
        if not usual or thoughts is not None or len(rows) > BUCKETS[-1]:
            return super().read(rows, prompts, thoughts)
        with self.clock("prefill"):
            hidden_BD = prefill(self.model, self.cache, rows, [p.pieces[0].tokens for p in prompts])
        counts = [p.num_thoughts for p in prompts]
        batch = self._batch(len(rows))
        batch.fill(rows, self._lengths(rows), counts)
        batch.hidden[: len(rows)] = hidden_BD
        self.cache.reserve(rows, [c + 1 for c in counts])
        left = max(counts)
        with self.clock("think", passes=left):
            while left:
                chain = min(left, LONGEST_CHAIN)
                self._replay(batch, "think", chain)
                left -= chain
        batch.remaining[: len(rows)] = 1
        tails = [p.pieces[1].tokens[0] for p in prompts]
        batch.tokens[: len(rows)] = torch.tensor(tails, device=self.cache.device)
        self._replay(batch, "feed", 1)
        return batch.hidden[: len(rows)].clone()

    @torch.inference_mode()
    def write(self, drafts: Sequence[Draft], steps: int) -> None:
        """As EagerRunner.write; one look at the device behind `steps` replays."""
        eos = self.model.tokens.eos
        writing = [d for d in drafts if not d.done(eos)]
        for start in range(0, len(writing), BUCKETS[-1]):
            part = writing[start : start + BUCKETS[-1]]
            with self.clock("write", passes=max(min(steps, d.limit - len(d.tokens)) for d in part)):
                self._write(part, steps)

    def _write(self, drafts: Sequence[Draft], steps: int) -> None:
        rows = [d.row for d in drafts]
        counts = [min(steps, d.limit - len(d.tokens)) for d in drafts]
        batch = self._batch(len(rows))
        batch.fill(rows, self._lengths(rows), counts)
        batch.tokens[: len(rows)] = torch.tensor([d.tokens[-1] for d in drafts], device=self.cache.device)
        if self.sampling.temperature:
            numbers = [[uniform(d.seed, len(d.tokens) + i) for i in range(steps)] for d in drafts]
            batch.numbers[: len(rows), :steps] = torch.tensor(numbers, dtype=torch.float64, device=self.cache.device)
        self.cache.reserve(rows, counts)
        for _ in range(max(counts)):
            self._replay(batch, "write", 1)
        for draft, written in zip(drafts, batch.written[: len(rows), : max(counts)].tolist(), strict=True):
            draft.tokens.extend(t for t in written if t >= 0)

    def _lengths(self, rows: Sequence[int]) -> list[int]:
        lengths = self.cache.layout.lengths
        return [int(lengths[r]) for r in rows]

    def _batch(self, rows: int) -> StaticBatch:
        size = next(b for b in BUCKETS if b >= rows)
        if size not in self.batches:
            self.batches[size] = StaticBatch(self.model, self.cache, size, self.spare, self.sampling, self.steps)
        return self.batches[size]

    def _replay(self, batch: StaticBatch, kind: str, count: int) -> None:
        """`count` passes of a kind, by their graph; captured on first use, run launch by launch where that fails."""
        key = (len(batch.rows), kind, count)
        if key not in self.graphs:
            one = getattr(batch, kind)

            def passes() -> None:
                for _ in range(count):
                    one()

            self.graphs[key] = passes if self.pool is None else self._capture(batch, passes)
        self.graphs[key]()

    def _capture(self, batch: StaticBatch, passes: Callable[[], None]) -> Callable[[], None]:
        state = (batch.remaining, batch.step)
        saved = [t.clone() for t in state]
        batch.remaining.zero_()  # a warm-up of inactive rows changes nothing but the spare slot
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                passes()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            batch.step.zero_()
            with torch.cuda.graph(graph, pool=self.pool):
                passes()
            return graph.replay
        except RuntimeError as error:
            self.trouble = f"capture failed, passes run launch by launch: {str(error).splitlines()[0]}"
            return passes
        finally:
            for tensor, value in zip(state, saved, strict=True):
                tensor.copy_(value)
