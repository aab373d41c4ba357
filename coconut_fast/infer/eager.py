"""The eager runner: any Hugging Face model, any device, in plain PyTorch calls over the ragged attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from coconut_fast import ops
from coconut_fast.infer.decode import ActiveAnswer, choose, decode, token_passes
from coconut_fast.infer.linears import fast_linears, plain_linears
from coconut_fast.infer.prefill import PREFILL_TOKENS, prefill
from coconut_fast.infer.prompts import Prompt
from coconut_fast.infer.sampling import Sampling
from coconut_fast.infer.stats import Clock
from coconut_fast.infer.think import think
from coconut_fast.model.batch import collate
from coconut_fast.model.cache import KVCache
from coconut_fast.model.coconut import Coconut
from coconut_fast.model.parallel import refine


class EagerRunner:
    """Prefills prompts and decodes answers over one cache. The engine (infer/engine.py) schedules them."""

    name = "eager"
    bytes_per_pass: tuple[int, int] | None = None  # weights read by a latent pass, by a token pass; None: not known
    measure_bandwidth: Callable[[], float] | None = None  # the most bytes a second that a pass could read
    max_prefill_tokens: int | None = PREFILL_TOKENS  # prompt tokens per call; None: the runner splits them itself
    reason = ""  # what to report about the passes besides the choice of runner
    fallback_reason = ""  # why the passes did not run as intended, if they did not

    def __init__(self, model: Coconut, *, num_slots: int, max_rows: int, max_length: int, sampling: Sampling) -> None:
        self.model = model
        self.sampling = sampling
        self.clock = Clock(model.device)
        self.linears = plain_linears(model)
        self.widened = self.linears if ops.is_widened(model.dtype) else []  # of these, those that prefill replaces
        self.cache = KVCache(
            model.num_layers, num_slots=num_slots, max_rows=max_rows, max_length=max_length, device=model.device
        )

    def prefill_and_think(
        self, rows: Sequence[int], prompts: Sequence[Prompt], thoughts: list[list[torch.Tensor]] | None
    ) -> torch.Tensor:
        """Prefills each prompt and thinks its thoughts -> hidden state of its last position, (B, D).

        The last thought of a piece is fed in the same pass as the tokens after it, so k thoughts cost k passes.
        """
        last_BD = None
        for r in range(max(len(p.pieces) for p in prompts)):
            members = [i for i, p in enumerate(prompts) if r < len(p.pieces)]
            index = torch.tensor(members, device=self.model.device)
            pieces = [prompts[i].pieces[r] for i in members]
            member_rows = [rows[i] for i in members]
            kept = [thoughts[i] for i in members] if thoughts is not None else None
            fed_BD = None if last_BD is None else last_BD[index]
            if fed_BD is not None and kept is not None:
                for sink, thought_D in zip(kept, fed_BD, strict=True):
                    sink.append(thought_D)
            with self.clock("prefill" if fed_BD is None else "think"), fast_linears(self.widened, "prompts"):
                hidden_BD = prefill(self.model, self.cache, member_rows, [p.tokens for p in pieces], fed_BD)
            more = [max(p.thoughts - 1, 0) for p in pieces]
            with self.clock("think", passes=max(more)), fast_linears(self.linears):
                hidden_BD = think(self.model, self.cache, member_rows, hidden_BD, more, kept)
            last_BD = hidden_BD if last_BD is None else last_BD.index_copy(0, index, hidden_BD)
        assert last_BD is not None
        return last_BD

    def first_tokens(self, hidden_BD: torch.Tensor, answers: Sequence[ActiveAnswer]) -> None:
        """Chooses the first token of each answer from its prompt's last hidden state."""
        with self.clock("decode", passes=0), fast_linears(self.linears):
            choose(self.model, hidden_BD, answers, self.sampling)

    def decode(self, answers: Sequence[ActiveAnswer], steps: int) -> None:
        """Decodes up to `steps` more tokens of each answer."""
        before = [len(a.tokens) for a in answers]
        with self.clock("decode", passes=0), fast_linears(self.linears):
            decode(self.model, self.cache, answers, steps, self.sampling)
        self.clock.passes["decode"] += token_passes(answers, before)

    def release(self) -> None:
        """Called when all rows are free at the end of a call; runner_cache.py keeps some runners for the next call."""


class ParallelRunner(EagerRunner):
    """For a model that was trained to refine its thoughts in parallel rounds (model/parallel.py)."""

    name = "parallel"

    @torch.inference_mode()
    def prefill_and_think(
        self, rows: Sequence[int], prompts: Sequence[Prompt], thoughts: list[list[torch.Tensor]] | None
    ) -> torch.Tensor:
        """As EagerRunner.prefill_and_think; a thought is the state at the position before it after the last round."""
        thought = self.model.tokens.thought
        batch = collate([p.ids for p in prompts], thought).to(self.model.device)
        rounds = self.model.settings.parallel_rounds or 0
        with self.clock("think", passes=rounds), fast_linears(self.widened, "prompts"):
            hidden, _ = refine(self.model, batch, self.cache, rows)
        padded_BWD = batch.padded(torch.cat(hidden))
        if thoughts is not None:
            for sink, prompt, hidden_WD in zip(thoughts, prompts, padded_BWD, strict=True):
                sink.extend(hidden_WD[t - 1] for t, token in enumerate(prompt.ids) if token == thought)
        ends_B = torch.tensor([len(p.ids) - 1 for p in prompts], device=self.model.device)
        return padded_BWD[torch.arange(len(rows), device=self.model.device), ends_B]
