"""Loading and saving: round trips, plain transformers, the reference's files, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from coconut_fast import Coconut, LatentTokens, generate, load
from coconut_fast.infer import native
from coconut_fast.model.coconut import SavedSettings
from coconut_fast.model.feedback import FEEDBACKS, make_feedback
from tests.conftest import ROOT
from tests.families import FAMILIES, TOKENS, make_hf, make_row


def make_tokenizer(*words: str) -> PreTrainedTokenizerFast:
    vocabulary = {w: i for i, w in enumerate(["<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_loss_free(family: str, tmp_path) -> None:
    model = Coconut(make_hf(family), TOKENS, settings=SavedSettings(num_thoughts=3, suffix=" ", method="coconut"))
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.tokens == model.tokens
    assert again.settings == model.settings
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    prompt = [make_row(6, 2, 0, 1)]
    assert generate(again, prompt, max_new_tokens=6).token_ids == generate(model, prompt, max_new_tokens=6).token_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_reads_what_we_save(family: str, tmp_path) -> None:
    model = Coconut(make_hf(family), TOKENS)
    model.save_pretrained(tmp_path)
    before = make_hf(family)  # eager too: up to transformers 5.17 SDPA leaves out Gemma 2's soft cap
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", attn_implementation="eager").eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, before(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FEEDBACKS)
def test_feedbacks_are_saved_with_the_model(name: str, tmp_path) -> None:
    hf = make_hf("gpt2")
    model = Coconut(hf, TOKENS, feedback=make_feedback(name, hf.get_input_embeddings()))
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    hidden = torch.randn(3, 32)
    assert type(again.feedback) is FEEDBACKS[name]
    assert torch.equal(again.feedback(hidden), model.feedback(hidden))


def test_a_feedback_without_its_weights_is_refused(tmp_path) -> None:
    hf = make_hf("gpt2")
    Coconut(hf, TOKENS, feedback=make_feedback("projection", hf.get_input_embeddings())).save_pretrained(tmp_path)
    (tmp_path / "feedback.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no feedback\.safetensors, the weights of its feedback 'projection'"):
        load(tmp_path)
    for broken in (b"torn", save({"0.weight": torch.zeros(32, 31)})):
        (tmp_path / "feedback.safetensors").write_bytes(broken)
        with pytest.raises(ValueError, match=r"feedback\.safetensors does not load as a feedback 'projection': Error"):
            load(tmp_path)


def in_the_hubs_cache(model, name: str, tmp_path, code: str) -> None:
    """Runs code where the model lies in the hub's cache, as after a download: in a process that looks up its path."""
    cached = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    model.save_pretrained(cached / "snapshots" / "0123abcd")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123abcd")
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment)


@pytest.mark.parametrize("name", ["some-org/Model-2.5-0.5B", "model"])
def test_a_hub_id_loads_whole(name: str, tmp_path) -> None:
    hf = make_hf("gpt2")
    model = Coconut(hf, TOKENS, feedback=make_feedback("projection", hf.get_input_embeddings()))
    code = f"""import torch; from coconut_fast import load
torch.save(load({name!r}).state_dict(), {str(tmp_path / "state")!r})"""
    in_the_hubs_cache(model, name, tmp_path, code)
    found = torch.load(tmp_path / "state")
    assert all(torch.equal(value, found[key]) for key, value in model.state_dict().items())


def test_a_hub_id_without_a_tokenizer_takes_tokens(tmp_path) -> None:
    code = """import pytest; from coconut_fast import LatentTokens, load
assert load("org/model", tokens=LatentTokens(thought=5)).tokenizer is None
with pytest.raises(ValueError, match="^tokens: org/model has no tokenizer"):
    load("org/model")"""
    in_the_hubs_cache(make_hf("llama"), "org/model", tmp_path, code)


