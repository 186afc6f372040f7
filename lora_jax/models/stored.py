"""Layers whose weight is held in another form than one array, and what all layers are asked about their weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx

from .layers import AXES, Array, Embedding


class StoredLinear(nnx.Module):
    """A linear layer whose weight is held in another form than one array. It stands where an `nnx.Linear` stood, and is a site like one.

    A subclass computes `__call__`, (..., inputs) -> (..., outputs), without making the weight as a whole where it can.

    Attributes:
        bias: (..., outputs), or None.
        dtype: of the matmul, and of the weight where it is asked for.
    """

    bias: nnx.Param | None
    dtype: Any

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """(..., inputs, outputs) of the weight; layers in front where it is stacked."""
        raise NotImplementedError

    @property
    def kernel_axes(self) -> tuple[str | None, ...] | None:
        """The weight's logical axes; None where they have no names."""
        raise NotImplementedError

    def dense_kernel(self, layer: int | None = None) -> Array:
        """The weight as one array, (..., inputs, outputs), or of one layer of a stack: made when it is asked for, and not kept."""
        raise NotImplementedError

    @property
    def kernel(self) -> nnx.Param:
        """The weight, as an `nnx.Linear` has it. What is set in it changes nothing: merge into `as_linear`."""
        made = nnx.Param(self.dense_kernel())
        if self.kernel_axes is not None:
            made.set_metadata(AXES, self.kernel_axes)
        return made

    def as_linear(self) -> nnx.Linear:
        """The layer as an `nnx.Linear`, which holds the weight as one array."""
        inputs, outputs = self.kernel_shape[-2:]
        options = {"use_bias": self.bias is not None, "dtype": self.dtype, "param_dtype": self.dtype}
        # Of one input, for its arrays are replaced.
        made = nnx.Linear(1, outputs, rngs=nnx.Rngs(0), **options)
        made.in_features, made.kernel = inputs, self.kernel
        if self.bias is not None:
            made.bias = self.bias
        return made


class StoredEmbedding(nnx.Module):
    """A table of vectors that is held in another form than one array, in the place of an `Embedding`, and a site like one.

    A subclass computes `__call__`, (rows, length) int32 -> (rows, length, width), without making the table as a whole.

    Attributes:
        dtype: of the vectors.
    """

    dtype: Any

    def projection(self) -> Callable[[Array], Array]:
        """(..., width) -> (..., rows): the product with every row. On a mesh the table is gathered when this is called."""
        raise NotImplementedError

    @property
    def embedding_shape(self) -> tuple[int, ...]:
        """(rows, width)."""
        raise NotImplementedError

    @property
    def embedding_axes(self) -> tuple[str | None, ...] | None:
        """The table's logical axes; None where they have no names."""
        raise NotImplementedError

    def dense_embedding(self) -> Array:
        """The table as one array: made when it is asked for, and not kept."""
        raise NotImplementedError

    @property
    def embedding(self) -> nnx.Param:
        """The table, as an `Embedding` has it. What is set in it changes nothing: merge into `as_embedding`."""
        made = nnx.Param(self.dense_embedding())
        if self.embedding_axes is not None:
            made.set_metadata(AXES, self.embedding_axes)
        return made

    def as_embedding(self) -> Embedding:
        """An `Embedding` that holds the table as one array."""
        made = Embedding(1, self.embedding_shape[1], dtype=self.dtype, param_dtype=self.dtype, rngs=nnx.Rngs(0))
        made.num_embeddings, made.embedding = self.embedding_shape[0], self.embedding
        return made


Stored = StoredLinear | StoredEmbedding


def weight_axes(module: Any, weight: str) -> tuple[str | None, ...] | None:
    """The logical axes of a module's weight, which is not made for it where it is not one array."""
    return getattr(module, f"{weight}_axes") if isinstance(module, Stored) else getattr(module, weight).get_metadata().get(AXES)


def weight_shape(module: Any, weight: str) -> tuple[int, ...]:
    """The shape of a module's weight, likewise."""
    return getattr(module, f"{weight}_shape") if isinstance(module, Stored) else getattr(module, weight).shape


def put(model: Any, path: Sequence[Any], module: nnx.Module) -> None:
    """Puts a module where another stands in a model."""
    owner = model
    for part in path[:-1]:
        owner = owner[part] if isinstance(part, int) else getattr(owner, part)
    if isinstance(path[-1], int):
        owner[path[-1]] = module
    else:
        setattr(owner, path[-1], module)


def dense(module: Any) -> Any:
    """A module that holds its weight as one array, in place of one that does not; any other as it is."""
    return (
        module.as_embedding() if isinstance(module, StoredEmbedding) else module.as_linear() if isinstance(module, StoredLinear) else module
    )
