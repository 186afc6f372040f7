"""What a GGUF file's header says: metadata and where tensors lie, of one file or of all files of a split model.

It is parsed here, not by `gguf.GGUFReader`: that one keeps several NumPy views per vocabulary entry (for SmolLM2 4.3 s and 156 MB)
and believes every length it reads, so that a broken file can make it loop for ever.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from ..errors import InputError
from .checkpoint import GGUF_PART, first_part

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_VERSIONS = (2, 3)
_MAX_AXES = 4


@dataclass(frozen=True)
class GGUFTensor:
    """One stored tensor. `shape` is in NumPy's order (the file lists axes the other way round); `offset` is in `file`."""

    file: Path
    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """Metadata keys to values (arrays as lists), and tensors by GGUF name, in file order."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        """The value at `key`, checked to be of `kind`.

        Raises:
            InputError: it is of another kind, or missing while no default is given.
        """
        if key not in self.metadata:
            if default is ...:
                raise InputError(f"{self.path}: the metadata lacks '{key}'.")
            return default
        value = self.metadata[key]
        wanted = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
            shown = f"a {type(value).__name__}" if isinstance(value, (list, str)) else repr(value)
            raise InputError(f"{self.path}: '{key}' should be {' or '.join(k.__name__ for k in wanted)}, not {shown}.")
        return value

    def positive(self, key: str, default: Any = ...) -> Any:
        """`get` for a whole number above zero."""
        value = self.get(key, int, default)
        if value is not default and value <= 0:
            raise InputError(f"{self.path}: '{key}' should be positive, not {value}.")
        return value


def stored_rows(tensor: GGUFTensor, rows: int) -> np.ndarray:
    """The stored bytes, `(rows, bytes of a row)`, mapped rather than read."""
    return np.memmap(tensor.file, np.uint8, "r", tensor.offset, (rows, tensor.nbytes // rows))


def dequantized(tensor: GGUFTensor, raw: np.ndarray) -> np.ndarray:
    """float32 values of the leading-axis rows whose bytes are `raw`: `(len(raw), *tensor.shape[1:])`.

    Raises:
        InputError: the gguf package does not know the quantisation.
    """
    rest = tensor.shape[1:] if len(tensor.shape) > 1 else tensor.shape
    lines = np.ascontiguousarray(raw).view(np.ndarray).reshape(len(raw) * math.prod(rest[:-1]), -1)
    try:
        values = dequantize(lines, tensor.kind)
    except NotImplementedError:
        kind = tensor.kind.name
        raise InputError(f"{tensor.file}: '{tensor.name}' is stored as {kind}, which the gguf package cannot dequantise.") from None
    return values.reshape(len(raw), *rest)


def read_gguf_header(path: Path) -> GGUFHeader:
    """Parse `path`, checking every count and offset against the file's length before using it.

    Raises:
        InputError: the file is cut short, is not GGUF, or is of a version or byte order that cannot be read.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise InputError(f"{path}: not a GGUF file (it does not start with 'GGUF').")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Cursor(data, path).header()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from None


def read_gguf(path: Path) -> GGUFHeader:
    """The header of a model, its tensors from all its files where it was split (llama.cpp's `gguf-split`).

    Raises:
        InputError: a file is missing, or is no part of this model; or as `read_gguf_header`.
    """
    first = first_part(path)
    if not first.is_file():
        raise InputError(f"{path}: one part of a split GGUF model, whose first file is missing: '{first.name}'.")
    header, match = read_gguf_header(first), GGUF_PART.fullmatch(first.name)
    count = header.get("split.count", int, 0)
    if count <= 1:
        return header
    if match is None or int(match["count"]) != count:
        raise InputError(f"{first}: one of {count} files of a split model, which should be called NAME-00001-of-{count:05d}.gguf.")
    tensors: dict[str, GGUFTensor] = {}
    for number in range(1, count + 1):
        file = first.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf")
        if not file.is_file():
            raise InputError(f"{first}: a model of {count} files, of which '{file.name}' is missing.")
        part = read_gguf_header(file)
        if part.get("split.no", int, None) != number - 1 or part.get("split.count", int, None) != count:
            raise InputError(f"{file}: its metadata does not say that it is file {number} of {count}.")
        twice = next((name for name in part.tensors if name in tensors), None)
        if twice:
            raise InputError(f"{file}: the tensor '{twice}' is also in '{tensors[twice].file.name}'.")
        tensors |= part.tensors
    whole = header.get("split.tensors.count", int, len(tensors))
    if whole != len(tensors):
        raise InputError(f"{first}: the model's {count} files should hold {whole} tensors, not {len(tensors)}.")
    return GGUFHeader(first, header.metadata, tensors)


