"""The device mesh, and where each array lies on it.

Sharding is data, not code: arrays are placed once, by the logical axis names of the parameters and one table of rules, and the
compiled step follows its inputs. One device is the mesh of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..config.errors import InputError
from ..config.schema import MeshConfig

AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axis. A parameter axis whose size a mesh axis does not divide stays whole.
RULES: dict[str, str | None] = {
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "embed": "fsdp",
    "embed_out": None,
    "positions": None,
    "norm": None,
    "classes": None,
    "layers": None,
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh a config asks for, over the first devices there are.

    Raises:
        InputError: more devices asked for than there are, or a number that does not divide them.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [getattr(config, axis) for axis in AXES]
    known = int(np.prod([s for s in sizes if s != -1]))
    if -1 in sizes:
        if len(devices) % known:
            raise InputError(f"mesh: {known} does not divide the {len(devices)} devices, so -1 has no value.")
        sizes[sizes.index(-1)] = len(devices) // known
    wanted = int(np.prod(sizes))
    if wanted > len(devices):
        shape = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
        raise InputError(f"mesh: {shape} needs {wanted} devices, and there are {len(devices)}.")
    return Mesh(np.array(devices[:wanted]).reshape(sizes), AXES)


def parameter_sharding(mesh: Mesh, shape: tuple[int, ...], axes: Sequence[str | None]) -> NamedSharding:
    """Where a parameter with these logical axes (None: no name) lies.

    Raises:
        KeyError: an axis has no rule.
    """
    parts = []
    for size, axis in zip(shape, axes, strict=True):
        target = None if axis is None else RULES[axis]
        parts.append(target if target is not None and size % mesh.shape[target] == 0 else None)
    return NamedSharding(mesh, PartitionSpec(*parts))


def replicated(mesh: Mesh) -> NamedSharding:
    """On every device, whole: adapters and optimizer state, which are small."""
    return NamedSharding(mesh, PartitionSpec())
