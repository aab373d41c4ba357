"""Latent pass, token pass and prefill of the native chain, by format and batch, against the limit and the peers.

    pytest benchmarks/bench_latent_pass.py                       # GPT-2 124M and Llama-3.2-1B shapes, random weights
    COCONUT_LLAMA_PYTHON=... pytest benchmarks/bench_latent_pass.py -k "gpt2 and bf16"

The limit of a pass is the bytes of weights it must read over the read bandwidth, the better of just before and just
after the fastest round (keys and values come on top of it, and are part of what is timed); that of a prefill is its
operations over the measured rate of matrix products. Hugging Face runs one row with its own cache, without its head in
a latent pass, and in bf16 where we have int8. llama.cpp always computes its head: `llama_headless` is the pass with the
vocabulary cut away. Correctness first: nothing is timed where the state after a thought (llama.cpp: after eight)
differs from Hugging Face's by more than int8 or bf16 explains.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import pytest
import torch

from benchmarks.peers import hugging_face, llama_cpp, llama_missing
from benchmarks.shapes import make_hf, make_tokens, save_for_peers
from coconut_fast import Coconut
from coconut_fast.infer import native

PROMPT, STEPS, PREFILL = 64, 8, 256  # tokens before the passes, passes of a round, tokens of the prefill
BATCHES = (1, 8, 32, 64)
MODELS = [("gpt2", "fp32"), ("gpt2", "bf16"), ("gpt2", "int8"), ("llama-1b", "bf16"), ("llama-1b", "int8")]
GATE = {"fp32": 1e-4, "bf16": 0.1, "int8": 0.3}  # of the largest value: far above rounding, far below a wrong result


@dataclass
class Original:
    """A model, with Hugging Face's seconds for it and the states after PROMPT tokens and each of STEPS thoughts."""

    model: Coconut
    name: str
    states_ND: torch.Tensor
    body: int  # parameters in its matrices, without embeddings and head
    latent: float
    token: float
    prefill: float


@dataclass
class Packed:
    """The packed model, one prompt prefilled per row of the largest batch; smaller batches use the first rows."""

    native: native.NativeModel
    original: Original
    cache: native.KVCache
    rows: list[int]
    hidden_BD: torch.Tensor
    off: float = 0.0  # how far the state after a thought is from Hugging Face's

    def think(self, batch: int, count: int) -> torch.Tensor:
        rows, hidden_BD = self.rows[:batch], self.hidden_BD[:batch].clone()
        self.native.think(self.cache, rows, [count] * batch, hidden_BD)
        self.cache.truncate(rows, [PROMPT] * batch)
        return hidden_BD

    def write(self, batch: int, count: int) -> None:
        rows = self.rows[:batch]
        self.native.decode(self.cache, rows, self.hidden_BD[:batch], pending=[1] * batch, limits=[count] * batch)
        self.cache.truncate(rows, [PROMPT] * batch)

    def read(self, count: int) -> None:
        row = self.cache.alloc(1)
        self.native.prefill(self.cache, row, [[i % 1000 + 1 for i in range(count)]], torch.zeros(1, self.dim))
        self.cache.free(row)

    @property
    def dim(self) -> int:
        return self.native.plan.dim


@functools.cache
def original(shape: str, dtype: torch.dtype) -> Original:
    """Hugging Face's model, measured before it becomes ours."""
    layers = 4 if shape == "llama-1b" and psutil.virtual_memory().available < 12 << 30 else None
    hf = make_hf(shape, dtype, layers)
    cache, state = hugging_face.prefilled(hf, PROMPT)
    times, states = [], []
    for _ in range(STEPS):
        start = time.perf_counter()
        state = hugging_face.latent_pass(hf, cache, state)
        times.append(time.perf_counter() - start)
        states.append(state[0, -1].float())
    token = least(lambda: hugging_face.token_pass(hf, cache), STEPS)
    prefill = least(lambda: hugging_face.prefilled(hf, PREFILL), 2)
    within = [m for m in hf.base_model.modules() if not isinstance(m, torch.nn.Embedding)]
    body = sum(p.numel() for m in within for p in m.parameters(recurse=False) if p.dim() == 2)
    model = Coconut(hf, make_tokens(hf.config.vocab_size)).eval()
    name = f"{shape}, {layers} layers" if layers else shape
    return Original(model, name, torch.stack(states), body, min(times), token, prefill)


@functools.cache
def pack(shape: str, weights: str) -> Packed:
    """Packed once for all batches; refused where its states are off."""
    base = original(shape, torch.float32 if weights == "fp32" else torch.bfloat16)
    chain, batch = native.NativeModel(base.model, weights=weights), max(BATCHES)
    slots = batch * 2 * PROMPT + PREFILL
    cache = chain.make_cache(num_slots=slots, max_rows=batch + 1, max_length=max(PREFILL, 2 * PROMPT))
    rows, hidden_BD = cache.alloc(batch), torch.zeros(batch, chain.plan.dim)
    chain.prefill(cache, rows, prompts(batch), hidden_BD)
    made = Packed(chain, base, cache, rows, hidden_BD)
    # Only one thought: a random Llama makes small differences grow with every further one.
    made.off = check(made.think(1, 1)[0], base.states_ND[0], weights, "ours")
    return made


def prompts(batch: int) -> list[list[int]]:
    """The first is Hugging Face's; all ids are small, so that llama.cpp can do without most of its vocabulary."""
    return [[(row + i) % PROMPT + 1 for i in range(PROMPT)] for row in range(batch)]


def check(state_D: torch.Tensor, expected_D: torch.Tensor, weights: str, whose: str) -> float:
    off = ((state_D - expected_D).abs().max() / expected_D.abs().max()).item()
    assert off < GATE[weights], f"{whose} {weights}: states are off by {off:.3g} of the largest value: nothing is timed"
    return off


