"""Kept activations: what enters the layers above the cut, for each example, found by the example's tokens; in memory, or in files.

An example's activations depend on its own tokens (and which of two texts each is of) alone, whatever shares its row and its batch, so that
a batch of any composition is put together from them. Files are whole or absent, and never take more than a limit in all. A file's name is
its key and the CRC-32 of what it holds: two processes that write the same file replace it by itself, and a damaged one is recognized.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from ..data.examples import Examples


def spans(batch: Mapping[str, np.ndarray]) -> Iterator[tuple[int, int, bytes]]:
    """The examples of a batch: where each starts and stops in the flattened tokens, and its tokens (and their types) as bytes.

    >>> batch = {"tokens": np.array([[7, 8, 9, 0]], np.int32), "segment_ids": np.array([[1, 1, 2, 0]], np.int32)}
    >>> [(start, stop) for start, stop, _ in spans(batch)]
    [(0, 2), (2, 3)]
    """
    tokens, segments = batch["tokens"].reshape(-1), batch["segment_ids"].reshape(-1)
    types = batch["token_types"].reshape(-1) if "token_types" in batch else None
    begins = np.ones(segments.size + 1, bool)
    begins[1:-1] = segments[1:] != segments[:-1]
    begins[:: batch["tokens"].shape[-1]] = True
    bounds = np.flatnonzero(begins)
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        if segments[start]:
            yield start, stop, _name(tokens[start:stop], None if types is None else types[start:stop])


def _name(tokens: np.ndarray, types: np.ndarray | None) -> bytes:
    parts = [tokens] if types is None else [tokens, types]
    return b"".join(np.asarray(part, np.int32).tobytes() for part in parts)


class PrefixStore:
    """The activations of some examples.

    Args:
        examples: equal ones are kept once.
        width: numbers a token.
        dtype: of the numbers.

    Attributes:
        tokens: how many are kept, padding not counted.
        pairs: whether the examples are pairs of texts.
        nbytes: size of the activations.
        hits, misses: batches that were put together from it, and that could not be.
    """

    def __init__(self, examples: Examples, width: int, dtype: np.dtype):
        self._where: dict[bytes, int] = {}
        self.tokens = 0
        self.pairs = examples.types is not None
        for tokens, types in zip(examples.tokens, examples.types or itertools.repeat(None)):
            name = _name(tokens, types)
            if name not in self._where:
                self._where[name] = self.tokens
                self.tokens += len(tokens)
        self.width, self.dtype = width, np.dtype(dtype)
        self.nbytes = self.tokens * width * self.dtype.itemsize
        self.hits = self.misses = 0
        self._rows: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(tokens, width) of the activations."""
        return self.tokens, self.width

    def names(self) -> Iterator[bytes]:
        """The examples as bytes, in the order they are kept in."""
        return iter(self._where)

    def use(self, rows: np.ndarray) -> None:
        """Keeps the activations in (or reads them from) an array of `shape`, of numbers as wide as `dtype`."""
        assert rows.shape == self.shape
        self._rows = rows.view(self.dtype)

    def put(self, batch: Mapping[str, np.ndarray], prefix: np.ndarray) -> None:
        """Takes the activations of a batch's examples, (..., rows, length, width)."""
        assert self._rows is not None
        flat = prefix.reshape(-1, self.width)
        for start, stop, name in spans(batch):
            at = self._where.get(name)
            if at is not None:
                self._rows[at : at + stop - start] = flat[start:stop]

    def get(self, batch: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """(..., rows, length, width): a batch's activations, 0 at padding; None if an example of it is not kept."""
        assert self._rows is not None
        flat = np.zeros((batch["tokens"].size, self.width), self.dtype)
        for start, stop, name in spans(batch):
            at = self._where.get(name)
            if at is None:
                self.misses += 1
                return None
            flat[start:stop] = self._rows[at : at + stop - start]
        self.hits += 1
        return flat.reshape(*batch["tokens"].shape, self.width)


_CHUNK = 1 << 24


class PrefixFiles:
    """The files of one folder.

    Args:
        folder: made when the first file is.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def open(self, key: str, shape: tuple[int, int], itemsize: int) -> np.ndarray | None:
        """The array of a key, (tokens, width) of unsigned integers, mapped read-only; None if there is none that is whole.

        A damaged file is removed.
        """
        for path in sorted(self.folder.glob(f"{key}-*.npy")):
            with contextlib.suppress(OSError, ValueError):
                rows = np.load(path, mmap_mode="r", allow_pickle=False)
                if rows.shape == shape and rows.dtype == _bits(itemsize) and path.stem == f"{key}-{_crc(rows)}":
                    os.utime(path)  # those used last are kept longest
                    return rows
            path.unlink(missing_ok=True)
        return None

    @contextlib.contextmanager
    def write(self, key: str, shape: tuple[int, int], itemsize: int, *, limit: int) -> Iterator[np.ndarray]:
        """An array to be filled, (tokens, width) of unsigned integers; it becomes the key's file when the block ends well.

        The mapped array goes on being valid then. The files used longest ago make room.

        Args:
            key: names the file.
            shape, itemsize: of the array.
            limit: most bytes of the folder's files in all.

        Raises:
            OSError: no room on the disk, or no permission. Nothing is left behind.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        self._make_room(limit - file_size(shape, itemsize))
        part = self.folder / f".{key}.{socket.gethostname()}.{os.getpid()}.part"
        try:
            with open(part, "w+b") as file:
                np.lib.format.write_array_header_1_0(
                    file, {"descr": np.lib.format.dtype_to_descr(_bits(itemsize)), "fortran_order": False, "shape": shape}
                )
                offset = file.tell()
                _reserve(file.fileno(), offset, file_size(shape, itemsize))
            rows = np.memmap(part, _bits(itemsize), "r+", offset, shape)
            yield rows
            rows.flush()
            os.replace(part, self.folder / f"{key}-{_crc(rows)}.npy")
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, room: int) -> None:
        """Removes the files used longest ago until the rest is at most `room` bytes. Whoever has one mapped keeps it."""
        found = []
        for path in self.folder.glob("*.npy"):
            with contextlib.suppress(FileNotFoundError):
                found.append((path.stat().st_mtime, path.stat().st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= room:
                return
            path.unlink(missing_ok=True)
            total -= size

    def _remove_leftovers(self) -> None:
        """What processes of this machine that were killed left behind."""
        for path in self.folder.glob(f".*.{socket.gethostname()}.*.part"):
            try:
                os.kill(int(path.name.split(".")[-2]), 0)
            except ProcessLookupError:
                path.unlink(missing_ok=True)
            except (ValueError, PermissionError):
                continue


def file_size(shape: tuple[int, int], itemsize: int) -> int:
    """Bytes of a file that holds an array of this shape."""
    return 128 + shape[0] * shape[1] * itemsize  # NumPy's header of a small array


def _bits(itemsize: int) -> np.dtype:
    return np.dtype(f"<u{itemsize}")


def _crc(rows: np.ndarray) -> str:
    flat = rows.reshape(-1).view(np.uint8)
    crc = 0
    for start in range(0, flat.size, _CHUNK):
        crc = zlib.crc32(flat[start : start + _CHUNK].data, crc)
    return f"{crc:08x}"


def _reserve(descriptor: int, start: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    os.lseek(descriptor, start, os.SEEK_SET)
    for at in range(start, size, _CHUNK):
        os.write(descriptor, bytes(min(_CHUNK, size - at)))
