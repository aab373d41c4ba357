"""The native runner: known model families on a CPU, with packed weights and one C++ call per chain of thoughts.

`NativeModel` packs a model's weights (csrc/cpu/chain.h) and runs rows of a KVCache with them; `NativeRunner` has the
interface of `EagerRunner` on top of it. `reason_not` says why a model cannot have one.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from coconut_fast import ops
from coconut_fast.infer import machine, runner_cache
from coconut_fast.infer.decode import ActiveAnswer, token_passes
from coconut_fast.infer.prefill import PREFILL_TOKENS
from coconut_fast.infer.prompts import Prompt
from coconut_fast.infer.sampling import Sampling
from coconut_fast.infer.stats import Clock
from coconut_fast.model.cache import KVCache
from coconut_fast.model.checks import check_finite
from coconut_fast.model.coconut import Coconut
from coconut_fast.model.feedback import Identity, Pause, Rescale
from coconut_fast.model.plan import ModelPlan, describe, versions

MAX_ROWS = 64  # rows of one C++ call, and prompt tokens of one pass
THOUGHT = -1  # among token ids: feed the row's thought here
FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16"}  # "int8" only on request
_SHAPE = ("layers", "dim", "heads", "kv_heads", "head_dim", "inner", "vocab", "max_positions")
_KIND = ("norm", "eps", "activation", "gated", "rope_scaling")


def reason_not(model: Coconut) -> str | None:
    """Why this model cannot run natively; None where it can."""
    if model.device.type != "cpu":
        return f"the model is on {model.device.type}, the native chain runs on the CPU"
    if model.dtype not in FORMATS:
        return f"the model is {model.dtype}, the native chain takes float32 and bfloat16"
    if type(model.feedback) not in (Identity, Rescale, Pause):
        return f"feedback {type(model.feedback).__name__} is not one of Identity, Rescale, Pause"
    plan = describe(model.hf)
    if isinstance(plan, str):
        return plan
    own_code = runner_cache.hooked(model)
    if own_code:
        return own_code
    try:
        ops.extension()
    except ImportError as error:
        return str(error)
    return None


class NativeModel:
    """A Coconut model's weights, packed for the CPU.

    weights: "fp32", "bf16" or "int8" (default: the model's dtype; int8 is never chosen automatically). threads: default
    `machine.cpus()`. Raises ValueError where `reason_not` has a reason, and for NaN or infinite weights,
    naming the tensor.
    """

    def __init__(self, model: Coconut, *, weights: str | None = None, threads: int | None = None) -> None:
        reason = reason_not(model)
        if reason:
            raise ValueError(f"model: cannot run natively: {reason}")
        self.fingerprint = fingerprint(model)  # first, so that a write by another thread during packing is noticed
        check_finite(model, "model")
        plan = describe(model.hf)
        assert isinstance(plan, ModelPlan)
        self.plan = plan
        self.dtype = model.dtype  # of the cache
        self.weights = weights or FORMATS[model.dtype]
        shape = {name: getattr(plan, name) for name in (*_SHAPE, *_KIND)}
        self.chain = ops.extension().NativeChain(shape, self.weights, threads or machine.cpus(), MAX_ROWS)
        layer = None
        for index in range(plan.layers):
            layer = plan.layer(index, into=layer)  # merged matrices in the memory of the layer before
            tensors = {name: _for_chain(t) for name, t in layer.named().items()}
            self.chain.set_layer(index, tensors, plan.scaling[index], plan.window[index])
        ends = {"embed": plan.embed, "head": plan.head, "final_norm": plan.final_norm}
        optional = ("positions", "inv_freq", "final_norm_bias", "head_bias")
        ends |= {name: t for name in optional if (t := getattr(plan, name)) is not None}
        # The chain reads embeddings in place: this keeps them alive, even if a parameter is given other storage.
        self.ends = {name: _for_chain(t.float() if name == "inv_freq" else t) for name, t in ends.items()}
        self.chain.set_embeddings(self.ends)
        if isinstance(model.feedback, Rescale):
            self.chain.set_feedback(float(model.feedback.mean_norm), None)
        elif isinstance(model.feedback, Pause):
            self.chain.set_feedback(0.0, model.feedback.embedding.detach().float().contiguous())

    def make_cache(self, *, num_slots: int, max_rows: int, max_length: int | None = None) -> KVCache:
        """A cache with storage for every layer."""
        cache = KVCache(self.plan.layers, num_slots=num_slots, max_rows=max_rows, max_length=max_length)
        example = torch.empty(0, self.plan.kv_heads, self.plan.head_dim, dtype=self.dtype, device="cpu")
        for layer in range(self.plan.layers):
            cache.storage(layer, example, example)
        return cache

    def prefill(
        self, cache: KVCache, rows: Sequence[int], ids: Sequence[Sequence[int]], hidden_BD: torch.Tensor
    ) -> None:
        """Runs `ids[i]` at the end of `rows[i]`; hidden_BD becomes the state of each row's last position.

        THOUGHT among the ids feeds the row's hidden state there. hidden_BD: fp32, contiguous, written in place.
        """
        counts = [len(row) for row in ids]
        flat = _int32([i for row in ids for i in row])
        with _reserved(cache, rows, counts) as starts:
            self.chain.prefill(
                cache.layout, cache.keys, cache.values, _int32(rows), starts, flat, _int32(counts), hidden_BD
            )

    def think(
        self,
        cache: KVCache,
        rows: Sequence[int],
        counts: Sequence[int],
        hidden_BD: torch.Tensor,
        keep: bool = False,
    ) -> torch.Tensor | None:
        """Runs `counts[i]` latent passes of `rows[i]` from hidden_BD, which becomes the state after them, in one call.

        With `keep`, returns the states that were fed back, (sum of counts, D), row by row.
        """
        fed = _states(sum(counts), self.plan.dim) if keep else None
        done = 0
        for part in _parts(len(rows)):
            total = sum(counts[part])
            with _reserved(cache, rows[part], counts[part]) as starts:
                self.chain.think(
                    cache.layout,
                    cache.keys,
                    cache.values,
                    _int32(rows[part]),
                    starts,
                    _int32(counts[part]),
                    hidden_BD[part],
                    None if fed is None else fed[done : done + total],
                )
            done += total
        return fed

    def decode(
        self,
        cache: KVCache,
        rows: Sequence[int],
        hidden_BD: torch.Tensor,
        *,
        pending: Sequence[int | None],
        limits: Sequence[int],
        stops: Sequence[int] = (),
        sampling: Sampling | None = None,
        seeds: Sequence[int] | None = None,
        first_steps: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Up to `limits[i]` tokens for `rows[i]`, fewer if one of `stops` is generated (it is included), in one call.

        pending[i] is the row's last token, not in the cache yet; None: the first token follows hidden_BD[i]. The last
        token of the result is not in the cache either. first_steps: tokens already drawn with the row's seed.
        """
        sampling = sampling or Sampling()
        seeds = seeds if seeds is not None else [0] * len(rows)
        first_steps = first_steps if first_steps is not None else [0] * len(rows)
        tokens: list[list[int]] = []
        for part in _parts(len(rows)):
            first = [-1 if token is None else token for token in pending[part]]
            limit = [max(0, n) for n in limits[part]]
            writes = [max(0, n - (token < 0)) for n, token in zip(limit, first, strict=True)]
            with _reserved(cache, rows[part], writes) as starts:
                made_BN, counts_B = self.chain.decode(
                    cache.layout,
                    cache.keys,
                    cache.values,
                    _int32(rows[part]),
                    starts,
                    _int32(first),
                    _int32(limit),
                    max(limit, default=0),
                    list(stops),
                    sampling.temperature,
                    sampling.top_k,
                    sampling.top_p,
                    torch.tensor(seeds[part], dtype=torch.uint64, device="cpu").view(torch.int64),
                    _int32(first_steps[part]),
                    hidden_BD[part],
                )
            counts = counts_B.tolist()
            tokens += [row[:count] for row, count in zip(made_BN.tolist(), counts, strict=True)]
            # Release the slots of tokens that were not generated.
            kept = [s + max(0, c - (f < 0)) for s, c, f in zip(starts.tolist(), counts, first, strict=True)]
            cache.truncate(rows[part], kept)
        return tokens


class NativeRunner:
    """Prefills prompts and decodes answers over one cache, natively. Has EagerRunner's interface (infer/eager.py)."""

    name = "native"
    reason = fallback_reason = ""
    max_prefill_tokens: int | None = PREFILL_TOKENS

    def __init__(
        self,
        model: Coconut,
        *,
        num_slots: int,
        max_rows: int,
        max_length: int,
        sampling: Sampling,
        native: NativeModel | None = None,
    ) -> None:
        self.model = model
        self.sampling = sampling
        self.native = native or packed(model)
        self.clock = Clock(model.device)
        chain = self.native.chain
        self.bytes_per_pass = (chain.body_bytes, chain.body_bytes + chain.head_bytes)
        self.measure_bandwidth = functools.partial(read_bandwidth, chain.threads)
        self.cache = self.native.make_cache(num_slots=num_slots, max_rows=max_rows, max_length=max_length)

    def prefill_and_think(
        self, rows: Sequence[int], prompts: Sequence[Prompt], thoughts: list[list[torch.Tensor]] | None
    ) -> torch.Tensor:
        """Prefills each prompt and thinks its thoughts -> hidden state of its last position, (B, D) fp32.

        The last thought of a piece is fed in the same pass as the tokens after it, so k thoughts cost k passes.
        """
        hidden_BD = _states(len(rows), self.native.plan.dim)
        for r in range(max(len(p.pieces) for p in prompts)):
            members = [i for i, p in enumerate(prompts) if r < len(p.pieces)]
            pieces = [prompts[i].pieces[r] for i in members]
            member_rows = [rows[i] for i in members]
            member_BD = hidden_BD[members]
            if thoughts is not None and r > 0:
                for i, state_D in zip(members, member_BD.clone(), strict=True):
                    thoughts[i].append(state_D.to(self.model.dtype))
            lead = [THOUGHT] if r > 0 else []
            with self.clock("think" if lead else "prefill"):
                self.native.prefill(self.cache, member_rows, [[*lead, *p.tokens] for p in pieces], member_BD)
            more = [max(p.thoughts - 1, 0) for p in pieces]
            with self.clock("think", passes=max(more)):
                fed = self.native.think(self.cache, member_rows, more, member_BD, keep=thoughts is not None)
            if thoughts is not None and fed is not None:
                for i, kept in zip(members, fed.to(self.model.dtype).split(more), strict=True):
                    thoughts[i].extend(kept)
            hidden_BD[members] = member_BD
        return hidden_BD

    def first_tokens(self, hidden_BD: torch.Tensor, answers: Sequence[ActiveAnswer]) -> None:
        """Chooses the first token of each answer from its prompt's last hidden state."""
        with self.clock("decode", passes=0):
            self._decode(answers, hidden_BD.float().contiguous(), [1] * len(answers))

    def decode(self, answers: Sequence[ActiveAnswer], steps: int) -> None:
        """Decodes up to `steps` more tokens of each answer."""
        writing = [a for a in answers if not a.done(self.model.tokens.eos)]
        unused_BD = _states(len(writing), self.native.plan.dim)
        limits = [min(steps, a.limit - len(a.tokens)) for a in writing]
        before = [len(a.tokens) for a in writing]
        with self.clock("decode", passes=0):
            self._decode(writing, unused_BD, limits)
        self.clock.passes["decode"] += token_passes(writing, before)

    def release(self) -> None:
        """Nothing to keep: packed weights are kept by model, and a cache is cheap to make."""

    def _decode(self, answers: Sequence[ActiveAnswer], hidden_BD: torch.Tensor, limits: list[int]) -> None:
        eos = self.model.tokens.eos
        tokens = self.native.decode(
            self.cache,
            [a.row for a in answers],
            hidden_BD,
            pending=[a.tokens[-1] if a.tokens else None for a in answers],
            limits=limits,
            stops=[] if eos is None else [eos],
            sampling=self.sampling,
            seeds=[a.seed for a in answers],
            first_steps=[len(a.tokens) for a in answers],
        )
        for answer, more in zip(answers, tokens, strict=True):
            answer.tokens.extend(more)


_packed: weakref.WeakKeyDictionary[Coconut, dict[str, NativeModel]] = weakref.WeakKeyDictionary()


def packed(model: Coconut, weights: str | None = None) -> NativeModel:
    """The model's packed weights, made once in each format and again after its weights or feedback changed.

    Changes are detected by addresses, version counters and optimizer steps. A write through `.data`, the way some code
    swaps in averaged weights, or through NumPy leaves no trace in these; `copy_` under `torch.no_grad()` and
    `load_state_dict` do, and `model.load_state_dict(model.state_dict())` makes an earlier write known.
    """
    kept = _packed.setdefault(model, {})
    name = weights or FORMATS[model.dtype]
    native = kept.get(name)
    if native is None or fingerprint(model) != native.fingerprint:
        if native is not None:
            kept.clear()  # other formats are stale too
        native = kept[name] = NativeModel(model, weights=name)
    threads = machine.cpus()
    if native.chain.threads != threads:
        native.chain.set_threads(threads)
    return native


def fingerprint(model: Coconut) -> tuple[object, ...]:
    """Changes when a chain would (except by writes through `.data` or NumPy, see `packed`) and in a forked process,
    which lacks the threads of its parent's chain."""
    plan = describe(model.hf)  # described again: a replaced weight is another tensor
    weights = plan if isinstance(plan, str) else plan.fingerprint()
    buffers = versions([*model.feedback.parameters(), *model.feedback.buffers()])
    return weights, type(model.feedback), buffers, _optimizer_steps, os.getpid()


_optimizer_steps = 0


def _count_optimizer_step(*_: object) -> None:
    """Fused optimizers write weights without bumping version counters, so every step counts as a change."""
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_optimizer_step)
# With more than one thread, PyTorch's parallel loops in a forked child wait forever for threads of the parent.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


