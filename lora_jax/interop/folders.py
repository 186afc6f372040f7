"""New folders, that appear whole or not at all and never in place of another."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..config.errors import InputError, RunError


def check_new(path: Path, key: str = "") -> None:
    """`InputError` unless `path` can become a new folder: nothing is there, or an empty folder."""
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        raise InputError(f"{key}{path} exists already; nothing is overwritten. Name another folder, or remove it.")


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
