"""coconut-fast demo: watch a model learn to think."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from coconut_fast.commands.common import add_command, quiet


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "demo",
        "train a small model to think on graphs, compare it with written chains, draw its thoughts (some minutes)",
        "coconut-fast demo --out runs/demo-1 --seed 1",
    )
    parser.add_argument("--out", default="runs/demo", help="where everything goes (default runs/demo)")
    parser.add_argument("--seed", type=int, default=0, help="of graphs, weights and order (default 0)")
    parser.add_argument("override", nargs="*", help="KEY=VALUE, instead of what recipes/demo.yaml says")
    parser.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    from coconut_fast import cli, demo
    from coconut_fast.files import check_folder

    quiet()
    folder = Path(arguments.out)
    check_folder(folder, "--out")
    demo.run_demo(folder, seed=arguments.seed, overrides=arguments.override)
    command, expected = demo.question_command(folder)
    print(f"\nAsk it yourself (right is: {expected}):\n\n    {demo.shown_command(command)}\n", flush=True)
    return cli.main(command)
