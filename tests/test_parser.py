"""The command line itself: what --help says and costs, where options may stand, how progress and warnings look."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch

from coconut_fast.cli import COMMANDS, main, make_parser
from coconut_fast.commands.common import WEIGHTS as CLI_WEIGHTS
from coconut_fast.commands.common import format_warning
from coconut_fast.commands.evaluate import METHODS as CLI_METHODS
from coconut_fast.data.curriculum import METHODS
from coconut_fast.infer import engine
from tests.conftest import ROOT


def test_help_is_instant_and_has_examples() -> None:
    start = time.perf_counter()
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "coconut_fast", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert shown.returncode == 0 and "example:\n  coconut-fast" in shown.stdout
    assert "torch" not in {line.split("|")[-1].strip() for line in shown.stderr.splitlines()}
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("command", ["data", "train", "eval", "generate", "convert", "doctor", "data prosqa"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*command.split(), "--help"])
    shown = capsys.readouterr().out
    assert exit_.value.code == 0
    assert f"example:\n  coconut-fast {command}" in shown


def test_options_may_stand_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    read = make_parser().parse_args
    for line in ("--top-k 3 m p", "m --top-k 3 p", "m p --top-k 3"):
        found = read(["generate", *line.split()])
        assert (found.model, found.prompt, found.top_k) == ("m", "p", 3)
    assert read(["generate", "m", "--top-k", "3"]).prompt is None
    assert read(["generate", "m", "--json", "--", "-p"]).prompt == "-p", "behind -- nothing is an option"
    found = read(["eval", "a", "b", "--limit", "5", "data"])
    assert (found.model, found.data) == (["a", "b"], "data")
    assert read(["demo", "--seed", "3", "lr=1", "--out", "x", "seed=-1"]).override == ["lr=1", "seed=-1"]
    with pytest.raises(SystemExit) as exit_:
        main(["eval", "m", "d", "--bogus"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.endswith("coconut-fast eval: error: unrecognized arguments: --bogus\n")
    with pytest.raises(SystemExit):
        main(["train"])
    assert capsys.readouterr().err.endswith("required: recipe\n"), "overrides may be left out"


def test_spelled_out_choices_are_complete() -> None:
    assert set(CLI_METHODS) == set(METHODS)
    assert CLI_WEIGHTS == engine.WEIGHTS
    assert len(COMMANDS) == 7


def _commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and its subparsers."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _commands(below)


def test_every_option_says_what_it_does_and_what_holds_without_it() -> None:
    commands = list(_commands(make_parser()))
    assert len(commands) == 15
    for command in commands:
        for action in command._actions:
            if isinstance(action, argparse._SubParsersAction | argparse._HelpAction | argparse._VersionAction):
                continue
            assert action.help, (command.prog, action.dest)
            a_switch = action.nargs == 0
            if action.option_strings and not a_switch and action.dest != "file":  # none of which has a default
                assert "default" in action.help, (command.prog, action.dest)
            if isinstance(action.default, str | int | float) and not a_switch:
                shown = f"{action.default:g}" if isinstance(action.default, float) else str(action.default)
                assert shown in action.help, (command.prog, action.dest, action.default)


def show_bar(steps: int, **environment: str) -> str:
    """What a progress bar writes to a log file, 50 steps a second."""
    code = (
        "from coconut_fast.commands.common import set_progress_bars; set_progress_bars()\n"
        "import time; from tqdm import tqdm\n"
        f"for _ in tqdm(range({steps})): time.sleep(0.02)"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TQDM_")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**kept, **environment}, check=True
    )
    return done.stderr


def test_progress_bars_come_late_from_one_process_and_write_little_to_log_files() -> None:
    assert show_bar(5) == "", "less than two seconds"
    assert show_bar(5, TQDM_DELAY="0") != "", "what the user has set stands"
    assert show_bar(5, TQDM_DELAY="0", RANK="1") == ""
    few, many = show_bar(50, TQDM_DELAY="0"), show_bar(50, TQDM_DELAY="0", TQDM_MININTERVAL="0.01")
    assert 1 <= few.count("/50 [") < many.count("/50 [") / 2


def test_warnings_of_ours_are_a_line() -> None:
    assert format_warning("told", UserWarning, engine.__file__, 1) == "coconut-fast: warning: told\n"
    assert format_warning("told", UserWarning, torch.__file__, 1).startswith(f"{torch.__file__}:1: UserWarning: told")
