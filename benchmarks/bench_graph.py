"""Latent and token passes on a GPU: as graphs of fused kernels, as graphs of Hugging Face's body, and eagerly.

    pytest benchmarks/bench_graph.py [--results FOLDER]       GPT-2 124M and Llama-3.2-1B shapes, bf16, random weights

The limit of a pass is the bytes of weights it must read (a token pass reads the head's too) over the bandwidth of a
large copy, both measured in this run; keys and values come on top of it and are part of what is timed. A thought's
graph is a chain of six, timed as a whole. "6 thoughts + 10 tokens" begins after the prefill and ends with the tokens on
the host. Its peers: Hugging Face's `generate` with a static cache and torch.compile, for as many passes (it knows no
thoughts, so each of its passes runs the head), and end to end, prefill included, the official code. Correctness first:
nothing is timed where states after two thoughts are off from Hugging Face's body by more than bf16 explains.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from transformers import PreTrainedModel

from benchmarks.figures import Figures
from benchmarks.peers import hugging_face, official, official_missing
from benchmarks.shapes import DEVICE, make_hf, make_prompts, make_tokens, save_for_peers
from benchmarks.timing import gpu_limits, seconds_of, waited
from coconut_fast import Coconut, generate
from coconut_fast.infer.cuda_graphs import GraphRunner
from coconut_fast.infer.decode import DECODE_STEPS, ActiveAnswer
from coconut_fast.infer.fused import FusedPasses, reason_not
from coconut_fast.infer.passes import HuggingFacePasses
from coconut_fast.infer.prefill import prefill
from coconut_fast.infer.sampling import Sampling
from coconut_fast.model.plan import ModelPlan, describe

PROMPT, THOUGHTS, TOKENS = 64, 6, 10
ROOM = 64  # positions that timed passes may fill
PASSES = THOUGHTS + 1 + TOKENS - 1  # the first token follows the pass over `<|end-latent|>`
# Relative to the largest value, after two thoughts, so that a thought fed by a thought is checked. In bf16 two correct
# bodies of the Llama shape are then up to 0.03 apart; one that lacks one of 16 MLPs is off by 0.3 after the first.
# Random weights multiply rounding errors by 1.5 per thought: after six, correct bodies are 0.25 apart.
GATE = 0.1


class Timed:
    """Rows of a model with prefilled prompts, and passes over them: fused, or Hugging Face's body."""

    def __init__(self, model: Coconut, batch: int, body: str) -> None:
        self.model, self.size, self.device = model, batch, model.device
        runner = GraphRunner(
            model,
            num_slots=batch * (PROMPT + ROOM + 16),
            max_rows=batch,
            max_length=PROMPT + ROOM,
            sampling=Sampling(),
        )
        if body == "hugging face":
            runner.passes = HuggingFacePasses(model, runner.cache, Sampling(), "to be compared with")
        elif type(runner.passes) is not FusedPasses:  # the persistent kernel, where it is the default
            runner.passes = FusedPasses(model, runner.cache, Sampling())
        self.runner, self.rows = runner, runner.cache.alloc(batch)
        prompts = [[(7 * r + i) % 90 + 1 for i in range(PROMPT)] for r in range(batch)]
        self.hidden_BD = prefill(model, runner.cache, self.rows, prompts)
        self.batch = runner.batch_for(batch)

    @torch.inference_mode()
    def pass_seconds(self, kind: str, graphed: bool, rounds: int) -> float:
        """Seconds of one pass; a latent pass is timed as part of a chain."""
        count = (THOUGHTS,) if kind == "think" else ()
        passes: Callable[[], None] = partial(self.runner.replay, self.batch, kind, *count)
        if not graphed:
            passes = partial(getattr(self.runner.passes, kind), self.batch, *count)
        self._start(ROOM)
        passes()  # compiles, captures
        best = float("inf")
        for _ in range(rounds):
            self._start(ROOM)
            self.batch.step.zero_()
            best = min(best, seconds_of(passes, self.device))
        return best / (count[0] if count else 1)

    @torch.inference_mode()
    def states(self, thoughts: int = 2) -> torch.Tensor:
        """(B, D) fp32 after `thoughts` thoughts."""
        self._start(thoughts)
        self.runner.replay(self.batch, "think", thoughts)
        return self.batch.hidden[: self.size].to(device="cpu", copy=True)

    @torch.inference_mode()
    def answer(self) -> list[list[int]]:
        """Six thoughts, `<|end-latent|>`, ten tokens, on the host."""
        self._start(THOUGHTS)
        runner, batch = self.runner, self.batch
        runner.cache.truncate(self.rows, [PROMPT] * self.size)
        runner.cache.reserve(self.rows, [THOUGHTS + 1] * self.size)
        runner.replay(batch, "think", THOUGHTS)
        batch.tails.fill_(1)
        batch.tokens.fill_(self.model.tokens.end)
        runner.replay(batch, "feed")
        answers = [ActiveAnswer(row, 0, TOKENS, []) for row in self.rows]
        runner.first_tokens(batch.hidden[: self.size].clone(), answers)
        while not all(a.done(self.model.tokens.eos) for a in answers):
            runner.decode(answers, DECODE_STEPS)
        return [a.tokens for a in answers]

    def _start(self, passes: int) -> None:
        cache = self.runner.cache
        cache.truncate(self.rows, [PROMPT] * self.size)
        cache.reserve(self.rows, [ROOM] * self.size)
        self.batch.fill(self.rows, [PROMPT] * self.size, [passes] * self.size)
        self.batch.hidden[: self.size] = self.hidden_BD


