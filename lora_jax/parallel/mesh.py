"""The device mesh, and where each array lies on it.

Sharding is data, not code: arrays are placed once, by the logical axis names of the parameters and one table of rules. What the
compiled step needs to be told besides is in `constraints.py`. One device is the mesh of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ..config.schema import MeshConfig
from ..errors import InputError

# An abstract one has sizes and no devices: enough to say where things would lie.
AnyMesh = Mesh | AbstractMesh

# Outermost first: neighbours in a mesh are those that talk most. Members of a sweep never talk.
AXES = ("sweep", "data", "fsdp", "tensor")

# What a batch's rows are cut over.
ROWS = ("data", "fsdp")

# Logical axis -> mesh axis. A parameter axis whose size a mesh axis does not divide stays whole.
RULES: dict[str, str | None] = {
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "experts": None,
    "embed": "fsdp",
    "embed_out": None,
    "positions": None,
    "norm": "fsdp",
    "classes": None,
    "layers": None,
}


def mesh_sizes(config: MeshConfig, devices: int) -> tuple[int, ...]:
    """How many devices the config asks for along each of `AXES`, with -1 worked out.

    Raises:
        InputError: the other axes do not divide the devices, so that -1 has no value.
    """
    sizes = [getattr(config, axis) for axis in AXES]
    known = int(np.prod([s for s in sizes if s != -1]))
    if -1 in sizes:
        if devices % known:
            raise InputError(f"mesh: {known} does not divide the {devices} devices, so -1 has no value.")
        sizes[sizes.index(-1)] = devices // known
    return tuple(sizes)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh a config asks for, over the first devices there are.

    Raises:
        InputError: more devices asked for than there are, a number that does not divide them, or too few for the processes.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(config, len(devices))
    wanted = int(np.prod(sizes))
    shape = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True) if size > 1 or axis in ROWS)
    if wanted > len(devices):
        raise InputError(f"mesh: {shape} needs {wanted} devices, but only {len(devices)} {'is' if len(devices) == 1 else 'are'} available.")
    if wanted < len(devices) and len({d.process_index for d in devices}) > 1:
        raise InputError(f"mesh: {shape} uses {wanted} devices, but the processes have {len(devices)}, and all of them must be used.")
    return Mesh(mesh_utils.create_device_mesh(sizes, devices[:wanted], allow_split_physical_axes=True), AXES)


def parameter_sharding(mesh: AnyMesh, shape: tuple[int, ...], axes: Sequence[str | None]) -> NamedSharding:
    """Where a parameter with these logical axes (None: no name) lies while it is not in use.

    What the table leaves whole along `fsdp` (a bias of hidden units, a width that the devices do not divide) is cut along its last
    axis that can be: a base is then spread evenly, whatever its sizes. The rows of a table of vectors are not: looking them up
    would add up activations over the devices.

    Raises:
        KeyError: an axis has no rule.
    """
    parts = _by_table(mesh, shape, axes)
    size = mesh.shape["fsdp"]
    if size > 1 and "fsdp" not in parts:
        for at in reversed(range(len(shape))):
            cut = 1 if parts[at] is None else mesh.shape[parts[at]]
            if axes[at] not in (None, "layers", "vocab", "positions") and shape[at] % (cut * size) == 0:
                return NamedSharding(mesh, PartitionSpec(*parts[:at], "fsdp" if cut == 1 else (parts[at], "fsdp"), *parts[at + 1 :]))
    return NamedSharding(mesh, PartitionSpec(*parts))


def gathered_sharding(mesh: AnyMesh, shape: tuple[int, ...], axes: Sequence[str | None]) -> NamedSharding:
    """Where a parameter lies while it is in use: cut over `tensor` alone."""
    return NamedSharding(mesh, PartitionSpec(*(None if part == "fsdp" else part for part in _by_table(mesh, shape, axes))))


def _by_table(mesh: AnyMesh, shape: tuple[int, ...], axes: Sequence[str | None]) -> list[str | None]:
    targets = [None if axis is None else RULES[axis] for axis in axes]
    return [t if t is not None and size % mesh.shape[t] == 0 else None for size, t in zip(shape, targets, strict=True)]


def replicated(mesh: Mesh) -> NamedSharding:
    """On every device, whole."""
    return NamedSharding(mesh, PartitionSpec())


def place(array: Any, sharding: NamedSharding) -> jax.Array:
    """An array that every process holds alike, cut up over the mesh; one that lies there already, as it is.

    Args:
        array: NumPy or JAX, PRNG keys too.
    """
    if isinstance(array, jax.Array) and array.sharding == sharding:
        return array
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(place(jax.random.key_data(array), sharding), impl=jax.random.key_impl(array))
    host = to_host(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def to_host(array: Any) -> np.ndarray:
    """The whole array in host memory. Where its parts lie with several processes, each of them has to call this."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)
