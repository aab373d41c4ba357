"""What is kept of the graph runner from one `generate` call to the next, and when nothing may be."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch

from coconut_fast import generate
from coconut_fast.infer import engine, machine, runner_cache
from coconut_fast.infer.eager import EagerRunner
from coconut_fast.infer.engine import choose_runner
from coconut_fast.model.coconut import Coconut
from coconut_fast.model.feedback import make_feedback
from tests.families import make_pair, make_row

PROMPTS = [make_row(n, k, 0, seed) for seed, (n, k) in enumerate([(5, 2), (12, 1), (3, 19), (30, 6), (4, 6)])]
pytestmark = pytest.mark.usefixtures("kept")


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_a_later_call_replays_what_the_first_one_captured(family: str) -> None:
    model, _ = make_pair(family)
    first = generate(model, PROMPTS, max_new_tokens=11)
    runner = runner_cache._kept[model]
    assert runner.captures == len(runner.graphs) > 0
    captured = runner.captures + (family == "gpt2")  # from the second call on, a graph packs weights again
    for prompts in (PROMPTS[::-1], PROMPTS):  # the same shapes in another order
        again = generate(model, prompts, max_new_tokens=11)
        assert runner_cache._kept[model] is runner and runner.captures == captured
    assert again.token_ids == first.token_ids
    assert again.stats.latent_passes == first.stats.latent_passes, "the clock starts anew with every call"
    generate(model, [PROMPTS[0]], max_new_tokens=2)  # a new bucket: a chain of thoughts, feed, begin, decode
    assert runner_cache._kept[model] is runner and runner.captures == captured + 4


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_what_makes_a_new_runner(family: str) -> None:
    model, _ = make_pair(family)
    seen = []

    def run(**options) -> None:
        generate(model, PROMPTS[:2], **{"max_new_tokens": 3, **options})
        if runner_cache._kept[model] not in seen:
            seen.append(runner_cache._kept[model])

    run()
    run(max_new_tokens=2)
    assert len(seen) == 1
    run(max_new_tokens=200)  # capacity
    run(max_new_tokens=200)
    assert len(seen) == 2
    run(temperature=0.5, seed=1)  # sampling
    run(temperature=0.5, seed=2)
    assert len(seen) == 3
    model.hf.model.norm.weight = torch.nn.Parameter(model.hf.model.norm.weight.detach().clone())  # storage
    run(temperature=0.5, seed=1)
    assert len(seen) == 4
    model.feedback = make_feedback("rescale", model.hf.get_input_embeddings())
    run(temperature=0.5, seed=1)
    assert len(seen) == 5
    for layer in model.hf.model.layers:
        layer.self_attn.scaling *= 2
    run(temperature=0.5, seed=1)
    assert len(seen) == 6
    square = model.hf.model.layers[0].self_attn.o_proj
    square.weight = torch.nn.Parameter(square.weight.data.t())  # strides
    run(temperature=0.5, seed=1)
    assert len(seen) == 7
    model.hf.config.logits_scaling = 0.5
    run(temperature=0.5, seed=1)
    assert len(seen) == 8
    model.hf.config.num_hidden_layers = 1
    run(temperature=0.5, seed=1)
    assert len(seen) == 9


@pytest.mark.parametrize("free", [0, 1])
def test_room_for_larger_calls_is_taken_where_there_is_memory(free: int, monkeypatch) -> None:
    """A call that just fits must not fail because capacity is rounded up."""
    model, _ = make_pair("llama")
    room = {"num_slots": 16 * 33, "max_rows": 3, "max_length": 300, "sampling": engine.Sampling()}
    needed = machine.cache_bytes(model, runner_cache._rounded_up(16 * 33))
    monkeypatch.setattr(machine, "free_bytes", lambda device: needed - 1 + free)
    assert runner_cache.acquire(model, **room).capacity["num_slots"] == (16 * 33 if free == 0 else 640)


class Scaled(torch.nn.Module):
    """A user's own feedback, whose factor is a Python number, not a tensor with an address."""

    factor = 1.0

    def forward(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        return self.factor * hidden_BD


class Adapted(torch.nn.Module):
    """As an adapter library wraps a layer: Python decides what it does."""

    def __init__(self, base: torch.nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x)


def add_hook(model: Coconut) -> Callable[[], None]:
    return model.hf.get_input_embeddings().register_forward_hook(lambda *_: None).remove


def replace_forward(model: Coconut) -> Callable[[], None]:
    module = model.hf.get_input_embeddings()
    module.forward = module.forward
    return lambda: delattr(module, "forward")


def set_feedback(model: Coconut) -> Callable[[], None]:
    kept, model.feedback = model.feedback, Scaled()
    return lambda: setattr(model, "feedback", kept)


def adapt(model: Coconut) -> Callable[[], None]:
    attention = model.hf.base_model.layers[0].self_attn
    base = attention.o_proj
    attention.o_proj = Adapted(base)
    return lambda: setattr(attention, "o_proj", base)


def hook_all(model: Coconut) -> Callable[[], None]:
    return torch.nn.modules.module.register_module_forward_hook(lambda *_: None).remove


def patch_class(model: Coconut) -> Callable[[], None]:
    kind = type(model.hf.base_model.norm)
    kept = kind.forward
    kind.forward = lambda self, x: kept(self, x)
    return lambda: setattr(kind, "forward", kept)


@pytest.mark.parametrize("change", [add_hook, replace_forward, set_feedback, adapt, hook_all, patch_class])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_nothing_is_kept_where_python_may_change_between_calls(family: str, change) -> None:
    model, _ = make_pair(family)
    run = partial(generate, model, PROMPTS[:2], max_new_tokens=3)
    expected = run().token_ids
    before = runner_cache._kept[model]
    undo = change(model)
    assert run().token_ids == expected and model not in runner_cache._kept, (
        "the kept runner is not used, and none is kept"
    )
    undo()
    assert run().token_ids == expected and runner_cache._kept[model] is not before


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_replaced_hook_and_a_changed_feedback_are_seen(family: str, monkeypatch) -> None:
    model, _ = make_pair(family)
    run = partial(generate, model, PROMPTS[:2], max_new_tokens=3)
    called = []
    for name in "AB":
        handle = model.hf.base_model.norm.register_forward_hook(lambda *_, name=name: called.append(name))
        run()
        handle.remove()
        assert set(called) == {name}
        called.clear()
    set_feedback(model)
    for factor in (1.0, -3.0):
        model.feedback.factor = factor
        with monkeypatch.context() as patch:
            found = run(return_thoughts=True).thoughts
            patch.setattr(engine, "choose_runner", lambda model: (EagerRunner, "asked for"))
            for ours, theirs in zip(found, run(return_thoughts=True).thoughts, strict=True):
                assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("change", [add_hook, replace_forward])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_model_with_hooks_is_not_captured(family: str, change, monkeypatch) -> None:
    monkeypatch.setattr(Coconut, "device", torch.device("cuda"))
    model, _ = make_pair(family)
    assert choose_runner(model)[0] is runner_cache.acquire
    change(model)
    runner, reason = choose_runner(model)
    assert runner is EagerRunner and "embed_tokens has" in reason


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma2"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_of_the_optimizer_is_seen_by_the_kept_runner(family: str, fused: bool, monkeypatch) -> None:
    model, _ = make_pair(family)
    before = generate(model, PROMPTS, max_new_tokens=11).token_ids
    runner = runner_cache._kept[model]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=fused)
    model(torch.tensor([PROMPTS[0]]), labels=torch.tensor([PROMPTS[0]])).loss.backward()
    optimizer.step()
    after = generate(model, PROMPTS, max_new_tokens=11).token_ids
    assert runner_cache._kept[model] is runner, "weights written in place need no new capture"
    monkeypatch.setattr(engine, "choose_runner", lambda model: (EagerRunner, "asked for"))
    assert after == generate(model, PROMPTS, max_new_tokens=11).token_ids != before