@functools.cache
def read_bandwidth(threads: int) -> float:
    """Bytes per second this machine reads from memory with `threads` threads: the bound of a pass. Takes about 1 s.

    Reads a GiB (a quarter of free memory, if that is less) repeatedly: part of a smaller buffer stays in the last-level
    cache between readings, an eighth of 256 MiB in a cache of 32, and would count as read from memory.
    """
    size = min(1 << 30, machine.free_bytes(torch.device("cpu")) // 4)
    return ops.extension().read_bandwidth(threads, size, 8)


@contextmanager
def _reserved(cache: KVCache, rows: Sequence[int], counts: Sequence[int]) -> Iterator[torch.Tensor]:
    """Reserves cache slots for `counts[i]` more tokens of `rows[i]`, released if the block raises.

    Yields the rows' previous lengths, int32 (B,).
    """
    starts = cache.layout.lengths[torch.tensor(list(rows), dtype=torch.int64, device="cpu")].clone()
    cache.reserve(rows, counts)
    try:
        yield starts
    except Exception:
        cache.truncate(rows, starts.tolist())
        raise


def _for_chain(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor if tensor.dim() == 2 else tensor.float().contiguous()


def _int32(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int32, device="cpu")


def _states(rows: int, dim: int) -> torch.Tensor:
    """Zeros, (rows, D), as the chain needs them, whatever the caller's default dtype and device."""
    return torch.zeros(rows, dim, dtype=torch.float32, device="cpu")


def _parts(count: int) -> list[slice]:
    return [slice(i, min(i + MAX_ROWS, count)) for i in range(0, count, MAX_ROWS)]
