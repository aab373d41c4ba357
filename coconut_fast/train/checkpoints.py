"""Checkpoints of a run on disk: they appear whole or not at all, are checked before use, and old ones are removed.

A checkpoint is a directory `checkpoint-STEP` that `coconut_fast.load` reads, with the trainer's state beside the model.
Its `checkpoint.json` is written last and lists every file with its size, so that a truncated one is recognised.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.serialization import get_crc32_options
from transformers import TrainerState

from coconut_fast.files import UNFINISHED, not_written, sync, sync_folder, write_json
from coconut_fast.model.coconut import Coconut
from coconut_fast.model.loading import load
from coconut_fast.model.saving import ADDED_WEIGHTS
from coconut_fast.train.schedule import EpochRecord

MANIFEST = "checkpoint.json"
TRAINER_STATE = "trainer_state.json"
TRAINER_TENSORS = ("optimizer.", "scheduler.", "scaler.", "rng_state", "pytorch_model_fsdp.")  # how their names start
PREFIX = "checkpoint-"
KINDS = {  # of what is read of a manifest
    "files": (dict, "an object"),
    "run": (dict, "an object"),
    "history": (list, "a list"),
    "best": (dict | None, "an object or null"),
    "stage": (int, "a whole number"),
    "skipped": (int, "a whole number"),
}
EPOCH = {field.name for field in fields(EpochRecord)}
BEST = {"stage", "accuracy", "step"}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; says which file, why, and what is left."""


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A temporary directory that becomes `target` when the block ends, synced to disk; removed if the block raises.

    OSError, naming the directory and the newest older checkpoint, if the directory cannot be written.
    """
    temporary = target.with_name(UNFINISHED + target.name)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        sync(temporary)
        remove(target)
        os.rename(temporary, target)
        sync_folder(target.parent)
    except Exception as error:
        failure = not_written(target, error)
        shutil.rmtree(temporary, ignore_errors=True)
        older = [folder.name for folder in complete(target.parent)]
        left = f"{older[-1]} is intact" if older else "there is no older checkpoint"
        raise OSError(f"{failure}; {left}") from error


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Writes the manifest: `facts`, and the size of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    write_json(folder / MANIFEST, {**facts, "files": sizes})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The facts of a whole checkpoint; CheckpointError for a truncated or foreign one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} is not a checkpoint of ours (no readable {MANIFEST}); move it away to go on with an older one"
        ) from error
    fault = _fault(manifest)
    if fault is not None:
        raise CheckpointError(
            f"{folder / MANIFEST}: {fault}; move {folder.name} away to go on with an older checkpoint"
        )
    for name, size in manifest["files"].items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "missing" if found is None else f"{found} bytes long"
            raise CheckpointError(
                f"{path} is {state}, expected {size} bytes; move {folder.name} away to go on with an older checkpoint"
            )
    return manifest


def _fault(manifest: Any) -> str | None:
    """What of a manifest cannot be read, in words; None: nothing."""
    if not isinstance(manifest, dict):
        return f"found a {type(manifest).__name__}, expected an object"
    for name, (kind, expected) in KINDS.items():
        found = manifest.get(name, "nothing")
        if not isinstance(found, kind):
            return f"{name}: found {found!r}, expected {expected}"
    if not all(isinstance(record, dict) and record.keys() == EPOCH for record in manifest["history"]):
        return f"history: expected each epoch's {' and '.join(sorted(EPOCH))}"
    if manifest["best"] is not None and not manifest["best"].keys() >= BEST:
        return f"best: found {manifest['best']!r}, expected {', '.join(sorted(BEST))}"
    return None


def check_state(folder: Path) -> None:
    """CheckpointError, naming the file, where the trainer's state in a checkpoint is not what was written.

    torch's files are zip archives, which hold a checksum of each tensor: a block of zeros is found, too.
    """
    for path in sorted(folder.iterdir()):
        try:
            if path.name.startswith(TRAINER_TENSORS):
                with zipfile.ZipFile(path) as archive:
                    broken = archive.testzip() if get_crc32_options() else None
                if broken is not None:
                    raise ValueError(f"{broken} is not what was written")
            elif path.name == TRAINER_STATE:
                TrainerState.load_from_json(str(path))
        except (zipfile.BadZipFile, OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{path} is damaged ({error}); move {folder.name} away to go on with an older checkpoint"
            ) from error


def read_model(folder: Path, feedback: nn.Module | None = None) -> Coconut:
    """A checkpoint's model, without `load`'s warning about modules added in training: the trainer reads those."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f".*{ADDED_WEIGHTS}")
        return load(folder, feedback=feedback)


def read_weights(folder: Path, feedback: nn.Module | None) -> dict[str, torch.Tensor]:
    """A checkpoint's weights, with those of modules added in training."""
    added = folder / ADDED_WEIGHTS
    return read_model(folder, feedback).state_dict() | (load_file(added) if added.is_file() else {})


def complete(run: Path) -> list[Path]:
    """The checkpoint directories of a run, oldest first."""
    if not run.is_dir():
        return []
    found = [path for path in run.iterdir() if path.is_dir() and path.name.removeprefix(PREFIX).isdigit()]
    return sorted(
        (path for path in found if path.name.startswith(PREFIX)), key=lambda p: int(p.name.removeprefix(PREFIX))
    )


def best_or_last(run: Path) -> Path | None:
    """The checkpoint that represents a run: the best of the newest one's stage, else the newest; None: none yet.

    The recorded best is of an earlier stage where a run has continued without validation.
    """
    found = complete(run)
    if not found:
        return None
    manifest = read_manifest(found[-1])
    best = manifest["best"]
    if best is not None and best["stage"] == manifest["stage"]:
        chosen = run / f"{PREFIX}{best['step']}"
        if chosen.is_dir():
            return chosen
    return found[-1]


def prune(run: Path, keep_last: int, best_step: int | None) -> None:
    """Keeps the last `keep_last` checkpoints (0: all) and the best one."""
    found = complete(run)
    for folder in found[:-keep_last] if keep_last else []:
        if folder.name != f"{PREFIX}{best_step}":
            remove(folder)


def remove(folder: Path) -> None:
    """Removes a directory, renamed first so that it never appears incomplete. For a link, the target stays."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        away = folder.with_name(f"{UNFINISHED}removed-{folder.name}")
        shutil.rmtree(away, ignore_errors=True)
        os.rename(folder, away)
        shutil.rmtree(away, ignore_errors=True)
