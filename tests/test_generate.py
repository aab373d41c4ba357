"""generate(): thought counts, sampling, samples, thoughts, batch independence, and what is refused."""

from __future__ import annotations

import functools
import warnings
from array import array
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from coconut_fast import generate, load, reference
from coconut_fast.data.graphs import ANSWER, EDGE, EOS
from coconut_fast.infer import engine
from coconut_fast.infer.eager import EagerRunner
from coconut_fast.infer.prompts import read_prompts
from coconut_fast.train.build import build
from tests.families import TOKENS, VOCAB, make_pair, make_row
from tests.runs import chains, tiny

pytestmark = pytest.mark.usefixtures("runner")


@pytest.fixture(scope="module")
def model():
    return make_pair("llama")[0]


PROMPTS = [make_row(5, 2, 0, 1), make_row(12, 0, 0, 2), make_row(3, 5, 0, 3), [4, 5, 6], make_row(7, 1, 0, 4)]


def test_thoughts_are_counted_placed_or_replaced(model) -> None:
    own = generate(model, PROMPTS, max_new_tokens=4)
    assert own.num_thoughts == [2, 0, 5, 0, 1]
    question = PROMPTS[0][:5]
    framed = generate(model, [question], num_thoughts=2, max_new_tokens=4)
    assert framed.num_thoughts == [2]
    assert framed.token_ids[0] == own.token_ids[0]
    replaced = generate(model, [PROMPTS[2], PROMPTS[1]], num_thoughts=[2, 3], max_new_tokens=4)
    assert replaced.num_thoughts == [2, 3]
    assert replaced.token_ids[1] == generate(model, [PROMPTS[1][:12]], num_thoughts=3, max_new_tokens=4).token_ids[0]


def test_thoughts_in_several_places_and_at_the_end() -> None:
    model, plain = make_pair("gpt2")
    prompts = [[5, 94, 94, 6, 7, 94, 8], [3, 4, 94, 94, 94], [9, 94, 2]]
    expected = [reference.generate(plain, torch.tensor(p), TOKENS.thought, TOKENS.eos, 6) for p in prompts]
    assert generate(model, prompts, max_new_tokens=6).token_ids == expected


def test_returned_thoughts_are_the_hidden_states_fed_back() -> None:
    # only the eager runner computes in fp64; test_native.py tests the same of the native chain
    model, plain = make_pair("gpt2", torch.float64)
    output = generate(model, PROMPTS, max_new_tokens=2, return_thoughts=True)
    assert output.thoughts is not None
    for prompt, thoughts in zip(PROMPTS, output.thoughts, strict=True):
        with torch.no_grad():
            embeds = reference.fill_thoughts(plain, torch.tensor(prompt), TOKENS.thought)
        expected = embeds[torch.tensor(prompt) == TOKENS.thought]
        torch.testing.assert_close(thoughts, expected, rtol=1e-12, atol=1e-12)


def test_greedy_does_not_depend_on_batch_or_order(model) -> None:
    expected = [generate(model, [p], max_new_tokens=9).token_ids[0] for p in PROMPTS]
    for size in (1, 2, 5):
        assert generate(model, PROMPTS, max_new_tokens=9, batch_size=size).token_ids == expected
    assert generate(model, PROMPTS[::-1], max_new_tokens=9, batch_size=3).token_ids == expected[::-1]


def test_sampling_does_not_depend_on_batch_or_order(model) -> None:
    options = {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "max_new_tokens": 9}
    expected = generate(model, PROMPTS, seed=3, **options).token_ids
    assert generate(model, PROMPTS, seed=3, batch_size=2, **options).token_ids == expected
    assert generate(model, PROMPTS[::-1], seed=3, **options).token_ids == expected[::-1]
    assert generate(model, PROMPTS, seed=4, **options).token_ids != expected


def test_without_a_seed_torchs_generator_gives_one(model) -> None:
    ask = functools.partial(generate, model, PROMPTS, temperature=1.0, max_new_tokens=9)
    torch.manual_seed(5)
    first, second = ask().token_ids, ask().token_ids
    torch.manual_seed(5)
    assert first != second and ask().token_ids == first


def test_samples_of_a_prompt_share_one_reading_and_differ(model) -> None:
    options = {"temperature": 1.0, "seed": 1, "max_new_tokens": 8}
    samples = generate(model, PROMPTS, num_samples=4, batch_size=5, **options)
    assert len(samples.token_ids) == 20
    assert samples.num_thoughts[:5] == [2, 2, 2, 2, 0]
    assert len({tuple(ids) for ids in samples.token_ids[:4]}) > 1
    # the n-th sample of a prompt is what the n-th copy of the prompt gets
    copies = generate(model, [p for p in PROMPTS for _ in range(4)], **options)
    assert copies.token_ids == samples.token_ids
    assert samples.stats.prompt_tokens * 4 == copies.stats.prompt_tokens