def least(run: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest call after a first one: other work on the machine can only add to it."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def fastest(run: Callable[[], object], rounds: int, threads: int) -> tuple[float, float]:
    """Seconds of the fastest call, and the better of the bandwidths just before and just after it."""
    pairs, before = [], bandwidth_now(threads)
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        seconds, behind = time.perf_counter() - start, bandwidth_now(threads)
        pairs.append((seconds, max(before, behind)))
        before = behind
    return min(pairs)


def thought_of_many(packed: Packed, count: int) -> float:
    """Seconds of `count` thoughts in one call over those of `count` calls just before; median of the rounds."""
    ratios = []
    for _ in range(11):
        times = [time.perf_counter()]
        for calls, thoughts in ((count, 1), (1, count)):
            for _ in range(calls):
                packed.think(1, thoughts)
            times.append(time.perf_counter())
        ratios.append((times[2] - times[1]) / (times[1] - times[0]))
    return statistics.median(ratios)


def bandwidth_now(threads: int) -> float:
    """Bytes per second read from memory; on a virtual machine it changes by the second, so every round measures it."""
    return native.read_bandwidth.__wrapped__(threads)


@functools.cache
def product_rate(dtype: torch.dtype) -> float:
    """Operations per second of PyTorch's matrix product."""
    a, b = torch.ones(2048, 2048, dtype=dtype), torch.ones(2048, 2048, dtype=dtype)
    return 2 * 2048**3 / least(lambda: a @ b, 5)


@pytest.fixture(scope="module")
def saved_gpt2(tmp_path_factory: pytest.TempPathFactory):
    """The fp32 weights for llama.cpp, which makes its own formats of them."""
    folder = tmp_path_factory.mktemp("gpt2")
    return save_for_peers(Coconut(make_hf("gpt2"), make_tokens(50260)), folder) if llama_missing() is None else folder


@pytest.mark.parametrize(
    ("shape", "weights", "batch"),
    [pytest.param(s, w, b, id=f"{s}-{w}-{b}") for s, w in MODELS for b in BATCHES],
)
def test_pass(benchmark, figures, saved_gpt2, shape: str, weights: str, batch: int) -> None:
    packed = pack(shape, weights)
    chain, base = packed.native.chain, packed.original
    name = f"{base.name} {weights}"
    body, head = chain.body_bytes, chain.head_bytes
    figures.card(f"{chain.threads} threads; kernels: {chain.isa}")
    figures.card(f"{name}: a latent pass reads {body / 1e6:.0f} MB, a token {(body + head) / 1e6:.0f} MB")
    figures.card(f"{name}: a thought is off Hugging Face's {base.model.dtype} by {packed.off:.1g} of its largest value")
    rounds = 10 if batch == 1 else 3
    benchmark.pedantic(packed.think, args=(batch, STEPS), rounds=rounds, warmup_rounds=1)
    passes = {"latent": packed.think, "token": packed.write}

    def measured() -> dict[str, tuple[float, float]]:
        return {what: fastest(lambda run=run: run(batch, STEPS), rounds, chain.threads) for what, run in passes.items()}

    ours = measured()
    peers: dict[str, dict[str, float]] = {"latent": {}, "token": {}}
    if batch == 1:
        peers = {"latent": {"hugging_face": base.latent}, "token": {"hugging_face": base.token}}
    if shape == "gpt2" and batch in (1, 32) and llama_missing() is None:
        theirs = llama_cpp(saved_gpt2, weights=weights, prompts=prompts(batch), thoughts=STEPS, rounds=rounds)
        exact = "bf16" if weights == "fp32" else weights  # its keys, values and GELU table are fp16
        check(torch.tensor(theirs["state"]), base.states_ND[-1], exact, "llama.cpp")
        peers["latent"] |= {"llama_cpp": theirs["latent"], "llama_headless": theirs["latent_headless"]}
        peers["token"] |= {"llama_cpp": theirs["token"]}
        ours = {what: min(times, ours[what]) for what, times in measured().items()}  # theirs took seconds in between
    for what, size in (("latent", body), ("token", body + head)):
        seconds, bandwidth = ours[what][0] / STEPS, ours[what][1]
        limit = size / bandwidth
        note = f"{limit / seconds:.0%} of the limit at {bandwidth / 1e9:.1f} GB/s, {batch / seconds:.0f} {what}s/s"
        figures.add(f"{name} batch {batch}: {what} pass", seconds, note=note, limit=limit, **peers[what])
    if batch == 1:
        figures.add(f"{name}: a thought of 32 / the only one", thought_of_many(packed, 32), unit="x")


@pytest.mark.parametrize(("shape", "weights"), [pytest.param(*m, id="-".join(m)) for m in MODELS])
def test_prefill(benchmark, figures, shape: str, weights: str) -> None:
    packed = pack(shape, weights)
    base, rate = packed.original, product_rate(packed.original.model.dtype)
    figures.card(f"matrix products in {base.model.dtype}: {rate / 1e12:.2f} TFLOP/s")
    benchmark.pedantic(packed.read, args=(PREFILL,), rounds=2, warmup_rounds=1)
    seconds = benchmark.stats.stats.min if benchmark.stats else least(lambda: packed.read(PREFILL), 1)
    limit = 2 * base.body * PREFILL / rate
    note = f"{limit / seconds:.0%} of the limit, {PREFILL / seconds:.0f} tokens/s"
    name = f"{base.name} {weights}: prefill of {PREFILL} tokens"
    figures.add(name, seconds, note=note, limit=limit, hugging_face=base.prefill)