class _Cursor:
    """Reads values one after another, never past the end."""

    def __init__(self, data: mmap.mmap, path: Path):
        self.data, self.path, self.at = data, path, 4

    def header(self) -> GGUFHeader:
        version = self.number("I")
        if version not in _VERSIONS:
            swapped = version & 0xFFFF == 0 and version != 0
            reason = "big-endian" if swapped else f"version {version}"
            raise InputError(f"{self.path}: a GGUF file of {reason}; readable: little-endian, version 2 or 3.")
        tensor_count, key_count = self.number("Q"), self.number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(self.count(key_count, smallest=13)):
            key = self.string()
            if key in metadata:
                raise self.broken(f"the key '{key}' appears twice")
            metadata[key] = self.value(self.number("I"))
        rows = [self.tensor() for _ in range(self.count(tensor_count, smallest=24))]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise self.broken(f"alignment {alignment!r}")
        start = -(-self.at // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, kind, shape, offset in rows:
            if name in tensors:
                raise self.broken(f"the tensor '{name}' appears twice")
            tensors[name] = self.placed(name, kind, shape, start + offset)
        return GGUFHeader(self.path, metadata, tensors)

    def placed(self, name: str, kind: GGMLQuantizationType, shape: tuple[int, ...], offset: int) -> GGUFTensor:
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise self.broken(f"the rows of '{name}' ({shape[-1]}) are no whole number of {kind.name} blocks ({block})")
        nbytes = math.prod(shape) // block * block_bytes
        if offset + nbytes > len(self.data):
            raise InputError(f"{self.path}: cut short: '{name}' should end at byte {offset + nbytes}, the file at {len(self.data)}.")
        return GGUFTensor(self.path, name, kind, shape, offset, nbytes)

    def tensor(self) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
        name = self.string()
        axes = self.number("I")
        if not 1 <= axes <= _MAX_AXES:
            raise self.broken(f"'{name}' has {axes} axes")
        shape = tuple(self.number("Q") for _ in range(axes))[::-1]
        kind = self.number("I")
        if 0 in shape:
            raise self.broken(f"'{name}' is empty")
        if kind not in GGMLQuantizationType._value2member_map_:
            raise InputError(f"{self.path}: '{name}' is of tensor type {kind}, which this version of the gguf package does not know.")
        return name, GGMLQuantizationType(kind), shape, self.number("Q")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            # A vocabulary may hold pieces of characters; they are replaced, not refused.
            return self.string(errors="replace")
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise self.broken(f"a value of unknown type {kind}")
        value = self.number(_SCALARS[kind])
        return bool(value) if kind == _BOOL else value

    def array(self) -> list[Any]:
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            return [self.string(errors="replace") for _ in range(self.count(count, smallest=8))]
        if kind not in _SCALARS:
            raise self.broken(f"an array of unknown or nested type {kind}")
        dtype = np.dtype(bool if kind == _BOOL else "<" + _SCALARS[kind])
        count = self.count(count, smallest=dtype.itemsize)
        values = np.frombuffer(self.take(count * dtype.itemsize), dtype)
        return values.tolist()

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self, errors: str = "strict") -> str:
        try:
            return self.take(self.number("Q")).decode("utf-8", errors)
        except UnicodeDecodeError:
            raise self.broken("a key or tensor name that is not UTF-8") from None

    def count(self, value: int, *, smallest: int) -> int:
        """`value`, a count of items of at least `smallest` bytes each, if that many can be left in the file."""
        if value * smallest > len(self.data) - self.at:
            raise InputError(f"{self.path}: cut short: at byte {self.at} the header announces {value} items.")
        return value

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise InputError(f"{self.path}: cut short: the header wants {count} bytes at {self.at}, the file ends at {len(self.data)}.")
        self.at += count
        return self.data[self.at - count : self.at]

    def broken(self, what: str) -> InputError:
        return InputError(f"{self.path}: a broken GGUF header: {what}.")
