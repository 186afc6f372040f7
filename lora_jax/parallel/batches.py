"""Batches onto the mesh: every process holds the same batch on its host and feeds the rows that lie on its own devices."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .mesh import ROWS, replicated

# Arrays of rows; the targets, which index all rows, are whole everywhere.
_OF_ROWS = frozenset({"tokens", "segment_ids", "positions", "example_ids", "token_types"})


def place_batch(mesh: Mesh, batch: Mapping[str, np.ndarray], *, row_axis: int) -> dict[str, jax.Array]:
    """A batch on the mesh, its rows along `data` and `fsdp`.

    Which rows a device gets follows from its place on the mesh, so the order of the data is the same for any number of processes.

    Args:
        mesh: of this process's devices, or of those of all processes.
        batch: name -> array, equal in all processes; only what lies on this process's devices leaves its host.
        row_axis: which axis of the arrays of rows counts them.
    """
    return {name: _placed(array, row_sharding(mesh, row_axis) if name in _OF_ROWS else replicated(mesh)) for name, array in batch.items()}


def row_sharding(mesh: Mesh, row_axis: int) -> NamedSharding:
    """Where an array lies whose axis `row_axis` counts a batch's rows."""
    return NamedSharding(mesh, PartitionSpec(*[None] * row_axis, ROWS))


def _placed(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    # device_put would first send the whole array around, to see that it is equal in all processes.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
