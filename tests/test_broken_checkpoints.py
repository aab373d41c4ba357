"""Directories that hold no model, or half of one: one sentence that says what is wrong, and never random weights."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

from coconut_fast import Coconut, LatentTokens, load
from coconut_fast.files import remove_unfinished
from coconut_fast.tokens import END_LATENT, LATENT, START_LATENT
from coconut_fast.train.build import build
from tests.families import TOKENS, make_hf
from tests.runs import tiny
from tests.test_loading import make_tokenizer


def _edited(folder, file: str, **changes) -> None:
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **changes}))


def _without(state, name: str):
    return {key: value for key, value in state.items() if key != name}


C_FC = "transformer.h.1.mlp.c_fc.weight"
UNFIT = {
    "a weight is missing": (lambda state: _without(state, C_FC), rf"missing \['{C_FC}'\], unexpected nothing"),
    "all are missing": (lambda state: {}, r"missing \['lm_head.weight', "),
    "names of DataParallel": (
        lambda state: {f"module.{key}": value for key, value in state.items()},
        r"missing \['lm_head.weight', .* unexpected \['module.transformer.",
    ),
    "another shape": (
        lambda state: {**state, C_FC: torch.zeros(2, 3)},
        rf"{C_FC} has shape \(2, 3\), expected \(32, 128\)",
    ),
    "another vocabulary": (
        lambda state: {**state, "transformer.wte.weight": torch.zeros(40, 32)},
        r"transformer.wte.weight has shape \(40, 32\), expected \(96, 32\)",
    ),
}


@pytest.mark.parametrize("change, message", UNFIT.values(), ids=UNFIT)
def test_weights_that_do_not_fit_are_never_drawn_at_random(change, message: str, tmp_path) -> None:
    """transformers does so, with a warning."""
    make_hf("gpt2").save_pretrained(tmp_path)
    save_file(change(load_file(tmp_path / "model.safetensors")), tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"^{tmp_path}: the weights do not fit config.json: {message}"):
        load(tmp_path, tokens=TOKENS)


def test_weights_stored_as_integers_are_refused(tmp_path) -> None:
    """A quantised model's, without the configuration that says so: they would be taken as they are."""
    hf = make_hf("gpt2")
    hf.save_pretrained(tmp_path)
    state = {key: tensor.clone() for key, tensor in hf.state_dict().items()}
    torch.save({**state, C_FC: state[C_FC] > 0}, tmp_path / "official")
    with pytest.raises(ValueError, match=rf"official: {C_FC} is stored as torch.bool, expected F64, F32, F16, BF16"):
        load(tmp_path / "official", tokens=TOKENS)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), C_FC: (100 * state[C_FC]).to(torch.int8)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"model.safetensors: {C_FC} is stored as I8, expected F64, F32, F16, BF16"):
        load(tmp_path, tokens=TOKENS)