def test_the_head_never_runs_in_a_latent_pass(model, monkeypatch) -> None:
    monkeypatch.setattr(engine, "choose_runner", lambda model: (EagerRunner, "its head is a Python call"))
    rows_seen = []
    head = type(model).head
    monkeypatch.setattr(type(model), "head", lambda self, h: rows_seen.append(len(h)) or head(self, h))
    output = generate(model, [make_row(5, 6, 0, 1)], max_new_tokens=3)
    assert rows_seen == [1] * output.stats.new_tokens


def test_end_of_text_ends_an_answer_and_is_not_part_of_it(model) -> None:
    first = generate(model, [PROMPTS[0]], max_new_tokens=5).token_ids[0]
    stop = type(TOKENS)(start=93, thought=94, end=95, eos=first[2])
    before, model.tokens = model.tokens, stop
    try:
        assert generate(model, [PROMPTS[0]], max_new_tokens=5).token_ids[0] == first[: first.index(first[2])]
    finally:
        model.tokens = before


def test_ctrl_c_returns_what_is_finished(model, monkeypatch) -> None:
    finish = engine.Engine._finish

    def interrupted(self, number, answer):
        finish(self, number, answer)
        if len(self.finished) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(engine.Engine, "_finish", interrupted)
    output = generate(model, PROMPTS, max_new_tokens=3, batch_size=1)
    assert output.stats.interrupted
    assert [ids is not None for ids in output.token_ids] == [True, True, False, False, False]


def test_prompts_of_a_group_fit_one_forward(model, monkeypatch) -> None:
    expected, groups = generate(model, PROMPTS, max_new_tokens=3).token_ids, []
    runner, _ = engine.choose_runner(model)
    begin = runner.prefill_and_think

    def watched(self, rows, prompts, kept):
        groups.append([len(p.ids) for p in prompts])
        return begin(self, rows, prompts, kept)

    monkeypatch.setattr(runner, "max_prefill_tokens", 16)
    monkeypatch.setattr(runner, "prefill_and_think", watched)
    assert generate(model, PROMPTS, max_new_tokens=3).token_ids == expected
    assert groups == [[9], [14], [10, 3], [10]]


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_of_the_optimizer_is_seen(fused: bool, tmp_path) -> None:
    """Weights packed for an engine are packed again; a fused optimizer does not raise their version counters."""
    model, _ = make_pair("gpt2")
    row, options = make_row(9, 3, 0, 1), {"return_thoughts": True, "max_new_tokens": 1}
    before = generate(model, [row], **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=fused)
    model(torch.tensor([row]), labels=torch.tensor([row])).loss.backward()
    optimizer.step()
    after = generate(model, [row], **options)
    model.save_pretrained(tmp_path)
    assert not torch.equal(after.thoughts[0], before.thoughts[0])
    assert torch.equal(after.thoughts[0], generate(load(tmp_path), [row], **options).thoughts[0])


def test_tensors_are_prompts_and_numbers_may_be_large(model) -> None:
    expected = generate(model, [[1, 2], [3, 4]], temperature=1.0, seed=2**70, max_new_tokens=4).token_ids
    options = {"temperature": 1, "seed": 2**70, "top_k": 2**40, "max_new_tokens": 4}
    assert generate(model, torch.tensor([[1, 2], [3, 4]]), **options).token_ids == expected
    assert generate(model, [torch.tensor([1, 2]), (3, 4)], **options).token_ids == expected
    assert generate(model, (range(i, i + 2) for i in (1, 3)), **options).token_ids == expected


