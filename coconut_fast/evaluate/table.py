"""Results as a table for people, and as JSON and per-example JSON lines for scripts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coconut_fast.files import write_atomically, write_json
from coconut_fast.infer.scoring import Evaluation

RESULTS = "results.json"
COLUMNS = ("model", "accuracy", "tokens", "thoughts", "ms / example", "examples")


def result_table(results: Mapping[str, Evaluation]) -> str:
    """One line per named result: accuracy in percent, generated tokens (thoughts included), time per example."""
    rows = [
        (
            name,
            f"{100 * r.accuracy:.1f}%",
            f"{r.mean_tokens:.1f}",
            f"{r.mean_thoughts:.1f}",
            f"{1e3 * r.seconds_per_example:.2f}",
            str(len(r.predictions)),
        )
        for name, r in results.items()
    ]
    return text_table(COLUMNS, rows)


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned text, the first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.rjust(w) for c, w in zip(cells, widths, strict=True)]
        return "  ".join([cells[0].ljust(widths[0]), *padded[1:]])

    return "\n".join([line(columns), line(["-" * w for w in widths]), *map(line, rows)])


def write_results(folder: str | Path, results: Mapping[str, Evaluation], facts: Mapping[str, Any]) -> None:
    """`results.json` (facts and one summary per name) and `NAME.jsonl` (one line per problem), each atomically."""
    folder = Path(folder)
    summaries = {name: result.summary() for name, result in results.items()}
    for name, result in results.items():
        with write_atomically(folder / f"{name}.jsonl") as file:
            for record in result.records():
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    write_json(folder / RESULTS, {**facts, "results": summaries})
