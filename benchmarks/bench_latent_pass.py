"""A latent pass and a token pass of the native chain, by format and batch, against the memory limit.

    pytest benchmarks/bench_latent_pass.py                       # GPT-2 124M and Llama-3.2-1B shapes, random weights
    pytest benchmarks/bench_latent_pass.py -k "gpt2 and bf16"

The limit of a pass is the bytes of weights it must read over the measured read bandwidth (keys and values come on top
of it, and are part of what is timed). The peer is Hugging Face's model with its own cache, without its head for the
latent pass. Correctness first: nothing is timed where the chain's states differ from Hugging Face's by more than int8
or bf16 explains.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil
import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from benchmarks.shapes import make_hf, make_tokens
from coconut_fast import Coconut
from coconut_fast.infer import native

PROMPT = 64
CASES = [("gpt2", w, b) for w in ("fp32", "bf16", "int8") for b in (1, 4, 8, 32, 64)]
CASES += [("llama-1b", w, b) for w in ("bf16", "int8") for b in (1, 8, 32)]
GATE = {"fp32": 1e-4, "bf16": 0.1, "int8": 0.3}  # of the largest value: far above rounding, far below a wrong result


@pytest.fixture(scope="module")
def chain(request: pytest.FixtureRequest, figures) -> tuple[native.NativeModel, PreTrainedModel]:
    """The packed model and Hugging Face's, checked against each other."""
    shape, weights = request.param
    dtype = torch.float32 if weights == "fp32" else torch.bfloat16
    layers = None
    if shape == "llama-1b" and psutil.virtual_memory().available < 14 << 30:
        layers = 4
    hf = make_hf(shape, dtype, layers)
    model = Coconut(make_hf(shape, dtype, layers), make_tokens(hf.config.vocab_size))
    packed = native.NativeModel(model, weights=weights)
    threads, bandwidth = packed.chain.threads, native.read_bandwidth(packed.chain.threads)
    figures.card(f"{threads} threads read {bandwidth / 1e9:.1f} GB/s; kernels: {packed.chain.isa}")
    body, head = packed.chain.body_bytes, packed.chain.head_bytes
    figures.card(
        f"{shape}{f' cut to {layers} layers' if layers else ''} {weights}: a latent pass reads {body / 1e6:.0f} MB "
        f"({body / bandwidth * 1e3:.2f} ms at the limit), a token {(body + head) / 1e6:.0f} MB "
        f"({(body + head) / bandwidth * 1e3:.2f} ms)"
    )
    prompt = list(range(1, 9))
    cache = packed.make_cache(num_slots=32, max_rows=1)
    hidden = torch.zeros(1, packed.plan.dim)
    packed.prefill(cache, cache.alloc(1), [prompt], hidden)
    with torch.no_grad():
        expected = hf.base_model(torch.tensor([prompt])).last_hidden_state[0, -1].float()
    off = ((hidden[0] - expected).abs().max() / expected.abs().max()).item()
    assert off < GATE[weights], f"{shape} {weights}: states are off by {off:.3g} of the largest value: nothing is timed"
    return packed, hf


@pytest.mark.parametrize(
    ("chain", "batch"),
    [pytest.param((shape, weights), batch, id=f"{shape}-{weights}-{batch}") for shape, weights, batch in CASES],
    indirect=["chain"],
)
def test_pass(benchmark, figures, chain, batch: int) -> None:
    packed, hf = chain
    name = f"{hf.config.model_type} {packed.weights} batch {batch}"
    bandwidth = native.read_bandwidth(packed.chain.threads)
    cache = packed.make_cache(num_slots=batch * 128, max_rows=batch, max_length=128)
    rows, hidden = cache.alloc(batch), torch.zeros(batch, packed.plan.dim)
    packed.prefill(cache, rows, [[(7 * r + i) % 1000 + 1 for i in range(PROMPT)] for r in range(batch)], hidden)

    def think(count: int) -> None:
        packed.think(cache, rows, [count] * batch, hidden)
        cache.truncate(rows, [PROMPT] * batch)

    def write(count: int) -> None:
        packed.decode(cache, rows, hidden, pending=[1] * batch, limits=[count] * batch)
        cache.truncate(rows, [PROMPT] * batch)

    benchmark.pedantic(think, args=(8,), rounds=5, warmup_rounds=1)
    latent, token = _least(think, 8) / 8, _least(write, 8) / 8
    body, head = packed.chain.body_bytes, packed.chain.head_bytes
    peers = _hugging_face(hf, batch) if packed.weights != "int8" else {"latent": None, "token": None}
    for what, seconds, size in (("latent", latent, body), ("token", token, body + head)):
        limit = size / bandwidth
        note = f"{limit / seconds:.0%} of the limit, {batch / seconds:.0f} {what}s/s"
        figures.add(f"{name}: {what} pass", seconds, note=note, limit=limit, hugging_face=peers[what])
    if batch == 1:
        one, many = _least(think, 1), _least(think, 32) / 32
        figures.add(f"{name}: a thought of 32 / the only one", many / one, unit="x")


def _least(run: Callable[[int], None], count: int) -> float:
    """Seconds of the fastest of many calls: others' work on the machine only ever adds."""
    run(count)
    best, until = float("inf"), time.perf_counter() + 1.5
    while time.perf_counter() < until:
        start = time.perf_counter()
        run(count)
        best = min(best, time.perf_counter() - start)
    return best


def _hugging_face(hf: PreTrainedModel, batch: int) -> dict[str, float]:
    """Seconds of one latent and one token pass of Hugging Face's model, with its own cache, behind the same prompt."""
    ids = torch.ones(batch, PROMPT, dtype=torch.long)
    times = {"latent": float("inf"), "token": float("inf")}
    with torch.inference_mode():
        cache = DynamicCache(config=hf.config)
        state = hf.base_model(ids, past_key_values=cache, use_cache=True).last_hidden_state[:, -1:]
        for _ in range(4):
            start = time.perf_counter()
            state = hf.base_model(inputs_embeds=state, past_key_values=cache, use_cache=True).last_hidden_state[:, -1:]
            times["latent"] = min(times["latent"], time.perf_counter() - start)
            start = time.perf_counter()
            hf(input_ids=ids[:, :1], past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1)
            times["token"] = min(times["token"], time.perf_counter() - start)
    return times
