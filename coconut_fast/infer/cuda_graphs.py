"""The graph runner: the chain of thoughts as one CUDA graph, and decoding as graphed steps.

The host fills a `StaticBatch` (infer/passes.py), reserves pages for what the passes will append, replays, and looks at
the results once, behind the last replay: end-of-text is found on the device, and a row that met it stands still until
then. `choose_passes` says what a pass is made of. First use of a shape captures, later uses replay, in later `generate`
calls too (infer/keep.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial

import torch

from coconut_fast.infer import fused, persistent
from coconut_fast.infer.capture import aside, captured
from coconut_fast.infer.decode import WRITE_STEPS, Draft, Sampling
from coconut_fast.infer.eager import EagerRunner
from coconut_fast.infer.passes import BUCKETS, HuggingFacePasses, Passes, StaticBatch
from coconut_fast.infer.prefill import prefill
from coconut_fast.infer.prompts import Prompt
from coconut_fast.infer.sampling import uniform
from coconut_fast.infer.stats import copy_bandwidth
from coconut_fast.model.cache import PAGE_SIZE, KVCache
from coconut_fast.model.coconut import Coconut

LONGEST_CHAIN = 16  # passes of one graph; a longer chain replays it


def choose_passes(model: Coconut, cache: KVCache, sampling: Sampling) -> Passes:
    """What the passes of this model are made of: the one place that decides it."""
    reason = fused.reason_not(model)
    if reason is not None:
        return HuggingFacePasses(model, cache, sampling, reason)
    try:
        if model.device.type == "cuda":
            faster, _ = persistent.enabled(torch.cuda.get_device_name(model.device))
            if faster and persistent.reason_not(model) is None:
                return persistent.PersistentChain(model, cache, sampling)
        return fused.FusedPasses(model, cache, sampling)
    except torch.OutOfMemoryError as error:
        reason = f"no memory to pack the weights: {_first_line(error)}"
    return HuggingFacePasses(model, cache, sampling, reason)


class GraphRunner(EagerRunner):
    """Prefill as the eager runner does it; thoughts and tokens by replay. Keeps no model alive: it may outlive a call.

    captures: how often something was captured.
    """

    name = "graph"

    def __init__(self, model: Coconut, *, num_slots: int, max_rows: int, max_length: int, sampling: Sampling) -> None:
        super().__init__(
            model,
            num_slots=num_slots + PAGE_SIZE,
            max_rows=max_rows + 1,
            max_length=max_length,
            sampling=sampling,
        )
        self.passes = choose_passes(model, self.cache, sampling)
        self.reason = self.passes.reason
        if isinstance(self.passes, HuggingFacePasses) and fused.reason_not(model) is None:
            self.trouble = self.reason  # there was no memory for better ones
        if isinstance(self.passes, fused.FusedPasses):
            self.bytes_per_pass = self.passes.bytes_per_pass
            self.measure_bandwidth = partial(copy_bandwidth, model.device)
        self.batches: dict[int, StaticBatch] = {}
        self.graphs: dict[tuple[int, str, tuple[int, ...]], Callable[[], None]] = {}
        self.captures = 0
        self.pool = torch.cuda.graph_pool_handle() if model.device.type == "cuda" else None

    @property
    def model(self) -> Coconut:  # type: ignore[override]
        model = self._model()
        assert model is not None, "the model is gone, and its runner runs"
        return model

    @model.setter
    def model(self, model: Coconut) -> None:
        self._model = weakref.ref(model)

    @torch.inference_mode()
    def read(
        self, rows: Sequence[int], prompts: Sequence[Prompt], thoughts: list[list[torch.Tensor]] | None
    ) -> torch.Tensor:
        """As EagerRunner.read, but thoughts replay; so does a single token behind them, as prompts usually end."""
        if len(rows) > BUCKETS[-1]:
            parts = [slice(start, start + BUCKETS[-1]) for start in range(0, len(rows), BUCKETS[-1])]
            return torch.cat([self.read(rows[p], prompts[p], None if thoughts is None else thoughts[p]) for p in parts])
        with self.clock("prefill"):
            hidden_BD = prefill(self.model, self.cache, rows, [p.pieces[0].tokens for p in prompts])
        for r in range(max(len(p.pieces) for p in prompts) - 1):
            counts = [p.pieces[r].thoughts if r < len(p.pieces) else 0 for p in prompts]
            tails = [p.pieces[r + 1].tokens if r + 1 < len(p.pieces) else () for p in prompts]
            if max(map(len, tails)) <= 1:
                hidden_BD = self._think(rows, hidden_BD, counts, tails, thoughts)
                continue
            hidden_BD = self._think(rows, hidden_BD, counts, [()] * len(rows), thoughts)
            members = [i for i, tail in enumerate(tails) if tail]
            with self.clock("prefill"):
                ends_BD = prefill(self.model, self.cache, [rows[i] for i in members], [tails[i] for i in members])
                hidden_BD[torch.tensor(members, device=self.cache.device)] = ends_BD
        return hidden_BD

    def _think(
        self,
        rows: Sequence[int],
        hidden_BD: torch.Tensor,
        counts: Sequence[int],
        tails: Sequence[tuple[int, ...]],
        thoughts: list[list[torch.Tensor]] | None,
    ) -> torch.Tensor:
        """Each row's `counts` thoughts, then its token in `tails`, if it has one -> its last hidden state, (B, D)."""
        batch, here = self.batch_for(len(rows)), slice(len(rows))
        batch.fill(rows, self._lengths(rows), counts)
        batch.hidden[here] = hidden_BD
        self.cache.reserve(rows, [count + len(tail) for count, tail in zip(counts, tails, strict=True)])
        longest = LONGEST_CHAIN if thoughts is None else 1  # whoever wants the thoughts has them one by one
        done = 0
        with self.clock("think", passes=max(counts)):
            while done < max(counts):
                if thoughts is not None:
                    fed_BD = batch.hidden[here].to(hidden_BD.dtype, copy=True)
                    for sink, count, thought_D in zip(thoughts, counts, fed_BD, strict=True):
                        sink.extend([thought_D] if done < count else [])
                chain = min(max(counts) - done, longest)
                self.replay(batch, "think", chain)
                done += chain
        if any(tails):
            given = [[len(tail) for tail in tails], [tail[0] if tail else 0 for tail in tails]]
            batch.remaining[here], batch.tokens[here] = torch.tensor(given, device=self.cache.device)
            with self.clock("prefill"):
                self.replay(batch, "feed")
        return batch.hidden[here].to(hidden_BD.dtype, copy=True)

    @torch.inference_mode()
    def write(self, drafts: Sequence[Draft], steps: int) -> None:
        """As EagerRunner.write; one look at the device behind `steps` replays."""
        assert steps <= WRITE_STEPS, f"{steps} tokens between two looks, the static batch holds {WRITE_STEPS}"
        eos = self.model.tokens.eos
        writing = [d for d in drafts if not d.done(eos)]
        for start in range(0, len(writing), BUCKETS[-1]):
            part = writing[start : start + BUCKETS[-1]]
            with self.clock("write", passes=max(min(steps, d.limit - len(d.tokens)) for d in part)):
                self._write(part, steps)

    def batch_for(self, rows: int) -> StaticBatch:
        """The static batch of the smallest bucket that holds so many rows."""
        size = next(b for b in BUCKETS if b >= rows)
        if size not in self.batches:
            dim = self.model.hf.get_input_embeddings().weight.shape[1]
            dtype = torch.promote_types(self.model.dtype, torch.float32)
            self.batches[size] = StaticBatch(size, dim, WRITE_STEPS, dtype, self.cache.device)
        return self.batches[size]

    def replay(self, batch: StaticBatch, kind: str, *count: int) -> None:
        """`count` passes of a kind, by their graph, which first use captures."""
        key = (batch.size, kind, count)
        if key not in self.graphs:
            with batch.at_rest(), aside(self.cache.device) as stream:
                self._warm_up(batch, kind, *count)
                self.graphs[key] = self._capture(partial(getattr(self.passes, kind), batch, *count), stream)
            self.captures += 1
        self.graphs[key]()

    def _write(self, drafts: Sequence[Draft], steps: int) -> None:
        rows = [d.row for d in drafts]
        counts = [min(steps, d.limit - len(d.tokens)) for d in drafts]
        batch = self.batch_for(len(rows))
        batch.fill(rows, self._lengths(rows), counts)
        batch.tokens[: len(rows)] = torch.tensor([d.tokens[-1] for d in drafts], device=self.cache.device)
        if self.sampling.temperature:
            numbers = [[uniform(d.seed, len(d.tokens) + i) for i in range(steps)] for d in drafts]
            batch.numbers[: len(rows), :steps] = torch.tensor(numbers, dtype=torch.float64, device=self.cache.device)
        self.cache.reserve(rows, counts)
        for _ in range(max(counts)):
            self.replay(batch, "write")
        for draft, written in zip(drafts, batch.written[: len(rows), : max(counts)].tolist(), strict=True):
            draft.tokens.extend(t for t in written if t >= 0)

    def _lengths(self, rows: Sequence[int]) -> list[int]:
        lengths = self.cache.layout.lengths
        return [int(lengths[r]) for r in rows]

    def _warm_up(self, batch: StaticBatch, kind: str, *count: int) -> None:
        """Runs the passes once without an active row, which compiles kernels and changes nothing that is read.

        Fused kernels that fail here give way to Hugging Face's body, and stats say so; want of memory is the caller's.
        """
        try:
            getattr(self.passes, kind)(batch, *count)
            return
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if isinstance(self.passes, HuggingFacePasses):
                raise
            why = f"fused kernels failed: {_first_line(error)}"
        self.passes = HuggingFacePasses(self.model, self.cache, self.sampling, why)
        self.trouble = self.passes.reason
        self.graphs.clear()
        self._warm_up(batch, kind, *count)

    def _capture(self, passes: Callable[[], None], stream: torch.cuda.Stream | None) -> Callable[[], None]:
        """What replays the passes; they themselves, run launch by launch, where they cannot be captured."""
        if stream is None:
            return passes
        try:
            return captured(passes, stream, self.pool)
        except RuntimeError as error:
            self.trouble = f"capture failed, passes run launch by launch: {_first_line(error)}"
            return passes


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
