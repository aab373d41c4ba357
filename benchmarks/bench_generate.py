"""End-to-end `generate` against the official code (its best dtype) and a Hugging Face loop with a cache.

    COCONUT_REFERENCE=... COCONUT_REFERENCE_PYTHON=... pytest benchmarks/bench_generate.py

Correctness first: in fp32 our answers must equal the official ones token for token, or nothing is timed.
"""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.peers import hugging_face, official, official_missing
from benchmarks.shapes import DEVICE, make_hf, make_model, make_prompts, save_for_peers
from coconut_fast import generate

VOCAB = 50260
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# name: prompts, prompt tokens, thoughts, new tokens, how many of the prompts the official code is timed on
WORKLOADS = {
    "64-token prompt, 6 thoughts, 64 tokens": (1, 64, 6, 64, 1),
    "400-token prompt, 6 thoughts, 128 tokens": (1, 400, 6, 128, 1),
    "16 ProsQA prompts (330 tokens, 6 thoughts, 12 tokens)": (16, 330, 6, 12, 4),
    "100 ProsQA prompts (330 tokens, 6 thoughts, 12 tokens)": (100, 330, 6, 12, 4),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """One set of weights for everybody, and the gate: fp32 answers equal the official ones."""
    folder = save_for_peers(make_model("gpt2"), tmp_path_factory.mktemp("gpt2"))
    if official_missing() is None:
        prompts = make_prompts(VOCAB, 2, 40, 6, seed=5)
        expected = official("generate", folder, vocab_size=VOCAB, dtype="float32", prompts=prompts, max_new_tokens=8)[
            "answers"
        ]
        found = generate(make_model("gpt2"), prompts, max_new_tokens=8).token_ids
        assert found == expected, "our fp32 answers differ from the official ones: nothing is timed"
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_generate(benchmark, figures, weights, workload: str, dtype: str) -> None:
    count, length, thoughts, new, timed = WORKLOADS[workload]
    model = make_model("gpt2", DTYPES[dtype])
    prompts = make_prompts(VOCAB, count, length, thoughts)
    output = benchmark.pedantic(
        generate, args=(model, prompts), kwargs={"max_new_tokens": new}, rounds=3, warmup_rounds=1
    )
    seconds = benchmark.stats.stats.min if benchmark.stats else 0.0
    peers: dict[str, float | None] = {"official": None}
    if official_missing() is None:
        theirs = official(
            "generate", weights, vocab_size=VOCAB, dtype=dtype, prompts=prompts[:timed], max_new_tokens=new
        )
        peers["official"] = theirs["seconds"] * count / timed
    hf = make_hf("gpt2", DTYPES[dtype]).to(DEVICE)
    hugging_face.generate(hf, prompts[0], VOCAB - 1, 2)
    start = time.perf_counter()
    for prompt in prompts[:timed]:
        hugging_face.generate(hf, prompt, VOCAB - 1, new)
    peers["hf_cached"] = (time.perf_counter() - start) * count / timed
    figures.add(f"generate {dtype}: {workload}", seconds, note=str(output.stats), **peers)
