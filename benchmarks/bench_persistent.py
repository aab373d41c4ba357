"""A latent pass by the persistent kernel, by the graph of fused kernels, and at the memory limit.

    pytest benchmarks/bench_persistent.py [--results FOLDER]

GPT-2 124M and Llama-3.2-1B shapes, bf16, random weights. A chain of six thoughts after 64 tokens, timed as a whole and
divided by six. The limit is the bytes of all layers' weights over the bandwidth of a large copy. Correctness first:
nothing is timed where the states after two thoughts differ from the graph's by more than bf16 explains, or those after
the chain from one run to the next at all. Where the kernel is the faster one in every row of the table, its device may
be entered in FASTER_ON of coconut_fast/infer/persistent.py, with the file of this run.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.bench_graph import THOUGHTS, Timed, assert_near, made, weight_bytes
from benchmarks.shapes import make_tokens
from benchmarks.timing import gpu_limits
from coconut_fast import Coconut
from coconut_fast.infer.persistent import PersistentChain, reason_not
from coconut_fast.infer.sampling import Sampling
from coconut_fast.model.plan import ModelPlan, describe

ROUNDS = 20


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> Coconut:
    hf = made(request.param)
    return Coconut(hf, make_tokens(hf.config.vocab_size)).eval()


def measure(model: Coconut, batch: int) -> dict[str, float]:
    """Seconds of a latent pass by "graph" and "persistent"; AssertionError where the two disagree."""
    ways = {how: Timed(model, batch, "fused") for how in ("graph", "persistent")}
    runner = ways["persistent"].runner
    runner.passes = PersistentChain(model, runner.cache, Sampling())
    for how, timed in ways.items():
        states = [timed.states(THOUGHTS) for _ in range(2)]
        assert torch.equal(*states), f"{how}: two runs of a chain differ"
        assert not timed.runner.fallback_reason, timed.runner.fallback_reason
    assert_near(ways["persistent"].states(), ways["graph"].states())
    return {how: timed.pass_seconds("think", True, ROUNDS) for how, timed in ways.items()}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the persistent kernel is a GPU's")
@pytest.mark.parametrize("batch", [1, 2, 4])
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
