"""A source's columns: lists of values, or files where the rows need not fit in memory."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

# So many rows are read, checked and tokenised at a time.
AT_ONCE = 20_000
_TEXT, _JSON, _OTHER = b"t", b"j", b"o"


class FileColumn(Sequence[Any]):
    """Values in a temporary file of this process, which goes with it; to be extended and read like a list.

    Texts, and lists and mappings of texts and whole numbers, are in the file, and None; anything else stays in memory.

    Args:
        folder: where the file is.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it is closed with the column
        self._ends = array("q")
        self._others: dict[int, Any] = {}

    def empty(self) -> FileColumn:
        """Another one in the same folder."""
        return FileColumn(self._folder)

    def extend(self, values: Iterable[Any]) -> None:
        """Appends values."""
        values = iter(values)
        while block := list(itertools.islice(values, AT_ONCE)):
            packed = [self._packed(len(self) + i, value) for i, value in enumerate(block)]
            self._file.write(b"".join(packed))
            end = self._ends[-1] if self._ends else 0
            self._ends.extend(end + n for n in itertools.accumulate(map(len, packed)))
        self._file.flush()

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        start = self._ends[index - 1] if index else 0
        return self._value(index, self._read(start, self._ends[index]))

    def __iter__(self) -> Iterator[Any]:
        start = 0
        for first in range(0, len(self), AT_ONCE):
            ends = self._ends[first : first + AT_ONCE]
            block, before = self._read(start, ends[-1]), start
            for index, end in enumerate(ends, first):
                yield self._value(index, block[before - start : end - start])
                before = end
            start = ends[-1]

    def _read(self, start: int, stop: int) -> bytes:
        """Read, and not mapped: pages of a mapped file count as the process's memory."""
        return os.pread(self._file.fileno(), stop - start, start)

    def _packed(self, index: int, value: Any) -> bytes:
        if value is None:
            return b""
        if type(value) is str:
            return _TEXT + value.encode("utf-8", "surrogatepass")
        if isinstance(value, list | dict) and _plain(value):
            return _JSON + json.dumps(value).encode()
        self._others[index] = value
        return _OTHER

    def _value(self, index: int, packed: bytes) -> Any:
        if not packed:
            return None
        kind, rest = packed[:1], packed[1:]
        if kind == _TEXT:
            return rest.decode("utf-8", "surrogatepass")
        return json.loads(rest) if kind == _JSON else self._others[index]


def _plain(value: Any) -> bool:
    """Whether JSON gives it back as it is."""
    if isinstance(value, dict):
        return all(type(key) is str and _plain(inner) for key, inner in value.items())
    if isinstance(value, list):
        return all(map(_plain, value))
    return value is None or type(value) in (str, int, bool)


# What rows are kept in: `extend` and `__getitem__` are all that is asked of it.
Column = list[Any] | FileColumn


def new_column(folder: Path | None) -> Column:
    """An empty one: a file in the folder, or a list where that is None."""
    return [] if folder is None else FileColumn(folder)


def like(column: Sequence[Any]) -> Column:
    """An empty one of the same kind."""
    return column.empty() if isinstance(column, FileColumn) else []


def chained(columns: Sequence[Sequence[Any]]) -> Column:
    """The values of several, one after the other."""
    whole = like(columns[0])
    for column in columns:
        whole.extend(column)
    return whole


def row_names(columns: Sequence[Sequence[Any]]) -> np.ndarray:
    """(n,) bytes, 16 of each row, the same for rows with equal values as text.

    >>> names = row_names([["a", "b", "a"], ["c", "c", "c"]])
    >>> (names == names[0]).tolist()
    [True, False, True]
    """
    texts = ("\x1f".join(map(str, values)) for values in zip(*columns, strict=True))
    digests = (hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in texts)
    return np.fromiter(digests, "S16", len(columns[0]) if columns else 0)
