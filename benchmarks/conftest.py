"""The `figures` of a run (benchmarks/figures.py): shown at its end, kept under the folder that `--results` names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.figures import Figures


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, default=None, help="folder to keep the figures of this run in")


_figures = Figures()


@pytest.fixture(scope="session")
def figures() -> Figures:
    return _figures


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not _figures.rows:
        return
    write = terminalreporter.write_line
    terminalreporter.section("figures of this run")
    for line in [*_figures.cards, "", *_figures.table(), "", _figures.as_json()]:
        write(line)


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """After every benchmark, not at the end: a run that is killed keeps what it has measured."""
    from coconut_fast.files import write_atomically

    folder = item.config.getoption("--results")
    if folder and _figures.rows:
        name = "-".join(sorted({Path(a.split("::")[0]).stem for a in item.config.args}))
        with write_atomically(folder / f"{name}.json") as file:
            file.write(_figures.as_json() + "\n")
