"""Pictures: thoughts on the graph they search, and the learning curves of several runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from coconut_fast.files import write_atomically
from coconut_fast.inspect.tree import SearchTree
from coconut_fast.train.reports import METRICS, literal, read_metrics, stage_starts

INK, PALE, RIGHT, WRONG = "#22303c", "#b9c3cc", "#0b7a4b", "#b3372f"
LINES = ("#e4572e", "#2e6fe4", "#8a8f98", "#7b4fb5", "#2a9d8f")
HEAT = LinearSegmentedColormap.from_list("heat", ["#ffffff", "#ffdfae", "#ffb347", "#f58a3c", "#ee6a33"])
SCALE = 0.85  # inches between neighbouring nodes
LETTER = 0.0138  # width of a letter of a stage's name, as a share of the learning curves' steps
LEAST = 0.015  # probabilities below this are not written beside their nodes


def draw_thoughts(
    tree: SearchTree, path: str | os.PathLike[str], *, title: str, mass: torch.Tensor | None = None, caption: str = ""
) -> Path:
    """A PNG with the graph once per thought, every node as dark as the probability that the thought puts on it.

    mass: (k, hops + 2), shown in a second row: the mean of SearchTree.mass_by_hops over many problems, with `caption`
    as its title.
    """
    places, thoughts = tree.layout(), len(tree.values)
    xs, ys = zip(*places.values(), strict=True)
    wide, high = SCALE * (max(xs) - min(xs) + 1.2), SCALE * (max(ys) - min(ys) + 1.2) + 0.7
    heights = [high] if mass is None else [high, 0.34 * thoughts + 0.6]
    figure = Figure(figsize=(max(8.0, wide * thoughts), sum(heights) + 0.6), layout="constrained")
    rows = figure.add_gridspec(len(heights), thoughts, height_ratios=heights)
    figure.suptitle(literal(title), fontsize=14, color=INK)
    for t in range(thoughts):
        axes = figure.add_subplot(rows[0, t])
        _draw_graph(axes, tree, t, places)
        axes.set(xlim=(min(xs) - 0.6, max(xs) + 0.6), ylim=(min(ys) - 0.6, max(ys) + 0.6), aspect="equal")
    if mass is not None:
        _draw_mass(figure.add_subplot(rows[1, :]), mass, caption)
    return _write(figure, path)


def _draw_graph(axes: Any, tree: SearchTree, t: int, places: Mapping[int, tuple[float, float]]) -> None:
    graph = tree.graph
    hops = graph.hops(graph.root)
    names = {graph.root: "root", graph.target: "answer", graph.neg_target: "other option"}
    colours = {graph.root: INK, graph.target: RIGHT, graph.neg_target: WRONG}
    for source, destination in graph.edges:
        searched = hops.get(source) == t  # the step that this thought takes
        axes.annotate(
            "",
            places[destination],
            places[source],
            arrowprops={
                "arrowstyle": "-|>",
                "color": "#e07b39" if searched else PALE,
                "linewidth": 1.8 if searched else 1.0,
                "shrinkA": 13,
                "shrinkB": 13,
                "mutation_scale": 9,
            },
        )
    for node, (x, y) in places.items():
        value = float(tree.values[t, node])
        special = node in names
        axes.scatter(
            [x], [y], s=560, color=[HEAT(value)], edgecolors=colours.get(node, PALE),
            linewidths=2.2 if special else 1.0, zorder=3,
        )  # fmt: skip
        axes.text(x, y, literal(tree.names[node]), ha="center", va="center", fontsize=9, color=INK, zorder=4)
        if value >= LEAST:
            axes.text(
                x + 0.24, y + 0.24, f"{100 * value:.0f}%", fontsize=8.5, color="#a33c10", weight="bold", zorder=5,
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
            )  # fmt: skip
        if special:
            below = node != graph.root
            axes.text(
                x, y - 0.3 if below else y + 0.3, names[node], ha="center", va="top" if below else "bottom",
                fontsize=8, color=colours[node], zorder=4,
            )  # fmt: skip
    reached = [float(tree.values[t, node]) for node, hop in hops.items() if hop == t + 1]
    axes.set_title(
        f"thought {t + 1}\n{100 * sum(reached):.0f}% {_hops(t + 1)} from the root",
        fontsize=11,
        color=INK,
        linespacing=1.4,
    )
    axes.axis("off")


def _draw_mass(axes: Any, mass: torch.Tensor, caption: str) -> None:
    thoughts, columns = mass.shape
    axes.imshow(mass.numpy(), cmap=HEAT, vmin=0, vmax=1, aspect="auto")
    for t in range(thoughts):
        for column in range(columns):
            axes.text(
                column, t, f"{100 * float(mass[t, column]):.1f}%", ha="center", va="center", fontsize=9, color=INK
            )
    axes.set_xticks(range(columns), ["root", *(_hops(h) for h in range(1, columns - 1)), "anywhere else"])
    axes.set_yticks(range(thoughts), [f"thought {t + 1}" for t in range(thoughts)])
    axes.set_title(literal(caption), fontsize=11, color=INK)
    axes.tick_params(length=0, labelsize=9, labelcolor=INK)
    axes.set_xticks([c + 0.5 for c in range(columns - 1)], minor=True)
    axes.set_yticks([t + 0.5 for t in range(thoughts - 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=3)
    axes.tick_params(which="minor", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def draw_learning_curves(
    runs: Mapping[str, str | os.PathLike[str]], path: str | os.PathLike[str], *, title: str, chance: float | None = None
) -> Path:
    """A PNG of training loss and validation accuracy of several runs, from their metrics.jsonl.

    runs: name -> directory; the stages of the first one are marked. chance: accuracy of a guess, drawn as a line.
    ValueError where a run has logged nothing.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    figure.suptitle(literal(title), fontsize=13, color=INK)
    for number, (name, folder) in enumerate(runs.items()):
        records = read_metrics(Path(folder) / METRICS)
        if not records:
            raise ValueError(f"runs: {folder} has no {METRICS}, expected the directory of a training run")
        colour = LINES[number % len(LINES)]
        for axes, key, mark in ((left, "loss", ""), (right, "eval_accuracy", "o")):
            points = [(r["step"], r[key]) for r in records if key in r]
            if points:
                axes.plot(
                    *zip(*points, strict=True), color=colour, label=literal(name), linewidth=1.4, marker=mark,
                    markersize=4,
                )  # fmt: skip
        if number == 0:
            last = max(record["step"] for record in records)
            for axes in (left, right):
                mark_stages(axes, stage_starts(records), last)
    left.set(xlabel="step", ylabel="training loss", ylim=(0, None))
    right.set(xlabel="step", ylabel="validation accuracy", ylim=(0, 1.03))
    if chance is not None:
        right.axhline(chance, color=PALE, linewidth=1, linestyle="--", label="a guess")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    return _write(figure, path)


def mark_stages(axes: Any, starts: Sequence[tuple[int, int]], last: int) -> None:
    """A stripe for every odd stage; above each stage its name, or its number if narrow, or nothing if narrower."""
    ends = [step for step, _ in starts[1:]] + [last]
    written = -float("inf")  # names so far reach up to this step
    for (start, stage), end in zip(starts, ends, strict=True):
        if stage % 2:
            axes.axvspan(start, end, color="#f3f5f7", zorder=0)
        name = f"stage {stage}"
        if start != starts[0][0] and end - start < LETTER * last * (len(name) + 1):
            name = str(stage)
        middle, width = (start + end) / 2, LETTER * last * (len(name) + 1)
        if middle - width / 2 < written:
            continue
        written = middle + width / 2
        axes.text(
            middle, 1.01, name, transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=8,
            color="#7d8790",
        )  # fmt: skip


def _hops(count: int) -> str:
    return f"{count} hop" if count == 1 else f"{count} hops"


def _write(figure: Figure, path: str | os.PathLike[str]) -> Path:
    with write_atomically(path, binary=True) as file:
        figure.savefig(file, dpi=150, format="png", facecolor="white")
    return Path(path)
