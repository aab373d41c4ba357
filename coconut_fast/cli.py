"""The command line, `coconut-fast` and `python -m coconut_fast`. One file per command in commands/.

Exit codes: 0 done; 1 it failed while running; 2 bad input, refused before any work; 141 the reader of its output has
exited, as `head` does. An error is one sentence on stderr (COCONUT_FAST_TRACEBACK=1 shows where it came from). Nothing
heavy is imported until a command runs.
"""

from __future__ import annotations

import argparse
import os
import select
import sys
import warnings
from collections.abc import Sequence

import coconut_fast
from coconut_fast.commands import convert, data, demo, doctor, evaluate, generate, train
from coconut_fast.commands.common import Parser, format_warning, open_streams, set_progress_bars

TRACEBACK = "COCONUT_FAST_TRACEBACK"
SIGPIPE = 141  # what a shell reports of a process that this signal ended
COMMANDS = (data, train, evaluate, generate, convert, demo, doctor)


def make_parser() -> argparse.ArgumentParser:
    """The parser; every command's namespace carries `run`, the function that does the work."""
    parser = Parser(
        prog="coconut-fast",
        description="Latent reasoning at speed: train, evaluate and run Coconut models (arXiv 2412.06769).",
        epilog="example:\n  coconut-fast generate runs/prosqa 'Tom is a terpus. ... Is Tom a lempus or scrompus?'",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"coconut-fast {coconut_fast.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command -> its exit code."""
    open_streams()
    try:
        try:
            arguments = make_parser().parse_args(argv)
        finally:
            sys.stdout.flush()  # the help
        set_progress_bars()
        warnings.formatwarning = format_warning
        code = arguments.run(arguments) or 0
        sys.stdout.flush()  # here, where an error is reported
        return code
    except KeyboardInterrupt as stop:
        return _failed(f"interrupted: {stop}" if str(stop) else "interrupted", 1)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if _was_interrupted(error):
            return _failed("interrupted", 1)
        cut_short = isinstance(error, BrokenPipeError) and _has_no_reader(sys.stdout.fileno())
        _drop_unwritten()
        return SIGPIPE if cut_short else _failed(error, 2 if isinstance(error, ValueError) else 1)
    except Exception as error:  # a bug, or a number that no machine can count to
        return _failed(error, 1, f"{type(error).__name__}: {error} ({TRACEBACK}=1 shows where it came from)")


def _drop_unwritten() -> None:
    """What stdout did not take is dropped: Python would try again at its exit and end with 120."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _has_no_reader(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)
    return bool(poll.poll(0))


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C caused an error: a library interrupted while it imports may raise ImportError instead."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _failed(error: BaseException | str, code: int, sentence: str = "") -> int:
    if os.environ.get(TRACEBACK) and isinstance(error, BaseException):
        raise error
    sentence = " ".join((sentence or str(error)).split()) or type(error).__name__
    print(f"coconut-fast: error: {sentence}", file=sys.stderr)
    return code
