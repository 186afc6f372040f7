"""One writer a run directory, or one a member: a second process is turned away in place of interleaving its files with the first's.

The lock is that of a file, of which byte k stands for member k: a process that trains the whole sweep takes all of it, one of several
that share the sweep takes its own members' bytes. So they exclude one another exactly where they would write the same files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from ..errors import InputError

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
    file = open(path, "ab")  # noqa: SIM115  kept open on purpose
    try:
        for start, length in [(0, 0)] if members is None else [(member, 1) for member in members]:  # a length of 0 is to the end
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
    except OSError:
        file.close()
        raise InputError(f"{folder}: another process is writing to this run. Wait for it, or give this run another 'name='.") from None
    _held[path] = file


@contextlib.contextmanager
def turn(folder: Path) -> Iterator[None]:
    """Waits until no other process is in here: for the moments in which processes that share a run would do the same thing twice."""
    if fcntl is None:
        yield
        return
    # A file of its own: closing any descriptor of `.lock` would drop what this process holds of it.
    with open(folder / ".turn", "ab") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def release(folder: Path) -> None:
    """Gives the lock of `folder` back; nothing happens where it is not held."""
    path = folder.resolve() / ".lock"
    if file := _held.pop(path, None):
        file.close()  # the file itself stays: removing it could pull it from under a process just taking the lock