@pytest.mark.parametrize("official", [False, True])
def test_frequencies_of_rotations_stay_what_they_are_in_16_bits(official: bool, tmp_path) -> None:
    """In bf16 they would rotate position 1,000 by 0.4 radians too much, and packed weights would never be reused."""
    hf = make_hf("llama")
    expected = hf.model.rotary_emb.inv_freq.clone()
    Coconut(hf, TOKENS).save_pretrained(tmp_path)
    path = tmp_path
    if official:
        path = tmp_path / "checkpoint"
        torch.save({f"base_causallm.{k}": v for k, v in hf.state_dict().items()}, path)
    model = load(path, dtype=torch.bfloat16, tokens=TOKENS)
    assert model.dtype == torch.bfloat16 and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.hf.model.rotary_emb.inv_freq, expected)
    assert native.packed(model, None) is native.packed(model, None)


def test_a_feedback_by_name_needs_no_load() -> None:
    assert isinstance(Coconut(make_hf("gpt2"), TOKENS, feedback="rescale").feedback, FEEDBACKS["rescale"])
    with pytest.raises(ValueError, match="feedback: expected one of .*found 'scaled'"):
        Coconut(make_hf("gpt2"), TOKENS, feedback="scaled")


def test_nothing_of_an_older_model_stays_beside_a_newer_one(tmp_path) -> None:
    model = Coconut(make_hf("gpt2"), TOKENS, feedback="projection")
    model.extra = torch.nn.Linear(2, 2)
    model.save_pretrained(tmp_path)
    assert {"added.safetensors", "feedback.safetensors"} <= set(os.listdir(tmp_path))
    Coconut(make_hf("gpt2"), TOKENS).save_pretrained(tmp_path)
    assert not {"added.safetensors", "feedback.safetensors"} & set(os.listdir(tmp_path))


def test_a_feedback_in_place_of_a_trained_one_is_told_of(tmp_path) -> None:
    """Its weights fit no other; a wrapper around it, one that adds noise say, would start with random weights."""
    hf = make_hf("gpt2")
    Coconut(hf, TOKENS, feedback="projection").save_pretrained(tmp_path)
    for other in ("rescale", torch.nn.Sequential(make_feedback("projection", hf.get_input_embeddings()))):
        with pytest.warns(UserWarning, match="was saved with 'projection', whose weights are left out; '(rescale|Seq)"):
            load(tmp_path, feedback=other)


def test_a_users_own_feedback_works(tmp_path) -> None:
    class Halve(torch.nn.Module):
        def forward(self, hidden_BD: torch.Tensor) -> torch.Tensor:
            return hidden_BD / 2

    Coconut(make_hf("gpt2"), TOKENS, feedback=Halve()).save_pretrained(tmp_path)
    assert isinstance(load(tmp_path, feedback=Halve()).feedback, Halve)
    wrong = {r"returned \(5, 5\)": torch.nn.Linear(32, 5), "raised RuntimeError": torch.nn.Linear(5, 32)}
    for found, module in wrong.items():
        with pytest.raises(ValueError, match=rf"feedback: Linear {found}.*, expected a map of \(5, 32\) torch.float32"):
            load(tmp_path, feedback=module)
    with pytest.raises(ValueError, match="saved with a module of its own, 'Halve'; expected feedback=module"):
        load(tmp_path)
    with pytest.raises(ValueError, match="feedback: expected one of .*found 'Halve'"):
        load(tmp_path, feedback="Halve")


def test_tokens_are_added_and_start_from_the_known_one(tmp_path) -> None:
    hf = make_hf("llama", vocab_size=6)
    hf.save_pretrained(tmp_path)
    make_tokenizer("a", "<<", "b", "c").save_pretrained(tmp_path)
    model = load(tmp_path)
    assert model.tokens == LatentTokens(start=6, end=7, thought=8, eos=0)
    for table in (model.hf.get_input_embeddings().weight, model.hf.get_output_embeddings().weight):
        assert len(table) == 9
        assert all(torch.equal(table[i], table[3]) for i in (6, 7, 8))


