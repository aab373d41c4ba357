"""A latent pass by the persistent kernel, by the graph of fused kernels, and at the memory limit.

    pytest benchmarks/bench_persistent.py [--results FOLDER]

GPT-2 124M and Llama-3.2-1B shapes, bf16, random weights. A chain of six thoughts behind 64 tokens, all of it timed,
divided by six. The limit is the bytes of all layers' weights over the bandwidth of a large copy. Correctness first:
nothing is timed where the states after the chain differ from the graph's by more than bf16 explains, or from one run to
the next at all. Where the kernel is the faster one in every row of the table, its device may be entered in FASTER_ON of
coconut_fast/infer/persistent.py, with the file of this run.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.bench_graph import GATE, THOUGHTS, Timed, made, weight_bytes
from benchmarks.shapes import make_tokens
from benchmarks.timing import gpu_limits
from coconut_fast import Coconut
from coconut_fast.infer.decode import Sampling
from coconut_fast.infer.persistent import PersistentChain, reason_not
from coconut_fast.model.plan import ModelPlan, describe

ROUNDS = 20


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> Coconut:
    hf = made(request.param)
    return Coconut(hf, make_tokens(hf.config.vocab_size)).eval()


def measure(model: Coconut, batch: int) -> dict[str, float]:
    """Seconds of a latent pass by "graph" and "persistent"; AssertionError where the two disagree."""
    found, states = {}, []
    for how in ("graph", "persistent"):
        timed = Timed(model, batch, "fused")
        if how == "persistent":
            timed.runner.passes = PersistentChain(model, timed.runner.cache, Sampling())
        states.append(timed.states())
        assert torch.equal(timed.states(), states[-1]), f"{how}: two runs of a chain differ"
        found[how] = timed.pass_seconds("think", True, ROUNDS)
        assert not timed.runner.trouble, timed.runner.trouble
    off = ((states[0] - states[1]).abs().max() / states[0].abs().max()).item()
    assert off < GATE, f"states after {THOUGHTS} thoughts are off by {off:.3g} of the largest value: nothing is timed"
    return found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the persistent kernel is a GPU's")
@pytest.mark.parametrize("batch", [1, 2, 4, 8])
@pytest.mark.parametrize("model", ["gpt2", "llama-1b"], indirect=True)
def test_latent_pass(benchmark, figures, model: Coconut, batch: int) -> None:
    assert reason_not(model) is None
    plan = describe(model.hf)
    assert isinstance(plan, ModelPlan)
    body, _ = weight_bytes(plan)
    bandwidth, _ = gpu_limits()
    limit = body / bandwidth
    figures.card(
        f"copy {bandwidth / 1e12:.2f} TB/s; {plan.model_type}: a latent pass reads {body / 1e6:.0f} MB "
        f"({limit * 1e6:.0f} us at the limit) and passes {1 + 5 * plan.layers} barriers"
    )
    found = benchmark.pedantic(measure, args=(model, batch), rounds=1)
    ours = found["persistent"]
    note = f"{limit / ours:.0%} of the limit, {batch / ours:.0f} latents/s"
    figures.add(f"{plan.model_type} batch {batch}: latent pass", ours, note=note, limit=limit, graph=found["graph"])
