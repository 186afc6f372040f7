"""Where a pack's arrays lie on a mesh: everything follows from the weight at a site.

A's input axis lies as its weight's input axis does, B's output axis as its weight's output axis; the rank is whole everywhere. A
trained weight of the base lies where it lay before. Optimizer state follows the array it belongs to. All of them have the
members in front, along the mesh's `sweep` axis; members that it does not divide lie on all of its devices, and a step adds
members that do not count (`even_members`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..parallel.mesh import AnyMesh, parameter_sharding, place
from .partition import Partition


def trainable_spec(part: Partition, name: str, mesh: AnyMesh) -> PartitionSpec:
    """How one member's trainable array lies; whole everywhere where its axes have no names.

    Args:
        part: `name` is one of `part.trainable`.
    """
    array, axes = part.trainable[name], part.axes.get(name)
    if axes is None:
        return PartitionSpec(*[None] * array.ndim)
    site, _, factor = name.rpartition(".")
    if factor not in ("lora_a", "lora_b"):
        return parameter_sharding(mesh, array.shape, axes).spec
    whole = part.frozen | part.trainable
    weight = next(n for n in (f"{site}.kernel", f"{site}.embedding") if n in whole)
    *_, inputs, outputs = parameter_sharding(mesh, whole[weight].shape, part.axes[weight]).spec
    lead = [None] * (array.ndim - 2)
    return PartitionSpec(*lead, inputs, None) if factor == "lora_a" else PartitionSpec(*lead, None, outputs)


def member_shardings(part: Partition, mesh: Mesh, tree: Any) -> Any:
    """A sharding for each leaf of a tree of stacked arrays, (members, ...).

    Args:
        tree: of arrays or shapes. A leaf below a trainable array's name, and of its shape, follows that array; others are only cut
            along the members.
    """
    specs = {name: trainable_spec(part, name, mesh) for name in part.trainable}

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        keys = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
        name = next((k for k in reversed(keys) if k in specs), None)
        members = None if leaf.shape[0] % mesh.shape["sweep"] else "sweep"
        if name is None or leaf.shape[1:] != part.trainable[name].shape:
            return NamedSharding(mesh, PartitionSpec(members))
        return NamedSharding(mesh, PartitionSpec(members, *specs[name]))

    return jax.tree_util.tree_map_with_path(one, tree)


def even_members(part: Partition, mesh: Mesh | None, tree: Any, count: int) -> Any:
    """Inside a compiled program: stacked arrays with the last member repeated until there are `count`.

    Each device then computes its share of them. Nobody outside the program knows of the repeated ones: it drops their results.
    """
    missing = count - len(jax.tree.leaves(tree)[0])
    if not missing:
        return tree
    padded = jax.tree.map(lambda a: jnp.concatenate([a, *[a[-1:]] * missing]), tree)
    return padded if mesh is None else jax.lax.with_sharding_constraint(padded, member_shardings(part, mesh, padded))


def stack_members(part: Partition, mesh: Mesh | None, members: Sequence[Any]) -> Any:
    """Equal trees, one a member, as one tree of stacked arrays, each of them on the mesh.

    What was drawn on the host is stacked there: one transfer, and nothing to compile for each new shape. Weights of the base lie on
    the mesh already, no process need have all of one, and they are stacked where they are.
    """
    if mesh is None:
        return jax.tree.map(lambda *arrays: _host_stack(arrays), *members)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct((len(members), *np.shape(a)), a.dtype), members[0])

    def one(sharding: NamedSharding, *arrays: Any) -> jax.Array:
        if all(isinstance(a, jax.Array) and len(a.sharding.device_set) > 1 for a in arrays):
            return jax.jit(lambda *a: jnp.stack(a), out_shardings=sharding)(*arrays)
        return place(_host_stack(arrays), sharding)

    return jax.tree.map(one, member_shardings(part, mesh, shapes), *members)


def _host_stack(arrays: Sequence[Any]) -> Any:
    if jnp.issubdtype(arrays[0].dtype, jax.dtypes.prng_key):
        return jnp.stack(arrays)
    return jnp.asarray(np.stack([np.asarray(a) for a in arrays]))