def test_tokens_start_from_the_mean_where_there_is_no_known_one(tmp_path) -> None:
    hf = make_hf("llama", vocab_size=6)
    hf.save_pretrained(tmp_path)
    make_tokenizer("a", "d", "b", "c").save_pretrained(tmp_path)
    table = load(tmp_path).hf.get_input_embeddings().weight
    torch.testing.assert_close(table[6:], table[:6].mean(0).expand(3, -1))


def test_strings_get_the_trained_number_of_thoughts(tmp_path) -> None:
    hf = make_hf("gpt2", vocab_size=6)
    hf.save_pretrained(tmp_path)
    make_tokenizer("a", "<<", "b", "c").save_pretrained(tmp_path)
    model = load(tmp_path)
    model.settings = SavedSettings(num_thoughts=4, suffix=" c")
    output = generate(model, ["a b a", "a <|latent|> b"], max_new_tokens=3)
    assert output.num_thoughts == [4, 1]
    assert output.token_ids[0] == generate(model, [[2, 4, 2, 5, 6, 8, 8, 8, 8, 7]], max_new_tokens=3).token_ids[0]
    assert output.texts[0] == model.tokenizer.decode(output.token_ids[0], skip_special_tokens=True)


def test_reference_checkpoints_of_either_kind_load(tmp_path) -> None:
    hf = make_hf("gpt2")
    make_hf("gpt2", vocab_size=60).config.save_pretrained(tmp_path)  # before the reference added its tokens
    prefixed = {f"base_causallm.{k}": v for k, v in hf.state_dict().items()}
    torch.save({**prefixed, "embedding.weight": hf.transformer.wte.weight}, tmp_path / "checkpoint_3")
    torch.save(hf.state_dict(), tmp_path / "cot_checkpoint")
    for name in ("checkpoint_3", "cot_checkpoint"):
        loaded = load(tmp_path / name, tokens=TOKENS)
        assert all(torch.equal(v, hf.state_dict()[k]) for k, v in loaded.hf.state_dict().items())


def test_weights_named_as_a_hub_names_them_are_whole(tmp_path) -> None:
    """openai-community/gpt2: names without the body's prefix, constant masks included, and no head."""
    hf = make_hf("gpt2")
    hf.save_pretrained(tmp_path)
    kept = {k.removeprefix("transformer."): v.clone() for k, v in hf.state_dict().items() if k != "lm_head.weight"}
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 256, 256) for layer in range(2)}
    save_file({**kept, **masks}, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = load(tmp_path, tokens=TOKENS)
    assert all(torch.equal(value, loaded.hf.state_dict()[name]) for name, value in hf.state_dict().items())


def test_a_tied_head_need_not_be_in_a_reference_checkpoint(tmp_path) -> None:
    hf = make_hf("gpt2")
    hf.config.save_pretrained(tmp_path)
    torch.save({k: v for k, v in hf.state_dict().items() if k != "lm_head.weight"}, tmp_path / "checkpoint")
    loaded = load(tmp_path / "checkpoint", tokens=TOKENS)
    assert torch.equal(loaded.hf.lm_head.weight, hf.transformer.wte.weight)
    hf.config.tie_word_embeddings = False
    hf.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"missing \['lm_head.weight'\], unexpected nothing"):
        load(tmp_path / "checkpoint", tokens=TOKENS)


def test_a_tied_head_of_other_weights_is_refused(tmp_path) -> None:
    hf = make_hf("gpt2")
    hf.config.save_pretrained(tmp_path)
    torch.save({**hf.state_dict(), "lm_head.weight": hf.lm_head.weight + 1}, tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="lm_head.weight differs from transformer.wte.weight, .* config.json ties"):
        load(tmp_path / "checkpoint", tokens=TOKENS)


