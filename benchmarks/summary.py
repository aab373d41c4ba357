"""The figures of every suite that wrote to a folder, a table per file.

python -m benchmarks.summary benchmarks/results/<device>
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.figures import Figures


def summarize(folder: Path) -> list[str]:
    """Device and versions, then the name, cards and rows of each file; one line where there is nothing."""
    runs = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("bench_*.json"))}
    if not runs:
        return [f"no figures in {folder}"]
    lines = list(
        dict.fromkeys(
            f"{run['device']}, torch {run['torch']}, commit {run['commit'] or 'unknown'}" for run in runs.values()
        )
    )
    for name, run in runs.items():
        figures = Figures()
        figures.rows = run["rows"]
        lines += ["", name, *run["card"], *figures.table()]
    return lines


if __name__ == "__main__":
    print("\n".join(summarize(Path(sys.argv[1]))))
