"""Writing safetensors: one file, or shards below a size with an index, one tensor in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from .safetensors_files import DTYPES
from .saving import Tensor

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
