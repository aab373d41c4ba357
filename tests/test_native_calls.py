"""The native chain as `generate` uses it: formats asked for, what stats say, and other threads meanwhile."""

from __future__ import annotations

import copy
import functools
import multiprocessing
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from coconut_fast import generate, reference
from coconut_fast.infer import engine, native
from coconut_fast.infer.eager import EagerRunner
from tests.families import TOKENS, make_pair, make_row

CALLS = ("prefill", "think", "decode")


class Watched:
    """A chain that notes by how much `turns` moved during each of its calls."""

    def __init__(self, chain, turns: list[int]) -> None:
        self.chain, self.turns, self.moved = chain, turns, dict.fromkeys(CALLS, 0)

    def __getattr__(self, name: str):
        def call(*arguments: object) -> object:
            before = self.turns[0]
            result = method(*arguments)
            self.moved[name] += self.turns[0] - before
            return result

        method = getattr(self.chain, name)
        return call


@pytest.fixture
def patient():
    """The interpreter switches threads only where one releases the GIL."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    yield
    sys.setswitchinterval(before)


def test_other_python_threads_run_during_a_call(patient) -> None:
    model = native.NativeModel(make_pair("gpt2")[0], threads=1)
    turns, over = [0], threading.Event()
    chain = model.chain = Watched(model.chain, turns)

    def count() -> None:
        while not over.is_set():
            turns[0] += 1
            time.sleep(0)

    other = threading.Thread(target=count)
    other.start()
    try:
        for _ in range(200):  # on a busy machine a call may end before the other thread gets a core
            cache = model.make_cache(num_slots=32 * 64, max_rows=32)
            rows, hidden = cache.alloc(32), torch.zeros(32, 32)
            model.prefill(cache, rows, [list(range(20))] * 32, hidden)
            model.think(cache, rows, [20] * 32, hidden)
            model.decode(cache, rows, hidden, pending=[None] * 32, limits=[20] * 32)
            if all(chain.moved.values()):
                break
    finally:
        over.set()
        other.join()
    assert all(chain.moved.values()), chain.moved


PROMPTS = [make_row(9, 3, 1, seed=i) for i in range(4)]


@pytest.mark.parametrize("runner", ["native", "eager"])
def test_passes_are_counted_that_ran(runner: str, monkeypatch) -> None:
    """An answer that ends early takes no further passes, however many tokens were asked for."""
    model, _ = make_pair("gpt2")
    if runner == "eager":
        monkeypatch.setattr(engine, "choose_runner", lambda model: (EagerRunner, "asked for"))
    ask = functools.partial(generate, model, [[3, 4, 5]], temperature=2.0, seed=0)  # sampled, so that the tokens differ
    first = ask(max_new_tokens=3)
    assert first.stats.backend == runner and first.stats.token_passes == 2, "the first token is the prompt's"
    model.tokens = replace(model.tokens, eos=first.token_ids[0][1])
    assert ask(max_new_tokens=40).stats.token_passes == 1


def test_stats_say_who_ran_and_where_the_time_went(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "read_bandwidth", lambda threads: 1e9)
    model = make_pair("gpt2")[0]
    stats = generate(model, PROMPTS, max_new_tokens=5).stats
    assert (stats.backend, stats.reason) == ("native", "this family has a native chain on the CPU")
    # A prompt has nine words, two markers and one more word; its third thought is fed with the tokens after it.
    assert (stats.prompt_tokens, stats.thoughts, stats.latent_passes) == (4 * 12, 4 * 3, 3)
    assert 4 <= stats.new_tokens <= 4 * 5 and 1 <= stats.token_passes <= 5
    chain = native.packed(model).chain
    assert stats.bytes_per_latent_pass == chain.body_bytes > 2 * 12 * 32 * 32 * 4
    assert stats.bytes_per_token_pass == chain.body_bytes + chain.head_bytes
    assert min(stats.prefill_seconds, stats.think_seconds, stats.decode_seconds) > 0
    assert stats.seconds == stats.prefill_seconds + stats.think_seconds + stats.decode_seconds
    per_pass = stats.think_seconds / 3
    assert stats.seconds_per_latent_pass == per_pass
    assert stats.seconds_per_token_pass == stats.decode_seconds / stats.token_passes
    assert stats.bandwidth_share == pytest.approx(chain.body_bytes / per_pass / 1e9)
    assert stats.tokens_per_second == pytest.approx((stats.new_tokens + 12) / stats.seconds)
    other = generate(make_pair("gemma2")[0], PROMPTS, max_new_tokens=1).stats
    assert other.backend == "eager" and "no native chain: model type 'gemma2' is not one of" in other.reason


def test_int8_is_what_one_asks_for() -> None:
    model = make_pair("llama")[0]
    options = {"max_new_tokens": 2, "return_thoughts": True}
    exact, asked = generate(model, PROMPTS, **options), generate(model, PROMPTS, weights="int8", **options)
    assert asked.stats.reason.endswith(", int8 weights") and "int8" not in exact.stats.reason
    assert asked.stats.bytes_per_latent_pass < exact.stats.bytes_per_latent_pass / 3
    assert exact.thoughts is not None and asked.thoughts is not None
    ours, theirs = torch.cat(asked.thoughts), torch.cat(exact.thoughts)
    assert not torch.equal(ours, theirs) and (ours - theirs).norm() < 0.1 * theirs.norm()
    again = generate(model, PROMPTS, **options)
    assert all(map(torch.equal, again.thoughts or [], exact.thoughts)), "both formats are kept"
    with torch.no_grad():
        model.hf.model.layers[0].mlp.down_proj.weight.mul_(2)
    changed = generate(model, PROMPTS, weights="int8", **options)
    assert not torch.equal(torch.cat(changed.thoughts or []), ours), "and packed again with the weights"


@pytest.mark.parametrize("how", ["made in inference mode", "shared"])
def test_weights_whose_versions_say_nothing_are_known_by_their_bits(how: str) -> None:
    """Another process may write shared ones, which raises no version here; nor does a write through `.data`."""
    with torch.inference_mode(how == "made in inference mode"):
        model, other = make_pair("llama")[0], make_pair("llama")[0]
        for p in other.parameters():
            p.mul_(1.5) if how != "shared" else p.data.mul_(1.5)
        if how == "shared":
            model.share_memory()
        assert generate(model, PROMPTS, max_new_tokens=4).token_ids != (
            expected := generate(other, PROMPTS, max_new_tokens=4).token_ids
        )
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.data.copy_(q.data)
        assert generate(model, PROMPTS, max_new_tokens=4).token_ids == expected
        kept = native.packed(model)
        assert native.packed(model) is kept


def test_embeddings_that_the_chain_reads_stay_where_a_parameter_gets_other_storage() -> None:
    """In another thread, while this one is inside the chain."""
    model = make_pair("gpt2")[0]
    chain = native.packed(model)
    addresses = [p.data_ptr() for p in (model.hf.transformer.wte.weight, model.hf.transformer.wpe.weight)]
    for p in model.parameters():
        p.data = p.data.clone()
    assert [chain.ends[name].data_ptr() for name in ("embed", "positions")] == addresses
    assert native.packed(model) is not chain, "and the next call knows"


def test_a_forked_process_generates() -> None:
    """At a size for which PyTorch's own loops use several threads, which a child does not have."""
    model = make_pair("gpt2", n_embd=768, n_head=12)[0]
    expected = generate(model, PROMPTS, max_new_tokens=4).token_ids
    ours, theirs = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("fork")
    child = context.Process(
        target=lambda: theirs.send(generate(model, PROMPTS, max_new_tokens=4).token_ids),
        daemon=True,  # one that hangs fails the test but does not block the end of the run
    )
    child.start()
    theirs.close()
    assert ours.poll(60) and ours.recv() == expected
    child.join()
    assert child.exitcode == 0
    assert generate(model, PROMPTS, max_new_tokens=4).token_ids == expected


