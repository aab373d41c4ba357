"""The demo end to end: a few steps always, the real thing where slow tests run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from coconut_fast import demo
from coconut_fast.cli import main
from coconut_fast.data.examples import read_examples
from coconut_fast.model.loading import load

FEW_STEPS = ["epoch_size=32", "batch_size_training=16", "first_stage_epochs=1", "epochs_per_stage=1", "num_epochs=5"]


def test_demo_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(demo, "PROBLEMS", {"train": 64, "valid": 8, "test": 16})
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), *FEW_STEPS]) == 0
    printed = capsys.readouterr().out
    for name in demo.RUNS:
        assert f"\n{name} " in printed
    assert f"coconut-fast generate {shlex.quote(f'{out}/coconut')} '" in printed
    assert "accuracy" in printed and "tokens" in printed and "ms / example" in printed
    for picture in (demo.CURVES, demo.THOUGHTS):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    results = json.loads((out / "results" / "results.json").read_text())
    assert set(results["results"]) == set(demo.RUNS) and len(results["accuracy_by_thoughts"]) == 4
    steps = [json.loads((out / n / "metrics.jsonl").read_text().splitlines()[-1])["step"] for n in ("coconut", "cot")]
    assert steps == [10, 10]
    model = load(out / "coconut")
    assert (model.settings.num_thoughts, model.settings.stage) == (3, 4)

    trained = (out / "coconut" / "metrics.jsonl").read_text()
    assert main(["demo", "--out", str(out), *FEW_STEPS]) == 0  # the same again trains nothing and shows the same
    assert (out / "coconut" / "metrics.jsonl").read_text() == trained


def test_settings_are_refused_before_graphs_are_made(tmp_path: Path):
    with pytest.raises(ValueError, match="seed: found -1, expected 0 or more"):
        demo.run_demo(tmp_path / "demo", seed=-1)
    with pytest.raises(ValueError, match="override: unknown key 'epoch'"):
        demo.run_demo(tmp_path / "demo", overrides=["epoch=1"])
    for override in ("name=x", "save_path=x", "seed=3", "debug=true", "only_eval=true", "resume=1"):
        key = override.split("=")[0]
        with pytest.raises(ValueError, match=f"override: found {key}, expected another setting: the demo "):
            demo.run_demo(tmp_path / "demo", overrides=[override])
    assert not list(tmp_path.iterdir())


def test_splits_share_no_problem(tmp_path: Path):
    files = demo.make_graphs(tmp_path, {"train": 300, "test": 100}, seed=0)
    seen = {json.dumps(example.extra) for example in read_examples(files["train"])}
    assert not seen & {json.dumps(example.extra) for example in read_examples(files["test"])}


def test_baselines_differ_in_the_method_alone():
    overrides = ["uniform_prob=0.1", "final_epochs=2"]  # two epochs of their one stage would end the others
    settings = [demo.settings_of(changes, overrides).to_dict() for changes in demo.RUNS.values()]
    assert [one["final_epochs"] for one in settings] == [2, None, None]
    for other in settings[1:]:
        changed = {k for k in other if other[k] != settings[0][k]}
        stages = {"lr_schedule", "final_epochs", "advance_at", "replay_prob", "uniform_prob"}
        assert changed == {"name", "method", *stages}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_model_learns_to_think(tmp_path: Path):
    results = demo.run_demo(tmp_path)
    assert results["Coconut"].accuracy >= 0.95
    assert results["CoT"].accuracy <= results["Coconut"].accuracy - 0.05
    assert abs(results["No-CoT"].accuracy - 0.5) < 0.06


def test_a_demo_of_another_seed_is_left_as_it_is(tmp_path: Path):
    (tmp_path / "coconut").mkdir()
    (tmp_path / "coconut" / "run.json").write_text('{"seed": 7}')
    with pytest.raises(ValueError, match="--out: .* holds a demo of seed 7, expected seed 9 or another folder"):
        demo.run_demo(tmp_path, seed=9)
    assert not (tmp_path / "data").exists()
