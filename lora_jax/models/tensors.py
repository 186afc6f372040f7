"""A model's parameters as the tensors of its checkpoint: what `load_model` reads, the other way round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from ..weights.safetensors import Tensor
from .encoder_decoder import Base
from .families import find_family
from .families.base import Weight


def aliases(table: dict[str, Weight]) -> tuple[tuple[str, str], ...]:
    """Module path -> Hugging Face module path, from the parameters' names."""
    pairs = {}
    for path, weight in table.items():
        module, _, name = path.rpartition(".")
        if name in ("kernel", "embedding", "scale"):  # a table that is no module's (of relative positions) is no module's name
            pairs[module] = weight.parameter.removesuffix(".weight")
    return tuple(sorted(pairs.items()))


def base_tensors(base: Base, dtypes: Mapping[str, np.dtype] | None = None) -> dict[str, Tensor]:
    """Every parameter of a plain base under its Hugging Face name and in its layout, without any prefix.

    What `load_model` reads and this writes back has the same bits, as far as the model's dtype holds them.

    Args:
        base: from `load_model`, or one merged from it (`adapters.merge.merged_base`).
        dtypes: our parameter path -> the dtype it is written in (`BaseFiles.stored_dtypes`); the model's own by default.

    Raises:
        ValueError: the model was not loaded from a checkpoint: nothing says what its parameters are called.
    """
    if base.origin is None:
        raise ValueError("the model was not loaded from a checkpoint")
    tensors = {}
    for path, weight in find_family(base.origin.config, base.origin.source).weights(base.config).items():
        variable = _parameter(base, path)
        dtype = (dtypes or {}).get(path, np.dtype(variable.dtype))
        for at, piece, name in weight.tensors(variable.shape):
            tensors[name] = _tensor(variable, weight, at, piece).cast(dtype)
    return tensors


def _parameter(base: nnx.Module, path: str) -> nnx.Variable:
    found: Any = base
    for part in path.split("."):
        # Each of a stack's segments shares the weights of all layers; where an update is merged, the last one holds it.
        found = found.segments[-1].block if hasattr(found, "segments") else found
        found = getattr(found, part)
    return found


def _tensor(variable: nnx.Variable, weight: Weight, at: tuple[int, ...], piece: int) -> Tensor:
    inner, pieces = tuple(variable.shape[len(at) :]), 1 + len(weight.joined)
    shape = (*inner[:-1], inner[-1] // pieces)

    def read() -> np.ndarray:
        array = np.asarray(variable[at] if at else variable[...])
        array = np.split(array, pieces, axis=-1)[piece] if pieces > 1 else array
        return np.ascontiguousarray(array.transpose(weight.as_stored(range(array.ndim))))

    return Tensor(weight.as_stored(shape), np.dtype(variable.dtype), read)
