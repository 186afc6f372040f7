"""Tokenised examples in files that are mapped into memory: rows that need not fit there, tokenised once.

An entry is a folder of arrays, one after the other without padding, and `facts.json`, which says what they are and the CRC-32 of each.
It is written under another name and renamed when it is whole. One that is damaged is removed, and made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, overload

import numpy as np

from ..errors import warn

# The folder below `tracking.dir` that the runs there share, and how large it gets before what was used longest ago goes.
FOLDER = ".token-cache"
_MOST_BYTES = 50 * 10**9
# Part of every key: a change to what is written, or to how tokens are made, takes the next number.
FORMAT = 1
# With `auto`, files of so many bytes together are kept.
KEPT_FROM = 16 * 10**6
_CHUNK = 1 << 22


class Ragged(Sequence[np.ndarray]):
    """Arrays of one dtype that lie one after the other: a view of each, without an object for each.

    Args:
        whole: all of them, (numbers,).
        ends: (n,) int64, where each ends.
    """

    def __init__(self, whole: np.ndarray, ends: np.ndarray):
        self.whole, self._ends = whole, ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self.whole[self._ends[index - 1] if index else 0 : self._ends[index]]

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64."""
        return np.diff(self._ends, prepend=0)

    def counts(self, other_than: int) -> np.ndarray:
        """(n,) int64: how many numbers of each are other ones."""
        before = 0
        found = np.zeros(len(self), np.int64)
        for start in range(0, len(self), _CHUNK // 64):
            ends = self._ends[start : start + _CHUNK // 64]
            total = np.concatenate([[0], np.cumsum(self.whole[before : ends[-1]] != other_than)])
            found[start : start + len(ends)] = np.diff(total[np.concatenate([[before], ends]) - before])
            before = int(ends[-1])
        return found


def lengths_of(column: Sequence[np.ndarray]) -> np.ndarray:
    """(n,) int64: the length of each array."""
    return column.lengths if isinstance(column, Ragged) else np.array([len(array) for array in column], np.int64)


def counts_of(column: Sequence[np.ndarray], other_than: int) -> np.ndarray:
    """(n,) int64: how many numbers of each array are other ones."""
    return column.counts(other_than) if isinstance(column, Ragged) else np.array([int((a != other_than).sum()) for a in column], np.int64)


def largest(column: Sequence[np.ndarray]) -> int:
    """The largest number of all arrays."""
    return int(column.whole.max()) if isinstance(column, Ragged) else max(int(array.max()) for array in column)


def file_digest(paths: Iterable[Path]) -> str:
    """64 hex digits of the contents of files, in order."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            own = hashlib.file_digest(file, "sha256")
        digest.update(own.digest())
    return digest.hexdigest()


class TokenFiles:
    """The entries of one folder.

    Args:
        folder: made when the first entry is.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def open(self, key: str) -> tuple[dict[str, Any], dict[str, Ragged]] | None:
        """The facts and the columns of an entry; None if there is none that is whole. A damaged one is removed, and it is said."""
        path = self.folder / key
        if not path.is_dir():
            return None
        try:
            said = json.loads((path / "facts.json").read_text(encoding="utf-8"))
            columns = {}
            for name, crcs in said["columns"].items():
                whole, ends = (np.load(path / f"{name}.{part}.npy", mmap_mode="r", allow_pickle=False) for part in ("numbers", "ends"))
                if [_crc(whole), _crc(ends)] != crcs or (len(ends) and int(ends[-1]) != len(whole)):
                    raise ValueError(f"{name} is not what was written")
                columns[name] = Ragged(whole, np.asarray(ends))
            os.utime(path)  # those used last are kept longest
            return said["facts"], columns
        except (OSError, ValueError, KeyError, TypeError) as error:
            warn(f"the tokens kept in {path} are damaged ({error}), and are made anew.")
            shutil.rmtree(path, ignore_errors=True)
            return None

    @contextlib.contextmanager
    def write(self, key: str) -> Iterator[Writer]:
        """What an entry is written with; it is there when the block ends well, and nothing is left behind where it does not."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        part = self.folder / f".{key}.{socket.gethostname()}.{os.getpid()}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        writer = Writer(part)
        try:
            yield writer
            writer.close()
            self._make_room(sum(file.stat().st_size for file in part.iterdir()))
            with contextlib.suppress(OSError):  # another process was faster: its entry is this one
                os.rename(part, self.folder / key)
        finally:
            writer.abandon()
            shutil.rmtree(part, ignore_errors=True)

    def _make_room(self, needed: int) -> None:
        found = []
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):
                if not path.name.startswith(".") and path.is_dir():
                    found.append((path.stat().st_mtime, sum(file.stat().st_size for file in path.iterdir()), path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total + needed <= _MOST_BYTES:
                return
            shutil.rmtree(path, ignore_errors=True)
            total -= size

    def _remove_leftovers(self) -> None:
        """What processes of this machine that were killed left behind."""
        for path in self.folder.glob(f".*.{socket.gethostname()}.*.part"):
            try:
                os.kill(int(path.name.split(".")[-2]), 0)
            except ProcessLookupError:
                shutil.rmtree(path, ignore_errors=True)
            except (ValueError, PermissionError):
                continue


class Writer:
    """Writes one entry.

    Args:
        folder: an empty one.

    Attributes:
        folder: as given.
        facts: what is said of it; JSON values.
    """

    def __init__(self, folder: Path):
        self.folder, self.facts = folder, dict[str, Any]()
        self._files: dict[str, IO[bytes]] = {}
        self._ends: dict[str, list[np.ndarray]] = {}
        self._totals: dict[str, int] = {}

    def add(self, columns: Mapping[str, list[np.ndarray]]) -> None:
        """Appends int32 arrays to columns, those of no arrays left aside."""
        for name, arrays in columns.items():
            if arrays:
                self._append(name, arrays)

    def _append(self, name: str, arrays: list[np.ndarray]) -> None:
        if name not in self._files:
            self._files[name] = (self.folder / f"{name}.raw").open("wb")
            self._ends[name], self._totals[name] = [], 0
        self._files[name].write(np.concatenate(arrays).astype("<i4", copy=False).tobytes())
        ends = self._totals[name] + np.cumsum([len(a) for a in arrays], dtype=np.int64)
        self._ends[name].append(ends)
        self._totals[name] = int(ends[-1])

    def close(self) -> None:
        """Writes the headers and the facts."""
        crcs = {}
        for name, file in self._files.items():
            file.close()
            raw = self.folder / f"{name}.raw"
            numbers = np.memmap(raw, "<i4", "r")
            np.save(self.folder / f"{name}.numbers.npy", numbers, allow_pickle=False)
            ends = np.concatenate(self._ends[name])
            np.save(self.folder / f"{name}.ends.npy", ends, allow_pickle=False)
            crcs[name] = [_crc(numbers), _crc(ends)]
            del numbers
            raw.unlink()
        said = json.dumps({"facts": self.facts, "columns": crcs})
        (self.folder / "facts.json").write_text(said, encoding="utf-8")

    def abandon(self) -> None:
        """Closes what is open."""
        for file in self._files.values():
            file.close()


def _crc(numbers: np.ndarray) -> int:
    crc = 0
    flat = numbers.reshape(-1)
    for start in range(0, len(flat), _CHUNK):
        crc = zlib.crc32(np.ascontiguousarray(flat[start : start + _CHUNK]).view(np.uint8).data, crc)
    return crc
