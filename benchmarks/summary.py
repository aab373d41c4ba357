"""The figures of every suite that wrote to a folder, as one table.

python -m benchmarks.summary benchmarks/results/<device>
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.conftest import Figures


def summarize(folder: Path) -> list[str]:
    """Where and with what, the cards, and the rows of all suites; one line says so where there is nothing."""
    runs = [json.loads(file.read_text()) for file in sorted(folder.glob("bench_*.json"))]
    if not runs:
        return [f"no figures in {folder}"]
    figures = Figures()
    for run in runs:
        for text in run["card"]:
            figures.card(text)
        figures.rows += run["rows"]
    where = dict.fromkeys(f"{run['device']}, torch {run['torch']}, commit {run['commit']}" for run in runs)
    return [*where, *figures.cards, "", *figures.table()]


if __name__ == "__main__":
    print("\n".join(summarize(Path(sys.argv[1]))))
