"""What several commands share: finding and loading a model, and its options. Imports nothing heavy by itself."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import coconut_fast

if TYPE_CHECKING:
    from coconut_fast.model.coconut import Coconut

_format_warning = warnings.formatwarning
DTYPES = ("float32", "bfloat16", "float16")
WEIGHTS = ("fp32", "bf16", "int8")
MODEL_HELP = "a run's directory, a model directory, an official checkpoint file, or a hub id"
BASE_HELP = "directory or hub id with the configuration and tokenizer of a checkpoint file (default: the file's folder)"


class Parser(argparse.ArgumentParser):
    """Accepts a command's options before, between and after its other arguments.

    Up to Python 3.12.6 argparse treats an optional positional argument as absent once an option precedes it, as in
    `generate MODEL --num-thoughts 6 PROMPT`.
    """

    _alone = False  # within parse_known_intermixed_args, which parses options first, then the rest

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        if self._alone or self._subparsers is not None:  # a command's own parser takes what follows its name
            return super().parse_known_args(args, namespace)
        self._alone = True
        try:
            found, unknown = self.parse_known_intermixed_args(args, namespace)
        finally:
            self._alone = False
        if unknown:  # reported here, below this command's usage
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def _print_message(self, message: str, file: Any = None) -> None:
        if message:  # argparse's own passes over a disk that is full
            (file or sys.stderr).write(message)


def add_command(commands: Any, name: str, help: str, example: str) -> argparse.ArgumentParser:
    """A subcommand whose --help ends with an example."""
    return commands.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="compute in this type (default: the checkpoint's)")
    parser.add_argument("--base", help=BASE_HELP)
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        help="what weights are read as on a CPU; int8 changes answers now and then (default: the model's type)",
    )
    parser.add_argument("--batch-size", type=int, help="rows at a time (default: 32 on a CPU, 256 on a GPU)")


def load_model(path: str, arguments: argparse.Namespace) -> Coconut:
    """The model at `path`, on the device and in the type asked for."""
    import torch

    from coconut_fast.model.loading import load

    quiet()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    tell_of_hub(path)
    return load(find_model(path), device=device, dtype=dtype, base=arguments.base)


def check_base(base: str | None, *paths: str) -> None:
    """ValueError where --base is given, but no model is a checkpoint file: others bring their own configuration."""
    if base is not None and not any(map(os.path.isfile, paths)):
        for path in paths:
            if not os.path.exists(path):
                raise ValueError(f"no such file or directory: {path}")
        raise ValueError(f"--base: found {base}, which would change nothing: {paths[0]} is no checkpoint file")


def find_model(path: str) -> str | Path:
    """What to load for `path`: for an unfinished run's directory, its stage's best checkpoint, else its last.

    A run that was made longer is unfinished again: a checkpoint is newer than the model of its first end, with a
    warning.
    """
    from coconut_fast.train import checkpoints

    if not os.path.isdir(path):
        return path
    model, found = Path(path, "config.json"), checkpoints.complete(Path(path))
    if not model.is_file():
        return checkpoints.best_or_last(Path(path)) or path
    manifest = found[-1] / checkpoints.MANIFEST if found else model
    if not manifest.is_file() or manifest.stat().st_mtime <= model.stat().st_mtime:
        return path
    chosen = checkpoints.best_or_last(Path(path))
    assert chosen is not None
    warnings.warn(f"{path}: {found[-1].name} is newer than the model beside it; reading {chosen.name}", stacklevel=1)
    return chosen


def tell_of_hub(path: str) -> None:
    """Prints a line where a model is not local: without a network transformers tries for half a minute."""
    from coconut_fast.model.loading import check_path

    if not os.path.exists(path):
        check_path(path)  # a mistyped path is refused without asking
        print(f"{path} is no path here: looking in the cache and on the hub of Hugging Face", file=sys.stderr)


class _Lossy(io.FileIO):
    """A file that drops what cannot be written: training goes on where the reader of its messages has exited."""

    def write(self, data: Any) -> int:
        whole = memoryview(data).nbytes
        try:
            return super().write(data) or whole  # None: a pipe that is full
        except OSError:
            return whole


def open_streams() -> None:
    """Opens the standard streams that the caller closed (`2>&-`), as /dev/null; stderr never raises from here on.

    Characters that the locale's encoding lacks are written as escapes: they must not cost the answers.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which no file of ours may get
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "w" if descriptor else "r"))
    out = sys.__stdout__
    if sys.stdout is out and isinstance(out, io.TextIOWrapper) and out.errors == "strict":
        out.reconfigure(errors="backslashreplace")
    own = sys.__stderr__
    if own is not None and sys.stderr is own:
        raw = io.BufferedWriter(_Lossy(own.fileno(), "w", closefd=False))
        sys.stderr = io.TextIOWrapper(raw, own.encoding, own.errors, line_buffering=True)


def set_progress_bars() -> None:
    """Progress bars, ours and libraries' (downloads): after two seconds, in one process, few lines in a log file.

    tqdm reads these variables when it is first imported. Those that the user has set stay.
    """
    os.environ.setdefault("TQDM_DELAY", "2")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "2")  # ten lines a second fill a log
    if os.environ.get("RANK", "0") != "0":
        os.environ.setdefault("TQDM_DISABLE", "1")


def format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Our own warnings take one line; those of libraries look as usual."""
    if filename.startswith(os.path.dirname(coconut_fast.__file__)):
        return f"coconut-fast: warning: {message}\n"
    return _format_warning(message, category, filename, lineno, line)


def quiet() -> None:
    """Silences libraries between our own lines."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
