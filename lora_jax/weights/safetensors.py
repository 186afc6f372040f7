"""Checkpoints in safetensors: one file, or an index and its shards, read and written by the safetensors package.

That package checks a file's header when it opens it, and reads slices of all dtypes but float8, which its NumPy side has no name
for: those are read from the file directly. Bfloat16 and float8 are ml_dtypes' here. Float8 weights with scales beside them are
multiplied by those as they are read; every other quantised layout is refused by name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..errors import InputError, warn
from .checkpoint import Checkpoint, parse_json, plain_names, read_json, slice_bounds
from .quantized import Float8, QuantFormat

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
    """Where one tensor lies, and what it is called there: `offset` counts from the start of `file`."""

    name: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


class SafetensorsCheckpoint(Checkpoint):
    """The tensors of a `.safetensors` file, or of all shards that a `.safetensors.index.json` names.

    Args:
        path: the file.
        config: the model's. None: the file is no model, but an adapter, and its tensors keep the names they have.
    """

    def __init__(self, path: Path, config: dict[str, Any] | None):
        self.path = path
        stored = _read_index(path) if path.suffix == ".json" else read_header(path)
        names = {name: name for name in stored} if config is None else plain_names(path, stored)
        config = config or {}
        self._entries = {name: stored[original] for name, original in names.items()}
        self._scales = _scales(path, self._entries, config)
        # What is read is no longer quantised, and what is written from it is not.
        self.config = {key: value for key, value in config.items() if key not in _QUANTISED_KEYS}

    def names(self) -> list[str]:
        hidden = {scale.name for scale in self._scales.values()}
        return [n for n, entry in self._entries.items() if entry.name not in hidden and not _ACTIVATION_SCALES.search(n)]

    def file(self, name: str) -> Path:
        return self._entry(name).file

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(np.float32) if name in self._scales else self._entry(name).dtype

    def _read_slice(self, name: str, index: Sequence[slice]) -> np.ndarray:
        entry, scale = self._entry(name), self._scales.get(name)
        values = _read_part(entry, slice_bounds(entry.shape, index))
        return values if scale is None else values.astype(np.float32) * scale.part(slice_bounds(entry.shape, index))

    def quantised(self, name: str) -> str:
        return self._entry(name).dtype.name if name in self._scales else ""

    def held(self, name: str, *, transposed: bool = False) -> QuantFormat | None:
        scale, entry = self._scales.get(name), self._entry(name)
        if scale is None or len(entry.shape) != 2 or transposed:
            return None
        rows, inputs = scale.block
        return Float8(entry.dtype.name, (rows, inputs))

    def read_held(self, name: str) -> dict[str, np.ndarray]:
        entry, scale = self._entry(name), self._scales[name]
        codes, scales = (_read_part(of, [(0, size) for size in of.shape]) for of in (entry, scale.entry))
        counts = [-(-size // block) for size, block in zip(entry.shape, scale.block, strict=True)]
        return {"codes": codes, "scales": scales.astype(np.float32).reshape(counts)}

    def _entry(self, name: str) -> TensorEntry:
        if name not in self._entries:
            raise self._missing(name)
        return self._entries[name]


def _read_part(entry: TensorEntry, bounds: Sequence[tuple[int, int]]) -> np.ndarray:
    """A part of a tensor; `bounds` are (start, stop) for each axis."""
    if any(start == stop for start, stop in bounds):  # safetensors refuses empty slices
        return np.empty([stop - start for start, stop in bounds], entry.dtype)
    part = tuple(slice(*b) for b in bounds)
    try:
        if entry.dtype in _FLOAT8:
            return np.array(np.memmap(entry.file, np.uint8, "r", entry.offset, entry.shape)[part]).view(entry.dtype)
        # Opened for each tensor: while a file is open, the pages that were read of it count as memory in use.
        with safe_open(entry.file, "numpy") as file:
            return file.get_slice(entry.name)[part]
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{entry.file}: '{entry.name}' cannot be read; the file has changed since it was opened ({error}).") from None


# Keys of config.json that say how weights are stored.
_QUANTISED_KEYS = ("quantization_config", "compression_config")

# Tensors that only quantised layouts have: GPTQ and AWQ, bitsandbytes, compressed-tensors, MXFP4, NVFP4, torchao and others.
_QUANTISED = re.compile(
    r"(\.(qweight|qzeros|g_idx|SCB|CB|absmax|quant_map|nested_absmax|nested_quant_map|weight_format|weight_packed|weight_g_idx"
    r"|weight_zero_point|weight_scale_2|weight_global_scale|compressed|bitmask|qdata|_packed_weight)"
    r"|\.quant_state\.\w+|_blocks|\.weight_scale_and_zero)$"
)
# How inputs, keys and values were scaled where those are float8 too; here they are not quantised.
_ACTIVATION_SCALES = re.compile(r"\.(input_scale(_ub)?|activation_scale|output_scale|[kvq]_scale)$")


@dataclasses.dataclass(frozen=True)
class Scale:
    """What a float8 weight's numbers are multiplied by: one number per block of `block` (an axis each) of the weight."""

    name: str
    entry: TensorEntry
    block: tuple[int, ...]

    def part(self, bounds: Sequence[tuple[int, int]]) -> np.ndarray:
        """The scales of a part of the weight, a number each (or one for a whole axis)."""
        scales = _read_part(self.entry, [(0, size) for size in self.entry.shape]).astype(np.float32)
        if scales.size == 1:
            return scales.reshape(())
        scales = scales.reshape(*scales.shape, *[1] * (len(self.block) - scales.ndim))
        places = [np.arange(*b) // size for b, size in zip(bounds, self.block, strict=True)]
        return scales[np.ix_(*places)]


def _scales(path: Path, entries: Mapping[str, TensorEntry], config: Mapping[str, Any]) -> dict[str, Scale]:
    """Float8 weight -> its scale.

    Raises:
        InputError: the weights are quantised in a layout that is not read.
    """
    said = next((config[key] for key in _QUANTISED_KEYS if config.get(key)), None)
    told = said if isinstance(said, Mapping) else {}
    method = str(told.get("quant_method") or "quantised") + (f" ({told['format']})" if told.get("format") else "")
    instead = "Load the model's unquantised checkpoint, or a GGUF file of it"
    scales = {}
    for name, entry in entries.items():
        if _QUANTISED.search(name) or (name.endswith(".weight") and entry.dtype.kind in "iu"):
            raise InputError(f"{entry.file}: '{entry.name}' is stored in a quantised layout that is not read: {method}. {instead}.")
        if name.endswith(("_scale_inv", "_scale")) and (weight := name.rpartition("_scale")[0]) in entries:
            if entries[weight].dtype not in _FLOAT8[:2]:
                raise InputError(
                    f"{entry.file}: '{entry.name}' scales a weight that is {entries[weight].dtype}, not float8: {method}. {instead}."
                )
            scales[weight] = Scale(entry.name, entry, _block(entries[weight], entry, told))
    plain = [name for name, entry in entries.items() if entry.dtype in _FLOAT8[:2] and name not in scales]
    modules = {name.rpartition(".")[0] for name in plain}
    used = {scale.name for scale in scales.values()}
    stray = [n for n, e in entries.items() if "scale" in n.rpartition(".")[2] and n.rpartition(".")[0] in modules and e.name not in used]
    if plain and (scales or said or stray):
        beside = f"; '{stray[0]}' is not a scale as known here" if stray else ""
        raise InputError(f"{path}: '{plain[0]}' is float8 without '{plain[0]}_scale'{beside}: {method}. {instead}.")
    if told.get("transform_config"):
        raise InputError(f"{path}: quantization_config.transform_config rotates activations, which is not done here. {instead}.")
    if scales:
        when = "as they are read, or with model.quantized: keep where they are used"
        warn(f"{path}: {len(scales)} float8 weights are multiplied by their scales, {when}; activations are not quantised.")
    elif plain:
        warn(f"{path}: {len(plain)} weights are float8 without scales, and read as they are.")
    elif said:
        warn(f"{path}: the config's quantization_config ({method}) is not used: the weights are stored unquantised, and read so.")
    return scales


def _block(weight: TensorEntry, scale: TensorEntry, told: Mapping[str, Any]) -> tuple[int, ...]:
    """The weight's numbers to a scale, along each axis; `InputError` where the shapes don't tell."""
    counts = (*scale.shape, *[1] * (len(weight.shape) - len(scale.shape)))
    if scale.shape in ((), (1,)) or set(scale.shape) == {1}:
        return weight.shape
    size = told.get("weight_block_size")
    for group in (told.get("config_groups") or {}).values() if isinstance(told.get("config_groups"), Mapping) else ():
        args = group.get("weights") if isinstance(group, Mapping) else None
        if size is None and isinstance(args, Mapping):
            size = args.get("block_structure") or (args.get("group_size") and [1, args["group_size"]])
    named = tuple(size) if isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size) else (None, None)
    named = (*[None] * (len(weight.shape) - 2), *named)[-len(weight.shape) :]
    blocks = []
    for length, count, block in zip(weight.shape, counts, named, strict=False):
        fits = {b for b in (1, length, block or 128) if -(-length // b) == count}
        if not fits and block is None and count and length % count == 0:
            fits = {length // count}
        if not fits or len(counts) != len(weight.shape):
            shapes = f"{scale.shape} for a weight of {weight.shape}" + (f" in blocks of {size}" if size else "")
            raise InputError(f"{scale.file}: '{scale.name}' has shape {shapes}, which do not fit.")
        blocks.append(min(fits))
    return tuple(blocks)


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
    more = [name for held in shards.values() for name in held if name not in entries]
    if more:
        shown = ", ".join(more[:4]) + ", ..." * (len(more) > 4)
        warn(f"{path}: its shards hold {len(more)} tensors that it does not name, and that are not read: {shown}.")
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
        entries[name] = TensorEntry(name, path, DTYPES[value["dtype"]], tuple(value["shape"]), 8 + length + value["data_offsets"][0])
    return entries


METADATA = {"format": "pt"}  # what transformers and PEFT ask for


_DIGEST, _TENSORS = "lora_jax.sha256.", "tensors"


def arrays_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Of names, dtypes, shapes and bytes, in any order."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode() + array.tobytes())
    return digest.hexdigest()


def read_digests(path: Path, tensors: Checkpoint) -> dict[str, str]:
    """The digests that `write_safetensors` kept beside the tensors of one file; none where it was written without, or by others.

    Args:
        path: the file.
        tensors: what was opened of it.

    Raises:
        InputError: the tensors are not those that were written.
    """
    with safe_open(path, "numpy") as file:
        kept = {key.removeprefix(_DIGEST): text for key, text in (file.metadata() or {}).items() if key.startswith(_DIGEST)}
    if kept.pop(_TENSORS, None) not in (None, arrays_digest({name: tensors.read(name) for name in tensors.names()})):
        raise InputError(f"{path}: damaged (its tensors are not those that were written).")
    return kept


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], *, digests: Mapping[str, str] | None = None) -> None:
    """Writes one file; all its tensors are in memory at once.

    Args:
        path: the file.
        tensors: in the order that they have there.
        digests: of what belongs to the file; kept in its header with a digest of the tensors (`read_digests`). None: neither is.

    Raises:
        ValueError: a tensor is not what it was announced as.
    """
    arrays = {name: np.ascontiguousarray(tensor.read()).reshape(tensor.shape) for name, tensor in tensors.items()}
    for name, array in arrays.items():
        if array.dtype != tensors[name].dtype:
            raise ValueError(f"'{name}' is {array.dtype}, announced as {tensors[name].dtype}")
    path.touch()
    mode = path.stat().st_mode
    kept = {} if digests is None else {_DIGEST + name: digest for name, digest in {**digests, _TENSORS: arrays_digest(arrays)}.items()}
    save_file(arrays, path, metadata=METADATA | kept)
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
