"""The graph runner: the chain of thoughts as one CUDA graph, and decoding as graphed steps.

The host fills `StaticPrompts` or a `StaticBatch` (infer/passes.py), reserves pages for what the passes will append,
replays, and continues without waiting: each graph uses what the one before left on the device. It synchronises once, to
read the results after the last replay: end-of-text is detected on the device, and a row that reached it stays inactive
until then. `choose_passes` decides how passes are implemented. A shape is captured on first use and replayed from then
on, in later `generate` calls too (infer/runner_cache.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial

import torch

from coconut_fast.infer import fused, persistent
from coconut_fast.infer.capture import capture_graph, capture_stream, first_line
from coconut_fast.infer.decode import DECODE_STEPS, ActiveAnswer
from coconut_fast.infer.eager import EagerRunner
from coconut_fast.infer.passes import BUCKETS, HuggingFacePasses, Passes, StaticBatch, StaticPrompts
from coconut_fast.infer.prefill import PREFILL_TOKENS
from coconut_fast.infer.prompts import Prompt
from coconut_fast.infer.sampling import Sampling, uniform
from coconut_fast.infer.stats import copy_bandwidth
from coconut_fast.model.cache import PAGE_SIZE, KVCache
from coconut_fast.model.coconut import Coconut

LONGEST_CHAIN = 16  # most passes in one graph; a longer chain takes several replays


def choose_passes(model: Coconut, cache: KVCache, sampling: Sampling) -> Passes:
    """The implementation of this model's passes; nothing else decides it."""
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
        reason = f"no memory to pack the weights: {first_line(error)}"
    return HuggingFacePasses(model, cache, sampling, reason)


def prompt_sizes(tokens: int, rows: int, longest: int) -> tuple[int, int, int]:
    """Sizes of the StaticPrompts for these numbers: up to twice the tokens (beyond 1,024 up to 1.5 times), up to four
    times the rows.

    The longest row sets the grid of attention, where a program without a query costs little but is not free; it is at
    least 256, or all the tokens where they are fewer.
    """
    size = 16
    while size < tokens:
        size = size * 3 // 2 if size >= 1024 and size & (size - 1) == 0 else 1 << size.bit_length()
    return size, next(b for b in (1, 4, 16, 64, 256) if b >= rows), min(size, max(256, 1 << (longest - 1).bit_length()))


