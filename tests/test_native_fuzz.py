"""500 random ragged batches, native against reference.py: greedy answers token for token (except for fp32 near-ties),
and a row's bits whatever it is batched with."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from coconut_fast import generate, reference
from coconut_fast.infer import native
from tests.families import TOKENS, make_pair, make_row

# Heads of 56 values make up a pair of vectors, one vector and a rest, at every width.
MODELS = {
    "gpt2": ("gpt2", {}),
    "gpt2-wide": ("gpt2", {"n_embd": 112, "n_head": 2}),
    "llama": ("llama", {}),
    "llama-wide": ("llama", {"head_dim": 56}),
    "mistral": ("mistral", {}),
    "mistral-wide": ("mistral", {"head_dim": 56, "sliding_window": 21}),
    "qwen2": ("qwen2", {}),
    "qwen2-wide": ("qwen2", {"hidden_size": 224}),
    "qwen3": ("qwen3", {}),
    "qwen3-wide": ("qwen3", {"head_dim": 56}),
}
BATCHES = 50  # per model


def make_prompt(draw: random.Random) -> list[int]:
    """Up to 60 tokens and 6 thoughts, some rows with a second run of thoughts."""
    seed = draw.randrange(1 << 30)
    prompt = make_row(draw.randint(1, draw.choice((4, 20, 50))), draw.randint(0, 6), draw.randint(0, 4), seed)
    if draw.random() < 0.2:
        prompt += make_row(draw.randint(1, 5), draw.randint(0, 3), 0, seed + 1)
    return prompt


def chains(model: native.NativeModel, prompts: list[list[int]], counts: list[int]) -> torch.Tensor:
    """The states of the rows after their prompts and `counts` thoughts."""
    cache = model.make_cache(num_slots=80 * len(prompts), max_rows=len(prompts))
    for side in (*cache.keys, *cache.values):
        side.fill_(float("nan"))
    rows, hidden_BD = cache.alloc(len(prompts)), torch.zeros(len(prompts), model.plan.dim)
    model.prefill(cache, rows, prompts, hidden_BD)
    model.think(cache, rows, counts, hidden_BD)
    return hidden_BD


@torch.no_grad()
def is_near_tie(plain: torch.nn.Module, prompt: list[int], ours: list[int], theirs: list[int]) -> bool:
    """Whether the first tokens that differ are no further apart in fp64 than the error of PyTorch's own fp32."""
    ours, theirs = ([*tokens, TOKENS.eos] for tokens in (ours, theirs))
    at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    ids, exact = torch.tensor(prompt + ours[:at]), copy.deepcopy(plain).double()
    fp32, fp64 = (reference.forward(m, ids, ids, TOKENS.thought)[1][-1].double() for m in (plain, exact))
    return bool((fp64[ours[at]] - fp64[theirs[at]]).abs() <= (fp32 - fp64).abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_random_batches_agree_with_the_oracle(name: str) -> None:
    family, changes = MODELS[name]
    model, plain = make_pair(family, **changes)
    exact = [native.NativeModel(model, weights=weights, threads=1) for weights in ("bf16", "int8")]
    half = make_pair(family, torch.bfloat16, **changes)[0]
    exact.append(native.NativeModel(half, threads=1))
    draw = random.Random(name)
    for _ in range(BATCHES):
        size = draw.choice((1, 2, 3, 7, 12, 20, 33))
        prompts = [make_prompt(draw) for _ in range(size)]
        limit, at_once = draw.randint(1, 6), draw.choice((None, 1, 5, size))
        made = generate(model, prompts, max_new_tokens=limit, batch_size=at_once)
        assert made.stats.backend == "native"
        for prompt, tokens in zip(prompts, made.token_ids, strict=True):
            expected = reference.generate(plain, torch.tensor(prompt), TOKENS.thought, TOKENS.eos, limit)
            assert tokens == expected or is_near_tie(plain, prompt, tokens, expected), prompt
        questions, counts = [p[:60] for p in prompts], [draw.randint(0, 5) for _ in prompts]
        one = draw.randrange(size)
        for packed in exact:
            together = chains(packed, questions, counts)
            assert torch.equal(together[one], chains(packed, [questions[one]], [counts[one]])[0])
