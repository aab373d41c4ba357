"""Standard streams that are closed, or that nobody reads any more: no work is lost, and none is reported as done."""

from __future__ import annotations

import argparse
import errno
import io
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest
import torch
import yaml

from coconut_fast import load
from coconut_fast.cli import SIGPIPE, main
from coconut_fast.commands.generate import _Lines
from coconut_fast.data.examples import read_examples
from tests.conftest import ROOT
from tests.runs import tiny


@pytest.fixture
def without_reader() -> Iterator[Callable[[], IO[str]]]:
    """Makes streams as a process has before `| true`."""
    made: list[IO[str]] = []

    def make() -> IO[str]:
        reader, writer = os.pipe()
        os.close(reader)
        made.append(os.fdopen(writer, "w"))
        return made[-1]

    yield make
    for stream in made:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        stream.close()


def test_a_reader_that_exits_costs_no_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_reader: Callable[[], IO[str]]
) -> None:
    torch.set_num_threads(1)
    settings = {k: v for k, v in tiny(tmp_path, num_epochs=1).to_dict().items() if k != "removal_smoothing"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    run, val = tmp_path / "runs" / "tiny", tmp_path / "val.json"

    def closed(*arguments: str | Path) -> int:
        with monkeypatch.context() as patched:
            for name in ("stdout", "stderr"):
                patched.setattr(sys, name, without_reader())
            patched.setattr(sys, "__stderr__", sys.stderr)
            return main([str(a) for a in arguments])

    assert closed("train", tmp_path / "recipe.yaml") == SIGPIPE
    assert load(run).settings.num_thoughts is not None and (run / "curve.png").exists()
    assert closed("data", "check", val) == SIGPIPE
    assert closed("data", "graphs", tmp_path / "graphs.json", "--count", "1") == 0, "only stderr is written to"
    assert closed("eval", run, val, "--out", tmp_path / "out", "--device", "cpu", "--max-new-tokens", "2") == SIGPIPE
    assert json.loads((tmp_path / "out" / "results.json").read_text())["results"]["tiny"]["examples"] == 8
    prompt = ("go on from ada", "--max-new-tokens", "2", "--device", "cpu")
    assert closed("generate", run, *prompt) == SIGPIPE


def test_a_pipe_that_breaks_elsewhere_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(*_: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("coconut_fast.data.examples.read_examples", breaks)
    with open(os.devnull, "w") as stream, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", stream)
        assert main(["data", "check", "x.json"]) == 1
    assert capsys.readouterr().err == "coconut-fast: error: [Errno 32] Broken pipe\n"


def test_closed_streams_are_dev_null(tmp_path: Path) -> None:
    """Nor does a file that is written get their number."""
    command = [sys.executable, "-m", "coconut_fast", "data", "graphs", str(tmp_path / "data.json"), "--count", "1"]
    assert subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command], cwd=ROOT).returncode == 0
    assert len(read_examples(tmp_path / "data.json")) == 1
    code = (
        "import sys; from coconut_fast.commands.common import open_streams as f; f(); sys.exit(sys.stdin.read() or 3)"
    )
    assert subprocess.run(["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, "-c", code], cwd=ROOT).returncode == 3


def test_a_full_disk_behind_stdout_is_an_error(tmp_path: Path) -> None:
    tiny(tmp_path)
    command = [sys.executable, "-m", "coconut_fast", "data", "check", tmp_path / "train.json"]
    commands = (command, [*command[:3], "--help"], [*command[:3], "train", "--help"])
    for arguments, unbuffered in itertools.product(commands, ("", "1")):
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        with open("/dev/full", "w") as full:
            done = subprocess.run(arguments, cwd=ROOT, env=environment, stdout=full, stderr=subprocess.PIPE, text=True)
        assert (done.returncode, done.stderr) == (1, "coconut-fast: error: [Errno 28] No space left on device\n")


def test_a_full_pipe_behind_stderr_ends_nothing(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writer, b"x")
    command = [sys.executable, "-m", "coconut_fast", "data", "graphs", tmp_path / "data.json", "--count", "1"]
    assert subprocess.run(command, cwd=ROOT, stderr=writer).returncode == 0
    os.close(reader)
    os.close(writer)


def test_what_the_encoding_of_stdout_lacks_is_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.json").write_text('[{"question": "go", "steps": [], "answer": "é"}]', encoding="utf-8")
    shown = io.BytesIO()
    stream = io.TextIOWrapper(shown, "ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "__stdout__", stream)
    assert main(["data", "check", str(tmp_path / "x.json")]) == 0
    lines = _Lines(["é"], argparse.Namespace(json=True, num_samples=1))
    lines.add(0, "é\U0001f600", [1], 2)
    *_, answer, record = shown.getvalue().decode("ascii").splitlines()
    assert answer.split() == ["first", "answer", r"\xe9"]
    assert json.loads(record) == {"prompt": "é", "text": "é\U0001f600", "token_ids": [1], "num_thoughts": 2}
