"""coconut-fast doctor: versions, devices, and which implementation of each op is chosen, with the reason."""

from __future__ import annotations

import argparse
from typing import Any

from coconut_fast.commands.common import add_command


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "doctor",
        "say what is installed, what was built, and which implementation of each op runs here, and why",
        "coconut-fast doctor --device cuda",
    )
    parser.add_argument("--device", help="choose for this device (default: a GPU where there is one)")
    parser.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from coconut_fast.doctor import report

    print(report(arguments.device))
    return 0