class GraphRunner(EagerRunner):
    """Prefills, thinks and decodes by replay. Does not keep the model alive, since it may outlive a call.

    captures: how often something was captured.
    """

    name = "graph"
    max_prefill_tokens = None

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
            self.fallback_reason = self.reason  # no memory for the fused passes
        if isinstance(self.passes, fused.FusedPasses):
            self.bytes_per_pass = self.passes.bytes_per_pass
            self.measure_bandwidth = partial(copy_bandwidth, model.device)
        self.dim = model.hf.get_input_embeddings().weight.shape[1]
        self.dtype = torch.promote_types(model.dtype, torch.float32)  # of hidden states
        self.batches: dict[int, StaticBatch] = {}
        self.prompts: dict[tuple[int, int, int], StaticPrompts] = {}
        self.graphs: dict[tuple[object, str, tuple[int, ...]], Callable[[], None]] = {}
        # Answers whose first token is still to be chosen, and their last hidden states.
        self.awaiting_first: tuple[torch.Tensor, Sequence[ActiveAnswer]] | None = None
        self.resident: list[ActiveAnswer] = []  # in the static batch since the last decode, if nothing else used it
        self.captures = 0
        # On other devices there is nothing to capture, and prompts are not padded to buckets.
        self.bucketed = model.device.type == "cuda"
        self.pool = torch.cuda.graph_pool_handle() if self.bucketed else None

    @property
    def model(self) -> Coconut:  # type: ignore[override]
        model = self._model()
        assert model is not None, "the model is gone, and its runner runs"
        return model

    @model.setter
    def model(self, model: Coconut) -> None:
        self._model = weakref.ref(model)

    def refresh(self) -> None:
        """Picks up weights written in place since the last call; a replay, since it takes up to a launch per matrix."""
        key = ((), "refresh", ())
        if not isinstance(self.passes, fused.FusedPasses):
            return
        if key not in self.graphs:
            with capture_stream(self.cache.device) as stream:
                self.passes.refresh()
                self.graphs[key] = self._capture(self.passes.refresh, stream)
            self.captures += 1
        self.graphs[key]()

    @torch.inference_mode()
    def prefill_and_think(
        self, rows: Sequence[int], prompts: Sequence[Prompt], thoughts: list[list[torch.Tensor]] | None
    ) -> torch.Tensor:
        """As EagerRunner's, in at least fp32; one token after the thoughts, the usual end of a prompt, is a `feed`."""
        if len(rows) > BUCKETS[-1]:
            parts = [slice(start, start + BUCKETS[-1]) for start in range(0, len(rows), BUCKETS[-1])]
            return torch.cat(
                [self.prefill_and_think(rows[p], prompts[p], None if thoughts is None else thoughts[p]) for p in parts]
            )
        batch, self.resident = self.batch_for(len(rows)), []
        with self.clock("prefill"):
            self._prefill(batch, range(len(rows)), rows, [p.pieces[0].tokens for p in prompts])
        for r in range(max(len(p.pieces) for p in prompts) - 1):
            counts = [p.pieces[r].thoughts if r < len(p.pieces) else 0 for p in prompts]
            tails = [p.pieces[r + 1].tokens if r + 1 < len(p.pieces) else () for p in prompts]
            if max(map(len, tails)) <= 1:
                self._think(batch, rows, counts, tails, thoughts)
                continue
            self._think(batch, rows, counts, [()] * len(rows), thoughts)
            members = [i for i, tail in enumerate(tails) if tail]
            with self.clock("prefill"):
                self._prefill(batch, members, [rows[i] for i in members], [tails[i] for i in members])
        return batch.hidden[: len(rows)].clone()

    def _prefill(
        self, batch: StaticBatch, into: Sequence[int], rows: Sequence[int], tokens: Sequence[Sequence[int]]
    ) -> None:
        """Prefills `tokens[i]` at the end of `rows[i]`; the last hidden state goes to row `into[i]` of the batch."""
        start = 0
        while start < len(rows):
            stop, total = start + 1, len(tokens[start])
            while stop < len(rows) and total + len(tokens[stop]) <= PREFILL_TOKENS:
                total += len(tokens[stop])
                stop += 1
            part = slice(start, stop)
            counts = [len(t) for t in tokens[part]]
            slots = self.cache.reserve(rows[part], counts)
            size = (total, len(counts), max(counts))
            graphed = self.bucketed and total <= self.passes.graphed_tokens
            static = self._prompts_for(*size) if graphed else self._static_prompts(size)
            static.fill(rows[part], tokens[part], self._lengths(rows[part]), slots, into[part])
            if graphed:
                self.replay(static, "prefill")
            else:
                self._run(static, "prefill")
            batch.hidden.index_copy_(0, static.into[: len(counts)], static.hidden[: len(counts)])
            start = stop

    def _think(
        self,
        batch: StaticBatch,
        rows: Sequence[int],
        counts: Sequence[int],
        tails: Sequence[tuple[int, ...]],
        thoughts: list[list[torch.Tensor]] | None,
    ) -> None:
        """Thinks each row's `counts` thoughts, then feeds its token in `tails`, if any; states stay in the batch."""
        batch.fill(rows, self._lengths(rows), counts, [tail[0] if tail else None for tail in tails])
        self.cache.reserve(rows, [count + len(tail) for count, tail in zip(counts, tails, strict=True)])
        longest = LONGEST_CHAIN if thoughts is None else 1  # thoughts to keep are copied before each pass
        done = 0
        with self.clock("think", passes=max(counts)):
            while done < max(counts):
                if thoughts is not None:
                    fed_BD = batch.hidden[: len(rows)].to(self.model.dtype, copy=True)
                    for sink, count, thought_D in zip(thoughts, counts, fed_BD, strict=True):
                        sink.extend([thought_D] if done < count else [])
                chain = min(max(counts) - done, longest)
                self.replay(batch, "think", chain)
                done += chain
        if any(tails):
            with self.clock("prefill"):
                self.replay(batch, "feed")

    def first_tokens(self, hidden_BD: torch.Tensor, answers: Sequence[ActiveAnswer]) -> None:
        """Leaves the first tokens to the next `decode`, to which these answers must be passed last."""
        self.awaiting_first = hidden_BD, answers

    @torch.inference_mode()
    def decode(self, answers: Sequence[ActiveAnswer], steps: int) -> None:
        """As EagerRunner.decode, with one host sync after `steps` replays; also chooses first tokens that are due."""
        assert steps <= DECODE_STEPS, f"{steps} tokens between two looks, the static batch holds {DECODE_STEPS}"
        eos = self.model.tokens.eos
        hidden_BD, fresh = self.awaiting_first or (None, ())
        self.awaiting_first = None
        writing = [a for a in answers if not a.done(eos)]
        old = len(writing) - len(fresh)
        assert all(a is b for a, b in zip(writing[old:], fresh, strict=True)), "first tokens of other answers are due"
        for start in range(0, len(writing), BUCKETS[-1]):
            part = slice(start, start + BUCKETS[-1])
            states_BD = None if hidden_BD is None else hidden_BD[max(start - old, 0) : max(part.stop - old, 0)]
            self._decode(writing[part], steps, states_BD if states_BD is not None and len(states_BD) else None)

    def _decode(self, answers: list[ActiveAnswer], steps: int, states_BD: torch.Tensor | None) -> None:
        """states_BD: the last hidden states of the last answers, those without a token yet."""
        fresh = 0 if states_BD is None else len(states_BD)
        old = len(answers) - fresh
        begun = int(fresh > 0)
        rows, batch = [a.row for a in answers], self.batch_for(len(answers))
        left = [a.limit - len(a.tokens) - (i >= old) for i, a in enumerate(answers)]  # after the first token
        counts = [min(steps, n) for n in left]
        if fresh or list(map(id, answers)) != list(map(id, self.resident)):
            last = [a.tokens[-1] if a.tokens else 0 for a in answers]
            batch.fill(rows, self._lengths(rows), left, last, fresh)
            if states_BD is not None:
                batch.hidden[old : len(answers)] = states_BD
        else:
            batch.step.zero_()  # all else is still on the device from the last call
        if self.sampling.temperature:
            written = [len(a.tokens) - (begun and a.tokens != []) for a in answers]
            numbers = torch.from_numpy(uniform([a.seed for a in answers], written, steps + begun))
            batch.numbers[: len(rows), : steps + begun] = numbers.to(self.cache.device)
        self.cache.reserve(rows, counts)
        with self.clock("decode", passes=max(counts)):
            if begun:
                self.replay(batch, "begin")
            for _ in range(max(counts)):
                self.replay(batch, "decode")
        written = batch.written.cpu()[: len(rows), : max(counts) + begun].tolist()
        for answer, tokens in zip(answers, written, strict=True):
            answer.tokens.extend(t for t in tokens if t >= 0)
        self.resident = answers

    def batch_for(self, rows: int) -> StaticBatch:
        """The static batch of the smallest bucket that holds this many rows."""
        size = next(b for b in BUCKETS if b >= rows)
        if size not in self.batches:
            self.batches[size] = StaticBatch(size, self.dim, DECODE_STEPS + 1, self.dtype, self.cache.device)
        return self.batches[size]

    def _prompts_for(self, tokens: int, rows: int, longest: int) -> StaticPrompts:
        """The static prompts of the smallest buckets that hold these numbers."""
        size = prompt_sizes(tokens, rows, longest)
        if size not in self.prompts:
            self.prompts[size] = self._static_prompts(size)
        return self.prompts[size]

    def _static_prompts(self, size: tuple[int, int, int]) -> StaticPrompts:
        return StaticPrompts(size, self.dim, self.dtype, self.cache.device)

    def replay(self, batch: StaticBatch | StaticPrompts, kind: str, *count: int) -> None:
        """Runs `count` passes of a kind by replaying their graph, which is captured on first use."""
        key = (batch.size, kind, count)
        if key not in self.graphs:
            with batch.at_rest(), capture_stream(self.cache.device) as stream:
                self._run(batch, kind, *count)  # no active row: compiles kernels and changes nothing else
                self.graphs[key] = self._capture(partial(getattr(self.passes, kind), batch, *count), stream)
            self.captures += 1
        self.graphs[key]()

    def _lengths(self, rows: Sequence[int]) -> list[int]:
        lengths = self.cache.layout.lengths
        return [int(lengths[r]) for r in rows]

    def _run(self, batch: StaticBatch | StaticPrompts, kind: str, *count: int) -> None:
        """Runs the passes without a graph.

        If fused kernels fail, falls back to Hugging Face's body, and stats say so; out-of-memory errors are raised.
        """
        before = batch.staged.block.clone()  # a pass that fails may have advanced positions
        try:
            getattr(self.passes, kind)(batch, *count)
            return
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if isinstance(self.passes, HuggingFacePasses):
                raise
            why = f"fused kernels failed: {first_line(error)}"
        self.passes = HuggingFacePasses(self.model, self.cache, self.sampling, why)
        self.fallback_reason = self.passes.reason
        self.graphs.clear()
        batch.staged.block.copy_(before)
        self._run(batch, kind, *count)

    def _capture(self, passes: Callable[[], None], stream: torch.cuda.Stream | None) -> Callable[[], None]:
        """A callable that replays the passes, or `passes` itself, which runs eagerly, where they cannot be captured."""
        if stream is None:
            return passes
        try:
            return capture_graph(passes, stream, self.pool)
        except RuntimeError as error:
            self.fallback_reason = f"capture failed, passes run launch by launch: {first_line(error)}"
            return passes