def assert_near(found_BD: torch.Tensor, expected_BD: torch.Tensor) -> None:
    """AssertionError where states after two thoughts differ by more than rounding."""
    off = ((found_BD - expected_BD).abs().max() / expected_BD.abs().max()).item()
    assert off < GATE, f"states after two thoughts are off by {off:.3g} of the largest value: nothing is timed"


def measure(model: Coconut, batch: int, rounds: int = 5) -> dict[str, float]:
    """Seconds of a latent and a token pass each way, and of "answer"; AssertionError where the two bodies disagree.

    Figures of Hugging Face's body are left out, with a warning, if its runner reports a `fallback_reason`.
    """
    bodies = {body: Timed(model, batch, body) for body in ("fused", "hugging face")}
    assert_near(*(timed.states() for timed in bodies.values()))
    found: dict[str, float] = {}
    for body, timed in bodies.items():
        for kind in ("think", "decode"):
            for graphed in (True, False):
                name = f"{kind}, {body}, {'graph' if graphed else 'launches'}"
                found[name] = timed.pass_seconds(kind, graphed, rounds)
        timed.answer()
        found[f"answer, {body}"] = min(waited(timed.answer, model.device) for _ in range(rounds))
        assert body != "fused" or not timed.runner.fallback_reason, timed.runner.fallback_reason
    if fallback_reason := bodies["hugging face"].runner.fallback_reason:
        warnings.warn(f"Hugging Face's body is left out: {fallback_reason}", stacklevel=2)
        return {name: seconds for name, seconds in found.items() if "hugging face" not in name}
    return found


def weight_bytes(plan: ModelPlan) -> tuple[int, int]:
    """Bytes of weights of a latent pass, and of the head."""
    body = sum(p.numel() * p.element_size() for p in plan.blocks.parameters())
    return body, plan.head.numel() * plan.head.element_size()


def add_cost_of_batch(figures: Figures, model_type: str, batch: int) -> None:
    """A latent pass of `batch` rows, as a multiple of one of a single row; nothing where that was not timed."""
    seconds = {row["what"]: row["ours"] for row in figures.rows}
    one, many = (seconds.get(f"{model_type} batch {size}: latent pass") for size in (1, batch))
    if batch > 1 and one and many:
        figures.add(f"{model_type} batch {batch}: latent pass over that of batch 1", many / one, unit="x")


def made(shape: str) -> PreTrainedModel:
    """A random bf16 model, drawn on the device: a host would take far longer for a billion numbers."""
    with torch.device(DEVICE):
        return make_hf(shape, torch.bfloat16)


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> Coconut:
    hf = made(request.param)
    return Coconut(hf, make_tokens(hf.config.vocab_size)).eval()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: graphs are a GPU's")
