"""The native chain: families, formats, instruction sets against Hugging Face in fp64; exact where it must be."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from coconut_fast.infer import native
from coconut_fast.infer.decode import ActiveAnswer
from coconut_fast.infer.eager import EagerRunner
from coconut_fast.infer.prompts import Piece, Prompt
from coconut_fast.infer.sampling import Sampling, sample
from coconut_fast.model.coconut import Coconut
from coconut_fast.model.feedback import make_feedback
from coconut_fast.tokens import LatentTokens
from tests.compare import assert_as_good_as_torch
from tests.test_plan import ROPES, gpt2, llama_like

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22], [30], [40, 41, 42, 43, 44]]
COUNTS = [3, 5, 0]
MODELS = {
    "gpt2": lambda: gpt2(scale_attn_by_inverse_layer_idx=True),
    "gpt2-relu": lambda: gpt2(activation_function="relu", n_head=3, n_inner=70),
    "gpt2-erf": lambda: gpt2(activation_function="gelu"),
    "llama": lambda: llama_like("Llama"),
    "llama-biased": lambda: llama_like("Llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "mistral": lambda: llama_like("Mistral", sliding_window=7),
    "qwen2": lambda: llama_like("Qwen2"),
    "qwen3": lambda: llama_like("Qwen3", head_dim=24),
    # A head is a pair of vectors, one vector and a rest, at any width; down's sums have several segments of 256.
    "qwen3-wide": lambda: llama_like("Qwen3", head_dim=56, intermediate_size=600),
}


def random_model(name: str, dtype: torch.dtype = torch.float32, **changes: object) -> nn.Module:
    torch.manual_seed(0)
    model = (llama_like("Llama", **changes) if changes else MODELS[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # so that norms, biases and scores all matter
            parameter.mul_(2.0).add_(0.05 * torch.randn_like(parameter))
    return model.to(dtype)


def wrap(hf: nn.Module, **options: object) -> Coconut:
    return Coconut(copy.deepcopy(hf), LatentTokens(thought=3, eos=2), **options)


def chains(hf: nn.Module, prompts: list[list[int]] = PROMPTS, counts: list[int] = COUNTS) -> torch.Tensor:
    """Hugging Face's own result, without a cache: every state of every row's chain, concatenated."""
    states = []
    with torch.no_grad():
        for prompt, count in zip(prompts, counts, strict=True):
            embeds = hf.get_input_embeddings()(torch.tensor([prompt]))
            for _ in range(count + 1):
                state = hf.base_model(inputs_embeds=embeds).last_hidden_state[:, -1:]
                states.append(state[0, 0])
                embeds = torch.cat([embeds, state], 1)
    return torch.stack(states)


def native_chains(
    model: native.NativeModel, prompts: list[list[int]] = PROMPTS, counts: list[int] = COUNTS
) -> torch.Tensor:
    cache = model.make_cache(num_slots=16 * 4 * len(prompts), max_rows=len(prompts))
    for side in (*cache.keys, *cache.values):
        side.fill_(float("nan"))
    rows = cache.alloc(len(prompts))
    hidden = torch.full((len(prompts), model.plan.dim), float("nan"))
    model.prefill(cache, rows, prompts, hidden)
    fed = model.think(cache, rows, counts, hidden, keep=True)
    states = []
    for row, part in zip(hidden, fed.split(counts), strict=True):
        states += [*part, row]
    return torch.stack(states)


def quantised(hf: nn.Module) -> nn.Module:
    """The model with its matrices rounded to what int8 weights represent."""
    hf = copy.deepcopy(hf)
    ends = (hf.get_input_embeddings(), hf.get_output_embeddings())
    with torch.no_grad():
        for module in hf.modules():
            weight = getattr(module, "weight", None)
            if weight is None or weight.dim() != 2 or module in ends or isinstance(module, nn.Embedding):
                continue
            rows = weight if isinstance(module, nn.Linear) else weight.t()
            scale = rows.abs().amax(1, keepdim=True).float() / 127
            rows.copy_((rows.float() / scale).round() * scale)
    return hf


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_chains_are_as_good_as_torch(name: str, weights: str) -> None:
    hf = random_model(name, torch.bfloat16 if weights == "bf16" else torch.float32)
    ours = native_chains(native.NativeModel(wrap(hf), threads=1))
    assert_as_good_as_torch(ours, chains(hf), chains(copy.deepcopy(hf).double()), what=name)


@pytest.mark.parametrize("name", MODELS)
def test_int8_chains_do_what_their_weights_say(name: str) -> None:
    hf = random_model(name, torch.float32)
    ours = native_chains(native.NativeModel(wrap(hf), weights="int8", threads=1))
    truth = quantised(hf.double())
    plain = quantised(random_model(name, torch.float32)).bfloat16()
    assert_as_good_as_torch(ours, chains(plain), chains(truth), what=name)


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_every_instruction_set(isa: str, weights: str) -> None:
    for name in ("gpt2", "qwen3", "qwen3-wide"):
        hf = random_model(name, torch.bfloat16 if weights != "fp32" else torch.float32)
        model = native.NativeModel(wrap(hf), weights=weights, threads=1)
        assert model.chain.isa == isa
        target = quantised(hf) if weights == "int8" else hf
        truth = chains(quantised(copy.deepcopy(hf).double()) if weights == "int8" else copy.deepcopy(hf).double())
        assert_as_good_as_torch(native_chains(model), chains(target), truth, what=f"{name} {isa}")


def test_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COCONUT_FAST_ISA", "sse9")
    with pytest.raises(ValueError, match="COCONUT_FAST_ISA is sse9"):
        native.NativeModel(wrap(random_model("gpt2")), threads=1)


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_rope_scaling(rope: dict[str, object]) -> None:
    hf = random_model("", rope_parameters={"rope_theta": 10000.0, **rope})
    ours = native_chains(native.NativeModel(wrap(hf), threads=1))
    assert_as_good_as_torch(ours, chains(hf), chains(copy.deepcopy(hf).double()))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_a_row_does_not_depend_on_its_batch_or_on_threads(weights: str) -> None:
    hf = random_model("qwen3-wide", torch.bfloat16 if weights != "fp32" else torch.float32)
    # Enough rows that products prefetch keys and values, from several pages per row.
    prompts = [[(7 * i + j) % 99 for j in range(1 + 7 * i % 37)] for i in range(21)]
    counts = [i % 4 for i in range(21)]
    together = native_chains(native.NativeModel(wrap(hf), weights=weights, threads=3), prompts, counts)
    model = native.NativeModel(wrap(hf), weights=weights, threads=1)
    alone = [native_chains(model, [p], [c]) for p, c in zip(prompts, counts, strict=True)]
    assert torch.equal(together, torch.cat(alone))


def test_prompts_longer_than_a_pass_and_more_rows_than_a_call() -> None:
    hf = random_model("llama")
    model = native.NativeModel(wrap(hf), threads=1)
    prompts = [[(i + j) % 99 for j in range(100 if i == 3 else 2)] for i in range(70)]
    counts = [i % 2 for i in range(70)]
    cache = model.make_cache(num_slots=3000, max_rows=70)
    rows = cache.alloc(70)
    hidden = torch.empty(70, 48)
    model.prefill(cache, rows, prompts, hidden)
    model.think(cache, rows, counts, hidden)
    for i in (0, 3, 65, 69):
        truth = chains(copy.deepcopy(hf).double(), [prompts[i]], [counts[i]])[-1]
        assert_as_good_as_torch(hidden[i], chains(hf, [prompts[i]], [counts[i]])[-1], truth)


def test_forked_rows_share_their_prompt() -> None:
    model = native.NativeModel(wrap(random_model("llama")), threads=2)
    cache = model.make_cache(num_slots=256, max_rows=8)
    (row,) = cache.alloc(1)
    hidden = torch.empty(1, 48)
    model.prefill(cache, [row], [PROMPTS[0]], hidden)
    rows = [row, *cache.fork([row, row])]
    states = hidden.repeat(3, 1)
    model.prefill(cache, rows, [[1], [2, 3], [1]], states)
    model.think(cache, rows, [2, 2, 2], states)
    assert torch.equal(states[0], states[2])
    for i, tail in enumerate([[1], [2, 3]]):
        alone = native_chains(model, [PROMPTS[0] + tail], [2])[-1]
        assert torch.equal(states[i], alone)


@pytest.mark.parametrize("feedback", ["rescale", "pause"])
def test_thoughts_go_through_the_feedback(feedback: str) -> None:
    hf = random_model("gpt2")
    model = wrap(hf, feedback=make_feedback(feedback, hf.get_input_embeddings()))
    runner = native.NativeModel(model, threads=1)
    cache = runner.make_cache(num_slots=64, max_rows=1)
    rows, hidden = cache.alloc(1), torch.zeros(1, 48)
    runner.prefill(cache, rows, [PROMPTS[0]], hidden)
    runner.think(cache, rows, [2], hidden)

    def run(reference: nn.Module) -> torch.Tensor:
        embeds = reference.get_input_embeddings()(torch.tensor([PROMPTS[0]]))
        for _ in range(3):
            state = reference.base_model(inputs_embeds=embeds).last_hidden_state[0, -1:]
            fed = state / state.norm() * model.feedback.mean_norm if feedback == "rescale" else model.feedback(state)
            embeds = torch.cat([embeds, fed[None]], 1)
        return state

    with torch.no_grad():
        assert_as_good_as_torch(hidden, run(hf), run(copy.deepcopy(hf).double()))


# ---- tokens ---------------------------------------------------------------------------------------------------------


def greedy(hf: nn.Module, ids: list[int], count: int) -> list[int]:
    made: list[int] = []
    with torch.no_grad():
        for _ in range(count):
            made.append(int(hf(torch.tensor([ids + made])).logits[0, -1].argmax()))
    return made


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_hugging_face(name: str) -> None:
    hf = random_model(name)
    model = native.NativeModel(wrap(hf), threads=1)
    cache = model.make_cache(num_slots=256, max_rows=3)
    rows, hidden = cache.alloc(3), torch.empty(3, 48)
    model.prefill(cache, rows, PROMPTS, hidden)
    first = model.decode(cache, rows, hidden, pending=[None] * 3, limits=[1, 4, 2])
    more = model.decode(cache, rows, hidden, pending=[t[-1] for t in first], limits=[7, 4, 6])
    for prompt, a, b in zip(PROMPTS, first, more, strict=True):
        assert a + b == greedy(hf, prompt, 8)
    assert cache.layout.lengths[torch.tensor(rows)].tolist() == [len(p) + 7 for p in PROMPTS]


def test_rows_stop_by_themselves() -> None:
    hf = random_model("llama")
    model = native.NativeModel(wrap(hf), threads=1)
    whole = [greedy(hf, p, 10) for p in PROMPTS]
    stop = whole[0][3]
    cache = model.make_cache(num_slots=256, max_rows=3)
    rows, hidden = cache.alloc(3), torch.empty(3, 48)
    model.prefill(cache, rows, PROMPTS, hidden)
    made = model.decode(cache, rows, hidden, pending=[None] * 3, limits=[10, 0, 10], stops=[stop])
    for got, expected, limit in zip(made, whole, [10, 0, 10], strict=True):
        cut = expected.index(stop) + 1 if stop in expected else 10
        assert got == expected[: min(cut, limit)]
    lengths = [len(p) + max(0, len(m) - 1) for p, m in zip(PROMPTS, made, strict=True)]
    assert cache.layout.lengths[torch.tensor(rows)].tolist() == lengths


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0),
        Sampling(0.5),
        Sampling(1.3, top_k=5),
        Sampling(1.0, top_p=0.6),
        Sampling(0.8, top_k=40, top_p=0.9),
        Sampling(1.0, top_k=1500),
        Sampling(2.0, top_p=0.995),
        Sampling(0.7, top_k=9999),
    ],
    ids=str,
)
def test_samples_are_those_of_the_eager_sampler(sampling: Sampling) -> None:
    hf = random_model("", vocab_size=3001)  # flat logits: top_p reaches beyond the candidates kept while streaming
    model = native.NativeModel(wrap(hf), threads=1)
    rows_wanted = 24
    cache = model.make_cache(num_slots=rows_wanted * 16, max_rows=rows_wanted)
    rows, hidden = cache.alloc(rows_wanted), torch.empty(rows_wanted, 48)
    model.prefill(cache, rows, [[i, 3 * i] for i in range(rows_wanted)], hidden)
    seeds = [(1 << 64) - 1 - 977 * i for i in range(rows_wanted)]
    steps = list(range(rows_wanted))
    made = model.decode(
        cache,
        rows,
        hidden,
        pending=[None] * rows_wanted,
        limits=[1] * rows_wanted,
        sampling=sampling,
        seeds=seeds,
        first_steps=steps,
    )
    logits = hf.lm_head(hidden).detach()
    expected = sample(logits, seeds, steps, sampling.temperature, sampling.top_k, sampling.top_p)
    assert [t for row in made for t in row] == expected.tolist()


def test_runner_does_what_the_eager_runner_does() -> None:
    model = wrap(random_model("qwen3"))
    options = {"num_slots": 512, "max_rows": 8, "max_length": 128, "sampling": Sampling(1.0, top_p=0.8)}
    prompts = [
        Prompt((5, 6, 7), (Piece((5, 6, 7), 0),), 4),
        Prompt((8, 3, 3, 9, 3, 4), (Piece((8,), 2), Piece((9,), 1), Piece((4,), 0)), 4),
        Prompt((11, 12, 3, 3, 3, 4, 4), (Piece((11, 12), 3), Piece((4, 4), 0)), 4),
    ]
    results = []
    for runner in (EagerRunner(model, **options), native.NativeRunner(model, **options)):
        rows = runner.cache.alloc(3)
        thoughts: list[list[torch.Tensor]] = [[], [], []]
        hidden = runner.prefill_and_think(rows, prompts, thoughts)
        answers = [ActiveAnswer(row, 17 * row + 5, 9, []) for row in rows]
        runner.first_tokens(hidden, answers)
        runner.decode(answers, 4)
        runner.decode(answers, 8)
        results.append(([d.tokens for d in answers], torch.stack([t for kept in thoughts for t in kept])))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-5)


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_refused_by_name() -> None:
    hf = random_model("llama")
    with torch.no_grad():
        hf.model.layers[1].mlp.up_proj.weight[3, 4] = float("inf")
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight holds NaN or infinite"):
        native.NativeModel(wrap(hf), threads=1)


def test_models_that_cannot_run_natively_are_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="activation of module transformer.h.0.mlp is a QuickGELU"):
        native.NativeModel(wrap(gpt2(activation_function="quick_gelu")))
    with pytest.raises(ValueError, match=r"torch.float16"):
        native.NativeModel(wrap(gpt2().half()))
    with pytest.raises(ValueError, match="feedback Tanh"):
        native.NativeModel(wrap(gpt2(), feedback=nn.Tanh()))


def test_bad_calls_are_refused_and_leave_the_chain_usable() -> None:
    model = native.NativeModel(wrap(random_model("gpt2")), threads=2)
    before = native_chains(model)
    cache = model.make_cache(num_slots=256, max_rows=4, max_length=128)
    rows, hidden = cache.alloc(2), torch.zeros(2, 48)
    with pytest.raises(ValueError, match="token id 99 is out of range"):
        model.prefill(cache, rows, [[1], [99]], hidden)
    with pytest.raises(ValueError, match="the model has 64"):
        model.think(cache, rows, [1, 70], hidden)
    with pytest.raises(ValueError, match="hidden must be a contiguous CPU tensor of 96 Float"):
        model.think(cache, rows, [1, 1], hidden.double())
    with pytest.raises(ValueError, match=r"places it has in the cache"):
        one = torch.ones(1, dtype=torch.int32)
        chain = model.chain
        chain.think(cache.layout, cache.keys, cache.values, one * rows[0], one * 5000, one, hidden[:1])
    with pytest.raises(ValueError, match="expected 2 layers, found 1"):
        chain.think(cache.layout, cache.keys[:1], cache.values[:1], one, one, one, hidden[:1])
    assert cache.layout.lengths.tolist() == [0] * 4
    assert torch.equal(native_chains(model), before)


def test_packed_again_when_weights_change() -> None:
    model = wrap(random_model("gpt2"))
    first = native.packed(model)
    assert native.packed(model) is first
    with torch.no_grad():
        model.hf.transformer.h[0].mlp.c_fc.weight.add_(0.1)
    assert native.packed(model) is not first


def test_a_write_through_data_is_known_once_the_state_is_loaded() -> None:
    model = wrap(random_model("gpt2"))
    before = native_chains(native.packed(model))
    model.hf.transformer.h[0].mlp.c_fc.weight.data.add_(0.1)
    model.load_state_dict(model.state_dict())
    after = native_chains(native.packed(model))
    assert not torch.equal(after, before) and torch.equal(after, native_chains(native.NativeModel(model)))


def test_bandwidth_is_read_by_any_number_of_threads() -> None:
    assert native.read_bandwidth(1) > 1e8