def test_rows_of_longrope_end_at_its_original_length() -> None:
    """A longer row would change the others' rotation frequencies (transformers goes by the longest row of a call)."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0, 5.0, 6.0, 9.0]}
    model, plain = make_pair("phi3", rope_parameters=rope, original_max_position_embeddings=32)
    short, long = make_row(5, 2, 1, 1), make_row(40, 2, 1, 2)
    expected = reference.generate(plain, torch.tensor(short), TOKENS.thought, TOKENS.eos, 22)
    assert generate(model, [short, make_row(12, 4, 1, 3)], max_new_tokens=12).token_ids[0] == expected[:12]
    assert generate(model, [short], max_new_tokens=22).token_ids[0] == expected
    with pytest.raises(ValueError, match="prompt 1 has 45 tokens .* more than the 32 positions"):
        generate(model, [short, long], max_new_tokens=8)


def test_no_prompts_give_no_answers() -> None:
    model, _ = make_pair("gpt2")
    assert generate(model, []).token_ids == []


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1, 2]], {"max_new_tokens": 0}, "max_new_tokens: expected an int of at least 1, found 0"),
        ([[1, 2]], {"max_new_tokens": [1, 2]}, r"max_new_tokens: expected one per prompt \(1\), found 2"),
        ([[1, 2]], {"max_new_tokens": [True]}, "max_new_tokens of prompt 0: expected an int of at least 1, found True"),
        ([[1, 2]], {"num_thoughts": 10**12}, "prompt 0 gets 1000000000000 thoughts, more than the 256 positions"),
        ([[1, 2]], {"num_thoughts": 257}, "prompts: prompt 0 gets 257 thoughts, more than the 256 positions"),
        ([[1]], {"num_thoughts": 256, "max_new_tokens": 1}, "prompts: prompt 0 has 259 tokens with its thoughts"),
        ([[1], [2]], {"num_thoughts": {0: 1, 1: 2}}, "num_thoughts: expected an int of at least 0, found {0: 1, 1: 2}"),
        ([[1, 2]], {"temperature": -1.0}, "temperature: expected"),
        ([[1, 2]], {"top_p": 0.0}, "top_p: expected"),
        ([[1, 2]], {"top_k": -1}, "top_k: expected"),
        ([[1, 2]], {"num_samples": 0}, "num_samples: expected"),
        ([[1, 2]], {"batch_size": 0}, "batch_size: expected"),
        ([[1, 2]], {"num_thoughts": -1}, "num_thoughts: expected an int of at least 0, found -1"),
        ([[1, 2]], {"num_thoughts": [1, 2]}, r"num_thoughts: expected one per prompt \(1\), found 2"),
        ([[1], []], {}, "prompt 1 is empty"),
        ("", {}, "prompt 0 is empty"),
        ([1, 2], {}, "one flat list of ints"),
        (torch.tensor([1, 2]), {}, "one flat list of ints"),
        (None, {}, "prompts: expected a string, strings, or lists of token ids; found None"),
        ([[1], None], {}, "prompt 1 is None, expected a string or a list of token ids"),
        ([iter([1])], {}, "prompt 0 is <.*iterator .*, expected a string or a list of token ids"),
        (torch.tensor(4), {}, r"lists of token ids; found tensor\(4\)"),
        (np.array("go"), {}, "lists of token ids; found array"),
        ([[1, 2], b"go"], {}, "prompt 1 is b'go', expected a string or a list of token ids"),
        ([[1], [True, False]], {}, "prompt 1 holds booleans, expected token ids"),
        ([torch.tensor([True, False])], {}, "prompt 0 holds booleans, expected token ids"),
        ([np.array([True, False])], {}, "prompt 0 holds something that is no token id: 'numpy.bool"),
        ([[1, 2.5]], {}, "prompt 0 holds something that is no token id: 'float'"),
        ([[1, 2]], {"num_thoughts": 1.5}, "num_thoughts: expected an int of at least 0, found 1.5"),
        ([[1, 2]], {"num_thoughts": "2"}, "num_thoughts: expected an int of at least 0, found '2'"),
        ([[1, 2]], {"temperature": "hot"}, "temperature: expected a finite number of at least 0, found 'hot'"),
        ([[1, 2]], {"temperature": float("nan")}, "temperature: expected"),
        ([[1, 2]], {"temperature": True}, "temperature: expected a finite number of at least 0, found True"),
        ([[1, 2]], {"top_p": "x"}, "top_p: expected"),
        ([[1, 2]], {"top_p": True}, "top_p: expected a number above 0 and up to 1, found True"),
        ([[1, 2]], {"seed": True}, "seed: expected an int or None, found True"),
        ([[1, 2]], {"seed": 1.5}, "seed: expected an int or None, found 1.5"),
        ([[1, -2]], {}, "prompt 0 holds token id -2, expected 0 to"),
        ([[1, 2]], {"num_samples": 3}, "num_samples: found 3 at temperature 0, where all answers to a prompt are one"),
        ([[1, 2]], {"num_samples": 10**9, "temperature": 1.0}, "batch_size: a cache of 1000000000 rows needs .* GB"),
        ([[1, 2]], {"num_samples": 10**30, "temperature": 1.0}, "batch_size: a cache of 10* rows needs .* GB"),
        ([[1, VOCAB]], {}, f"prompt 0 holds token id {VOCAB}, expected 0 to {VOCAB - 1}"),
        ([[94, 1]], {}, "prompt 0 starts with a thought"),
        ([[1] * 250], {"max_new_tokens": 8}, "more than the 256 positions"),
        ([[1], [1, 94, 2, 94]], {"num_thoughts": 3}, "prompts: prompt 1: .* stand in several places"),
        ({"input_ids": [1, 2]}, {}, "expected a string, strings, or lists of token ids; found {'input_ids"),
        ([{"question": "1"}], {}, "prompt 0 is {'question': '1'}, expected a string or a list of token ids"),
        ("text", {}, "no tokenizer"),
    ],
)
def test_bad_input_is_refused_before_any_work(model, prompts, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, **options)
    assert generate(model, [[1, 2]], max_new_tokens=1).token_ids  # usable afterwards


def test_a_hugging_face_model_is_named(model) -> None:
    for wrong in (model.hf, None):
        with pytest.raises(ValueError, match=f"model: found a {type(wrong).__name__}, expected a Coconut model"):
            generate(wrong, [[1, 2]])


def test_a_word_without_a_token_is_named(tmp_path) -> None:
    """Where the vocabulary has no token for unknown words, as with the symbols of graph problems."""
    model = build(tiny(tmp_path, tokenizer="symbols"), [])
    assert generate(model, "1 2 [Q] 2 3 [R] 1", num_thoughts=0, max_new_tokens=1).token_ids[0]
    expected = "prompt 1 holds 'hello', which is none of the 40 words of the model's tokenizer"
    with pytest.raises(ValueError, match=expected):
        generate(model, ["1 2", "1 <|latent|> hello 2"], max_new_tokens=1)


def test_words_that_become_the_unknown_token_are_told_of(tmp_path) -> None:
    """All become one token to the model, and nobody would know why its answers are poor."""
    model = build(tiny(tmp_path), chains(8))
    message = r"^prompts: the tokenizer does not know 4 of the words, first 'zorp,' in prompt 1; .* as <\|unknown\|>"
    with pytest.warns(UserWarning, match=message) as told:
        generate(model, ["go on from ada", "go zorp, blub", [7, 7], "zorp"], num_thoughts=0, max_new_tokens=1)
    assert len(told) == 1
    with pytest.warns(UserWarning, match="does not know 1 of the words, first white space or the like in prompt 0"):
        generate(model, "go on from ada ", num_thoughts=0, max_new_tokens=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # 2: the unknown token itself, given on purpose
        generate(model, ["go on from ada", [2, 2]], num_thoughts=0, max_new_tokens=1)


def test_answers_without_thoughts_that_nobody_asked_for_are_told_of(tmp_path) -> None:
    """An official checkpoint does not say how many thoughts it was trained with."""
    model = build(tiny(tmp_path), chains(8))
    prompts = ["go on from ada", "go<|start-latent|><|latent|><|end-latent|>", [7, 7], "ada"]
    message = "^num_thoughts: the model does not say how many it was trained with, so 2 of 4 prompts get none; num_thou"
    with pytest.warns(UserWarning, match=message) as told:
        assert generate(model, prompts, max_new_tokens=1).num_thoughts == [0, 1, 0, 0]
    assert len(told) == 1 and told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, prompts, num_thoughts=0, max_new_tokens=1)
        generate(model, prompts[1:3], max_new_tokens=1)
        model.settings.num_thoughts = 2
        assert generate(model, prompts, max_new_tokens=1).num_thoughts == [2, 1, 0, 2]


def test_prompts_may_be_of_any_sequence(model) -> None:
    plain = generate(model, [[4, 5], [6, 7]], max_new_tokens=3).token_ids
    for prompts in (
        ((4, 5), (6, 7)),
        np.array([[4, 5], [6, 7]]),
        torch.tensor([[4, 5], [6, 7]]),
        [np.array([4, 5], np.uint8), torch.tensor([6, 7])],
        ([i, i + 1] for i in (4, 6)),
        [range(4, 6), array("i", [6, 7])],
    ):
        assert generate(model, prompts, max_new_tokens=3).token_ids == plain


def test_a_graph_is_asked_without_separators_where_it_was_trained_so(tmp_path) -> None:
    """Questions in files are written with them."""
    model = build(tiny(tmp_path, tokenizer="symbols"), [])
    whole, bare = "<eos> 4 10 | 10 7 | 5 3 [Q] 7 3 [R] 4", "4 10 10 7 5 3 [Q] 7 3 [R] 4"
    for num_thoughts in (0, 2):
        model.settings.symbols = {"separators": False}
        (alike,), (same,) = (read_prompts(model, text, num_thoughts, 1) for text in (whole, bare))
        assert alike == same and EDGE not in same.ids
        model.settings.symbols = {"separators": True}
        (kept,) = read_prompts(model, whole, num_thoughts, 1)
        assert kept.ids.count(EDGE) == 2 and kept.ids[0] == EOS


def test_a_graph_has_its_cue_behind_any_number_of_thoughts(tmp_path) -> None:
    """[A] follows the thoughts, as in training; without it the model answers nothing."""
    model = build(tiny(tmp_path, tokenizer="symbols"), [])
    model.settings.symbols, model.settings.markers = {"separators": False}, False
    model.settings.curriculum = {"markers": False, "target": "random_frontier"}
    text = "4 10 10 7 5 3 [Q] 7 3 [R] 4"
    for model.settings.stage in (1, 3):
        asked = [read_prompts(model, text, n, 1)[0].ids for n in (None, 0, 1, 5)]
        for ids, count in zip(asked, (model.settings.stage, 0, 1, 5), strict=True):
            assert ids[-count - 1 :] == (*[model.tokens.thought] * count, ANSWER) and ids[: -count - 1] == asked[1][:-1]


def test_two_threads_that_share_a_model_answer_as_one_after_the_other() -> None:
    """The native chain releases the GIL and has one team of threads and one set of buffers for both."""
    model, _ = make_pair("llama")
    halves = [[make_row(1 + 7 * i % 23, i % 4, 0, seed=i) for i in part] for part in (range(8), range(8, 16))]
    ask = functools.partial(generate, model, max_new_tokens=24, return_thoughts=True)
    expected = [ask(prompts) for prompts in halves]
    with ThreadPoolExecutor(2) as threads:
        for _ in range(10):
            for found, alone in zip(threads.map(ask, halves), expected, strict=True):
                assert found.token_ids == alone.token_ids
                assert all(map(torch.equal, found.thoughts, alone.thoughts))


def test_an_answer_may_end_at_the_last_position() -> None:
    """The last token of an answer is never read, so it needs no position."""
    model, plain = make_pair("gpt2", n_positions=16)
    prompt = make_row(8, 2, 3, 1)
    assert len(prompt) == 15
    expected = reference.generate(plain, torch.tensor(prompt), TOKENS.thought, TOKENS.eos, 2)
    assert generate(model, [prompt], max_new_tokens=2).token_ids[0] == expected
    with pytest.raises(ValueError, match="more than the 16 positions"):
        generate(model, [prompt], max_new_tokens=3)


def test_each_prompt_may_have_a_limit_of_its_own(model) -> None:
    long = [generate(model, [p], max_new_tokens=9).token_ids[0] for p in PROMPTS]
    some = generate(model, PROMPTS, max_new_tokens=[1, 9, 4, 2, 7], batch_size=2).token_ids
    assert some == [ids[:n] for ids, n in zip(long, (1, 9, 4, 2, 7), strict=True)]


def test_integers_of_numpy_and_torch_are_integers(model) -> None:
    plain = generate(model, PROMPTS[:2], num_thoughts=[3, 1], max_new_tokens=3)
    for kind in (np.array, torch.tensor):
        other = generate(model, PROMPTS[:2], num_thoughts=kind([3, 1]), max_new_tokens=kind(3))
        assert other.token_ids == plain.token_ids


def test_modules_keep_their_mode() -> None:
    model, _ = make_pair("gpt2", resid_pdrop=0.5)
    assert not model.training, "the mode of the model it was made of"
    model.train()
    model.hf.transformer.h[0].eval()  # frozen by its owner
    before = [m.training for m in model.modules()]
    generate(model, [[1, 2]], max_new_tokens=1)
    assert [m.training for m in model.modules()] == before


def test_the_least_and_the_greatest_temperature(model) -> None:
    greedy = generate(model, PROMPTS, max_new_tokens=4).token_ids
    for options in ({"temperature": 1e-40}, {"temperature": 1e300, "top_k": 1}):
        assert generate(model, PROMPTS, max_new_tokens=4, seed=1, **options).token_ids == greedy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thoughts_are_of_the_models_type(dtype: torch.dtype) -> None:
    thoughts = generate(make_pair("llama", dtype)[0], PROMPTS, max_new_tokens=1, return_thoughts=True).thoughts
    assert {t.dtype for t in thoughts} == {dtype}


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_no_default_of_the_caller_is_in_the_way(model, default: torch.dtype) -> None:
    expected = generate(model, PROMPTS, max_new_tokens=4).token_ids
    torch.set_default_dtype(default)
    try:
        with torch.device("meta"):
            assert generate(model, PROMPTS, max_new_tokens=4).token_ids == expected
    finally:
        torch.set_default_dtype(torch.float32)