class _Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_trained_rows_of_special_tokens_survive_a_tokenizer_without_them(tmp_path) -> None:
    """An official checkpoint has the three rows, its base's tokenizer does not know them."""
    tokenizer = make_tokenizer("<<", "a", "b")
    hf = make_hf("gpt2")
    hf.resize_token_embeddings(len(tokenizer) + 3, mean_resizing=False)
    hf.config.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    state = {f"base_causallm.{k}": v for k, v in hf.state_dict().items()}
    torch.save(state, tmp_path / "checkpoint_7")
    hf.config.vocab_size = len(tokenizer)
    hf.config.save_pretrained(tmp_path / "before")  # as the base is published
    tokenizer.save_pretrained(tmp_path / "before")
    torch.save(hf.state_dict(), tmp_path / "plain_7")  # as from a run without thoughts
    for name, base in (("checkpoint_7", "base"), ("checkpoint_7", "before"), ("plain_7", "before")):
        model = load(tmp_path / name, base=tmp_path / base)
        assert torch.equal(model.hf.get_input_embeddings().weight, hf.get_input_embeddings().weight)
        assert model.tokens == LatentTokens(start=5, end=6, thought=7, eos=0)


def test_bad_files_are_refused_in_one_sentence(tmp_path, capsys) -> None:
    hf = make_hf("gpt2")
    hf.config.save_pretrained(tmp_path)
    (tmp_path / "evil").write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(ValueError, match="more than tensors"):
        load(tmp_path / "evil", tokens=TOKENS)
    assert "code ran" not in capsys.readouterr().out
    state = {f"base_causallm.{k}": v for k, v in hf.state_dict().items()}
    torch.save(state, tmp_path / "whole")
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:5000])
    with pytest.raises(ValueError, match="not a whole torch checkpoint|more than tensors"):
        load(tmp_path / "cut", tokens=TOKENS)
    del state["base_causallm.transformer.h.1.mlp.c_fc.weight"]
    torch.save(state, tmp_path / "missing")
    with pytest.raises(ValueError, match="missing .*h.1.mlp.c_fc.weight"):
        load(tmp_path / "missing", tokens=TOKENS)
    torch.save({**state, "base_causallm.transformer.h.1.mlp.c_fc.weight": torch.zeros(2, 2)}, tmp_path / "shape")
    with pytest.raises(
        ValueError, match=r"does not fit .*: size mismatch for transformer.h.1.mlp.c_fc.weight: .*\]\)\.$"
    ):
        load(tmp_path / "shape", tokens=TOKENS)
    hf.save_pretrained(tmp_path / "torn")
    weights = tmp_path / "torn" / "model.safetensors"
    for size in (0, 1000, weights.stat().st_size - 4):
        weights.write_bytes(weights.read_bytes()[:size] if size else b"")
        with pytest.raises(ValueError, match="torn: does not load as a causal language model: model.safetensors: "):
            load(tmp_path / "torn", tokens=TOKENS)
        hf.save_pretrained(tmp_path / "torn")
    (tmp_path / "alone").mkdir()
    torch.save(state, tmp_path / "alone" / "checkpoint_1")
    with pytest.raises(ValueError, match=r"config.json beside it, or base=... \(--base\), .*in .*alone"):
        load(tmp_path / "alone" / "checkpoint_1", tokens=TOKENS)
    with pytest.raises(ValueError, match="no config.json"):
        load(tmp_path / "alone")
    (tmp_path / "torn" / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(ValueError, match="^the tokenizer of .*torn does not load"):
        load(tmp_path / "torn")
    (tmp_path / "torn" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="^the configuration of .*torn does not load"):
        load(tmp_path / "whole", base=tmp_path / "torn")
    for name, content in (("text", b"hello, world"), ("json", b"{}")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is not a whole torch checkpoint: it is none at all"):
            load(tmp_path / name, tokens=TOKENS)
    for name, odd in (("list", [1]), ("nested", {"model": state}), ("numbers", {1: torch.zeros(2)})):
        torch.save(odd, tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} holds a .*, expected tensors by name"):
            load(tmp_path / name, tokens=TOKENS)
    torch.save({**state, "base_causallm.transformer.wte.weight": torch.zeros(())}, tmp_path / "point")
    with pytest.raises(ValueError, match="does not fit .*: size mismatch for transformer.wte.weight"):
        load(tmp_path / "point", tokens=TOKENS)
    (tmp_path / "nothing").write_bytes(b"")
    with pytest.raises(ValueError, match="not a whole torch checkpoint: it is empty"):
        load(tmp_path / "nothing", tokens=TOKENS)
    for path in (tmp_path / "nowhere", "./nowhere", "a/folder/nowhere", "tests/nowhere"):
        with pytest.raises(ValueError, match="no such file or directory"):
            load(path)


def test_a_curriculum_of_another_version_is_refused(tmp_path) -> None:
    hf = make_hf("gpt2", vocab_size=6)
    hf.save_pretrained(tmp_path)
    make_tokenizer("a", "<<", "b", "c").save_pretrained(tmp_path)
    model = load(tmp_path)
    model.settings = SavedSettings(stage=1, curriculum={"c_thought": 1, "warmth": 2})
    with pytest.raises(ValueError, match=r"coconut.json: curriculum: 'warmth' is unknown to this version"):
        generate(model, "a b")
    model.settings = SavedSettings(stage=1, curriculum={"method": "magic"})
    with pytest.raises(ValueError, match=r"coconut.json: curriculum: method: found 'magic'"):
        generate(model, "a b")


@pytest.mark.parametrize("name", ["hf.model.embed_tokens.weight", "hf.model.norm.weight", "feedback.3.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(name: str, value: float, tmp_path) -> None:
    hf = make_hf("llama")
    model = Coconut(hf, TOKENS, feedback=make_feedback("projection", hf.get_input_embeddings()))
    with torch.no_grad():
        model.get_parameter(name).view(-1)[5] = value
    model.save_pretrained(tmp_path)
    shown = name.removeprefix("hf.")
    with pytest.raises(ValueError, match=f"{tmp_path}: the weight {shown} holds NaN or infinite"):
        load(tmp_path)


def test_tokens_are_given_by_name() -> None:
    with pytest.raises(TypeError, match="positional"):
        LatentTokens(5, 6, 7, 0)


def test_unknown_tokens_are_refused(tmp_path) -> None:
    make_hf("gpt2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokens: .* has no tokenizer"):
        load(tmp_path)
    with pytest.raises(ValueError, match="tokens.end: expected an id below the model's 96 embeddings, found 99"):
        load(tmp_path, tokens=LatentTokens(start=1, thought=2, end=99, eos=0))
    for wrong in (json.dumps({"tokens": {}}), "[]", "\xff"):
        (tmp_path / "coconut.json").write_text(wrong, encoding="latin-1")
        with pytest.raises(ValueError, match="coconut.json: expected"):
            load(tmp_path)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"dtype": "int8"}, "dtype: found 'int8', expected float64, float32, bfloat16 or float16, or 'auto'"),
        ({"dtype": torch.int32}, "dtype: found torch.int32, expected float64, float32"),
        ({"device": "gpu"}, "device: gpu cannot be used here"),
        ({"tokens": {"thought": 5}}, "tokens: found {'thought': 5}, expected LatentTokens"),
        ({"tokens": LatentTokens(thought=5.0)}, "tokens.thought: expected an id below .* found 5.0"),
        ({"tokens": LatentTokens(thought=5, eos=5)}, "tokens.eos: found 5, which is tokens.thought"),
    ],
)
def test_arguments_of_load_are_refused(keywords, message, tmp_path) -> None:
    make_hf("gpt2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load(tmp_path, **keywords)
    with pytest.raises(ValueError, match="path_or_id: found None, expected a path"):
        load(None)


def test_a_model_that_cannot_be_saved_says_where(tmp_path, monkeypatch) -> None:
    model = Coconut(make_hf("gpt2"), TOKENS)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="directory: .*file is a file, expected a directory or nothing"):
        model.save_pretrained(tmp_path / "file")

    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(model.hf, "save_pretrained", full)
    with pytest.raises(OSError, match=r"target could not be written \(Error while .* No space left .* MB were free\)"):
        model.save_pretrained(tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
