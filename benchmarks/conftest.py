"""The `figures` of a suite (benchmarks/figures.py): shown at the end, kept in the folder that `--results` names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.figures import Figures


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, default=None, help="folder to keep the figures of this run in")


_figures: dict[str, Figures] = {}  # by the name of the suite


@pytest.fixture(scope="module")
def figures(request: pytest.FixtureRequest) -> Figures:
    return _figures.setdefault(request.path.stem, Figures())


def pytest_terminal_summary(terminalreporter: Any) -> None:
    write = terminalreporter.write_line
    for name, figures in _figures.items():
        if figures.rows:
            terminalreporter.section(f"figures of {name}")
            for line in [*figures.cards, "", *figures.table(), "", figures.as_json()]:
                write(line)


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """After every benchmark, not at the end: a run that is killed keeps what it has measured."""
    from coconut_fast.files import write_atomically

    folder, figures = item.config.getoption("--results"), _figures.get(item.path.stem)
    if folder and figures and figures.rows:
        with write_atomically(folder / f"{item.path.stem}.json") as file:
            file.write(figures.as_json() + "\n")
