"""Files that appear whole or not at all: written under a temporary name, synced to disk, then renamed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

TEMPORARY = ".tmp"  # the end of a file's name while it is written
UNFINISHED = ".unfinished-"  # the start of a directory's, while it is written or removed
REPLACING = f"{UNFINISHED}replacing-"  # the same, while its files replace those of an older saved model


@contextmanager
def write_atomically(path: str | os.PathLike[str], *, binary: bool = False) -> Iterator[IO[Any]]:
    """A file handle for what becomes `path` when the block ends; where the block raises, `path` stays as it was.

    Text is UTF-8 with "\\n" line ends; bytes of a path that are not UTF-8 become JSON's escapes. A missing folder is
    created. A link stays a link: its target is written. A file keeps its mode. ValueError where `path` is a folder or a
    device.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():  # the rename would put a file in a device's place
        raise ValueError(f"cannot write a file at {path}: a {'folder' if target.is_dir() else 'device'} is there")
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, so that the rename stays within one file system; named by process and thread, so that two that
    # write the same file do not share a temporary one.
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}{TEMPORARY}")
    text: Any = {} if binary else {"encoding": "utf-8", "errors": "backslashreplace", "newline": "\n"}
    try:
        with (
            naming(path),
            open(temporary, "wb" if binary else "w", **text) as file,
        ):
            yield file
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Adds `path` to an OSError of the block that names no file, as when the disk is full."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or os.fspath(path)
        raise


def not_written(path: str | os.PathLike[str], error: Exception) -> OSError:
    """An OSError in place of what libraries raise on a full disk, which names neither the file nor the disk."""
    folder = next(place for place in Path(path).absolute().parents if place.is_dir())
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    free = shutil.disk_usage(folder).free / 1e6
    return OSError(f"{os.fspath(path)} could not be written ({reason}; {free:.1f} MB were free)")


@contextmanager
def reserve(folder: Path, name: str) -> Iterator[None]:
    """Reserves `folder`, created if missing, for this process while the block runs.

    ValueError, beginning with the setting's `name`, where another process has reserved it. The lock is on the folder
    itself, not on a file, and ends with the process, however that ends; on file systems without such locks (NFS)
    nothing is reserved.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    _reserved.add(descriptor)
    try:
        with suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                found = f"another process is writing to {folder}"
                raise ValueError(f"{name}: {found}, expected a folder of our own") from None
        yield
    finally:
        if descriptor in _reserved:  # not in a forked child
            _reserved.remove(descriptor)
            os.close(descriptor)


_reserved: set[int] = set()  # descriptors that hold locks


def _let_go() -> None:
    """Drops the locks that forked children inherit: a data loader's outlive a killed process by some seconds."""
    while _reserved:
        os.close(_reserved.pop())


os.register_at_fork(after_in_child=_let_go)


def remove_unfinished(folder: Path) -> None:
    """Removes what killed writers left in `folder`, which must be reserved.

    Not what says that a saved model there mixes two: saving it again removes that.
    """
    for path in folder.glob(f".*{TEMPORARY}"):
        path.unlink(missing_ok=True)
    for path in folder.glob(f"{UNFINISHED}*"):
        if not path.name.startswith(REPLACING):
            shutil.rmtree(path, ignore_errors=True)


def check_folder(path: str | os.PathLike[str], name: str) -> None:
    """ValueError, beginning with the setting's `name`, where `path` is no writable folder and none can be made."""
    if not os.fspath(path):
        raise ValueError(f"{name}: found nothing, expected a directory")
    for place in (Path(path), *Path(path).parents):
        try:
            found = os.lstat(place)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise ValueError(f"{name}: {place} cannot be a directory ({error.strerror})") from error
        if not place.is_dir():
            what = "a link to nothing" if stat.S_ISLNK(found.st_mode) and not place.exists() else "a file"
            raise ValueError(f"{name}: {place} is {what}, expected a directory or nothing")
        try:
            with tempfile.TemporaryFile(dir=place):  # permissions are no proof for root, file servers or /proc
                return
        except OSError as error:
            reason = error.strerror
            raise ValueError(
                f"{name}: {place} cannot be written to ({reason}), expected a directory that can"
            ) from error


def check_file(path: str | os.PathLike[str], name: str) -> None:
    """ValueError, beginning with the setting's `name`, where no file could be written at `path`."""
    target = Path(os.path.realpath(path))
    if target.is_dir() or os.fspath(path).endswith(os.sep):
        raise ValueError(f"{name}: {Path(path)} is a directory, expected a file or nothing")
    if target.exists() and not target.is_file():
        raise ValueError(f"{name}: {Path(path)} is a device, expected a file or nothing")
    check_folder((target if os.path.islink(path) else Path(path)).parent, name)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as JSON, atomically. TypeError where JSON cannot hold it (and nothing is written)."""
    with write_atomically(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut, on file systems that allow it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync(folder: Path) -> None:
    """Everything below `folder` is on the disk when this returns."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)
