"""Saving: a model's stacked parameters back into a checkpoint's tensors, through the same table of names that loads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import nnx

from .families import Weight, families
from .loading import Base


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
    for path, weight in families()[base.origin.model_type].weights(base.config).items():
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
        return np.ascontiguousarray(array.transpose(weight.oriented(range(array.ndim))))

    return Tensor(weight.oriented(shape), np.dtype(variable.dtype), read)
