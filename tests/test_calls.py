"""Calls of the public functions as outsiders write them: what is taken, what is refused, and with which words."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import PreTrainedTokenizerFast

from coconut_fast import Coconut, GenerateOutput, LatentTokens, doctor, generate, load, ops
from coconut_fast.data.curriculum import CurriculumConfig
from coconut_fast.data.prosqa import generate_prosqa
from coconut_fast.infer import decode, eager, engine, runner_cache
from coconut_fast.infer.eager import EagerRunner
from coconut_fast.infer.prefill import prefill
from coconut_fast.infer.think import think
from coconut_fast.model.batch import collate
from coconut_fast.model.cache import KVCache
from coconut_fast.model.coconut import SavedSettings
from coconut_fast.train.build import build
from tests.families import TOKENS, VOCAB, make_hf
from tests.runs import chains, tiny
from tests.test_loading import make_tokenizer

THOUGHT = TOKENS.thought
PROMPT = [5, 6, TOKENS.start, THOUGHT, TOKENS.end]


@pytest.fixture(scope="module")
def model() -> Coconut:
    return Coconut(make_hf("gpt2"), TOKENS)


REFUSED = {
    "a path in a model's place": (lambda: Coconut("gpt2", TOKENS), "hf: found 'gpt2'"),
    "no tokens": (lambda: Coconut(make_hf("gpt2"), None), "tokens: found None, expected LatentTokens"),
    "a token as text": (lambda: Coconut(make_hf("gpt2"), LatentTokens(thought="5")), "tokens.thought: .* found '5'"),
    "a token beyond the table": (lambda: Coconut(make_hf("gpt2"), LatentTokens(thought=VOCAB)), f"found {VOCAB}"),
    "one token for two": (lambda: Coconut(make_hf("gpt2"), LatentTokens(thought=5, eos=5)), "which is tokens.thought"),
    "no feedback": (lambda: Coconut(make_hf("gpt2"), TOKENS, feedback=5), "feedback: found 5"),
    "layers": (lambda: KVCache(0, num_slots=16), "num_layers: found 0, expected a whole number of 1 or more"),
    "half a slot": (lambda: KVCache(2, num_slots=1.5), r"num_slots: found 1\.5"),
    "a flag for a number": (lambda: CurriculumConfig(c_thought=True), "c_thought: found True"),
    "text for a flag": (lambda: CurriculumConfig(pad_latent_to_max="yes"), "pad_latent_to_max: found 'yes'"),
    "text for a marker": (lambda: CurriculumConfig(markers="x"), "markers: found 'x'"),
    "fewer than no problems": (lambda: generate_prosqa(-1), "count: found -1"),
    "an unknown op": (lambda: ops.choose("nope", torch.device("cpu")), "ops has no op 'nope'; it has "),
}


@pytest.mark.parametrize("call, message", REFUSED.values(), ids=REFUSED)
def test_what_makes_no_sense_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_masks_that_are_none_are_refused(model: Coconut) -> None:
    ids = torch.tensor([[5, 6, 7]])
    for mask in ([[0.0, 0.0, -1.0]], [[2, 2, 2]]):
        with pytest.raises(ValueError, match="attention_mask: expected 1 for tokens and 0 for pads"):
            model(ids, torch.tensor(mask))
    for kind in (torch.bool, torch.int64, torch.float32, torch.bfloat16):
        mask = torch.tensor([[1, 1, 0]]).to(kind)
        assert torch.equal(model(ids, mask).logits[:, :2], model(ids[:, :2]).logits)


def test_a_batch_holds_its_own_tensors(model: Coconut) -> None:
    """Others beside it would be ignored: labels, for one, gave a loss of 0."""
    ids = torch.tensor([PROMPT])
    batch = collate([PROMPT], THOUGHT)
    for name in ("input_ids", "attention_mask", "position_ids", "labels"):
        with pytest.raises(ValueError, match=f"^batch: found {name} beside it, expected the batch alone"):
            model(**{name: ids}, batch=batch)
    assert model(batch=batch).loss is None


def test_searches_are_told_of_empty_rows_and_counts(model: Coconut) -> None:
    cache = KVCache(model.num_layers, num_slots=64, max_rows=2)
    rows = cache.alloc(2)
    with pytest.raises(ValueError, match="tokens: row 1 of the call has none"):
        prefill(model, cache, rows, [[5], []])
    hidden_BD = prefill(model, cache, rows, [[5], [6]])
    for counts in ([1], [1, -1]):
        with pytest.raises(ValueError, match="counts: found .* expected 0 or more for each of 2 rows"):
            think(model, cache, rows, hidden_BD, counts)
    assert cache.layout.lengths[rows].tolist() == [1, 1]


@pytest.mark.parametrize("backend", ["triton", "nonsense"])
def test_a_backend_that_generation_cannot_have_is_an_error(model: Coconut, backend: str, monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model.save_pretrained(tmp_path)
    with ops.use(backend), pytest.raises(ValueError, match=f"^ops.* backend {backend!r} was asked for, but"):
        load(tmp_path)
    with ops.use(backend), pytest.raises(ValueError, match=f"backend {backend!r} was asked for, but"):
        generate(model, [PROMPT], max_new_tokens=2)


def test_on_a_gpu_plain_pytorch_is_not_captured(model: Coconut, monkeypatch) -> None:
    """It takes no padding tokens, to which prompts are padded for a graph, and reads lengths on the host."""
    monkeypatch.setattr(Coconut, "device", torch.device("cuda"))
    assert engine.choose_runner(model)[0] is runner_cache.acquire
    with ops.use("torch"):
        runner, reason = engine.choose_runner(model)
        (line, _) = doctor._runners(model.device)
    assert runner is EagerRunner and reason == "no CUDA graphs, since attention runs on torch: asked for"
    assert line.endswith("eager: plain PyTorch over the ragged attention: asked for")


def test_plain_pytorch_is_what_generation_runs_where_it_is_asked_for(model: Coconut) -> None:
    expected = generate(model, [PROMPT], max_new_tokens=4)
    with ops.use("torch"):
        plain = generate(model, [PROMPT], max_new_tokens=4)
    with ops.use("cpu"):
        native = generate(model, [PROMPT], max_new_tokens=4)
    assert plain.stats.backend == "eager" and "backend 'torch' was asked for" in plain.stats.reason
    assert native.stats.backend == expected.stats.backend == "native"
    assert plain.token_ids == native.token_ids == expected.token_ids


def test_an_output_is_made_of_five_fields() -> None:
    output = GenerateOutput(texts=["a"], token_ids=[[1]], num_thoughts=[0], thoughts=None, stats=None)
    assert output.prompt_ids == []


@pytest.mark.usefixtures("runner")
def test_answers_are_told_of_when_they_are_complete(model: Coconut) -> None:
    told: list[tuple] = []
    options = {"max_new_tokens": [40, 2, 3], "num_samples": 2, "temperature": 1.0, "seed": 1, "batch_size": 4}
    output = generate(model, [PROMPT, [5, 6], [7]], **options, on_answer=lambda *answer: told.append(answer))
    assert [i for i, *_ in told] == [2, 3, 4, 5, 0, 1], "the long answers are complete last"
    assert sorted(told) == list(zip(range(6), output.texts, output.token_ids, output.num_thoughts, strict=True))


def test_the_cache_has_room_for_an_answer_that_outlives_the_others_to_its_prompt(model: Coconut, monkeypatch) -> None:
    """Three rows at a time, two to a prompt: the second answer to the first prompt, and both to the second."""

    def choose(model: Coconut, hidden_BD: torch.Tensor, answers: list, sampling: object) -> None:
        for answer in answers:
            answer.tokens.append(TOKENS.eos if answer.seed == 0 else 5)

    monkeypatch.setattr(engine, "choose_runner", lambda model: (EagerRunner, "asked for"))
    monkeypatch.setattr(engine, "_seeds", lambda *_: range(4))
    for module in (decode, eager):
        monkeypatch.setattr(module, "choose", choose)
    output = generate(model, [[5], [6]], num_samples=2, batch_size=3, temperature=1.0, max_new_tokens=60)
    assert [len(ids) for ids in output.token_ids] == [0, 60, 60, 60]


def test_states_that_are_not_finite_are_told_of_once() -> None:
    """Their answers look like any others."""

    class Broken(nn.Module):
        def forward(self, hidden_BD: torch.Tensor) -> torch.Tensor:
            return hidden_BD * float("nan")

    model = Coconut(make_hf("gpt2"), TOKENS, feedback=Broken())
    with pytest.warns(UserWarning, match="^generate: hidden states are NaN or infinite") as told:
        generate(model, [PROMPT] * 3, max_new_tokens=2, batch_size=1)
    assert len(told) == 1 and told[0].filename == __file__


def test_paths_and_dtypes_are_taken_as_transformers_does(model: Coconut, tmp_path: Path) -> None:
    class Entry:  # a path that is no Path, as os.scandir gives
        def __fspath__(self) -> str:
            return str(tmp_path)

    model.save_pretrained(tmp_path)
    expected = generate(model, [PROMPT], max_new_tokens=2).token_ids
    for dtype in ("bfloat16", torch.bfloat16):
        assert load(Entry(), dtype=dtype).dtype == torch.bfloat16
    assert load(os.fsencode(tmp_path).decode(), dtype="auto").dtype == torch.float32
    assert generate(Entry(), [PROMPT], max_new_tokens=2).token_ids == expected
    with pytest.raises(ValueError, match="dtype: found 'half a float', expected float64, float32, bf"):
        load(tmp_path, dtype="half a float")
    with pytest.raises(ValueError, match="device: meta cannot be used here"):
        load(tmp_path, device="meta")
    with pytest.raises(ValueError, match="path_or_id: found ''"):
        load("")


def test_logits_are_read_as_the_forward_was_run(model: Coconut) -> None:
    ids = torch.tensor([PROMPT])
    expected = model(ids).logits
    assert expected.requires_grad
    later = model(ids)
    with torch.inference_mode():
        inference = model(ids)
    with torch.no_grad():
        plain = model(ids)
        assert not later.logits.requires_grad and later.logits.numpy().shape == expected.shape
    for output in (inference, plain, later):
        torch.testing.assert_close(output.logits, expected.detach())
        assert not output.logits.requires_grad
    assert plain["logits"] is plain[1] is plain[1:][0] is plain[:2][1] and plain["loss"] is plain[0] is None


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    model = Coconut(make_hf("gpt2"), LatentTokens(thought=np.int64(THOUGHT)))
    model.save_pretrained(tmp_path)
    assert load(tmp_path).tokens == LatentTokens(thought=THOUGHT)
    assert len(generate_prosqa(np.int64(2))) == 2
    assert KVCache(1, num_slots=np.int64(16)).layout.num_pages == 1


def test_trained_rows_are_kept_where_ids_have_gaps(tmp_path: Path) -> None:
    """Ids of the three tokens beyond the number of words, in a table that has their rows."""
    words = {"<eos>": 0, "<unk>": 1, "<<": 2, "<|start-latent|>": 13, "<|end-latent|>": 14, "<|latent|>": 15}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    hf = make_hf("llama", vocab_size=16)
    hf.save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>").save_pretrained(tmp_path)
    model = load(tmp_path)
    assert (model.tokens.start, model.tokens.end, model.tokens.thought) == (13, 14, 15)
    assert torch.equal(model.hf.get_input_embeddings().weight, hf.get_input_embeddings().weight)


@pytest.mark.parametrize("known", [("a", "<<"), ("a",)], ids=["with <<", "without"])
@pytest.mark.parametrize("added", [["<|latent|>"], ["<|start-latent|>", "<|end-latent|>", "<|latent|>"], ["<pad>"]])
def test_tokens_that_only_the_tokenizer_knows_get_their_rows(known, added: list[str], tmp_path: Path) -> None:
    """The tokenizer was extended, and the model's table was not: its new rows are no random ones."""
    tokenizer = make_tokenizer(*known)
    hf = make_hf("llama", vocab_size=len(tokenizer), eos_token_id=0, bos_token_id=0)
    tokenizer.add_tokens(added)
    hf.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    one, other = load(tmp_path), load(tmp_path)
    for table in ("get_input_embeddings", "get_output_embeddings"):
        before, after = getattr(hf, table)().weight, getattr(one.hf, table)().weight
        start = before[tokenizer.get_vocab()["<<"]] if "<<" in known else before.mean(0)
        latent = [one.tokens.start, one.tokens.thought, one.tokens.end]
        assert torch.equal(after[: len(before)], before)
        torch.testing.assert_close(after[latent], start.expand(3, -1))
        if added == ["<pad>"]:
            torch.testing.assert_close(after[tokenizer.get_vocab()["<pad>"]], before.mean(0))
        assert torch.equal(after, getattr(other.hf, table)().weight)


