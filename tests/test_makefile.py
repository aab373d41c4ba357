"""The Makefile, with a stand-in for python that writes down what it is asked to do."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHON = """#!/bin/sh
case "$*" in
  "-m venv "*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  "-m pip "*"--editable"*) echo "begin $*" >> log; (sleep 5; touch over) > /dev/null 2>&1 & echo "end $*" >> log ;;
  "-m pip "*) echo "begin $*" >> log; sleep 0.2; echo "end $*" >> log ;;
esac
"""


@pytest.mark.skipif(not (shutil.which("make") and shutil.which("flock")), reason="needs make and flock")
def test_two_at_once_install_one_after_the_other(tmp_path: Path) -> None:
    folder = tmp_path / "a path with spaces"
    (folder / "csrc").mkdir(parents=True)
    for name in ("Makefile", "requirements.txt", "pyproject.toml", "setup.py", "build_backend.py"):
        shutil.copy(ROOT / name, folder)
    (folder / "python").write_text(PYTHON)
    (folder / "python").chmod(0o755)

    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    make = ["make", "install", "PYTHON=./python"]
    both = [subprocess.Popen(make, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said

    assert not (folder / "over").exists(), "what the build leaves running keeps nobody waiting"
    log = (folder / "log").read_text().splitlines()
    assert len(log) == 6, "torch, the other requirements and the package are installed once"
    for begin, end in zip(log[::2], log[1::2], strict=True):
        assert begin.removeprefix("begin") == end.removeprefix("end")
    again = subprocess.run(make, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    assert again.stdout == "", "nothing is left to do, and nothing is said"
