"""Figures of one run side by side: a static card first, then a table, then one JSON line.

A benchmark calls `figures.add(what, seconds, **peers)`; the table shows each peer's time and how many times as fast we
are.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch


class Figures:
    """What was measured in this run."""

    def __init__(self) -> None:
        self.cards: list[str] = []
        self.rows: list[dict[str, Any]] = []

    def card(self, text: str) -> None:
        """A line of the static card: bytes that must move, bandwidth, the limit."""
        if text not in self.cards:
            self.cards.append(text)

    def add(self, what: str, seconds: float, *, unit: str = "s", note: str = "", **peers: float | None) -> None:
        """Our figure for `what` and the peers' (same unit, smaller is better); None: that peer is not here."""
        present = {k: v for k, v in peers.items() if v is not None}
        self.rows.append({"what": what, "ours": seconds, "unit": unit, "note": note, **present})

    def table(self) -> list[str]:
        """The rows as text, a column per peer with the ratio to ours."""
        names = list(dict.fromkeys(k for r in self.rows for k in r if k not in ("what", "ours", "unit", "note")))
        lines = [["", "ours", *names, "note"]]
        for row in self.rows:
            scale, unit = _unit(row["ours"], row["unit"])
            cells = [row["what"], f"{row['ours'] * scale:.3g} {unit}"]
            for name in names:
                value = row.get(name)
                cells.append("" if value is None else f"{value * scale:.3g} {unit} ({value / row['ours']:.2f}x)")
            lines.append([*cells, row["note"]])
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        return ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]

    def as_json(self) -> str:
        """One line: when, where, with what, and every row."""
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        return json.dumps(
            {
                "date": datetime.date.today().isoformat(),
                "commit": _commit(),
                "device": gpu or _processor(),
                "threads": torch.get_num_threads(),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "card": self.cards,
                "rows": self.rows,
            }
        )


def _unit(seconds: float, unit: str) -> tuple[float, str]:
    if unit != "s":
        return 1.0, unit
    return (1.0, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "us")


@functools.cache
def _commit() -> str:
    """COCONUT_FAST_COMMIT if set, for a checkout copied without its history; else git's; empty without either."""
    given = os.environ.get("COCONUT_FAST_COMMIT")
    if given or shutil.which("git") is None:
        return given or ""
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()