def test_autocast_has_runners_of_its_own_which_are_not_kept() -> None:
    """Its copies of the weights die with it; a runner made outside would compute in the weights' dtype."""
    model, _ = make_pair("gpt2")
    expected = generate(model, PROMPTS, max_new_tokens=5).token_ids
    assert runner_cache._kept[model].passes.layers[0].qkv.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        runner = runner_cache.acquire(model, num_slots=64, max_rows=2, max_length=32, sampling=engine.Sampling())
        assert runner.passes.layers[0].qkv.dtype == runner.passes.head.dtype == torch.bfloat16
        assert runner.passes.layers[0].norm1.dtype == torch.float32
        under = generate(model, PROMPTS, max_new_tokens=5, return_thoughts=True)
        assert model not in runner_cache._kept and "fused kernels" in under.stats.reason
    again = generate(model, PROMPTS, max_new_tokens=5, return_thoughts=True)
    assert again.token_ids == expected
    for a, b in zip(under.thoughts, again.thoughts, strict=True):
        assert 0 < (a - b).abs().max() < 0.1 * b.abs().max(), "as far apart as bf16 is from fp32"


def test_a_runner_can_be_forgotten() -> None:
    model, _ = make_pair("gpt2")
    generate(model, PROMPTS, max_new_tokens=2)
    runner_cache.drop(model)
    assert model not in runner_cache._kept and runner_cache.held_bytes(model) == 0


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_the_runner_goes_when_the_model_goes(family: str) -> None:
    model, _ = make_pair(family)
    output = generate(model, PROMPTS, max_new_tokens=3, return_thoughts=True)
    runner = runner_cache._kept[model]
    cache, alive = weakref.ref(runner.cache), weakref.ref(model)
    assert runner_cache.held_bytes(model) > 0
    del runner
    gc.collect()
    gc.disable()  # freeing must not depend on the cycle collector
    try:
        del model
        assert alive() is None and cache() is None
        assert len(output.thoughts) == len(PROMPTS), "what it said stays"
    finally:
        gc.enable()


@pytest.mark.parametrize("chosen", [choose_runner, lambda model: (EagerRunner, "it has hooks")])
def test_a_model_that_runs_elsewhere_keeps_nothing_on_the_gpu(chosen, monkeypatch) -> None:
    model, _ = make_pair("gpt2")
    generate(model, PROMPTS, max_new_tokens=2)
    cache = weakref.ref(runner_cache._kept[model].cache)
    monkeypatch.setattr(engine, "choose_runner", chosen)
    generate(model, PROMPTS, max_new_tokens=2)
    assert model not in runner_cache._kept and cache() is None


def test_a_call_that_fails_leaves_no_runner_behind(monkeypatch) -> None:
    model, _ = make_pair("gpt2")
    expected = generate(model, PROMPTS, max_new_tokens=5).token_ids

    def interrupted(self, number, answer):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.Engine, "_finish", interrupted)
        assert generate(model, PROMPTS, max_new_tokens=5).stats.interrupted
    assert model not in runner_cache._kept
    assert generate(model, PROMPTS, max_new_tokens=5).token_ids == expected