@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("model", ["gpt2", "llama-1b"], indirect=True)
def test_passes(benchmark, figures, model: Coconut, batch: int) -> None:
    assert reason_not(model) is None
    plan = describe(model.hf)
    assert isinstance(plan, ModelPlan)
    body, head = weight_bytes(plan)
    bandwidth, _ = gpu_limits()
    name = f"{plan.model_type} batch {batch}"
    figures.card(
        f"copy {bandwidth / 1e12:.2f} TB/s; {plan.model_type}: a latent pass reads {body / 1e6:.0f} MB "
        f"({body / bandwidth * 1e6:.0f} us at the limit), a token {(body + head) / 1e6:.0f} MB"
    )
    found = benchmark.pedantic(measure, args=(model, batch), rounds=1)
    for kind, what, size in (("think", "latent", body), ("decode", "token", body + head)):
        ours, limit = found[f"{kind}, fused, graph"], size / bandwidth
        figures.add(
            f"{name}: {what} pass",
            ours,
            note=f"{limit / ours:.0%} of the limit, {batch / ours:.0f} {what}s/s",
            limit=limit,
            fused_launches=found[f"{kind}, fused, launches"],
            hf_body_graph=found.get(f"{kind}, hugging face, graph"),
            hf_body_launches=found.get(f"{kind}, hugging face, launches"),
        )
    add_cost_of_batch(figures, plan.model_type, batch)
    figures.add(
        f"{name}: {THOUGHTS} thoughts + {TOKENS} tokens",
        found["answer, fused"],
        limit=(PASSES * body + TOKENS * head) / bandwidth,
        hf_body_graph=found.get("answer, hugging face"),
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: graphs are a GPU's")
@pytest.mark.skipif(official_missing() is not None, reason=str(official_missing()))
@pytest.mark.parametrize("model", ["gpt2"], indirect=True)
def test_against_the_official_code(benchmark, figures, model: Coconut, tmp_path) -> None:
    vocabulary = model.config.vocab_size
    prompts = make_prompts(vocabulary, 1, PROMPT, THOUGHTS)
    folder = save_for_peers(model, tmp_path)
    generate(model, prompts, max_new_tokens=TOKENS)
    benchmark.pedantic(generate, args=(model, prompts), kwargs={"max_new_tokens": TOKENS}, rounds=5, warmup_rounds=1)
    theirs = official(
        "generate", folder, vocab_size=vocabulary, dtype="bfloat16", prompts=prompts, max_new_tokens=TOKENS, rounds=3
    )
    figures.add(
        f"gpt2 batch 1, end to end: {PROMPT}-token prompt, {THOUGHTS} thoughts, {TOKENS} tokens",
        benchmark.stats.stats.min,
        official=theirs["seconds"],
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: graphs are a GPU's")
@pytest.mark.parametrize("shape", ["gpt2", "llama-1b"])
def test_against_a_compiled_static_cache(benchmark, figures, shape: str) -> None:
    """Only at batch 1 and after everything else: compiling costs most of a minute per shape."""
    hf = made(shape)
    timed = Timed(Coconut(hf, make_tokens(hf.config.vocab_size)).eval(), 1, "fused")
    timed.answer()  # captures
    benchmark.pedantic(waited, args=(timed.answer, timed.device), rounds=5)
    figures.add(
        f"{hf.config.model_type} batch 1: {THOUGHTS} thoughts + {TOKENS} tokens",
        benchmark.stats.stats.min,
        hf_static_compiled=static_seconds(made(shape)),
    )


def static_seconds(hf: PreTrainedModel, batch: int = 1, rounds: int = 3) -> float:
    """Hugging Face's `generate`, static cache, compiled: PASSES decoding passes, prefill and first token subtracted."""
    times = []
    for new in (1, PASSES + 1):
        run = partial(hugging_face.static_generate, hf, batch, PROMPT, new)
        run()  # compiles
        times.append(min(waited(run, hf.device) for _ in range(rounds)))
    return times[1] - times[0]
