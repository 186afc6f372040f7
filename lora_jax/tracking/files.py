"""Files and folders that are either whole or absent, and the lock that gives a run directory one writer.

A file is written under a temporary name in the same folder, then renamed into place. Byte k of the lock's file stands for member k: a
process that trains the whole sweep takes all of it, one of several that share the sweep takes its own members' bytes. So they exclude
one another exactly where they would write the same files.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from ..errors import InputError, RunError


def write_atomic(path: Path | str, content: str | bytes) -> Path:
    """Replaces `path` by `content`; a reader, or a run killed half-way, sees the old file or the new one, never a part.

    Args:
        path: The file. Its folder is made if missing.
        content: Text is written as UTF-8.

    Returns:
        `path`, as a `Path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Same folder, because a rename is atomic only inside one file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the new name on an empty file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def finite_or_none(value: Any) -> Any:
    """`value` with every NaN and infinity inside it replaced by None, and numpy scalars by Python's: JSON has neither.

    >>> finite_or_none({"loss": float("nan"), "steps": [1, 2]})
    {'loss': None, 'steps': [1, 2]}
    """
    if isinstance(value, dict):
        return {str(key): finite_or_none(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_none(item) for item in value]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: Path | str, value: Any) -> Path:
    """Writes `value` as indented, standard JSON (NaN and infinity become null), atomically."""
    return write_atomic(path, json.dumps(finite_or_none(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path | str) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        InputError: The file is missing, is not JSON, or holds something other than an object.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # bad UTF-8 or bad JSON
        raise InputError(f"{path}: damaged, not JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: damaged, holds a {type(value).__name__} where an object was expected")
    return value


def check_new(path: Path, key: str = "") -> None:
    """`InputError` unless `path` can become a new folder: nothing is there, or an empty folder."""
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        raise InputError(f"{key}{path} already exists and is not overwritten. Give another folder, or remove it.")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` at the end; if that is not reached, nothing is left of it.

    Raises:
        InputError: something is at `path` already.
        RunError: it cannot be written.
    """
    check_new(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        yield part
        if path.exists():
            path.rmdir()  # empty, or this fails
        part.rename(path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror or error}).") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


try:
    import fcntl
except ImportError:  # Windows has no POSIX locks; there, two processes on one run directory are not noticed
    fcntl = None  # type: ignore[assignment]

# POSIX locks belong to the process and end with the first descriptor closed, so each is opened once and kept.
_held: dict[Path, IO[bytes]] = {}


def acquire(folder: Path, members: Sequence[int] | None = None) -> None:
    """Takes the lock of `folder` for this process; taking it again is no error. The system drops it when the process ends.

    Args:
        folder: A run directory.
        members: Numbers of the members to lock, where others train the rest; all by default.

    Raises:
        InputError: Another process holds it, or some of it.
    """
    path = folder.resolve() / ".lock"
    if fcntl is None or path in _held:
        return
    file = _open_lock(path)
    try:
        for start, length in [(0, 0)] if members is None else [(member, 1) for member in members]:  # a length of 0 is to the end
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
    except OSError:
        file.close()
        raise InputError(f"{folder}: another process is writing to this run. Wait for it, or give this run another 'name='.") from None
    _held[path] = file


def _open_lock(path: Path) -> IO[bytes]:
    """Opens a lock's file, made where there is none; never what a link points to, which may be anywhere."""
    try:
        return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0), 0o666), "ab")
    except OSError as error:
        if path.is_symlink():
            raise InputError(f"{path}: is a link, but a run's lock must be a plain file. Remove it.") from None
        raise error


@contextlib.contextmanager
def turn(folder: Path) -> Iterator[None]:
    """Waits until no other process is in here: for the moments in which processes that share a run would do the same thing twice."""
    if fcntl is None:
        yield
        return
    # A file of its own: closing any descriptor of `.lock` would drop what this process holds of it.
    with _open_lock(folder / ".turn") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def release(folder: Path) -> None:
    """Gives the lock of `folder` back; nothing happens where it is not held."""
    path = folder.resolve() / ".lock"
    if file := _held.pop(path, None):
        file.close()  # the file itself stays: removing it could pull it from under a process just taking the lock
