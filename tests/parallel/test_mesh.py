"""Meshes over eight simulated devices: the same losses as on one, with the base really cut up."""

from __future__ import annotations

import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lora_jax.config.errors import InputError
from lora_jax.config.schema import MeshConfig
from lora_jax.parallel.batches import place_batch
from lora_jax.parallel.mesh import make_mesh, parameter_sharding, replicated
from lora_jax.training.loop import train_pack
from lora_jax.training.pack import Pack
from lora_jax.training.setup import set_up

needs_eight = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs the eight CPU devices that tests/conftest.py makes")


@needs_eight
@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((1, 1, 1), (1, 1, 1)),
        ((2, 2, 2), (2, 2, 2)),
        ((-1, 1, 1), (8, 1, 1)),
        ((2, -1, 2), (2, 2, 2)),
        ((1, 3, 1), (1, 3, 1)),
        ((1, 2, -1), (1, 2, 4)),
    ],
)
def test_shapes(sizes, shape):
    mesh = make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]), jax.devices()[:8])
    assert tuple(mesh.shape.values()) == shape and mesh.axis_names == ("data", "fsdp", "tensor")


def test_more_devices_than_there_are():
    with pytest.raises(InputError, match="data 3 x fsdp 1 x tensor 1 needs 3 devices, and there are 2"):
        make_mesh(MeshConfig(data=3), jax.devices()[:1] * 2)
    with pytest.raises(InputError, match="mesh: 3 does not divide the 2 devices"):
        make_mesh(MeshConfig(data=-1, tensor=3), jax.devices()[:1] * 2)


@needs_eight
def test_where_parameters_lie():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert parameter_sharding(mesh, (3, 32, 64), ("layers", "embed", "mlp")).spec == P(None, "fsdp", "tensor")
    assert parameter_sharding(mesh, (3, 32, 64), ("layers", "heads", "embed")).spec == P(None, "tensor", "fsdp")
    assert parameter_sharding(mesh, (31, 32), ("vocab", "embed")).spec == P(None, "fsdp")  # 31 rows cannot be halved
    assert parameter_sharding(mesh, (32,), (None,)).spec == P(None)
    with pytest.raises(KeyError):
        parameter_sharding(mesh, (3,), ("embde",))


def test_every_axis_of_the_models_has_a_rule(hub):
    from flax import nnx

    from lora_jax.models.loading import load_model
    from lora_jax.models.stack import AXES
    from lora_jax.parallel.mesh import RULES

    for source in (hub.bert, hub.llama):
        variables = [v for _, v in nnx.iter_graph(load_model(str(source))) if isinstance(v, nnx.Variable)]
        named = {a for v in variables for a in v.get_metadata().get(AXES, ()) if a is not None}
        assert named and named <= set(RULES)
        assert all(len(v.get_metadata()[AXES]) == v.ndim for v in variables if AXES in v.get_metadata() and v.ndim > 1)


@needs_eight
def test_rows_are_shared_and_targets_are_whole():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2))
    placed = place_batch(mesh, {"tokens": np.zeros((1, 8, 6), np.int32), "target_index": np.zeros((1, 5), np.int32)}, row_axis=1)
    assert {s.data.shape for s in placed["tokens"].addressable_shards} == {(1, 2, 6)}
    assert placed["target_index"].sharding == replicated(mesh)


def run(hub, folder, mesh, steps=10):
    """(losses of the steps, held-out loss, the pack) of two members with the base on a mesh."""
    changes = {
        "mesh": mesh,
        "training.steps": steps,
        "training.batch_size": 16,
        "adapter.targets": ["q_proj", "down_proj"],
        "task.eval_size": 16,
    }
    config = hub.config(folder, changes)
    other = config.model_copy(update={"adapter": config.adapter.model_copy(update={"rank": 3})})
    setup = set_up(config)
    pack = Pack.build(setup.model, [config, other], setup.steps, setup.mesh)
    losses = []
    listener = types.SimpleNamespace(
        on_train=lambda step, metrics, speed: losses.append(metrics["loss"]), on_eval=lambda step, metrics: None
    )
    outcome = train_pack(pack, setup, eval_every=5, log_every=1, listener=listener)
    return np.stack(losses), outcome.final["loss"], pack


@pytest.fixture(scope="module")
def one_device(hub, tmp_path_factory, compile_cache):
    return run(hub, tmp_path_factory.mktemp("one"), {})


@needs_eight
@pytest.mark.parametrize("mesh", [{"data": 2, "fsdp": 2, "tensor": 2}, pytest.param({"fsdp": 4}, marks=pytest.mark.slow)])
def test_the_mesh_is_invisible(hub, tmp_path, one_device, mesh):
    losses, held_out, pack = run(hub, tmp_path, mesh)
    np.testing.assert_allclose(losses, one_device[0], rtol=1e-5)
    np.testing.assert_allclose(held_out, one_device[1], rtol=1e-5)
    assert np.ptp(losses[-1]) > 1e-4 and np.ptp(losses) > 0.03  # members and steps differ, so that equal losses say something
    # Compiled once: the state came back in the layout in which it went in.
    assert pack.programs.train.traces.count == 1 and pack.programs.evaluate.traces.count == 1
    # The base is cut up, and no device holds all of it.
    fsdp, tensor = mesh["fsdp"], mesh.get("tensor", 1)
    kernel = next(a for n, a in pack.part.frozen.items() if n.endswith("mlp.up_proj.kernel"))
    assert kernel.shape == (3, 32, 64)
    assert {s.data.shape for s in kernel.addressable_shards} == {(3, 32 // fsdp, 64 // tensor)}
    total = sum(a.nbytes for a in pack.part.frozen.values())
    largest = max(
        sum(s.data.nbytes for a in pack.part.frozen.values() for s in a.addressable_shards if s.device == device)
        for device in jax.devices()[:4]
    )
    assert largest < 1.3 * total / (fsdp * tensor)
