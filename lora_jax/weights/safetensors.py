"""Checkpoints in safetensors: one file, or an index and its shards.

The format is an 8-byte length, a JSON header of that length, then raw tensors; it is read here directly because the
safetensors package's NumPy side knows no bfloat16, and every offset is checked before it is believed.

Writing safetensors: one file, or shards below a size with an index, one tensor in memory at a time.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np

from ..errors import InputError
from .checkpoint import Checkpoint, parse_json, read_json, slice_bounds

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
        "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
    }.items()
}  # fmt: skip

_BLOCK = 16 * 1024 * 1024  # bytes read at a time where only a part of each row is wanted
_LONGEST_HEADER = 100_000_000  # the reference implementation's limit


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor to be written: what it is, and how to get it when its turn comes.

    Attributes:
        shape, dtype: of what `read` gives.
        read: makes the array; nothing keeps it, so that of a whole checkpoint one tensor is in memory at a time.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def cast(self, dtype: np.dtype) -> Tensor:
        """The same tensor in another dtype, rounded when it is read."""
        return self if dtype == self.dtype else Tensor(self.shape, dtype, lambda: self.read().astype(dtype))


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `offset` counts from the start of `file`."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


class SafetensorsCheckpoint(Checkpoint):
    """The tensors of a `.safetensors` file, or of all shards that a `.safetensors.index.json` names."""

    def __init__(self, path: Path, config: dict[str, Any]):
        self.path = path
        self.config = config
        self._entries = _read_index(path) if path.suffix == ".json" else read_header(path)

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> np.dtype:
        return self._entry(name).dtype

    def read(self, name: str) -> np.ndarray:
        entry = self._entry(name)
        count = math.prod(entry.shape)
        flat = np.fromfile(entry.file, entry.dtype, count, offset=entry.offset)
        if flat.size != count:
            raise self._cut_short(name)
        return flat.reshape(entry.shape)

    def read_slice(self, name: str, index: Sequence[slice]) -> np.ndarray:
        entry = self._entry(name)
        bounds = slice_bounds(entry.shape, index)
        out = np.empty([stop - start for start, stop in bounds], entry.dtype)
        if not entry.shape or out.size == 0:
            return self.read(name)[tuple(slice(*b) for b in bounds)]
        # Whole rows are read and cut, a few at a time: a mapping of the file would count every page it touches as memory in use.
        row = math.prod(entry.shape[1:])
        inner, (first, last) = tuple(slice(*b) for b in bounds[1:]), bounds[0]
        step = max(1, _BLOCK // (row * entry.dtype.itemsize))
        for start in range(first, last, step):
            stop = min(start + step, last)
            offset = entry.offset + start * row * entry.dtype.itemsize
            block = np.fromfile(entry.file, entry.dtype, (stop - start) * row, offset=offset)
            if block.size != (stop - start) * row:
                raise self._cut_short(name)
            out[start - first : stop - first] = block.reshape(-1, *entry.shape[1:])[:, *inner]
        return out

    def _cut_short(self, name: str) -> InputError:
        """It was whole when the header was read."""
        return InputError(f"{self._entry(name).file}: '{name}' is cut short; the file has changed since it was opened.")

    def _entry(self, name: str) -> TensorEntry:
        if name not in self._entries:
            raise self._missing(name)
        return self._entries[name]


def _read_index(path: Path) -> dict[str, TensorEntry]:
    """The entries of all shards named by an index, in the index's order."""
    weight_map = read_json(path, "the shard index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: no 'weight_map' from tensor names to shard files.")
    shards: dict[str, dict[str, TensorEntry]] = {}
    entries = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _stays_inside(shard):
            raise InputError(f"{path}: '{name}' is said to lie in {repr(shard)[:80]}, which is not a file inside this folder.")
        if shard not in shards:
            if not (path.parent / shard).is_file():
                raise InputError(f"{path}: the shard '{shard}' is missing from the folder.")
            shards[shard] = read_header(path.parent / shard)
        if name not in shards[shard]:
            raise InputError(f"{path}: '{name}' is said to lie in '{shard}', which does not hold it.")
        entries[name] = shards[shard][name]
    return entries


def _stays_inside(shard: str) -> bool:
    # By its words alone, not by resolving: in the hub's cache every file is a link out of the folder.
    parts = PurePosixPath(shard)
    return (
        0 < len(shard) < 256 and shard.isprintable() and not set(shard) & set("\\:") and not parts.is_absolute() and ".." not in parts.parts
    )


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, every size and offset checked against the file's length.

    Raises:
        InputError: the file is cut short, is not safetensors, or contradicts itself.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise InputError(f"{path}: cut short or not a safetensors file (a header of {length} bytes, a file of {size}).")
            if length > _LONGEST_HEADER:
                raise InputError(f"{path}: a header of {length} bytes is absurd; this is not a safetensors file.")
            header = parse_json(file.read(length).decode("utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from None
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: its header is not JSON ({error}); this is not a safetensors file.") from None
    if not isinstance(header, dict):
        raise InputError(f"{path}: its header is not a JSON object; this is not a safetensors file.")
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, value, 8 + length, size) for name, value in header.items()}
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, math.prod(item[1].shape))):
        if entry.offset != end:
            raise InputError(f"{path}: '{name}' starts at byte {entry.offset}, and what stands before it ends at {end}.")
        end += math.prod(entry.shape) * entry.dtype.itemsize
    if end != size:
        raise InputError(f"{path}: its tensors end at byte {end}, the file at {size}.")
    return entries


def _entry(path: Path, name: str, value: Any, start: int, size: int) -> TensorEntry:
    try:
        kind, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
        numbers = [*shape, begin, end]
    except (TypeError, KeyError, ValueError):
        raise InputError(f"{path}: the header's entry for '{name}' is broken.") from None
    if not isinstance(kind, str) or kind not in DTYPES:
        raise InputError(f"{path}: '{name}' has dtype {kind!r}, which cannot be read; readable: {', '.join(DTYPES)}.")
    if not all(type(n) is int and n >= 0 for n in numbers):
        raise InputError(f"{path}: the header's entry for '{name}' is broken.")
    if start + end > size:
        raise InputError(f"{path}: cut short: '{name}' should end at byte {start + end}, the file at {size}.")
    dtype = DTYPES[kind]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise InputError(f"{path}: '{name}' is {kind} {tuple(shape)} but takes {end - begin} bytes.")
    return TensorEntry(path, dtype, tuple(shape), start + begin)


_NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = {"format": "pt"}  # what transformers and PEFT ask for


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes one file: an 8-byte length, a JSON header of that length, then the tensors' bytes, in the mapping's order."""
    header: dict[str, object] = {"__metadata__": METADATA}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors start aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            array = tensor.read()
            if array.shape != tensor.shape or array.dtype != tensor.dtype:
                raise ValueError(f"'{name}' is {array.dtype} {array.shape}, announced as {tensor.dtype} {tensor.shape}")
            file.write(array.tobytes())


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor], *, largest: int) -> list[str]:
    """Writes `model.safetensors`, or shards and their index where that would pass `largest` bytes.

    Args:
        folder: an existing one.
        tensors: in the order they are to have.
        largest: bytes of tensors in a file; a single larger tensor gets a file to itself.

    Returns:
        names of the files with tensors.
    """
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > largest:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return ["model.safetensors"]
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        write_safetensors(folder / file, shard)
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
        "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files
