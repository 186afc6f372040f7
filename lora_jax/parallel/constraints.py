"""Where a running model's arrays lie, so that a compiled step moves what is meant to be moved and nothing else.

A step on a mesh is fully sharded data parallelism: each device works on its own rows of the batch, with one layer's weights
gathered at a time, and what is added up over the devices is gradients of what trains. Left alone, the compiler may as well keep
a weight cut up and add up activations. The functions here change nothing unless a step is being traced for several devices
(`on_mesh`), so that the program for one device has no trace of them. Under `jax.vmap` over members they need
`spmd_axis_name="sweep"`. Every process holds the same batch on its host and feeds the rows that lie on its own devices; a batch's
targets are sorted by the devices that hold their rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from .mesh import ROWS, gathered_sharding, parameter_sharding, replicated


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[object]:
    """What is traced inside is for this mesh: JAX's own ambient mesh, which it also tells traced functions apart by."""
    return contextlib.nullcontext() if mesh is None or mesh.size == 1 else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def _ambient() -> AbstractMesh | None:
    """The mesh that is traced for; None for one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def row_groups() -> int:
    """In how many groups, of equally many rows each, a batch is cut over the devices; 1 without a mesh."""
    mesh = _ambient()
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def weights_cut() -> bool:
    """Whether weights lie in pieces and are gathered where they are used."""
    mesh = _ambient()
    return mesh is not None and mesh.shape["fsdp"] > 1


def rows_shared() -> bool:
    """Whether devices share the outputs of a weight, each having its own."""
    mesh = _ambient()
    return mesh is not None and mesh.shape["tensor"] > 1


def looked_up(axes: Sequence[str | None] | None) -> bool:
    """Whether a parameter is a vocabulary's table of vectors: not gathered to be looked up, only to project to the vocabulary."""
    return axes is not None and axes[0] == "vocab"


def by_rows(x: jax.Array) -> jax.Array:
    """An activation whose first axis is rows, or runs through all rows: each device has its own group's."""
    mesh = _ambient()
    if mesh is None or x.shape[0] % row_groups():
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(ROWS)))


def gathered(weight: jax.Array, axes: Sequence[str | None] | None) -> jax.Array:
    """A weight about to be used: whole along `fsdp`. Its gradient is added up over the devices here.

    Args:
        weight: of any rank.
        axes: its logical axes; None where it has no names, and lies whole everywhere.
    """
    mesh = _ambient()
    if mesh is None or axes is None:
        return weight
    return jax.lax.with_sharding_constraint(weight, gathered_sharding(mesh, weight.shape, axes))


def look_up(table: jax.Array, axes: Sequence[str | None] | None, tokens: jax.Array) -> jax.Array:
    """`table[tokens]`: (rows, length) int32 -> (rows, length, width), each device its own rows.

    A table that is cut along its width stays where it is. Every device looks up all tokens in its own columns, then trades columns
    of all rows for all columns of its own: neither the table is gathered nor any activation added up, and the gradient of a table
    that trains stays with its columns.
    """
    mesh = _ambient()
    if mesh is None or axes is None or not looked_up(axes):
        return jnp.take(table, tokens, axis=0)
    at_rest = parameter_sharding(mesh, table.shape, axes)
    table = jax.lax.with_sharding_constraint(table, at_rest)
    if mesh.shape["fsdp"] == 1 or "fsdp" not in at_rest.spec:
        return by_rows(jnp.take(table, tokens, axis=0))

    def constrain(x: jax.Array, *parts: Any) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*parts)))

    rows = "data" if tokens.shape[0] % mesh.shape["data"] == 0 else None
    return by_rows(constrain(jnp.take(table, constrain(tokens, rows), axis=0), rows, None, "fsdp"))


def take_positions(x: jax.Array, index: jax.Array | None) -> jax.Array:
    """(rows, length, width) -> (n, width) at the flattened positions `index` (n,); x itself where `index` is None.

    Where the rows are cut into groups over a mesh, the first n / groups positions are in the first group, and so on.
    """
    if index is None:
        return x
    groups = row_groups()
    if groups == 1:
        return x.reshape(-1, x.shape[-1])[index]
    own = x.reshape(groups, -1, x.shape[-1])
    within = index.reshape(groups, -1) % own.shape[1]
    return by_rows(jax.vmap(lambda x, i: x[i])(own, within)).reshape(-1, x.shape[-1])


# Arrays of rows; the targets, which index all rows, are whole everywhere.
_OF_ROWS = frozenset({"tokens", "pixels", "segment_ids", "positions", "example_ids", "token_types"})
_OF_ROWS |= {f"decoder_{name}" for name in ("tokens", "segment_ids", "positions")}


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
        batch: one micro-batch. A position has at most one target. Arrays named `target_...` have an entry for each target.

    Returns:
        `target_index`, `target_ids`, `target_weights` and all others of the targets, of shape (groups * room, ...), the first `room` of
        them of the first group, and so on; `example_ids`, where there are any, renumbered to match; and `target_source`, which target
        each place holds, with their number for filler.
    """
    groups = row_groups()
    if groups == 1:
        return batch
    count, positions = batch["target_index"].shape[0], batch.get("decoder_segment_ids", batch["segment_ids"]).size // groups
    room = min(count, positions)
    group = jnp.where(batch["target_weights"] > 0, batch["target_index"] // positions, groups)
    # (groups, room): which target each place gets; `count`, which is none, for filler.
    source = jax.vmap(lambda g: jnp.nonzero(group == g, size=room, fill_value=count)[0])(jnp.arange(groups)).reshape(-1)
    first = jnp.repeat(jnp.arange(groups, dtype=jnp.int32) * positions, room)
    moved = {n: a.at[source].get(mode="fill", fill_value=0) for n, a in batch.items() if n.startswith("target_")}
    moved["target_index"] = jnp.where(source < count, moved["target_index"], first)
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