def test_a_prompt_with_markers_is_framed_once(tmp_path: Path) -> None:
    make_hf("llama", vocab_size=8).save_pretrained(tmp_path)
    make_tokenizer("a", "b", "<|start-latent|>", "<|latent|>", "<|end-latent|>").save_pretrained(tmp_path)
    model = load(tmp_path)
    model.settings = SavedSettings(num_thoughts=2, suffix=" b")
    start, thought, end = model.tokens.start, model.tokens.thought, model.tokens.end
    question = model.tokenizer.encode("a")

    def read(text: str, count: int | None = None) -> list[int]:
        return generate(model, text, num_thoughts=count, max_new_tokens=1).prompt_ids[0]

    whole = [*question, start, thought, thought, end]
    for inner in ("<|end-latent|>", "", "<|latent|> <|end-latent|>"):
        assert read(f"a <|start-latent|> {inner}", 2) == whole, inner
    assert read("a <|start-latent|> <|end-latent|>") == whole
    assert read("a") == read("a b") == [*model.tokenizer.encode("a b"), start, thought, thought, end]


def test_texts_have_no_special_tokens(tmp_path: Path) -> None:
    model = build(tiny(tmp_path), chains(40)).eval()
    output = generate(model, ["go on from ada"] * 4, num_thoughts=1, max_new_tokens=40, temperature=9.0, seed=0)
    assert any(set(ids) & set(model.tokenizer.all_special_ids) for ids in output.token_ids)
    assert not any("<|" in text for text in output.texts)


def test_names_of_wrappers_are_no_part_of_a_checkpoint(tmp_path: Path) -> None:
    hf = make_hf("gpt2")
    hf.config.save_pretrained(tmp_path)
    state = {f"module._orig_mod.base_causallm.{name}": value for name, value in hf.state_dict().items()}
    torch.save(state, tmp_path / "checkpoint_1")
    again = load(tmp_path / "checkpoint_1", tokens=TOKENS)
    assert all(torch.equal(a, b) for a, b in zip(again.hf.parameters(), hf.parameters(), strict=True))
    assert isinstance(again.feedback, nn.Module)
