"""Run settings: the official files unchanged, our recipes, overrides, and what is refused."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import TrainingArguments

from coconut_fast.train.arguments import PASSED_THROUGH, RENAMED_FIELDS, CoconutArguments
from coconut_fast.train.build import build, make_tokenizer
from coconut_fast.train.recipe import make_arguments, parse_overrides, read_recipe
from coconut_fast.train.schedule import StageSchedule
from tests.runs import chains, tiny

ROOT = Path(__file__).resolve().parents[1]

# The keys of the official gsm_coconut.yaml, with our own values where its own are placeholders.
OFFICIAL = """
project: coconut
save_path: out
name: gsm-coconut
only_eval: False
coconut: True
cot: False
no_thoughts: False
no_cot: False
c_thought: 2
epochs_per_stage: 3
max_latent_stage: 3
pad_latent_to_max: True
save_only_improve: False
uniform_prob: 0.0
model_id: openai-community/gpt2
load_model_path: None
seed: 0
resume: 3
bf16: False
train_path: data/gsm_train.json
val_path: data/gsm_valid.json
reset_optimizer: True
batch_size_training: 32
debug: False
gradient_accumulation_steps: 1
num_epochs: 25
lr: !!float "1e-4"
weight_decay: 0.01
"""


@pytest.fixture
def official(tmp_path: Path) -> Path:
    file = tmp_path / "gsm_coconut.yaml"
    file.write_text(OFFICIAL)
    return file


def test_official_file_keeps_its_meaning(official: Path) -> None:
    found = read_recipe(official)
    assert found.method == "coconut" and found.model == "openai-community/gpt2"
    assert found.load_model_path is None and found.precision == "fp32"
    assert found.reset_optimizer == "epoch" and found.lr == 1e-4 and found.batch_size_training == 32
    assert found.output_dir == "out/gsm-coconut" and found.answer_length() == 64
    schedule = found.schedule()
    assert schedule.next_stage([]) == 1, "resume: 3 of 3 epochs per stage begins with stage 1"
    assert schedule.last_stage == 4
    args = found.to_training_arguments()
    assert args.num_train_epochs == 22 and args.max_grad_norm == 0 and args.weight_decay == 0.01


@pytest.mark.parametrize(
    ("flags", "method"),
    [
        ({"coconut": True}, "coconut"),
        ({"cot": True}, "cot"),
        ({"no_cot": True}, "no_cot"),
        ({"coconut": True, "no_thoughts": True}, "no_thoughts"),
        ({"coconut": True, "no_cot": True}, "no_cot"),
        ({"coconut": False}, "pause_as_thought"),
    ],
)
def test_official_flags(flags: dict[str, bool], method: str) -> None:
    assert make_arguments(flags).method == method


@pytest.mark.parametrize(
    ("file", "overrides", "method"),
    [
        ({"coconut": True}, {"no_thoughts": False}, "coconut"),
        ({"coconut": True}, {"cot": False}, "coconut"),
        ({"coconut": True, "no_thoughts": True}, {"no_thoughts": False}, "coconut"),
        ({"coconut": True}, {"coconut": False}, "pause_as_thought"),
        ({"cot": True}, {"coconut": True}, "coconut"),
        ({"cot": True}, {"method": "icot", "cot": False}, "icot"),
        ({"method": "icot"}, {"no_cot": False}, "icot"),
        ({"method": "icot"}, {"no_cot": True}, "no_cot"),
        ({}, {"cot": False}, "coconut"),
    ],
)
def test_official_flags_as_overrides(file: dict[str, Any], overrides: dict[str, Any], method: str) -> None:
    assert make_arguments(file, overrides).method == method


def test_a_tracker_that_is_not_used_need_not_be_installed() -> None:
    for unused in ("debug", "only_eval"):
        assert make_arguments({"report_to": "no such tracker", unused: True}).report_to == "no such tracker"


def test_a_flag_that_would_leave_no_method_is_refused() -> None:
    with pytest.raises(ValueError, match="override: cot: found false, but settings has method cot; expected another"):
        make_arguments({"method": "cot"}, {"cot": False})


@pytest.mark.parametrize(
    ("own", "theirs"),
    [
        ({"model": "a"}, {"model_id": "b"}),
        ({"precision": "bf16"}, {"bf16": False}),
        ({"method": "icot"}, {"cot": True}),
    ],
)
def test_an_official_setting_beside_our_own_is_refused(own: dict[str, Any], theirs: dict[str, Any]) -> None:
    message = f"found {next(iter(own))} and {next(iter(theirs))}, expected one of them"
    with pytest.raises(ValueError, match=f"a.yaml: {message}"):
        make_arguments({**theirs, **own}, where="a.yaml")
    with pytest.raises(ValueError, match=f"override: {message}"):
        make_arguments({}, {**theirs, **own})
    name, value = next(iter(own.items()))
    assert getattr(make_arguments(theirs, own), name) == value, "an override wins"


@pytest.mark.parametrize("text", ["no", "off", "yes", "true", "2026-11-26", "007", "1.10", "12:30", "1_000", "0x10"])
def test_text_is_taken_as_it_is_written(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """YAML 1.1 would turn `no` into False, 2026-11-26 into a date, 007 into 7 and 12:30 into 750."""
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["tracker"])
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"name: {text}  # of today\nsave_path: {text}\nmodel_id: {text}\nreset_optimizer: no\nreport_to: [tracker]\n"
    )
    found = read_recipe(file)
    assert (found.name, found.save_path, found.model, found.load_model_path) == (text, text, text, None)
    assert found.reset_optimizer == "never" and found.report_to == ["tracker"]
    file.write_text("method: coconut\n")
    found = read_recipe(file, [f"name={text}", f'save_path="{text}"', f"load_model_path={text}", "tokenizer=null"])
    assert (found.name, found.save_path, found.load_model_path, found.tokenizer) == (text, text, text, None)
    with pytest.raises(ValueError, match="method: found 'off', expected one of"):
        read_recipe(file, ["method=off"])
    with pytest.raises(ValueError, match="override: name: '2026-13-13' is not YAML"):
        read_recipe(file, ["name=2026-13-13"])
    with pytest.raises(ValueError, match="override: name: found None, expected text"):
        read_recipe(file, ["name="])


def test_official_values_keep_their_meaning() -> None:
    assert make_arguments({"bf16": True}).precision == "bf16_weights"
    assert make_arguments({"reset_optimizer": False}).reset_optimizer == "never"
    assert make_arguments({"lr": "1e-5"}).lr == 1e-5  # YAML 1.1 reads it as text
    nested = {"from_config": "gpt2", "layer_norm_epsilon": "1e-5", "rope": {"factor": "-2.5E+3", "kind": "1x"}}
    read = {"from_config": "gpt2", "layer_norm_epsilon": 1e-5, "rope": {"factor": -2500.0, "kind": "1x"}}
    assert make_arguments({"model": nested}).model == read
    overrides = parse_overrides(["model.layer_norm_epsilon=1e-6"])
    assert make_arguments({"model": nested}, overrides).model == {**read, "layer_norm_epsilon": 1e-6}
    with pytest.raises(ValueError, match="found no_cot and cot set, expected at most one"):
        make_arguments({"cot": True, "no_cot": True})


def test_overrides_win(official: Path) -> None:
    found = read_recipe(official, ["lr=3e-4", "method=no_thoughts", "name=try", "advance_at=0.9"])
    assert (found.lr, found.method, found.name, found.advance_at) == (3e-4, "no_thoughts", "try", 0.9)
    assert read_recipe(official, ["coconut=false", "cot=true"]).method == "cot"
    scratch = make_arguments(
        {"model": {"from_config": "gpt2", "n_layer": 2}},
        parse_overrides(["model.n_layer=4", "training_arguments.tf32=false"]),
    )
    assert scratch.model == {"from_config": "gpt2", "n_layer": 4}
    assert scratch.training_arguments == {"tf32": False}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rate=1", "override: unknown key 'learning_rate'; learning_rate is called lr here"),
        ("leraning_rate=1", "override: unknown key 'leraning_rate'; learning_rate is called lr here"),
        ("epoch_per_stage=2", "override: unknown key 'epoch_per_stage'; the nearest known one is 'epochs_per_stage'"),
        ("learning_rate", "override: found 'learning_rate', expected key=value"),
        ("detach_after=1 parallel_rounds=2", "detach_after: found 1 with parallel_rounds, whose gradients"),
        ("c_thought=0", "c_thought: found 0, expected 1 or more thoughts per step for method 'coconut'"),
        ("c_thought=0 method=pause", "c_thought: found 0, expected 1 or more pauses per step for method 'pause'"),
        ("num_epochs=0 only_eval=true resume=3", "num_epochs: found 0, expected 1 or more"),
        ("advance_at=70", "advance_at: found 70.0, expected accuracies from 0 to 1"),
        ("frontier=some", "frontier: found 'some', expected one of shortest_paths, all"),
        ("max_latent_stage=-1", "max_latent_stage: "),
        ("uniform_prob=3", "uniform_prob: "),
        ("report_to=tensorbored", "report_to: found 'tensorbored', expected none, all, or what is installed of"),
        ("report_to=[none]", "report_to: found 'none', expected none, all, or"),
        ("adam_beta1=1.5", "adam_beta1: found 1.5, expected at least 0 and less than 1"),
        ("num_epochs=many", "override: num_epochs: found 'many', expected a whole number"),
        ("debug=1", "override: debug: found 1, expected true or false"),
        ("c_thought=true", "override: c_thought: found True, expected a whole number"),
        ("precision=fp8", "precision: found 'fp8', expected one of fp32, bf16, fp16, bf16_weights"),
        ("method=magic", "method: found 'magic', expected one of coconut"),
        ("model.n_layer=2", "override: model.n_layer: model is not a mapping here"),
        ('model={"n_layer":1,"n_layer":2}', "override: model: line 1: found n_layer again, expected it once"),
        ("device=warp", "device: found 'warp', expected cpu or cuda"),
        ("seed=-1", "seed: found -1, expected 0 or more"),
        ("lr=-1", "lr: found -1.0, expected a finite number of at least 0"),
        ("advance_at=0.9", "val_path: found none, expected a file, because advance_at looks at"),
        ("save_only_improve=true", "val_path: found none, expected a file, because save_only_improve looks at"),
    ],
)
def test_overrides_that_make_no_sense_are_refused(tmp_path: Path, override: str, message: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: gpt2\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        read_recipe(file, override.split())


@pytest.mark.parametrize(
    ("method", "override", "because"),
    [
        ("cot", "uniform_prob=0.3", "cot has one stage"),
        ("no_curriculum", "replay_prob=0.1", "no_curriculum has one stage"),
        ("pause", "advance_at=[0.9]", "pause has one stage"),
        ("no_thoughts", "tokens_per_stage=2", "only icot removes single tokens"),
        ("pause_as_thought", "detach_after=0", "pause_as_thought has no thoughts"),
        ("no_cot", "parallel_rounds=1", "no_cot has no thoughts"),
        ("pause_as_thought_multipass", "feedback=rescale", "pause_as_thought_multipass feeds back no hidden states"),
        ("coconut tokenizer=words", "separators=false", "graphs are written as the recipe says with tokenizer: "),
        ("coconut tokenizer=symbols", "frontier=all", "only target: random_frontier asks for one"),
        ("coconut", "num_thoughts=3", "it is for only_eval; in training the stage says how many"),
    ],
)
def test_settings_that_would_change_nothing_are_refused(official: Path, method: str, override: str, because: str):
    name, (method, *others) = override.partition("=")[0], method.split()
    with pytest.raises(ValueError, match=rf"^{name}: found .*, which would change nothing: {because}"):
        read_recipe(official, [f"method={method}", *others, override])
    graphs = ["tokenizer=symbols", "target=random_frontier"]
    needs = {"tokens_per_stage": ["method=icot"], "separators": graphs, "frontier": graphs}
    needs["num_thoughts"] = ["only_eval=true"]
    read_recipe(official, [*needs.get(name, []), override])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="device: found 'cuda', but torch sees no GPU here"):
        CoconutArguments(device="cuda")


def test_a_process_has_one_gpu_of_several(monkeypatch) -> None:
    """Otherwise transformers wraps the model in DataParallel, which hands every replica the one ragged batch."""

    def finds_four(self: TrainingArguments) -> torch.device:
        self._n_gpu = 4
        return torch.device("cpu")

    devices = functools.cached_property(finds_four)
    devices.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", devices)
    args = CoconutArguments(batch_size_training=8).to_training_arguments()
    assert (args.n_gpu, args.train_batch_size) == (1, 8)


def test_one_process_has_nothing_to_shard_over() -> None:
    with pytest.raises(ValueError, match="fsdp: found one process, expected several to shard over, started by"):
        CoconutArguments(fsdp=True, device="cpu").to_training_arguments("GPT2Block")


def test_files_that_are_no_recipe_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent.yaml: cannot be read \(No such file"):
        read_recipe(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match=r"list.yaml: found list, expected lines of `key: value`"):
        read_recipe(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\nb: 2\n")
    with pytest.raises(ValueError, match=r"broken.yaml: not YAML \(line 2\)"):
        read_recipe(tmp_path / "broken.yaml")
    (tmp_path / "typo.yaml").write_text("batch_size: 4\n")
    with pytest.raises(ValueError, match="typo.yaml: unknown key 'batch_size'; .* 'batch_size_training'"):
        read_recipe(tmp_path / "typo.yaml")
    for text, message in (
        ("lr: !!int ''\n", "not YAML; expected lines"),
        ("lr: 1" + "0" * 400, "lr: found 1(0*), expected a number"),
        ("training_arguments: {1: 2}", "training_arguments: found the key 1, expected text"),
        ("model: {from_config: gpt2, 5: 1}", "model: found the key 5, expected text"),
        ("lr: 1\nseed: 1\nlr: 2", "line 3: found lr again, expected it once"),
        ("model: {from_config: gpt2, n_layer: 1, n_layer: 2}", "line 1: found n_layer again, expected it once"),
    ):
        (tmp_path / "odd.yaml").write_text(text)
        with pytest.raises(ValueError, match=f"odd.yaml: {message}"):
            read_recipe(tmp_path / "odd.yaml")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gradient_accumulation_steps", "expected our own setting instead: gradient_accumulation_steps"),
        ("learning_rate", "expected our own setting instead: lr"),
        ("output_dir", "expected our own setting instead: save_path and name"),
        ("optim", "which this trainer does not follow; expected some of activation_checkpointing, "),
        ("nope", "which this trainer does not follow"),
        ("torch_compile", "but passes differ in shape"),
        ("torch_compile_backend", "but passes differ in shape"),
    ],
)
def test_training_arguments_that_are_ours_or_nobodys_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"training_arguments: found '?{name}'?, {message}"):
        CoconutArguments(training_arguments={name: 1})


@pytest.mark.parametrize("level", ["loud", ["info"]])
def test_a_training_argument_that_transformers_cannot_read_is_named(level: Any) -> None:
    with pytest.raises(ValueError, match="training_arguments: found log_level .*, expected one of .*info"):
        CoconutArguments(training_arguments={"log_level": level}, device="cpu").to_training_arguments()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"from_config": "t5"}, "model: Unrecognized configuration class .*AutoModelForCausalLM.$"),
        ({"from_config": ["gpt2"]}, r"model: found from_config \['gpt2'\], expected a family"),
        ({"from_config": "gpt2", "n_layer": 1, "activation_function": "foo"}, "model: KeyError: 'foo'"),
        ({"from_config": "gpt2", "n_layer": "two"}, "model: .*'n_layer'.*'two'"),
        ({"from_config": "gpt2", "dtype": "bf16"}, "model: .*'bf16'"),
    ],
)
def test_a_model_that_cannot_be_made_is_refused_in_one_sentence(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(CoconutArguments(model=model, tokenizer="symbols"), [])


def test_a_tokenizer_that_does_not_load_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^tokenizer: {tmp_path} does not load: Couldn't instantiate .* one of: .1."):
        make_tokenizer(str(tmp_path), [])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("[]")
    with pytest.raises(ValueError, match=f"^tokenizer: {tmp_path} does not load: "):
        make_tokenizer(str(tmp_path), [])


def test_a_tokenizer_beside_a_models_own_is_refused(tmp_path: Path) -> None:
    build(tiny(tmp_path), chains(8)).save_pretrained(tmp_path / "words")
    for saved in ({"model": str(tmp_path / "words")}, {"load_model_path": str(tmp_path / "words")}):
        with pytest.raises(ValueError, match="tokenizer: found 'words', expected none .* for a model that brings its"):
            build(tiny(tmp_path, **saved), chains(8))
        with pytest.raises(ValueError, match="tokenizer: found 'symbols', expected none, because the model's own tok"):
            build(tiny(tmp_path, **saved, tokenizer="symbols"), [])


def test_training_arguments_that_are_followed_have_no_other_name() -> None:
    known = TrainingArguments.__dataclass_fields__
    defaults = {name: known[name].default for name in PASSED_THROUGH if name in known}
    CoconutArguments(training_arguments=defaults, device="cpu").to_training_arguments()
    assert not {*PASSED_THROUGH} & {*RENAMED_FIELDS, *CoconutArguments.__dataclass_fields__}


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_our_recipes_read(recipe: Path) -> None:
    found = read_recipe(recipe)
    assert recipe.stem in (found.name, Path(found.save_path).name)  # the demo has several runs in one folder
    unused = set(yaml.safe_load(recipe.read_text())) - set(CoconutArguments.__dataclass_fields__)
    assert not unused, "our own recipes use our own names"


@pytest.mark.parametrize(
    "method", ["cot", "no_cot", "icot", "pause", "no_curriculum", "no_thoughts", "pause_as_thought", "coconut"]
)
@pytest.mark.parametrize("recipe", ["gsm8k", "prosqa", "prontoqa"])
def test_every_row_of_table_1_is_one_override(recipe: str, method: str) -> None:
    found = read_recipe(ROOT / "recipes" / f"{recipe}.yaml", [f"method={method}"])
    assert found.curriculum().method == method
    assert found.schedule().next_stage([]) == 0


def test_the_schedule_is_of_the_settings() -> None:
    plan = {"epochs_per_stage": 2, "num_epochs": 19, "first_stage_epochs": 5, "final_epochs": 4, "advance_at": 0.5}
    plan |= {"reset_optimizer": "never"}
    settings = make_arguments({**plan, "resume": 3, "max_latent_stage": 2, "val_path": "val.json"})
    assert settings.schedule() == StageSchedule(**plan, last_stage=3, first_epoch=3)
    assert make_arguments({"method": "cot", "c_thought": 0}).schedule().last_stage == 0
    make_arguments({"only_eval": True, "num_thoughts": 4, "c_thought": 0, "load_model_path": "x"})  # says how many


def test_settings_reach_transformers() -> None:
    given = {"weight_decay": 0.3, "adam_beta1": 0.8, "adam_beta2": 0.7, "max_grad_norm": 2.0, "warmup_steps": 7}
    given |= {"logging_steps": 3, "gradient_accumulation_steps": 5, "seed": 4}
    ours = {"lr": 0.5, "num_workers": 2, "precision": "bf16", "device": "cpu"}
    found = make_arguments({**given, **ours}).to_training_arguments()
    assert {name: getattr(found, name) for name in given} == given
    assert (found.learning_rate, found.dataloader_num_workers, found.bf16) == (0.5, 2, True)


def test_limits_of_the_problems_that_are_read() -> None:
    assert make_arguments({}).limits() == (None, None)
    assert make_arguments({"eval_examples": 5}).limits() == (None, 5)
    assert make_arguments({"eval_examples": 5, "debug": True}).limits() == (5000, 32)