def test_a_forked_process_with_threads_of_its_own_packs_changed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its threads take the places in memory of its parent's, and so may have the same handles."""
    monkeypatch.setattr(native.machine, "cpus", lambda: 4)
    model = make_pair("gpt2")[0]
    generate(model, PROMPTS, max_new_tokens=4)

    def change_and_generate() -> None:
        for _ in range(3):
            with torch.no_grad():
                model.hf.transformer.ln_f.bias.add_(1)
            generate(model, PROMPTS, max_new_tokens=4)

    child = multiprocessing.get_context("fork").Process(target=change_and_generate, daemon=True)
    child.start()
    child.join(60)
    assert child.exitcode == 0


def test_the_instruction_set_is_that_of_the_time_of_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of the chain do not read the environment: a bad value, or a write meanwhile, would end the process."""
    model = make_pair("gpt2")[0]
    expected = generate(model, PROMPTS, max_new_tokens=4).token_ids
    monkeypatch.setenv("COCONUT_FAST_ISA", "avx3")
    assert generate(model, PROMPTS, max_new_tokens=4).token_ids == expected


def test_formats_that_cannot_be_had_are_refused() -> None:
    with pytest.raises(ValueError, match="weights: expected fp32, bf16, int8 or None, found 'int4'"):
        generate(make_pair("llama")[0], PROMPTS, weights="int4")
    with pytest.raises(ValueError, match="weights: found 'int8', but only the native chain packs weights; no native"):
        generate(make_pair("gemma2")[0], PROMPTS, weights="int8")


def _answers(model) -> list[list[int]]:
    return generate(model, [make_row(6, 3, 0, seed) for seed in range(4)], max_new_tokens=6).token_ids


def _like_the_oracle(model) -> None:
    plain = copy.deepcopy(model.hf)
    plain.set_attn_implementation("eager")
    rows = [torch.tensor(make_row(6, 3, 0, seed)) for seed in range(4)]
    assert _answers(model) == [reference.generate(plain, row, TOKENS.thought, TOKENS.eos, 6) for row in rows]


def _new_head(model) -> None:
    model.hf.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.hf.lm_head.weight))


def _a_new_matrix_where_an_earlier_one_was(model) -> None:
    layer = model.hf.transformer.h[0].mlp.c_fc
    memory = np.zeros(layer.weight.shape, np.float32)
    layer.weight = torch.nn.Parameter(torch.from_numpy(memory))
    _answers(model)
    layer.weight = None  # frees the parameter, not its memory
    memory[:] = torch.randn(memory.shape).numpy()
    layer.weight = torch.nn.Parameter(torch.from_numpy(memory))


def _a_square_matrix_transposed(model) -> None:
    layer = model.hf.transformer.h[0].attn.c_proj
    layer.weight.data = layer.weight.data.t()


@torch.no_grad()
def _a_new_parameter_on_the_same_memory(model) -> None:
    """Written as often as the one before, whose versions are not counted any more."""
    layer = model.hf.transformer.h[0].mlp.c_fc
    layer.weight = torch.nn.Parameter(torch.randn_like(layer.weight))
    layer.weight.mul_(2)
    _answers(model)
    layer.weight = torch.nn.Parameter(layer.weight.data)
    layer.weight.mul_(-2)


def _another_model(model) -> None:
    model.hf = make_pair("gpt2", seed=7)[0].hf


def _fewer_layers(model) -> None:
    model.hf.transformer.h = model.hf.transformer.h[:1]
    model.hf.config.num_hidden_layers = 1


@torch.no_grad()
def _final_bias(model) -> None:
    model.hf.transformer.ln_f.bias.normal_(std=5.0)


def _flat_norms(model) -> None:
    for module in model.hf.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 100.0


def _sharp_attention(model) -> None:
    for block in model.hf.transformer.h:
        block.attn.scaling *= 9


def _other_dtype_by_swapping(model) -> None:
    """Refused for tensors that have a weak reference."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.hf.double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    with torch.no_grad():
        model.hf.transformer.h[0].mlp.c_fc.weight.mul_(-2)