def test_a_tokenizer_of_another_model_is_refused(tmp_path) -> None:
    hf, tokenizer = make_hf("gpt2"), make_tokenizer(*"abcd", START_LATENT, LATENT, END_LATENT)
    tokens = LatentTokens(start=6, thought=7, end=8, eos=0)
    Coconut(hf, tokens, tokenizer=tokenizer).save_pretrained(tmp_path)
    assert load(tmp_path).tokens == tokens
    _edited(tmp_path, "coconut.json", tokens={"start": 6, "thought": 5, "end": 8, "eos": 0})
    wrong = r"<\|latent\|> is 7 in the tokenizer and 5 in its tokens"
    with pytest.raises(ValueError, match=wrong):
        load(tmp_path)
    with pytest.raises(ValueError, match=wrong):
        Coconut(hf, LatentTokens(thought=5), tokenizer=tokenizer).save_pretrained(tmp_path)
    hf.resize_token_embeddings(7, mean_resizing=False)  # fewer than the tokenizer has
    torch.save({f"base_causallm.{key}": tensor for key, tensor in hf.state_dict().items()}, tmp_path / "official")
    (tmp_path / "coconut.json").unlink()
    with pytest.raises(ValueError, match="official has 7 embeddings, expected one for each of the 9 tokens"):
        load(tmp_path / "official")
    settings = tiny(tmp_path, model=str(tmp_path), tokenizer=None)
    hf.save_pretrained(tmp_path)
    Coconut(hf, LatentTokens(thought=5), tokenizer=make_tokenizer(*"abcdefgh")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model: its tokenizer has 10 tokens, expected at most its 7 embeddings"):
        build(settings, [])


def test_only_files_that_are_loaded_are_looked_at(tmp_path) -> None:
    make_hf("gpt2").save_pretrained(tmp_path)
    (tmp_path / "model-old.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    (tmp_path / "model.fp16.safetensors").symlink_to("nowhere")
    load(tmp_path, tokens=TOKENS)
    make_hf("gpt2").save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    shard = next(path for path in (tmp_path / "shards").glob("*.safetensors") if C_FC in load_file(path))
    state = load_file(shard)
    save_file({**state, C_FC: state[C_FC].to(torch.int8)}, shard, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{shard.name}: {C_FC} is stored as I8"):
        load(tmp_path / "shards", tokens=TOKENS)


def test_a_missing_shard_is_named(tmp_path) -> None:
    make_hf("gpt2").save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=f"does not load as a causal language model: .*{shard.name}"):
        load(tmp_path, tokens=TOKENS)


def test_a_file_that_does_not_open_hides_no_other_reason(tmp_path) -> None:
    make_hf("gpt2").save_pretrained(tmp_path)
    (tmp_path / "adapter.safetensors").symlink_to("nothing")  # as left by a cache that was cleaned up
    load(tmp_path, tokens=TOKENS)
    _edited(tmp_path, "config.json", n_head=3)
    with pytest.raises(ValueError, match="does not load as a causal language model: .*must be divisible by num_heads"):
        load(tmp_path, tokens=TOKENS)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").symlink_to("nothing")
    with pytest.raises(ValueError, match="does not load as a causal language model: "):
        load(tmp_path, tokens=TOKENS)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "", "does not load as a causal language model: .*not a valid JSON"),
        ("config.json", "[]", "does not load as a causal language model: "),
        ("config.json", "null", "does not load as a causal language model: "),
        ("config.json", {"dtype": "bf16"}, "does not load as a causal language model: .*bf16"),
        ("config.json", {"n_layer": "two"}, "does not load as a causal language model: .*'n_layer'.*'two'"),
        ("config.json", {"n_layer": 0}, "GPT2LMHeadModel has 0 layers"),
        ("config.json", {"model_type": "t5"}, "does not load as a causal language model: .*AutoModelForCausalLM.$"),
        ("generation_config.json", "[]", "does not load as a causal language model: "),
        ("tokenizer_config.json", "[]", "the tokenizer of .* does not load: "),
        ("coconut.json", {"settings": []}, "coconut.json: expected tokens, settings and feedback as JSON"),
        ("coconut.json", {"feedback": ["identity"]}, "coconut.json: expected .*found TypeError.*its name"),
        ("coconut.json", {"settings": {"num_thoughts": "six"}}, "coconut.json: expected .*num_thoughts: found 'six'"),
        ("coconut.json", {"settings": {"num_thoughts": -1}}, "coconut.json: expected .*num_thoughts: found -1"),
        ("coconut.json", {"settings": {"suffix": None}}, "coconut.json: expected .*suffix: found None"),
    ],
)
def test_files_that_make_no_sense_are_refused_in_one_sentence(file: str, content, message: str, tmp_path) -> None:
    Coconut(make_hf("gpt2"), TOKENS).save_pretrained(tmp_path)
    if isinstance(content, str):
        (tmp_path / file).write_text(content)
    else:
        _edited(tmp_path, file, **content)
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_places_that_hold_no_model_are_refused(tmp_path, monkeypatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    for device in (tmp_path / "pipe", os.devnull):
        with pytest.raises(ValueError, match=f"^{device} is a device, expected a model directory"):
            load(device)
    with pytest.raises(ValueError, match="^no such file or directory: Tom is a terpus"):
        load("Tom is a terpus. " * 100)  # a prompt instead of a model
    make_hf("gpt2").save_pretrained(tmp_path / "closed")
    monkeypatch.setattr(os, "access", lambda place, mode: False)  # root may read anything
    with pytest.raises(ValueError, match="closed may not be read, expected a model directory"):
        load(tmp_path / "closed", tokens=TOKENS)


def test_a_model_that_half_replaced_another_one_is_refused_until_it_is_saved_again(tmp_path, monkeypatch) -> None:
    """Its weights are the new ones, its settings the old ones. Ctrl-C leaves what a power failure would."""
    first, second = (Coconut(make_hf("gpt2", seed=number), TOKENS, feedback="projection") for number in range(2))
    first.save_pretrained(tmp_path)
    second.save_pretrained(tmp_path)
    assert load(tmp_path).tokens == TOKENS
    replaced = []

    def killed(source, target) -> None:
        if len(replaced) == at:
            raise KeyboardInterrupt
        replaced.append(target)
        rename(source, target)

    rename = os.replace
    for at in (0, 2):
        monkeypatch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            first.save_pretrained(tmp_path)
        monkeypatch.undo()
        if not at:
            assert load(tmp_path).tokens == TOKENS, "nothing was replaced"
            assert not list(tmp_path.glob(".*"))
    remove_unfinished(tmp_path)  # as the next start of a run does
    with pytest.raises(ValueError, match="a process ended while it saved a model over another one here; save it again"):
        load(tmp_path)
    second.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path).feedback[0].weight, second.feedback[0].weight)
    assert not list(tmp_path.glob(".*"))


