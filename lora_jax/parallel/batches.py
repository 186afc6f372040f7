"""Batches onto the mesh: every process holds the same batch on its host and feeds the rows that lie on its own devices.

A batch's targets, sorted by the devices that hold their rows, so that each computes its own targets' losses and moves nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .constraints import by_rows, row_groups
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


Batch = dict[str, jax.Array]


def targets_by_rows(batch: Batch) -> Batch:
    """The batch with its target arrays sorted by group of rows; itself where the rows are in one group, as on one device.

    Every group has room for as many targets as there can be in its rows, but for no more than there are in all. What is left over
    is filler: weight 0, at the group's first position.

    Args:
        batch: one micro-batch. A position has at most one target.

    Returns:
        `target_index`, `target_ids`, `target_weights` (and `target_values`, where there are any) of shape (groups * room, ...), the
        first `room` of them of the first group, and so on; `example_ids`, where there are any, renumbered to match; and
        `target_source`, which target each place holds, with their number for filler.
    """
    groups = row_groups()
    if groups == 1:
        return batch
    count, positions = batch["target_index"].shape[0], batch["tokens"].size // groups
    room = min(count, positions)
    group = jnp.where(batch["target_weights"] > 0, batch["target_index"] // positions, groups)
    # (groups, room): which target each place gets; `count`, which is none, for filler.
    source = jax.vmap(lambda g: jnp.nonzero(group == g, size=room, fill_value=count)[0])(jnp.arange(groups)).reshape(-1)
    first = jnp.repeat(jnp.arange(groups, dtype=jnp.int32) * positions, room)
    moved = {
        "target_index": jnp.where(source < count, batch["target_index"].at[source].get(mode="fill", fill_value=0), first),
        "target_ids": batch["target_ids"].at[source].get(mode="fill", fill_value=0),
        "target_weights": batch["target_weights"].at[source].get(mode="fill", fill_value=0),
    }
    if "target_values" in batch:
        moved["target_values"] = batch["target_values"].at[source].get(mode="fill", fill_value=0)
    out = batch | {name: by_rows(a) for name, a in moved.items()} | {"target_source": source}
    if "example_ids" in batch:
        places = jnp.full(count + 1, groups * room, jnp.int32).at[source].set(jnp.arange(groups * room, dtype=jnp.int32))
        out["example_ids"] = by_rows(places.at[count].set(groups * room)[batch["example_ids"]])
    return out


def in_order(batch: Batch, answers: jax.Array, count: int) -> jax.Array:
    """Answers at the targets of `targets_by_rows`, (n, ...), to the `count` targets that the batch had before, in their order."""
    if "target_source" not in batch:
        return answers
    return jnp.zeros((count, *answers.shape[1:]), answers.dtype).at[batch["target_source"]].set(answers, mode="drop")
