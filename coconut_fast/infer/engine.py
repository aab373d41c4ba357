"""generate(): continuous batching. One running batch; finished rows make room for waiting prompts."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral, Real

import torch
from tqdm import tqdm

from coconut_fast import ops
from coconut_fast.infer import machine, runner_cache
from coconut_fast.infer.decode import DECODE_STEPS, ActiveAnswer
from coconut_fast.infer.eager import EagerRunner, ParallelRunner
from coconut_fast.infer.native import NativeRunner, packed, reason_not
from coconut_fast.infer.prompts import Prompt, read_prompts, whole
from coconut_fast.infer.sampling import Sampling
from coconut_fast.infer.stats import GenerateStats
from coconut_fast.model.cache import PAGE_SIZE
from coconut_fast.model.coconut import Coconut
from coconut_fast.model.plan import modules_of

BATCH_SIZE = {"cpu": 32, "cuda": 256}
WEIGHTS = ("fp32", "bf16", "int8")
OnAnswer = Callable[[int, str | None, list[int], int], object]


@dataclass
class GenerateOutput:
    """One entry per answer; with num_samples = n the n answers to a prompt are adjacent.

    An answer that was unfinished when the user interrupted is None (`stats.interrupted` says so).
    """

    texts: list[str | None]  # without special tokens; None for models without a tokenizer
    token_ids: list[list[int] | None]  # without end-of-text
    num_thoughts: list[int]
    # (k, D) each: the hidden states fed back (with parallel rounds, those after the last one), one tensor for all
    # samples of a prompt; None unless asked for.
    thoughts: list[torch.Tensor | None] | None = field(repr=False)
    stats: GenerateStats = field(repr=False)
    # As the model read it, with thoughts, markers and anything else that frames a question: the answer's tokens follow.
    prompt_ids: list[list[int]] = field(default_factory=list, repr=False)


def generate(
    model: Coconut | str | os.PathLike[str],
    prompts: str | Sequence[str] | Sequence[Sequence[int]],
    *,
    num_thoughts: int | Sequence[int] | None = None,
    max_new_tokens: int | Sequence[int] = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    num_samples: int = 1,
    return_thoughts: bool = False,
    batch_size: int | None = None,
    weights: str | None = None,
    on_answer: OnAnswer | None = None,
) -> GenerateOutput:
    """Answers to prompts, each after its thoughts (arXiv 2412.06769, section 3, "Inference").

    model: a Coconut model, or what `coconut_fast.load` takes. prompts: a string, strings, or lists of token ids.
    num_thoughts: for all, one per prompt, or None: the prompt's own `<|latent|>` tokens; a string without any gets the
    thoughts or pauses its checkpoint was trained with, or none, with a warning, if the checkpoint does not say
    (official ones). max_new_tokens: the longest answer, for all or one per prompt. temperature 0 is greedy; otherwise
    every answer has its own random numbers, made from `seed` and its prompt, so it does not depend on the batch or the
    order of prompts. num_samples: answers per prompt, from one prefill and one chain of thoughts; more than one need a
    temperature; with a feedback that draws noise pass the prompt several times instead, and call `torch.manual_seed`.
    return_thoughts: also return the hidden states that were fed back; with parallel rounds, those after the last round,
    which one more round would feed. batch_size: rows at a time; None: 32 on a CPU, 256 on a GPU, or as many as fit into
    its memory. weights: "fp32", "bf16" or "int8", the format of the native chain's weights on a CPU; None: the model's
    own dtype. int8 (a scale per output) takes half the time of bf16 for one row, no less time from 32 rows on, and
    changes answers: measure it with `coconut-fast eval --weights int8`. on_answer: called with i, texts[i],
    token_ids[i] and num_thoughts[i] of the output as soon as this answer is complete; answers complete in any order.

    Any token may be generated, `<|latent|>` too, as by the official code; a later forward would take it for a thought.
    Weight changes between calls are seen, except writes through `.data` or `.detach().numpy()` on the CPU; after
    those call `model.load_state_dict(model.state_dict())`.

    Raises ValueError, before any work, for a prompt that is empty, too long for the model or holds an unknown token
    id, and for arguments out of range. Warns, on a CPU, where hidden states are NaN or infinite. Ctrl-C returns the
    answers finished so far.
    """
    num_samples, top_k = whole("num_samples", num_samples, 1), whole("top_k", top_k, 0)
    batch_size = None if batch_size is None else whole("batch_size", batch_size, 1)
    if not _is_a(Real, temperature) or not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: expected a finite number of at least 0, found {temperature!r}")
    if num_samples > 1 and not temperature:
        raise ValueError(f"num_samples: found {num_samples} at temperature 0, where all answers to a prompt are one")
    if not _is_a(Real, top_p) or not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number above 0 and up to 1, found {top_p!r}")
    if seed is not None and not _is_a(Integral, seed):
        raise ValueError(f"seed: expected an int or None, found {seed!r}")
    if weights not in (None, *WEIGHTS):
        raise ValueError(f"weights: expected {', '.join(WEIGHTS)} or None, found {weights!r}")
    if not isinstance(model, Coconut):
        if not isinstance(model, str | os.PathLike):
            raise ValueError(f"model: found a {type(model).__name__}, expected a Coconut model, a path or a hub id")
        from coconut_fast.model.loading import load

        model = load(model)
    read = read_prompts(model, prompts, num_thoughts, max_new_tokens)
    if seed is None:
        seed = int(torch.randint(2**62, (), device="cpu")) if temperature else 0
    # Below 1e-30 only the likeliest token can be drawn, and 1 / temperature may overflow fp32; above 1e30 all tokens
    # are equally likely, and logits / temperature, whose order top_k needs, may all be 0.
    temperature = min(temperature, 1e30) if temperature > 1e-30 else 0.0
    sampling = Sampling(temperature, min(top_k, 2**31 - 1), top_p)
    engine = Engine(model, read, sampling, seed, num_samples, batch_size, weights, return_thoughts, on_answer)
    in_training = [module for module in modules_of(model) if module.training]
    for module in in_training:
        module.training = False
    try:
        engine.run()
    except KeyboardInterrupt:
        engine.stats.interrupted = True
    finally:
        for module in in_training:
            module.training = True
    return engine.output()


def choose_runner(model: Coconut) -> tuple[Callable[..., EagerRunner | NativeRunner], str]:
    """The runner for this model and device, and why."""
    rounds = model.settings.parallel_rounds
    if rounds is not None:
        return ParallelRunner, f"all thoughts are refined together in {rounds} rounds, as in training"
    if model.device.type == "cuda":
        backend, why = ops.choose("ragged_attention", model.device)
        if backend != "triton":  # plain PyTorch knows no padding tokens and reads lengths on the host
            return EagerRunner, f"no CUDA graphs, since attention runs on {backend}: {why}"
        hook = runner_cache.hooked(model)
        if hook is None:
            # a GraphRunner (infer/cuda_graphs.py): the one left by the model's last call where it still fits
            return runner_cache.acquire, "chains of thoughts and tokens replay as CUDA graphs"
        return EagerRunner, f"no CUDA graphs, which would not call it: {hook}"
    reason = reason_not(model)
    if reason is None and ops.asked() not in (None, "cpu"):
        reason = f"backend {ops.asked()!r} was asked for"
    if reason is None:
        return NativeRunner, "this family has a native chain on the CPU"
    return EagerRunner, f"no native chain: {reason}"


class Engine:
    """The running batch of one `generate` call."""

    def __init__(
        self,
        model: Coconut,
        prompts: list[Prompt],
        sampling: Sampling,
        seed: int,
        num_samples: int,
        batch_size: int | None,
        weights: str | None,
        keep_thoughts: bool,
        on_answer: OnAnswer | None,
    ) -> None:
        self.model = model
        self.prompts = prompts
        self.num_samples = num_samples
        self.keep_thoughts = keep_thoughts
        self.on_answer = on_answer
        self.not_finite = False  # whether a prompt's last state was found to be NaN or infinite
        self.finished: dict[int, list[int]] = {}  # answer number -> its tokens
        self.thoughts: dict[int, torch.Tensor] = {}  # prompt number -> (k, D)
        batch_size, room = _fitted(model, prompts, num_samples, batch_size)
        # Greedy answers need no random numbers, and a seed costs 30 ns a token of its prompt.
        self.seeds = _seeds(prompts, seed, num_samples) if sampling.temperature else [0] * (len(prompts) * num_samples)
        runner, reason = choose_runner(model)
        if runner is not runner_cache.acquire:
            runner_cache.drop(model)  # the model has left the GPU, or may not use its kept runner
        if weights is not None:
            if runner is not NativeRunner:
                raise ValueError(f"weights: found {weights!r}, but only the native chain packs weights; {reason}")
            runner, reason = partial(NativeRunner, native=packed(model, weights)), f"{reason}, {weights} weights"
        self.runner = runner(model, **room, sampling=sampling)
        self.batch_size = batch_size
        self.stats = GenerateStats(self.runner.name, "; ".join(r for r in (reason, self.runner.reason) if r))
        if self.runner.bytes_per_pass is not None:
            self.stats.bytes_per_latent_pass, self.stats.bytes_per_token_pass = self.runner.bytes_per_pass
            self.stats.measure_bandwidth = self.runner.measure_bandwidth

    def run(self) -> None:
        """Prefills prompts while there is room and decodes answers until all are finished."""
        waiting = deque(range(len(self.prompts)))
        active: dict[int, ActiveAnswer] = {}  # answer number -> answer
        with tqdm(total=len(self.prompts) * self.num_samples, desc="generate", unit="answer", delay=2) as bar:
            while waiting or active:
                group = self._next(waiting, self.batch_size - len(active))
                if group:
                    active.update(self._start(group))
                self.runner.decode(list(active.values()), DECODE_STEPS)
                for number in [n for n, a in active.items() if a.done(self.model.tokens.eos)]:
                    answer = active.pop(number)
                    self.runner.cache.free([answer.row])
                    self._finish(number, answer)
                    bar.update()
        self.runner.release()

    def _next(self, waiting: deque[int], room: int) -> list[int]:
        """The prompts to prefill now: as many as there is room for and as one forward takes.

        For graphs, whose passes cost the same for few rows and many, a group waits until a quarter of the batch is
        free: running rows pause while it thinks.
        """
        group: list[int] = []
        tokens, most = 0, self.runner.max_prefill_tokens
        if most is None and room < min(self.batch_size // 4, len(waiting) * self.num_samples):
            return group
        while waiting and room >= self.num_samples:
            tokens += len(self.prompts[waiting[0]].ids)
            if group and most is not None and tokens > most:
                break
            group.append(waiting.popleft())
            room -= self.num_samples
        return group

    def _start(self, group: list[int]) -> dict[int, ActiveAnswer]:
        """Prefills and thinks a group of prompts -> one new answer per sample, by answer number."""
        prompts = [self.prompts[i] for i in group]
        kept: list[list[torch.Tensor]] | None = [[] for _ in group] if self.keep_thoughts else None
        rows = self.runner.cache.alloc(len(group))
        hidden_BD = self.runner.prefill_and_think(rows, prompts, kept)
        if hidden_BD.is_cpu and not self.not_finite and not hidden_BD.isfinite().all():  # on a GPU this would wait
            self.not_finite = True
            warnings.warn("generate: hidden states are NaN or infinite, so that answers mean nothing", stacklevel=4)
        answers = {}
        for n, (i, row) in enumerate(zip(group, rows, strict=True)):
            shared = [row] + [self.runner.cache.fork([row])[0] for _ in range(self.num_samples - 1)]
            for sample, answer_row in enumerate(shared):
                number = i * self.num_samples + sample
                answers[number] = ActiveAnswer(answer_row, self.seeds[number], self.prompts[i].max_new_tokens, [])
            if kept is not None:
                none = torch.zeros(0, hidden_BD.shape[1], dtype=self.model.dtype, device=hidden_BD.device)
                self.thoughts[i] = torch.stack(kept[n]) if kept[n] else none
        self.runner.first_tokens(hidden_BD.repeat_interleave(self.num_samples, 0), list(answers.values()))
        self.stats.prompt_tokens += sum(len(p.ids) - p.num_thoughts for p in prompts)
        self.stats.thoughts += sum(p.num_thoughts for p in prompts)
        return answers

    def _finish(self, number: int, answer: ActiveAnswer) -> None:
        tokens = answer.tokens
        if tokens and tokens[-1] == self.model.tokens.eos:
            tokens = tokens[:-1]
        self.stats.new_tokens += len(answer.tokens)
        self.finished[number] = tokens
        if self.on_answer is not None:
            thoughts = self.prompts[number // self.num_samples].num_thoughts
            self.on_answer(number, self._text(tokens), list(tokens), thoughts)

    def _text(self, tokens: list[int] | None) -> str | None:
        tokenizer = self.model.tokenizer
        return None if tokens is None or tokenizer is None else tokenizer.decode(tokens, skip_special_tokens=True)

    def output(self) -> GenerateOutput:
        """The finished answers, in the order of the prompts."""
        self.stats.take(self.runner.clock)
        if self.runner.fallback_reason:
            self.stats.reason = self.runner.fallback_reason
        answers = [self.finished.get(n) for n in range(len(self.prompts) * self.num_samples)]
        texts = [self._text(ids) for ids in answers]
        counts = [p.num_thoughts for p in self.prompts for _ in range(self.num_samples)]
        thoughts = None
        if self.keep_thoughts:
            thoughts = [self.thoughts.get(i) for i in range(len(self.prompts)) for _ in range(self.num_samples)]
        read = [list(p.ids) for p in self.prompts for _ in range(self.num_samples)]
        return GenerateOutput(texts, answers, counts, thoughts, self.stats, read)


def _is_a(kind: type, value: object) -> bool:
    """Whether a value is such a number; True and False, which Python counts as 1 and 0, are not."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _fitted(
    model: Coconut, prompts: Sequence[Prompt], num_samples: int, batch_size: int | None
) -> tuple[int, dict[str, int]]:
    """The rows at a time, and the cache for them; fewer rows than usual where the number is ours to choose and memory
    is short. ValueError where the cache does not fit into memory."""
    rows = batch_size or BATCH_SIZE.get(model.device.type, 64)
    rows = max(num_samples, min(rows, len(prompts) * num_samples))
    lengths = sorted((len(p.ids) + p.max_new_tokens for p in prompts), reverse=True) or [0]
    room = _room(lengths, num_samples, rows)
    if runner_cache.holds(model, **room):
        return rows, room
    free = machine.free_bytes(model.device) + runner_cache.held_bytes(model)  # a kept cache is reused, or freed first
    # A quarter of the memory is left to the passes.
    while batch_size is None and rows > num_samples and machine.cache_bytes(model, room["num_slots"]) > free * 3 // 4:
        rows -= 1
        room = _room(lengths, num_samples, rows)
    machine.check(model, room["num_slots"], rows, free)
    return rows, room


def _room(lengths: Sequence[int], num_samples: int, batch_size: int) -> dict[str, int]:
    """The cache for any `batch_size` answers at a time, of `num_samples` to each prompt; lengths: what prompts grow to,
    longest first. Whole pages per row, and one more for the page that each sample of a prompt writes by itself."""
    whole, rest = divmod(batch_size, num_samples)
    pages = [-(-n // PAGE_SIZE) + 1 for n in lengths[: whole + 1]]
    num_pages = sum(pages[:whole]) * num_samples + (pages[whole] * rest if rest else 0)
    return {"num_slots": num_pages * PAGE_SIZE, "max_rows": batch_size + 1, "max_length": lengths[0] + PAGE_SIZE}


def _seeds(prompts: Sequence[Prompt], seed: int, num_samples: int) -> list[int]:
    """A seed per answer, from `seed`, the prompt and how often it occurred before, but not from its position."""
    seen: Counter[tuple[int, ...]] = Counter()
    seeds = []
    for prompt in prompts:
        for _ in range(num_samples):
            key = f"{seed}:{seen[prompt.ids]}:{prompt.ids}".encode()
            seeds.append(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little"))
            seen[prompt.ids] += 1
    return seeds