def test_all_files_of_a_saved_model_have_the_mode_of_new_files(tmp_path) -> None:
    before = os.umask(0o027)
    try:
        Coconut(make_hf("gpt2"), TOKENS, feedback="projection").save_pretrained(tmp_path / "saved")
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "saved").iterdir()}
    assert {"model.safetensors", "feedback.safetensors"} <= modes.keys() and {*modes.values()} == {0o640}, modes


def test_several_processes_may_save_into_one_directory(tmp_path) -> None:
    """As where every rank saves: none removes what another one is about to put in place."""
    model = Coconut(make_hf("gpt2"), TOKENS, feedback="projection")
    with ThreadPoolExecutor(4) as pool:
        for saving in [pool.submit(model.save_pretrained, tmp_path / f"{n // 8}") for n in range(32)]:
            saving.result()
    for place in tmp_path.iterdir():
        assert load(place).tokens == TOKENS and not list(place.glob(".*"))


def test_a_tokenizer_with_several_chat_templates_is_saved_twice(tmp_path) -> None:
    tokenizer = make_tokenizer(*"abc")
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    model = Coconut(make_hf("gpt2"), TOKENS, tokenizer=tokenizer)
    for _ in range(2):
        model.save_pretrained(tmp_path)
        assert load(tmp_path).tokenizer.chat_template == tokenizer.chat_template


def test_nothing_of_an_older_model_is_loaded_with_a_newer_one(tmp_path) -> None:
    tokenizer = make_tokenizer(*"abc")
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    Coconut(make_hf("gpt2", seed=1), TOKENS, tokenizer=tokenizer).save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("stays")
    model = Coconut(make_hf("gpt2"), TOKENS)
    save = model.hf.save_pretrained
    model.hf.save_pretrained = lambda *places, **keywords: save(*places, **keywords, max_shard_size="40KB")
    model.save_pretrained(tmp_path)  # in shards, which transformers reads only where there is no whole file
    loaded = load(tmp_path)
    assert loaded.tokenizer is None and torch.equal(loaded.hf.lm_head.weight, model.hf.lm_head.weight)
    assert (tmp_path / "notes.txt").exists() and len(list(tmp_path.glob("model-*.safetensors"))) > 2
