"""End-to-end `generate` against the official code and a Hugging Face loop with a cache; by batch and thoughts.

    COCONUT_REFERENCE=... COCONUT_REFERENCE_PYTHON=... pytest benchmarks/bench_generate.py

Both peers generate one answer at a time: they are timed on a few of the prompts, and the time for all is computed from
that (all have one length). The official code recomputes everything for every token, and is fastest in bf16 on a CPU.
`weights` is the time to read the weights of every latent and token pass at the measured bandwidth, without the prefill.
Correctness first: in fp32 our answers must equal the official ones token for token, or nothing is timed.
"""

from __future__ import annotations

import functools
import time

import pytest
import torch
from transformers import PreTrainedModel

from benchmarks.peers import hugging_face, official, official_missing
from benchmarks.shapes import DEVICE, make_hf, make_model, make_prompts, save_for_peers
from coconut_fast import Coconut, GenerateOutput, generate

VOCAB = 50260
# dtype, prompts, prompt tokens, thoughts, new tokens, how many of the prompts the peers are timed on
WORKLOADS = [
    ("bfloat16", 1, 64, 6, 64, 1),
    ("float32", 1, 64, 6, 64, 1),
    ("bfloat16", 1, 400, 6, 128, 1),
    ("bfloat16", 16, 330, 6, 12, 1),  # prompts of ProsQA's length
    ("float32", 16, 330, 6, 12, 1),
    ("bfloat16", 100, 330, 6, 12, 2),
    pytest.param(("bfloat16", 500, 330, 6, 12, 2), marks=pytest.mark.skipif(DEVICE == "cpu", reason="takes a GPU")),
]
PROMPT, NEW = 32, 16  # tokens of the runs by batch and thoughts
OTHERS = ("opt-125m", "gemma3-270m")  # families without an engine of their own


@functools.cache
def ours(dtype: str, shape: str) -> Coconut:
    return make_model(shape, getattr(torch, dtype))


@functools.cache
def theirs(dtype: str, shape: str) -> PreTrainedModel:
    return make_hf(shape, getattr(torch, dtype)).to(DEVICE)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory):
    """One set of weights for all peers, and the gate: fp32 answers equal the official ones."""
    folder = save_for_peers(make_model("gpt2"), tmp_path_factory.mktemp("gpt2"))
    if official_missing() is None:
        prompts = make_prompts(VOCAB, 2, 40, 6, seed=5)
        found = generate(ours("float32", "gpt2"), prompts, max_new_tokens=8).token_ids
        expected = official("generate", folder, vocab_size=VOCAB, dtype="float32", prompts=prompts, max_new_tokens=8)
        assert found == expected["answers"], "our fp32 answers differ from the official ones: nothing is timed"
    return folder


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: "-".join(map(str, w[:5])))
def test_generate(benchmark, figures, weights, workload: tuple[str, int, int, int, int, int]) -> None:
    dtype, count, length, thoughts, new, timed = workload
    prompts = make_prompts(VOCAB, count, length, thoughts)
    seconds, output = run(benchmark, dtype, prompts, new)
    peers = {"weights": weights_limit(output), "official": None}
    if official_missing() is None:
        job = {"dtype": dtype, "prompts": prompts[:timed], "max_new_tokens": new, "rounds": rounds(prompts)}
        peers["official"] = official("generate", weights, vocab_size=VOCAB, **job)["seconds"] * count / timed
    peers["hugging_face"] = time_hugging_face(dtype, prompts[:timed], new, rounds(prompts)) * count / timed
    what = f"{dtype}: {count} x {length}-token prompt, {thoughts} thoughts, {new} tokens"
    figures.add(what, seconds, note=str(output.stats), **peers)


@pytest.mark.parametrize("thoughts", [0, 1, 6, 32])
@pytest.mark.parametrize("batch", [1, 8, 32, 64])
def test_batch(benchmark, figures, batch: int, thoughts: int) -> None:
    prompts = make_prompts(VOCAB, batch, PROMPT, thoughts)
    seconds, output = run(benchmark, "bfloat16", prompts, NEW, batch)
    one = one_prompt_of_hugging_face(thoughts)
    what = f"bfloat16: batch {batch}, {PROMPT}-token prompts, {thoughts} thoughts, {NEW} tokens"
    figures.add(what, seconds, note=str(output.stats), weights=weights_limit(output), hugging_face=one * batch)


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", OTHERS)
def test_other_families(benchmark, figures, shape: str, dtype: str, count: int) -> None:
    model, peer = ours(dtype, shape), theirs(dtype, shape)
    prompts = make_prompts(model.hf.config.vocab_size, count, 64, 6)
    if dtype == "float32":
        expected = hugging_face.generate(peer, prompts[0], model.tokens.thought, 8)
        assert generate(model, prompts[:1], max_new_tokens=8).token_ids == [expected], (
            "answers differ: nothing is timed"
        )
    seconds, output = run(benchmark, dtype, prompts, 64, shape=shape)
    one = time_hugging_face(dtype, prompts[:1], 64, rounds(prompts), shape)
    what = f"{shape}, {dtype}: {count} x 64-token prompt, 6 thoughts, 64 tokens"
    figures.add(what, seconds, note=str(output.stats), hugging_face=one * count)


def rounds(prompts: list[list[int]]) -> int:
    """Calls of which the fastest counts, of ours and of each peer's."""
    return 3 if DEVICE == "cuda" else 1 if len(prompts) * len(prompts[0]) > 20_000 else 2


def run(
    benchmark, dtype: str, prompts: list[list[int]], new: int, batch: int | None = None, shape: str = "gpt2"
) -> tuple[float, GenerateOutput]:
    """Seconds of the fastest call on warm weights, and its answers.

    On a GPU the first call compiles and captures.
    """
    model = ours(dtype, shape)
    generate(model, prompts[:1], max_new_tokens=2)
    keywords = {"max_new_tokens": new, "batch_size": batch}
    start = time.perf_counter()
    output = benchmark.pedantic(generate, args=(model, prompts), kwargs=keywords, rounds=rounds(prompts))
    return benchmark.stats.stats.min if benchmark.stats else time.perf_counter() - start, output


def weights_limit(output: GenerateOutput) -> float | None:
    """Seconds to read the weights of every pass after the prefill, where the engine knows their size."""
    stats = output.stats
    if stats.measure_bandwidth is None or not stats.bytes_per_latent_pass or not stats.bytes_per_token_pass:
        return None
    moved = stats.latent_passes * stats.bytes_per_latent_pass + stats.token_passes * stats.bytes_per_token_pass
    return moved / stats.measure_bandwidth()


def time_hugging_face(dtype: str, prompts: list[list[int]], new: int, repeats: int, shape: str = "gpt2") -> float:
    """Seconds for the prompts, one after the other, the fastest of several times.

    On a GPU every new length of the cache loads kernels first.
    """
    model, thought = theirs(dtype, shape), ours(dtype, shape).tokens.thought
    warm = (prompts[0], new) if DEVICE == "cuda" else (prompts[0][:8], 2)
    hugging_face.generate(model, warm[0], thought, warm[1])
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for prompt in prompts:
            hugging_face.generate(model, prompt, thought, new)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@functools.cache
def one_prompt_of_hugging_face(thoughts: int) -> float:
    prompts = make_prompts(VOCAB, 1, PROMPT, thoughts)
    return time_hugging_face("bfloat16", prompts, NEW, rounds(prompts))
