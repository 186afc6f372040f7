"""The mesh a config asks for, and where the table of rules puts parameters on it."""

from __future__ import annotations

import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lora_jax.config.schema import MeshConfig
from lora_jax.errors import InputError
from lora_jax.parallel.mesh import gathered_sharding, make_mesh, parameter_sharding, place, replicated, to_host

needs_eight = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs the eight CPU devices that tests/conftest.py makes")


@needs_eight
@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (1, 1, 1, 1)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (1, 2, 2, 2)),
        ({"data": -1}, (1, 8, 1, 1)),
        ({"data": 2, "fsdp": -1, "tensor": 2}, (1, 2, 2, 2)),
        ({"fsdp": 3}, (1, 1, 3, 1)),
        ({"fsdp": 2, "tensor": -1}, (1, 1, 2, 4)),
        ({"sweep": -1, "data": 2}, (4, 2, 1, 1)),
    ],
)
def test_shapes(sizes, shape):
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[:8])
    assert mesh.axis_names == ("sweep", "data", "fsdp", "tensor") and tuple(mesh.shape.values()) == shape


def test_more_devices_than_there_are():
    with pytest.raises(InputError, match="data 3 x fsdp 1 needs 3 devices, but only 2 are available"):
        make_mesh(MeshConfig(data=3), jax.devices()[:1] * 2)
    with pytest.raises(InputError, match="mesh: 3 does not divide the 2 devices"):
        make_mesh(MeshConfig(data=-1, tensor=3), jax.devices()[:1] * 2)


def test_every_process_takes_part():
    devices = [types.SimpleNamespace(process_index=i // 2) for i in range(4)]
    with pytest.raises(InputError, match="data 2 x fsdp 1 uses 2 devices, but the processes have 4"):
        make_mesh(MeshConfig(data=2), devices)


@needs_eight
def test_where_parameters_lie():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert parameter_sharding(mesh, (3, 32, 64), ("layers", "embed", "mlp")).spec == P(None, "fsdp", "tensor")
    assert parameter_sharding(mesh, (3, 32, 64), ("layers", "heads", "embed")).spec == P(None, "tensor", "fsdp")
    assert parameter_sharding(mesh, (31, 32), ("vocab", "embed")).spec == P(None, "fsdp")  # 31 rows cannot be halved
    assert parameter_sharding(mesh, (32,), (None,)).spec == P(None)
    # Nothing is left whole along fsdp that some axis would let be cut, but for the rows of a table.
    assert parameter_sharding(mesh, (3, 64), ("layers", "mlp")).spec == P(None, ("tensor", "fsdp"))
    assert parameter_sharding(mesh, (3, 31, 64), ("layers", "embed", "mlp")).spec == P(None, None, ("tensor", "fsdp"))
    assert parameter_sharding(mesh, (32, 31), ("vocab", "embed")).spec == P("tensor", None)
    assert gathered_sharding(mesh, (64,), ("mlp",)).spec == P("tensor")
    assert gathered_sharding(mesh, (32, 64), ("embed", "mlp")).spec == P(None, "tensor")
    with pytest.raises(KeyError):
        parameter_sharding(mesh, (3,), ("embde",))


def test_every_axis_of_the_models_has_a_rule(hub):
    from flax import nnx

    from lora_jax.models.layers import AXES
    from lora_jax.models.load import load_model
    from lora_jax.parallel.mesh import RULES

    for source in (hub.bert, hub.llama):
        variables = [v for _, v in nnx.iter_graph(load_model(str(source))) if isinstance(v, nnx.Variable)]
        named = {a for v in variables for a in v.get_metadata().get(AXES, ()) if a is not None}
        assert named and named <= set(RULES)
        assert all(len(v.get_metadata()[AXES]) == v.ndim for v in variables if AXES in v.get_metadata() and v.ndim > 1)


@needs_eight
def test_keys_and_arrays_are_placed():
    mesh = make_mesh(MeshConfig(data=8))
    sharding = parameter_sharding(mesh, (8,), (None,))
    keys = place(jax.random.split(jax.random.key(0), 8), sharding)
    assert keys.sharding == sharding and place(keys, sharding) is keys
    np.testing.assert_array_equal(to_host(place(np.arange(8), replicated(mesh))), np.arange(8))
