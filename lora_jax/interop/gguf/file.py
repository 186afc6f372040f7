"""Writing a GGUF file, and what llama.cpp calls a base's tensors: the tables that files are read by, the other way round."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize

from ...errors import InputError
from ...models.decoder import Decoder, DecoderConfig
from ...models.families import find_family
from ...weights.checkpoint import GGUFArchitecture, GGUFWeight
from ...weights.gguf import row_order
from ...weights.safetensors import Tensor

# The package tells at length what it writes.
logging.getLogger("gguf").setLevel(logging.WARNING)


@dataclasses.dataclass(frozen=True)
class GGUFOutput:
    """A tensor to be written.

    Attributes:
        shape: in NumPy's order.
        kind: as what it is stored.
        read: makes the array, float32; nothing keeps it once it is written.
    """

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        block, block_bytes = GGML_QUANT_SIZES[self.kind]
        return int(np.prod(self.shape, dtype=np.int64)) // block * block_bytes


def write_gguf(path: Path, architecture: str, metadata: Mapping[str, Any], tensors: Mapping[str, GGUFOutput]) -> None:
    """Writes a file, a tensor in memory at a time.

    Args:
        path: the file.
        architecture: `general.architecture`.
        metadata: further keys; whole numbers become 32-bit ones, floats float32, lists arrays.
        tensors: GGUF's name -> what is written.

    Raises:
        InputError: a number is not finite in the type that its tensor is stored as.
    """
    writer = GGUFWriter(path, architecture)
    for key, value in metadata.items():
        _add(writer, key, value)
    for name, tensor in tensors.items():
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=tensor.kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors.items():
            array = np.ascontiguousarray(tensor.read(), np.float32)
            if tensor.kind is GGMLQuantizationType.F16 and not np.abs(array).max(initial=0.0) < 65520:  # what rounds to infinity
                raise InputError(f"'{name}' holds numbers that float16 cannot: --dtype bfloat16 or float32 can.")
            writer.write_tensor_data(np.ascontiguousarray(quantize(array, tensor.kind)).view(np.uint8))
    finally:
        writer.close()


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        (writer.add_uint32 if value >= 0 else writer.add_int32)(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def architecture_of(base: Decoder) -> GGUFArchitecture:
    """How GGUF files of a base's family are laid out.

    Raises:
        InputError: the family has no such form here.
    """
    assert base.origin is not None
    found = find_family(base.origin.config, base.origin.source).gguf
    if found is None:
        raise InputError(f"'{base.origin.model_type}' models have no form in GGUF here.")
    return found


def modules(architecture: GGUFArchitecture) -> dict[str, tuple[str, GGUFWeight]]:
    """Hugging Face's path of a module, `{i}` standing for the layer -> GGUF's name of it, and how its tensors are changed."""
    return {weight.name: (name, weight) for name, weight in architecture.weights.items()}


def heads_of(config: DecoderConfig) -> dict[str, int]:
    """What `GGUFWeight.pairs` and `thirds` name."""
    return {"num_attention_heads": config.block.heads, "num_key_value_heads": config.block.kv_heads}


def converted(array: np.ndarray, weight: GGUFWeight, kind: str, config: DecoderConfig, name: str) -> np.ndarray:
    """A tensor in Hugging Face's layout as llama.cpp has it, float32.

    Args:
        array: the tensor.
        weight: its module.
        kind: `weight` or `bias`.
        config: the model's.
        name: of the tensor, for messages.
    """
    array = np.asarray(array, np.float32)
    if weight.transposed and kind == "weight":
        array = array.T
    if weight.added and kind == "weight":
        array = array + np.float32(weight.added)
    order = row_order(weight, heads_of(config), array.shape[0], f"'{name}'")
    return array if order is None else array[np.argsort(order)]


def gguf_tensors(
    base: Decoder, architecture: GGUFArchitecture, tensors: Mapping[str, Tensor], kind_of: Callable[[str, Tensor], GGMLQuantizationType]
) -> dict[str, GGUFOutput]:
    """All tensors of a base under GGUF's names.

    Args:
        base: the model.
        architecture: of its family.
        tensors: Hugging Face's name -> tensor (`models.tensors.base_tensors`).
        kind_of: (GGUF's name, tensor) -> as what it is stored.

    Raises:
        InputError: GGUF files of this family have no such tensor.
    """
    known = {
        hf.replace("{i}", str(layer)): (name.replace("{i}", str(layer)), weight)
        for hf, (name, weight) in modules(architecture).items()
        for layer in (range(base.config.depth) if "{i}" in hf else [0])
    }
    found = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if module not in known:
            raise InputError(f"GGUF files of a {architecture.name} model have no place for the tensor '{name}'.")
        stem, weight = known[module]

        def read(tensor: Tensor = tensor, weight: GGUFWeight = weight, kind: str = kind, name: str = name) -> np.ndarray:
            return converted(tensor.read(), weight, kind, base.config, name)

        turned = weight.transposed and kind == "weight"
        shape = tensor.shape[::-1] if turned else tensor.shape
        found[f"{stem}.{kind}"] = GGUFOutput(shape, kind_of(f"{stem}.{kind}", dataclasses.replace(tensor, shape=shape)), read)
    return found