def _other_activation(model) -> None:
    for block in model.hf.transformer.h:
        block.mlp.act = torch.nn.ReLU()


CHANGES = [
    _new_head,
    _a_new_matrix_where_an_earlier_one_was,
    _a_square_matrix_transposed,
    _a_new_parameter_on_the_same_memory,
    _other_dtype_by_swapping,
    _another_model,
    _fewer_layers,
    _final_bias,
    _flat_norms,
    _sharp_attention,
    _other_activation,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_answers_with_its_new_weights(change) -> None:
    model, _ = make_pair("gpt2", tie_word_embeddings=False)
    before = _answers(model)
    change(model)
    _like_the_oracle(model)
    assert _answers(model) != before
    assert generate(model, [[1, 2]], max_new_tokens=1).stats.backend == "native"


def test_layers_beyond_those_of_the_configuration_are_left_out_as_transformers_does() -> None:
    model, _ = make_pair("llama")
    before = _answers(model)
    model.hf.config.num_hidden_layers = 1
    _like_the_oracle(model)
    assert _answers(model) != before
    assert generate(model, [[1, 2]], max_new_tokens=1).stats.backend == "native"


def test_weights_that_are_no_parameters_are_seen() -> None:
    model, _ = make_pair("gpt2")
    for layer in (model.hf.transformer.h[0].mlp.c_fc, model.hf.transformer.h[1].mlp.c_fc):
        weight = layer.weight.detach().clone()
        del layer.weight
        layer.register_buffer("weight", weight)
        _answers(model)
        for change in (lambda w: w.mul_(-2), lambda w: torch.randn_like(w) * 2):
            layer.weight = change(layer.weight)
            _like_the_oracle(model)
    assert generate(model, [[1, 2]], max_new_tokens=1).stats.backend == "native"
    weight = layer.weight
    del layer.weight
    layer.weight = weight
    _answers(model)
    layer.weight = torch.randn_like(weight)
    assert "transformer.h.1.mlp.c_fc has a weight that is no parameter" in generate(model, [[1]]).stats.reason
    _like_the_oracle(model)


def test_code_of_the_users_own_is_not_passed_over() -> None:
    """A hook on the feedback is the way to intervene on a thought."""
    model, _ = make_pair("gpt2")
    assert generate(model, [[1, 2]], max_new_tokens=1).stats.backend == "native"
    hook = model.feedback.register_forward_hook(lambda module, inputs, thought: thought * 0)
    stats = generate(model, [[1, 2, 94, 3]], max_new_tokens=1).stats
    assert stats.backend == "eager" and "module feedback has a forward hook" in stats.reason
    hook.remove()

    class Other(type(model)):
        def head(self, hidden_ND: torch.Tensor) -> torch.Tensor:
            return super().head(hidden_ND).index_fill(1, torch.tensor([5]), -torch.inf)

    model.__class__ = Other
    stats = generate(model, [[1, 2]], max_new_tokens=1).stats
    assert stats.backend == "eager" and "Other has a head of its own" in stats.reason


def test_a_model_made_in_inference_mode_generates() -> None:
    expected = _answers(make_pair("gpt2")[0])
    with torch.inference_mode():
        model, _ = make_pair("gpt2")
        assert _answers(model) == expected
    assert _answers(model) == expected
