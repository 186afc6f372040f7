"""Checkpoints in safetensors: one file, or an index and its shards, read and written by the safetensors package.

That package checks a file's header when it opens it, and reads slices of all dtypes but float8, which its NumPy side has no name
for: those are read from the file directly. Bfloat16 and float8 are ml_dtypes' here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

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

_FLOAT8 = (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor to be written: what it is, and how to get it when its file is written.

    Attributes:
        shape, dtype: of what `read` gives.
        read: makes the array; nothing keeps it once its file is written, so that a checkpoint takes the memory of one shard.
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


@dataclasses.dataclass(frozen=True)
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
        return self.read_slice(name, ())

    def read_slice(self, name: str, index: Sequence[slice]) -> np.ndarray:
        entry = self._entry(name)
        bounds = slice_bounds(entry.shape, index)
        if any(start == stop for start, stop in bounds):  # safetensors refuses empty slices
            return np.empty([stop - start for start, stop in bounds], entry.dtype)
        part = tuple(slice(*b) for b in bounds)
        try:
            if entry.dtype in _FLOAT8:
                return np.array(np.memmap(entry.file, np.uint8, "r", entry.offset, entry.shape)[part]).view(entry.dtype)
            # Opened for each tensor: while a file is open, the pages that were read of it count as memory in use.
            with safe_open(entry.file, "numpy") as file:
                return file.get_slice(name)[part]
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"{entry.file}: '{name}' cannot be read; the file has changed since it was opened ({error}).") from None

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
    """The tensors of one safetensors file, in the header's order.

    Raises:
        InputError: the file is cut short, is not safetensors, contradicts itself, or holds a dtype that cannot be read.
    """
    try:
        with safe_open(path, "numpy"), path.open("rb") as file:  # safe_open checks sizes and offsets against the file's length
            length = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(length).decode("utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{path}: not a safetensors file, or damaged ({error}).") from None
    header.pop("__metadata__", None)
    entries = {}
    for name, value in header.items():
        if value["dtype"] not in DTYPES:
            raise InputError(f"{path}: '{name}' has dtype {value['dtype']}, which cannot be read; readable: {', '.join(DTYPES)}.")
        entries[name] = TensorEntry(path, DTYPES[value["dtype"]], tuple(value["shape"]), 8 + length + value["data_offsets"][0])
    return entries


METADATA = {"format": "pt"}  # what transformers and PEFT ask for


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes one file; all its tensors are in memory at once.

    Raises:
        ValueError: a tensor is not what it was announced as.
    """
    arrays = {name: np.ascontiguousarray(tensor.read()).reshape(tensor.shape) for name, tensor in tensors.items()}
    for name, array in arrays.items():
        if array.dtype != tensors[name].dtype:
            raise ValueError(f"'{name}' is {array.dtype}, announced as {tensors[name].dtype}")
    path.touch()
    mode = path.stat().st_mode
    save_file(arrays, path, metadata=METADATA)
    path.chmod(mode)  # safetensors lets the owner alone read what it writes


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor], *, largest: int) -> list[str]:
    """Writes `model.safetensors`, or shards and their index where that would pass `largest` bytes.

    Args:
        folder: an existing one.
        tensors: in the order in which they are shared out among the files.
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
