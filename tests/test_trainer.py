"""The trainer: exact steps, stages, optimizer resets, what it keeps, skipped steps, and every method and precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import TrainingArguments

from coconut_fast import generate, load
from coconut_fast.commands.common import find_model
from coconut_fast.data.curriculum import METHODS, CurriculumConfig
from coconut_fast.data.examples import Example, write_examples
from coconut_fast.model.batch import collate
from coconut_fast.model.feedback import name_of
from coconut_fast.train import checkpoints
from coconut_fast.train.build import MULTIPASS, build
from coconut_fast.train.callbacks import record_curriculum
from coconut_fast.train.checkpoints import CheckpointError
from coconut_fast.train.problems import DataSet
from coconut_fast.train.reports import read_metrics
from coconut_fast.train.rows import StageRows
from coconut_fast.train.run import run
from coconut_fast.train.state import RunState
from coconut_fast.train.trainer import CoconutTrainer
from tests.runs import MODEL, NO_DROPOUT, chains, tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def make_trainer(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> CoconutTrainer:
    settings = tiny(folder, **changes)
    train = chains(40)
    model = build(settings, train).to(dtype)
    validation = DataSet(chains(8, seed=1), model.tokenizer) if settings.val_path else None
    return CoconutTrainer(model, settings, DataSet(train, model.tokenizer), validation)


def weights(trainer: CoconutTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_equal(ours: dict[str, torch.Tensor], others: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    for name, value in ours.items():
        torch.testing.assert_close(
            value, others[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


EXACT = {"model": {**MODEL, **NO_DROPOUT}, "val_path": None, "debug": True, "num_epochs": 3}


def test_a_run_is_adamw_on_the_mean_over_labelled_tokens(tmp_path: Path) -> None:
    """Against a loop written out by hand, in fp64."""
    trainer = make_trainer(tmp_path, torch.float64, **EXACT)
    model = build(tiny(tmp_path, **EXACT), chains(40)).double().train()
    trainer.train()

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    for epoch in range(3):
        if epoch:
            optimizer.state.clear()
        trainer.sampler.epoch, trainer.sampler.stage = epoch, epoch
        trainer.sampler.lengths = trainer.rows.lengths(epoch)
        for keys in trainer.sampler:
            _, ids, labels = zip(*[trainer.rows[key] for key in keys], strict=True)
            model(batch=collate(ids, model.tokens.thought, labels=labels)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_equal(weights(trainer), dict(model.named_parameters()), 1e-11)


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_activation_checkpointing_changes_nothing(tmp_path: Path, name: str) -> None:
    if name not in TrainingArguments.__dataclass_fields__:
        pytest.skip(f"transformers {transformers.__version__} does not call it {name}")
    results = []
    for asked in ({}, {"training_arguments": {name: True}}):
        trainer = make_trainer(tmp_path, torch.float64, **{**EXACT, **asked})
        trainer.train()
        assert trainer.model.checkpoint_passes == bool(asked)
        results.append(weights(trainer))
    assert_equal(*results, 1e-11)


def test_training_arguments_reach_the_optimizer(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, **EXACT, training_arguments={"adam_epsilon": "1e-3"})
    trainer.train()
    assert trainer.optimizer.param_groups[0]["eps"] == 1e-3


def test_accumulation_changes_nothing(tmp_path: Path) -> None:
    results = []
    for batch_size, accumulation in ((16, 1), (4, 4)):
        size = {"batch_size_training": batch_size, "gradient_accumulation_steps": accumulation}
        trainer = make_trainer(tmp_path, torch.float64, **{**EXACT, **size})
        trainer.train()
        results.append(weights(trainer))
    assert_equal(results[0], results[1], 1e-11)


@pytest.mark.parametrize(("accumulation", "uniform"), [(1, 0.0), (4, 0.3)])
def test_graphed_steps_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int, uniform: float
) -> None:
    """In buckets and by replay, as on a GPU; padding tokens do not affect what is logged."""
    results, records = [], []
    mixed = {"pad_latent_to_max": False, "uniform_prob": uniform, "logging_steps": 1}
    # The gradient of a key bias is nothing but rounding, which Adam with an eps of 1e-8 would scale up.
    mixed["training_arguments"] = {"adam_epsilon": 1e-4}
    size = {"batch_size_training": 16 // accumulation, "gradient_accumulation_steps": accumulation}
    for graphed in (False, True):
        if graphed:
            monkeypatch.setattr(CoconutTrainer, "fits_graphs", lambda trainer: True)
        trainer = make_trainer(tmp_path, torch.float64, **{**EXACT, **mixed, **size, "num_epochs": 8})
        trainer.train()
        results.append(weights(trainer))
        records.append([(r["loss"], r.get("thought_norm", 0.0)) for r in trainer.state.log_history if "loss" in r])
        assert (trainer.graphed is not None) == graphed
    assert trainer.graphed.captures
    assert_equal(*results, 1e-11)
    assert any(norm for _, norm in records[0])
    for plain, replayed in zip(*records, strict=True):
        assert replayed == pytest.approx(plain, rel=1e-6)


def test_optimizer_is_reset_at_stage_switches(tmp_path: Path) -> None:
    def steps_since_reset(**changes: Any) -> int:
        trainer = make_trainer(tmp_path, **{**EXACT, "epochs_per_stage": 2, "num_epochs": 4, **changes})
        trainer.train()
        return int(next(iter(trainer.optimizer.state.values()))["step"])

    assert steps_since_reset() == 2 * 3
    assert steps_since_reset(reset_optimizer="epoch") == 3
    assert steps_since_reset(reset_optimizer="never") == 4 * 3


def test_a_run_leaves_a_model_metrics_and_a_curve(tmp_path: Path) -> None:
    folder = run(tiny(tmp_path, epochs_per_stage=2, num_epochs=6, keep_last=1))
    records = read_metrics(folder / "metrics.jsonl")
    evaluations = [r for r in records if "eval_accuracy" in r]
    assert [r["stage"] for r in evaluations] == [0, 0, 1, 1, 2, 2]
    figures = {"loss", "grad_norm", "tokens_per_second", "samples_per_second", "memory_gib", "stage"}
    assert figures <= records[0].keys()
    assert any("thought_norm" in r for r in records)
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "run.json").read_text())["max_latent_stage"] == 2

    best = max(evaluations[4:], key=lambda r: r["eval_accuracy"])["step"]
    assert {c.name for c in checkpoints.complete(folder)} == {"checkpoint-18", f"checkpoint-{best}"}
    model = load(folder)
    assert model.settings.stage == 2 and model.settings.num_thoughts == 2 and model.settings.method == "coconut"
    assert torch.equal(model.embed(torch.arange(3)), load(folder / f"checkpoint-{best}").embed(torch.arange(3)))
    assert generate(model, "go on from ada", max_new_tokens=4).num_thoughts == [2]
    assert run(tiny(tmp_path, epochs_per_stage=2, num_epochs=6, keep_last=1)) == folder, "a finished run stays finished"


def test_a_name_is_no_formula(tmp_path: Path) -> None:
    folder = run(tiny(tmp_path, name="a$_$b", num_epochs=1, epoch_size=16, val_path=None))
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_keeps_its_records(tmp_path: Path) -> None:
    """Whatever another call with its name asks for."""
    folder = run(tiny(tmp_path, num_epochs=2))
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(CheckpointError, match="lr was 0.01 there and is 0.5 now"):
        run(tiny(tmp_path, num_epochs=3, lr=0.5))
    assert run(tiny(tmp_path, num_epochs=1, debug=True)) == tmp_path / "runs" / "tiny-debug"
    for checkpoint in checkpoints.complete(folder):
        checkpoints.remove(checkpoint)
    with pytest.raises(ValueError, match="name: .*tiny holds the model of a run without its checkpoints"):
        run(tiny(tmp_path, num_epochs=2))
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_a_stage_is_left_when_accuracy_passes(tmp_path: Path) -> None:
    changes = {"advance_at": 0.0, "epochs_per_stage": 5, "num_epochs": 20, "final_epochs": 2, "epoch_size": 16}
    folder = run(tiny(tmp_path, **changes, lr_schedule="cosine_final", eval_examples=2))
    stages = [r["stage"] for r in read_metrics(folder / "metrics.jsonl") if "eval_accuracy" in r]
    assert stages == [0, 1, 2, 3, 3], "every accuracy passes 0, and two epochs of the last stage end the run"
    rates = [r["learning_rate"] for r in read_metrics(folder / "metrics.jsonl") if "learning_rate" in r]
    assert rates == pytest.approx([1e-2, 1e-2, 1e-2, 1e-2, 0.5e-2]), "a cosine over the last stage alone"


@pytest.mark.parametrize("lr_schedule", ["linear", "cosine"])
def test_the_learning_rate_ends_where_final_epochs_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lr_schedule: str
) -> None:
    changes = {"final_epochs": 1, "num_epochs": 20, "lr_schedule": lr_schedule, "epoch_size": 16, "eval_examples": 2}
    folder = run(tiny(tmp_path, **changes))
    rates = [r["learning_rate"] for r in read_metrics(folder / "metrics.jsonl") if "learning_rate" in r]
    assert len(rates) == 4 and rates[0] == 1e-2 and rates[-1] < 0.26e-2
    assert "\nstages      0 to 3: 1 epoch each\n" in capsys.readouterr().err
    with pytest.raises(ValueError, match=f"lr_schedule: found '{lr_schedule}', expected 'constant' or 'cosine_final'"):
        tiny(tmp_path, **changes, advance_at=0.9)


def test_save_only_improve(tmp_path: Path) -> None:
    folder = run(tiny(tmp_path, method="no_cot", save_only_improve=True, keep_last=0, num_epochs=3))
    scores = [(r["step"], r["eval_accuracy"]) for r in read_metrics(folder / "metrics.jsonl") if "eval_accuracy" in r]
    improving = {step for i, (step, score) in enumerate(scores) if all(score > s for _, s in scores[:i])}
    kept = sorted(improving | {scores[-1][0]})
    assert [c.name for c in checkpoints.complete(folder)] == [f"checkpoint-{step}" for step in kept]


def test_a_run_that_saves_improvements_alone_knows_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"method": "no_cot", "save_only_improve": True, "num_epochs": 3}
    monkeypatch.setattr(RunState, "improves", lambda self, stage, accuracy, step: step == 3)
    folder = run(tiny(tmp_path, **changes))
    assert [c.name for c in checkpoints.complete(folder)] == ["checkpoint-3", "checkpoint-9"]
    trained = (folder / "metrics.jsonl").read_text()
    run(tiny(tmp_path, **changes))
    assert (folder / "metrics.jsonl").read_text() == trained, "a finished run stays finished"


def test_the_best_of_an_earlier_stage_is_not_the_result(tmp_path: Path) -> None:
    """If a run is resumed without validation, the last model is."""
    run(tiny(tmp_path, num_epochs=2))
    folder = run(tiny(tmp_path, num_epochs=4, val_path=None))
    model, last = load(folder), load(folder / "checkpoint-12")
    assert (model.settings.stage, last.settings.stage) == (3, 3)
    assert torch.equal(model.embed(torch.arange(3)), last.embed(torch.arange(3)))
    (folder / "config.json").unlink()
    assert find_model(str(folder)) == folder / "checkpoint-12"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(tmp_path: Path, method: str) -> None:
    changes = {"tokens_per_stage": 2} if method == "icot" else {}
    folder = run(tiny(tmp_path, method=method, num_epochs=2, epoch_size=16, eval_examples=2, **changes))
    model = load(folder)
    assert model.settings.method == method
    assert all(r["eval_loss"] > 0 for r in read_metrics(folder / "metrics.jsonl") if "eval_loss" in r)


@pytest.mark.parametrize("device", ["cpu", None])
@pytest.mark.parametrize("precision", ["bf16", "bf16_weights", "fp16"])
def test_every_precision_trains_and_keeps_its_weights_dtype(tmp_path: Path, precision: str, device: str | None) -> None:
    settings = {"precision": precision, "device": device, "feedback": "projection"}
    folder = run(tiny(tmp_path, **settings, num_epochs=3, eval_examples=2))
    model = load(folder)
    assert model.dtype == (torch.bfloat16 if precision == "bf16_weights" else torch.float32)
    losses = [r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]
    assert losses[-1] < losses[0]


def test_halves_are_computed_in_halves(tmp_path: Path) -> None:
    """accelerate falls back to fp32 where it has no scaler for a device."""
    losses = {}
    for precision in ("fp32", "bf16", "fp16"):
        trainer = make_trainer(tmp_path, **EXACT, precision=precision)
        trainer.train()
        losses[precision] = torch.tensor([r["loss"] for r in trainer.state.log_history if "loss" in r])
    off = {name: (values - losses["fp32"]).abs().max() for name, values in losses.items()}
    assert 0 < off["fp16"] < off["bf16"] < 0.1


def test_graph_problems_train_as_symbols(tmp_path: Path) -> None:
    """Graph problems: stage s asks for a node s + 1 hops away, the last one for the target."""
    from coconut_fast.data.examples import write_examples
    from coconut_fast.data.graphs import layered_trees, symbolic_record

    write_examples(tmp_path / "graphs.json", [symbolic_record(g, i) for i, g in enumerate(layered_trees(24, depth=2))])
    path = str(tmp_path / "graphs.json")
    changes = {"tokenizer": "symbols", "target": "random_frontier", "relabel": True, "num_epochs": 3}
    folder = run(tiny(tmp_path, **changes, train_path=path, val_path=path, markers=False, max_latent_stage=2))
    tokens = [r["eval_mean_tokens"] for r in read_metrics(folder / "metrics.jsonl") if "eval_accuracy" in r]
    assert tokens[:2] == [1, 2], "a node; a thought and a node"
    assert load(folder).settings.symbols == {"frontier": "shortest_paths", "relabel": True, "separators": True}


@pytest.mark.parametrize(
    ("steps", "changes", "stage"),
    [(30, {"uniform_prob": 1.0}, 0), (2, {"replay_prob": 1.0, "c_thought": 30}, 2)],
    ids=["a long chain", "many thoughts"],
)
def test_rows_are_short_enough_whatever_they_draw(
    tmp_path: Path, steps: int, changes: dict[str, Any], stage: int
) -> None:
    examples = [Example("go on from ada", ["ada to bo"] * steps, "bo")]
    settings = tiny(tmp_path, **changes)
    model = build(settings, examples)
    rows = StageRows(DataSet(examples, model.tokenizer), settings.curriculum(), model.tokens, seed=0)
    assert all(len(rows[0, 0, stage][1]) <= 64 for stage in range(4)), "in epoch 0 every row draws a stage that fits"
    with pytest.raises(ValueError, match=rf"train_path: problem 1 has \d+ tokens at stage {stage}, expected at most"):
        rows.check(range(4), 64)


def test_a_resumed_run_reads_its_model_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"val_path": None, "epoch_size": 16}
    run(tiny(tmp_path, **changes, num_epochs=1))
    read: list[str] = []
    monkeypatch.setattr(checkpoints, "read_model", lambda folder, *_: read.append(folder.name) or load(folder))
    run(tiny(tmp_path, **changes, num_epochs=2))
    assert read == ["checkpoint-1", "checkpoint-2"], "the second one for the run's directory"


def test_a_setting_without_effect_may_differ_in_the_run_that_is_resumed(tmp_path: Path) -> None:
    """Earlier versions accepted any value of it."""
    changes = {"method": "cot", "val_path": None, "epoch_size": 16}
    manifest = run(tiny(tmp_path, **changes, num_epochs=1)) / "checkpoint-1" / "checkpoint.json"
    content = json.loads(manifest.read_text())
    assert "replay_prob" not in content["run"]
    content["run"] |= {"replay_prob": 0.4}
    manifest.write_text(json.dumps(content))
    run(tiny(tmp_path, **changes, num_epochs=2))


def test_special_tokens_that_are_new_to_a_model_start_from_a_known_one(tmp_path: Path) -> None:
    """In a CoT run they are never right: their rows moved away from where the official code has them start."""
    write_examples(tmp_path / "marked.json", [Example("go<<from ada", ["ada to bo"], "bo")] * 16)
    changes = {"train_path": str(tmp_path / "marked.json"), "val_path": None, "num_epochs": 1}
    folder = run(tiny(tmp_path, **changes, method="cot"))
    names = ["<|start-latent|>", "<|end-latent|>", "<|latent|>", "<<"]

    def rows(before: str, now: str) -> torch.Tensor:
        model = load(folder)
        record_curriculum(model, CurriculumConfig(before), 0)
        model.save_pretrained(folder)
        model = build(tiny(tmp_path, **changes, method=now, load_model_path=str(folder), tokenizer=None), [])
        return model.hf.get_output_embeddings().weight.detach()[model.tokenizer.convert_tokens_to_ids(names)]

    kept = rows("cot", "cot")
    assert not torch.isclose(kept[:3], kept[3]).any()
    assert torch.equal(rows("cot", "coconut"), kept[[3, 3, 3, 3]])
    assert torch.equal(rows("pause_as_thought", "coconut"), kept[[0, 1, 3, 3]]), "the markers were trained"
    assert torch.equal(rows("coconut", "pause"), kept)


def test_a_saved_feedback_is_kept_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(tiny(tmp_path, feedback="projection"), chains(8)).save_pretrained(tmp_path / "saved")
    changes = {"load_model_path": str(tmp_path / "saved"), "tokenizer": None, "val_path": None, "epoch_size": 8}
    folder = run(tiny(tmp_path, **changes, num_epochs=1))
    assert name_of(load(folder).feedback) == "projection"
    assert "coconut, 1 thought per step, fed back by projection\n" in capsys.readouterr().err


def test_the_feedback_of_a_method_ends_with_it(tmp_path: Path) -> None:
    """Coconut from a model with pauses fed back the pause, and called it a thought."""
    build(tiny(tmp_path, feedback="projection"), chains(8)).save_pretrained(tmp_path / "chosen")
    model = build(tiny(tmp_path, method=MULTIPASS), chains(8))
    record_curriculum(model, CurriculumConfig(MULTIPASS), 1)
    model.save_pretrained(tmp_path / "paused")

    def feedback(before: str, **changes: Any) -> str:
        changes = {"tokenizer": None, "load_model_path": str(tmp_path / before), **changes}
        return name_of(build(tiny(tmp_path, **changes), []).feedback)

    assert feedback("paused") == feedback("paused", method="cot") == "identity"
    assert feedback("paused", method=MULTIPASS) == feedback("paused", only_eval=True) == "pause"
    assert feedback("chosen") == "projection"


def test_refuses_before_it_starts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train_path: problem \d+ has \d+ tokens at stage 0, expected at most the 12"):
        run(tiny(tmp_path, model={**MODEL, "n_positions": 12}))
    write_examples(tmp_path / "long.json", [*chains(3), Example("go " + "on " * 80, ["ada to bo"], "bo")])
    with pytest.raises(ValueError, match=r"val_path: problem 4 has \d+ tokens at stage 0, expected at most the 64"):
        run(tiny(tmp_path, val_path=str(tmp_path / "long.json")))
    write_examples(tmp_path / "thought.json", [*chains(3), Example("<|latent|> go on", ["ada to bo"], "bo")])
    with pytest.raises(ValueError, match=r"thought.json: record 4: the question starts with a thought, expected a"):
        run(tiny(tmp_path, train_path=str(tmp_path / "thought.json")))
    with pytest.raises(
        ValueError, match=r"train.json: record 1: the field 'edges' is missing; expected a problem with"
    ):
        run(tiny(tmp_path, tokenizer="symbols"))
    with pytest.raises(ValueError, match=r"train.json: record 1: found text, expected a graph problem, whose nodes"):
        run(tiny(tmp_path, target="random_frontier"))
    with pytest.raises(ValueError, match=r"model: .*divisible by num_heads"):
        run(tiny(tmp_path, model={**MODEL, "n_head": 5}))
    with pytest.raises(ValueError, match="train_path: found none, expected a file of problems"):
        run(tiny(tmp_path, train_path=None))
    with pytest.raises(ValueError, match="model: gpt2 has no setting 'n_layers'; the nearest it has is 'n_layer'"):
        run(tiny(tmp_path, model={"from_config": "gpt2", "n_layers": 2}))
    with pytest.raises(ValueError, match="model: .*field 'n_layer'.* expected int, got str"):
        run(tiny(tmp_path, model={**MODEL, "n_layer": "two"}))
    for name in ("n_layer", "n_head", "n_embd"):
        with pytest.raises(ValueError, match=f"model: found {name} 0, expected 1 or more"):
            run(tiny(tmp_path, model={**MODEL, name: 0}))
    with pytest.raises(ValueError, match="model: found from_config 'gpt9', expected a family transformers has"):
        run(tiny(tmp_path, model={"from_config": "gpt9"}))
    with pytest.raises(ValueError, match="load_model_path: no such file or directory: nowhere"):
        run(tiny(tmp_path, load_model_path="nowhere", tokenizer=None))
    with pytest.raises(ValueError, match="tokenizer: found none, expected 'words'"):
        run(tiny(tmp_path, tokenizer=None))
