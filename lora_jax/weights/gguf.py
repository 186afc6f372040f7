"""Checkpoints in GGUF: llama.cpp's names, layouts and block quantisation turned back into Hugging Face's.

A family says what its tensors are (`GGUFArchitecture.weights`); the config is `gguf_config.py`'s. Tensors are dequantised to float32 a
few rows at a time, straight into the array that is returned.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES

from ..errors import InputError, hint
from .checkpoint import Checkpoint, GGUFArchitecture, GGUFWeight, slice_bounds
from .gguf_blocks import KINDS, Blocks
from .gguf_config import NOT_WEIGHTS, gguf_config
from .gguf_header import GGUFHeader, GGUFTensor, dequantized, read_gguf, stored_rows
from .quantized import QuantFormat

_CHUNK = 1 << 18  # elements dequantised at once: small beside a tensor, large beside the cost of a call


class GGUFCheckpoint(Checkpoint):
    """A GGUF file under Hugging Face names; every tensor reads as float32.

    Args:
        path: the file.
        architectures: `general.architecture` -> what it maps to.

    Raises:
        InputError: a broken file, or an architecture, tensor or scaling that is not known here (rather than a wrong model).
    """

    def __init__(self, path: Path, architectures: Mapping[str, GGUFArchitecture]):
        header = read_gguf(path)
        self.path = header.path
        architecture = _architecture(header, architectures)
        self._tensors: dict[str, tuple[GGUFTensor, GGUFWeight]] = {}
        for name, tensor in header.tensors.items():
            if name not in NOT_WEIGHTS:
                hf_name, weight = _hf_name(header, architecture, name)
                self._tensors[hf_name] = (tensor, weight)
        self.config = gguf_config(header, architecture)

    def names(self) -> list[str]:
        return list(self._tensors)

    def file(self, name: str) -> Path:
        return self._tensor(name)[0].file

    def shape(self, name: str) -> tuple[int, ...]:
        tensor, weight = self._tensor(name)
        return tensor.shape[::-1] if weight.transposed else tensor.shape

    def dtype(self, name: str) -> np.dtype:
        self._tensor(name)
        return np.dtype(np.float32)

    def _read_slice(self, name: str, index: Sequence[slice]) -> np.ndarray:
        tensor, weight = self._tensor(name)
        bounds = slice_bounds(self.shape(name), index)
        if weight.transposed:
            array = np.ascontiguousarray(self._stored(tensor, weight, bounds[::-1]).T)
        else:
            array = self._stored(tensor, weight, bounds)
        if weight.added and name.endswith(".weight"):
            array -= np.float32(weight.added)
        return array

    def _stored(self, tensor: GGUFTensor, weight: GGUFWeight, bounds: Sequence[tuple[int, int]]) -> np.ndarray:
        """Values in the file's axes, `(start, stop)` of each, in fresh memory; rows in Hugging Face's order."""
        order = row_order(weight, self.config, tensor.shape[0], f"{self.path}: '{tensor.name}'")
        if len(tensor.shape) == 1:
            whole = dequantized(tensor, stored_rows(tensor, 1)).reshape(-1)
            return np.array((whole if order is None else whole[order])[slice(*bounds[0])])
        rows, inner = tensor.shape[0], tuple(slice(*b) for b in bounds[1:])
        raw = stored_rows(tensor, rows)
        out = np.empty([stop - start for start, stop in bounds], np.float32)
        step = max(1, _CHUNK // math.prod(tensor.shape[1:]))
        first, last = bounds[0]
        for start in range(first, last, step):
            stop = min(start + step, last)
            chosen = slice(start, stop) if order is None else order[start:stop]
            out[start - first : stop - first] = dequantized(tensor, raw[chosen])[:, *inner]
        return out

    def quantised(self, name: str) -> str:
        kind = self._tensor(name)[0].kind
        return kind.name if GGML_QUANT_SIZES[kind][0] > 1 else ""  # others are no blocks

    def held(self, name: str, *, transposed: bool = False) -> QuantFormat | None:
        tensor, weight = self._tensor(name)
        kept = tensor.kind.name in KINDS and len(tensor.shape) == 2 and weight.transposed == transposed and not weight.added
        return Blocks(tensor.kind.name) if kept else None

    def read_held(self, name: str) -> dict[str, np.ndarray]:
        tensor, weight = self._tensor(name)
        order = row_order(weight, self.config, tensor.shape[0], f"{self.path}: '{tensor.name}'")
        raw = stored_rows(tensor, tensor.shape[0])
        return Blocks(tensor.kind.name).stored(np.array(raw if order is None else raw[order]))

    def _tensor(self, name: str) -> tuple[GGUFTensor, GGUFWeight]:
        if name not in self._tensors:
            raise self._missing(name)
        return self._tensors[name]


def row_order(weight: GGUFWeight, config: Mapping[str, int], rows: int, where: str) -> np.ndarray | None:
    """Which stored row is each Hugging Face row; None where they agree.

    Args:
        weight: the module.
        config: of the keys that it names, the numbers of heads.
        rows: of its tensor.
        where: file and tensor, for the message.

    Raises:
        InputError: the heads cannot share the rows.
    """
    key, parts = (weight.pairs, 2) if weight.pairs else (weight.thirds, 3)
    if not key:
        return None
    heads = config[key]
    if rows % (parts * heads):
        raise InputError(f"{where} has {rows} rows, which {heads} heads cannot share.")
    if weight.pairs:
        return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
    return np.arange(rows).reshape(3, heads, -1).swapaxes(0, 1).reshape(-1)


def _architecture(header: GGUFHeader, known: Mapping[str, GGUFArchitecture]) -> GGUFArchitecture:
    name = header.get("general.architecture", str)
    if name not in known:
        raise InputError(f"{header.path}: the architecture '{name}' is not supported in GGUF. {hint(name, known)}".rstrip())
    if header.get(f"{name}.expert_count", int, 0):
        raise InputError(f"{header.path}: a mixture-of-experts '{name}' is not supported in GGUF; load its safetensors.")
    return known[name]


def _hf_name(header: GGUFHeader, architecture: GGUFArchitecture, name: str) -> tuple[str, GGUFWeight]:
    match = re.fullmatch(r"(?:blk\.(?P<layer>0|[1-9]\d{0,5})\.)?(?P<stem>\w+)\.(?P<kind>weight|bias)", name)
    weight = architecture.weights.get(("blk.{i}." if match["layer"] else "") + match["stem"]) if match else None
    if match is None or weight is None:
        raise InputError(f"{header.path}: the tensor '{name}' is not part of a {architecture.model_type} model as known here.")
    return f"{weight.name.replace('{i}', match['layer'] or '')}.{match['kind']}", weight
