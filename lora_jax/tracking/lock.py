"""One writer a run directory: a second process is turned away in place of interleaving its files with the first's."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from lora_jax.config.errors import InputError

try:
    import fcntl
except ImportError:  # Windows has no POSIX locks; there, two processes on one run directory are not noticed
    fcntl = None  # type: ignore[assignment]

# POSIX locks belong to the process and end with the first descriptor closed, so each is opened once and kept.
_held: dict[Path, IO[bytes]] = {}


def acquire(folder: Path) -> None:
    """Takes the lock of `folder` for this process; taking it again is no error. The system drops it when the process ends.

    Raises:
        InputError: Another process holds it.
    """
    path = folder.resolve() / ".lock"
    if fcntl is None or path in _held:
        return
    file = open(path, "ab")  # noqa: SIM115  kept open on purpose
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise InputError(f"{folder}: another process is writing to this run. Wait for it, or give this run another 'name='.") from None
    _held[path] = file


def release(folder: Path) -> None:
    """Gives the lock of `folder` back; nothing happens where it is not held."""
    path = folder.resolve() / ".lock"
    if file := _held.pop(path, None):
        file.close()  # the file itself stays: removing it could pull it from under a process just taking the lock
