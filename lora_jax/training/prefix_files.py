"""Kept activations on the disk: `.npy` files in one folder, whole or absent, never more than a limit in all.

A file's name is its key and the CRC-32 of what it holds: two processes that write the same file replace it by itself, and a damaged
one is recognized. The disk's blocks are taken before anything is mapped, so that a full disk is an error and not a signal.
"""

from __future__ import annotations

import contextlib
import os
import socket
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

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
