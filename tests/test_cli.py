"""The command line: every command once, what --help costs, and how bad input ends."""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from coconut_fast import load
from coconut_fast.cli import main
from coconut_fast.commands.common import find_model
from coconut_fast.commands.generate import _Lines, read_prompts_file
from coconut_fast.data.examples import read_examples
from coconut_fast.evaluate import recipe
from coconut_fast.infer import engine
from coconut_fast.model.loading import REFERENCE_PREFIX
from coconut_fast.train import checkpoints
from coconut_fast.train.build import build
from tests.runs import tiny


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, made by the command line."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("cli")
    settings = {k: v for k, v in tiny(folder, num_epochs=3).to_dict().items() if k != "removal_smoothing"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train", str(folder / "recipe.yaml"), "lr=1e-3", "name=run"]) == 0
    return folder


def call(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def fails(capsys: pytest.CaptureFixture[str], code: int, *arguments: str | Path) -> str:
    """The one sentence a command ends with."""
    try:
        found = main([str(a) for a in arguments])
    except SystemExit as exit_:  # argparse
        found = exit_.code
    error = capsys.readouterr().err
    assert found == code, error
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


@pytest.mark.parametrize("kind", ["prosqa", "prontoqa", "graphs"])
def test_data(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(capsys, "data", kind, tmp_path / "a.json", "--count", "5")
    call(capsys, "data", kind, tmp_path / "b.jsonl", "--count", "5", "--split", "test")
    first, other = read_examples(tmp_path / "a.json"), read_examples(tmp_path / "b.jsonl")
    assert len(first) == len(other) == 5 and first != other
    assert "problems         5" in call(capsys, "data", "check", tmp_path / "a.json")


def test_eval(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = trained / "runs" / "run", trained / "val.json"
    table = call(capsys, "eval", model, data, "--out", tmp_path / "out", "--max-new-tokens", "8", "--device", "cpu")
    columns = " ".join(table.splitlines()[0].split())
    assert columns == "model accuracy tokens thoughts ms / example examples"
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]["run"]
    lines = (tmp_path / "out" / "run.jsonl").read_text().splitlines()
    assert results["examples"] == len(lines) == 8 and results["mean_thoughts"] == 2
    assert sum(json.loads(line)["correct"] for line in lines) == results["correct"]
    printed = json.loads(call(capsys, "eval", model, data, "--num-thoughts", "1", "--limit", "3", "--json"))
    assert printed["run"]["mean_thoughts"] == 1 and printed["run"]["examples"] == 3


def test_a_model_that_fails_takes_no_results_of_others_with_it(trained: Path, tmp_path: Path, capsys) -> None:
    run, torn = trained / "runs" / "run", tmp_path / "run"
    shutil.copytree(run, torn)
    (torn / "model.safetensors").write_bytes(b"")
    data, out = trained / "val.json", tmp_path / "out"
    assert "does not load" in fails(capsys, 2, "eval", run, run, torn, data, "--limit", "2", "--out", out)
    results = json.loads((out / "results.json").read_text())["results"]
    assert "run" in results and len(results) == len(list(out.glob("*.jsonl"))) == 2


def test_generate(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained / "runs" / "run"
    one = call(capsys, "generate", model, "go on from ada", "--max-new-tokens", "4")
    (tmp_path / "prompts.txt").write_text("go on from ada\n\ngo on on from bo\n")
    both = call(capsys, "generate", model, "--file", tmp_path / "prompts.txt", "--max-new-tokens", "4")
    assert both.startswith(one)
    (tmp_path / "odd.txt").write_bytes("go on\x0cfrom ada\r\ngo \u2028 on from bo\r\n".encode())
    assert read_prompts_file(str(tmp_path / "odd.txt")) == ["go on\x0cfrom ada", "go \u2028 on from bo"]
    (tmp_path / "prompts.jsonl").write_text('{"question": "go on from ada"}\n')
    assert call(capsys, "generate", model, "--file", tmp_path / "prompts.jsonl", "--max-new-tokens", "4") == one
    assert "is not valid Unicode" in fails(capsys, 2, "generate", model, "go \udcff from ada")
    record = json.loads(
        call(capsys, "generate", model, "go on from ada", "--num-thoughts", "3", "--json", "--max-new-tokens", "2")
    )
    assert record["num_thoughts"] == 3 and len(record["token_ids"]) <= 2
    monkeypatch.setattr("sys.stdin", io.StringIO("go on from ada\n\n"))
    assert call(capsys, "generate", model, "--max-new-tokens", "4") == one, "prompts as they are typed"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{'go ' * 10_000}\ngo on from ada\n"))
    assert main(["generate", str(model), "--max-new-tokens", "4"]) == 2, "a piped prompt was refused"
    assert capsys.readouterr().out == one, "the others are answered"


def test_a_model_that_is_not_here_is_told_before_the_hub_is_asked(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(path_or_id: str, **_: object) -> None:
        assert "some-body/model is no path here: looking in the cache" in capsys.readouterr().err
        raise ValueError("asked")

    monkeypatch.setattr("coconut_fast.model.loading.load", ask)
    monkeypatch.setattr("coconut_fast.train.build.load", ask)
    assert fails(capsys, 2, "generate", "some-body/model", "go").endswith("asked")
    hub = ("tokenizer=null", "model=some-body/model", "name=hub")
    assert fails(capsys, 2, "train", trained / "recipe.yaml", *hub).endswith("asked")
    for name in ("train_path", "val_path"):
        assert main(["train", str(trained / "recipe.yaml"), *hub, f"{name}=absent.json"]) == 2
        assert capsys.readouterr().err.startswith("coconut-fast: error: absent.json: cannot be read")


def test_convert(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = trained / "runs" / "run"
    call(capsys, "convert", "official", model, tmp_path / "checkpoint_9")
    state = torch.load(tmp_path / "checkpoint_9", weights_only=True)
    assert all(name.startswith(REFERENCE_PREFIX) or name == "embedding.weight" for name in state)
    again = ("convert", "model", tmp_path / "checkpoint_9", tmp_path / "back", "--base", model, "--num-thoughts", "2")
    call(capsys, *again)
    ours, back = load(model).state_dict(), load(tmp_path / "back").state_dict()
    assert all(torch.equal(ours[name], back[name]) for name in ours)
    assert load(tmp_path / "back").settings.num_thoughts == 2
    call(capsys, "convert", "model", model, tmp_path / "other", "--num-thoughts", "1")
    printed = json.loads(call(capsys, "eval", tmp_path / "other", trained / "val.json", "--limit", "2", "--json"))
    assert printed["other"]["mean_thoughts"] == 1, "instead of the number it was trained with"
    (tmp_path / "icot.txt").write_text("How many?||<<1+1=2>> #### 2\n")
    call(capsys, "convert", "icot", tmp_path / "icot.txt", tmp_path / "icot.json")
    assert read_examples(tmp_path / "icot.json")[0].answer == "2"


def test_only_eval(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe of the official code with only_eval, on its own kind of checkpoint."""
    run = trained / "runs" / "run"
    call(capsys, "convert", "official", run, tmp_path / "checkpoint_3")
    official = {
        "model_id": str(run), "load_model_path": str(tmp_path / "checkpoint_3"), "only_eval": True, "coconut": True,
        "c_thought": 1, "epochs_per_stage": 1, "max_latent_stage": 2, "num_epochs": 9, "resume": 3, "name": "only",
        "save_path": str(tmp_path), "val_path": str(trained / "val.json"), "bf16": False, "reset_optimizer": True,
    }  # fmt: skip
    # Like official checkpoints: nothing says how many thoughts they were trained with.
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (bare / file).write_bytes((run / file).read_bytes())
    official["model_id"] = str(bare)
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(official))
    assert "only" in call(capsys, "train", tmp_path / "eval.yaml")
    assert json.loads((tmp_path / "only" / "results.json").read_text())["results"]["only"]["mean_thoughts"] == 2
    error = fails(capsys, 2, "train", tmp_path / "eval.yaml", "resume=1")
    assert "num_thoughts: found none, and resume=1 would mean 1 thoughts where a fully trained model has 2" in error
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(recipe, "evaluate_recipe", lambda settings: pytest.fail("evaluated in vain"))
    error = fails(capsys, 2, "train", tmp_path / "eval.yaml", f"save_path={tmp_path / 'file'}")
    assert f"save_path: {tmp_path / 'file'} is a file, expected a directory or nothing" in error
    monkeypatch.undo()
    call(capsys, "train", tmp_path / "eval.yaml", "resume=1", "num_thoughts=1", "num_epochs=1")  # nothing is trained
    assert json.loads((tmp_path / "only" / "results.json").read_text())["results"]["only"]["mean_thoughts"] == 1
    monkeypatch.setenv("RANK", "1")  # the official code runs under torchrun; all processes but the first do nothing
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert call(capsys, "train", tmp_path / "eval.yaml") == ""


def test_bad_input_is_one_sentence_and_exit_code_2(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = trained / "runs" / "run", trained / "val.json"
    training = trained / "recipe.yaml"
    assert "invalid choice" in fails(capsys, 2, "learn")
    assert "unknown key 'epoch'" in fails(capsys, 2, "train", training, "epoch=3")
    assert "seed: found 4294967296, expected less than" in fails(capsys, 2, "train", training, "seed=4294967296")
    assert "no such file or directory" in fails(capsys, 2, "eval", tmp_path / "absent", data)
    assert "config.json; expected" in fails(capsys, 2, "eval", run, tmp_path, tmp_path / "absent.json"), "before work"
    assert "absent.json: cannot be read" in fails(capsys, 2, "eval", run, tmp_path / "absent.json")
    assert "absent.txt: cannot be read (No such file or directory); expected a file of prompts" in fails(
        capsys, 2, "generate", run, "--file", "absent.txt"
    )
    assert "prompt 0 is empty" in fails(capsys, 2, "generate", run, "")
    assert "--max-new-tokens: found -5" in fails(capsys, 2, "eval", run, data, "--max-new-tokens", "-5")
    assert "--limit: found 0" in fails(capsys, 2, "eval", run, data, "--limit", "0")
    assert "--num-thoughts: found -2" in fails(capsys, 2, "eval", run, data, "--num-thoughts", "-2")
    assert "--batch-size: found 0" in fails(capsys, 2, "eval", run, data, "--batch-size", "0")
    assert "--count: found 0" in fails(capsys, 2, "data", "prosqa", tmp_path / "x.json", "--count", "0")
    assert "--file: found a prompt as well" in fails(capsys, 2, "generate", run, "a", "--file", "b")
    for given in (("generate", run, "go"), ("eval", run, data), ("convert", "model", run, tmp_path / "new")):
        error = fails(capsys, 2, *given, "--base", "gpt2")
        assert f"--base: found gpt2, which would change nothing: {run} is no checkpoint file" in error
    for absent in ("checkpoint_40", "some/checkpoint_40"):
        error = fails(capsys, 2, "generate", absent, "go", "--base", "gpt2")
        assert f"no such file or directory: {absent}" in error
    assert "device: quantum cannot be used here" in fails(capsys, 2, "generate", run, "go", "--device", "quantum")
    assert "max_new_tokens: expected an int" in fails(capsys, 2, "generate", run, "go", "--max-new-tokens", "0")
    in_the_way = f"{data} is a file, expected a directory or nothing"
    assert f"save_path: {in_the_way}" in fails(capsys, 2, "train", training, f"save_path={data / 'runs'}")
    assert f"--out: {in_the_way}" in fails(capsys, 2, "eval", run, data, "--out", data)
    assert f"--out: {in_the_way}" in fails(capsys, 2, "demo", "--out", data)
    assert f"target: {in_the_way}" in fails(capsys, 2, "convert", "model", run, data)
    assert f"file: {in_the_way}" in fails(capsys, 2, "data", "graphs", data / "x.json")
    folder_there = f"{tmp_path} is a directory, expected a file or nothing"
    assert f"file: {folder_there}" in fails(capsys, 2, "data", "prosqa", tmp_path)
    assert f"target: {folder_there}" in fails(capsys, 2, "convert", "official", run, tmp_path)
    assert f"target: {folder_there}" in fails(capsys, 2, "convert", "icot", data, tmp_path)
    (tmp_path / "bad.json").write_text('[{"question": "q", "steps": [], "answer": 5}]')
    assert "record 1, field 'answer': found a number (5)" in fails(capsys, 2, "eval", run, tmp_path / "bad.json")


def test_text_for_a_model_of_symbols_is_named(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build(tiny(tmp_path, tokenizer="symbols"), [])
    model.settings.symbols = {}
    model.save_pretrained(tmp_path / "symbols")
    error = fails(capsys, 2, "eval", tmp_path / "symbols", trained / "val.json")
    assert f"{trained / 'val.json'}: record 1: the field 'edges' is missing" in error


def test_an_unfinished_run_stands_for_its_best_checkpoint_else_its_last(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "unfinished"
    shutil.copytree(trained / "runs" / "run", run)
    assert find_model(str(run)) == str(run), "a finished one stands for itself"
    (run / "config.json").unlink()
    last = checkpoints.complete(run)[-1]
    best = run / f"checkpoint-{checkpoints.read_manifest(last)['best']['step']}"
    assert find_model(str(run)) == best
    prompt = ("go on from ada", "--max-new-tokens", "4")
    assert call(capsys, "generate", run, *prompt) == call(capsys, "generate", best, *prompt)
    manifest = json.loads((last / "checkpoint.json").read_text())
    (last / "checkpoint.json").write_text(json.dumps({**manifest, "best": None}))  # as without validation
    assert find_model(str(run)) == last


def test_a_run_that_has_gone_on_stands_for_its_checkpoints(trained: Path, tmp_path: Path) -> None:
    """It had ended, was made longer and killed: the model of its first end is still in its directory."""
    run = tmp_path / "longer"
    shutil.copytree(trained / "runs" / "run", run)
    last = checkpoints.complete(run)[-1]
    best = run / f"checkpoint-{checkpoints.read_manifest(last)['best']['step']}"
    ended = (run / "config.json").stat().st_mtime
    os.utime(last / "checkpoint.json", (ended + 1, ended + 1))
    with pytest.warns(UserWarning, match=f"{last.name} is newer than the model beside it; reading {best.name}"):
        assert find_model(str(run)) == best


def test_a_finished_run_says_so(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = ("train", str(trained / "recipe.yaml"), "name=run")
    assert main([*again, "lr=1e-3"]) == 0
    assert "finished    nothing is left to train" in capsys.readouterr().err
    assert main([*again, "lr=1e-3", "load_model_path=x"]) == 0
    assert "run, from checkpoint-9, not from load_model_path (x); another name begins a new" in capsys.readouterr().err
    assert "belongs to another run: lr was 0.001 there and is 0.002 now" in fails(capsys, 2, *again, "lr=2e-3")


def test_places_that_may_not_be_written_to_are_refused_before_work(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, data = trained / "runs" / "run", trained / "val.json"

    def temporary(dir: Path, really: Any = tempfile.TemporaryFile) -> Any:
        if dir == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied")
        return really(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", temporary)  # root may write anywhere
    refused = f"{tmp_path} cannot be written to (Permission denied), expected a directory that can"
    assert f"file: {refused}" in fails(capsys, 2, "data", "prosqa", tmp_path / "x.json", "--count", "1000000000")
    assert f"--out: {refused}" in fails(capsys, 2, "eval", run, data, "--out", tmp_path / "a" / "b")
    assert f"save_path: {refused}" in fails(capsys, 2, "train", trained / "recipe.yaml", f"save_path={tmp_path}")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()

    monkeypatch.setattr("coconut_fast.model.loading.load", lambda *_, **__: pytest.fail("loaded in vain"))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "nowhere").symlink_to("absent")
    (tmp_path / "there" / "results.json").mkdir(parents=True)
    (tmp_path / "taken" / f"{run.name}.jsonl").mkdir(parents=True)
    assert "target: /dev/full is a device" in fails(capsys, 2, "convert", "official", run, "/dev/full")
    assert f"file: {tmp_path / 'pipe'} is a device" in fails(capsys, 2, "data", "graphs", tmp_path / "pipe")
    assert f"file: {tmp_path / 'new'} is a directory" in fails(capsys, 2, "data", "graphs", f"{tmp_path}/new/")
    nothing = f"--out: {tmp_path / 'nowhere'} is a link to nothing, expected a directory or nothing"
    assert nothing in fails(capsys, 2, "eval", run, data, "--out", tmp_path / "nowhere")
    assert "results.json is a directory" in fails(capsys, 2, "eval", run, data, "--out", tmp_path / "there")
    assert f"{run.name}.jsonl is a directory" in fails(capsys, 2, "eval", run, data, "--out", tmp_path / "taken")
    assert "--out: found nothing, expected a directory" in fails(capsys, 2, "eval", run, data, "--out", "")
    assert "cannot be a directory (File name too long)" in fails(capsys, 2, "eval", run, data, "--out", "a" * 300)


def test_an_interrupted_command_says_what_is_left(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    finish = engine.Engine._finish
    monkeypatch.setattr(engine.Engine, "_finish", lambda self, n, answer: stop() if n else finish(self, n, answer))
    (tmp_path / "prompts.txt").write_text("go on from ada\ngo on from bo\n")
    generating = ("generate", trained / "runs" / "run", "--file", tmp_path / "prompts.txt", "--max-new-tokens", "4")
    assert main([str(a) for a in generating]) == 1
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 1 and "None" not in shown.out
    assert shown.err.endswith("coconut-fast: error: interrupted: 1 of 2 answers were finished\n")

    monkeypatch.setattr("coconut_fast.train.run.run", stop)
    training = ("train", trained / "recipe.yaml")
    assert fails(capsys, 1, *training, "name=run").endswith("interrupted: the same command goes on from checkpoint-9")
    assert fails(capsys, 1, *training, "name=new").endswith("begins anew, there is no checkpoint yet")

    def half_imported(_: object) -> None:
        try:
            stop()
        except KeyboardInterrupt as error:
            raise ImportError("Could not import module 'PreTrainedModel'") from error

    monkeypatch.setattr("coconut_fast.train.recipe.read_recipe", lambda *_: half_imported(_))
    assert fails(capsys, 1, *training) == "coconut-fast: error: interrupted"


def test_answers_are_printed_as_they_are_complete(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of the prompts; whatever ends the process later takes none of them with it."""
    finish, printed = engine.Engine._finish, []

    def watched(self, number: int, answer: object) -> None:
        printed.append(capsys.readouterr().out)
        if number == 2:
            raise RuntimeError("the machine is on fire")
        finish(self, number, answer)

    (tmp_path / "prompts.txt").write_text("go on from ada\ngo on from bo\ngo on on from bo\n")
    generating = ("generate", trained / "runs" / "run", "--file", tmp_path / "prompts.txt", "--max-new-tokens", "4")
    expected = call(capsys, *generating)
    monkeypatch.setattr(engine.Engine, "_finish", watched)
    assert fails(capsys, 1, *generating, "--batch-size", "1").endswith("the machine is on fire")
    assert all(printed[1:]) and "".join(printed) == "".join(expected.splitlines(keepends=True)[:2])

    lines = _Lines(["a", "b"], argparse.Namespace(json=False, num_samples=2))
    shown = []
    for number in (1, 0, 3):
        lines.add(number, f"answer {number}", [], 0)
        shown.append(capsys.readouterr().out)
    lines.print_rest()
    assert shown == ["", "answer 0\nanswer 1\n", ""] and capsys.readouterr().out == "answer 3\n"


def test_failures_while_running_exit_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    error = fails(capsys, 1, "data", "graphs", tmp_path / "data.json", "--count", "1")
    assert error == f"coconut-fast: error: [Errno 28] No space left on device: '{tmp_path / 'data.json'}'"
    assert list(tmp_path.iterdir()) == []


def test_what_nobody_foresaw_is_one_sentence_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where it comes from can be seen, as it may be a bug."""

    def fails(*_: object) -> None:
        raise KeyError("edges")

    monkeypatch.setattr("coconut_fast.data.examples.read_examples", fails)
    monkeypatch.delenv("COCONUT_FAST_TRACEBACK", raising=False)
    assert main(["data", "check", "x.json"]) == 1
    where = "(COCONUT_FAST_TRACEBACK=1 shows where it came from)"
    assert capsys.readouterr().err == f"coconut-fast: error: KeyError: 'edges' {where}\n"
    monkeypatch.setenv("COCONUT_FAST_TRACEBACK", "1")
    with pytest.raises(KeyError):
        main(["data", "check", "x.json"])
