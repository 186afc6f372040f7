"""What is common to a pack: found by what trains, computed once, and not differentiated."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from lora_jax.config.schema import MeshConfig
from lora_jax.packing.pack import Pack
from lora_jax.parallel.constraints import place_batch
from lora_jax.parallel.mesh import make_mesh
from lora_jax.training.setup import place_model
from lora_jax.training.trunk import Trunk, trunk_depth
from tests import tiny

pytestmark = pytest.mark.usefixtures("compile_cache")


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick_compile():
        yield


def _micro(causal=False):
    return {name: array[0] for name, array in tiny.batch(causal=causal).items()}


def _depth(model, *members):
    pack = Pack.build(model, [tiny.config(**m) for m in members], 10)
    return trunk_depth(pack.part, _micro(model.base.is_decoder))


def test_how_much_is_common_follows_from_what_trains():
    top = {"adapter__targets": ["q_proj"], "adapter__layers": "last:2"}
    assert _depth(tiny.classifier(4), top) == 2
    assert _depth(tiny.language_model(4), top, top | {"adapter__layers": [1, 3]}) == 1
    assert _depth(tiny.language_model(4), top | {"adapter__dropout": 0.5}) == 2
    assert _depth(tiny.classifier(4), top | {"adapter__modules_to_save": ["pooler"]}) == 2
    assert _depth(tiny.classifier(4), {"adapter__method": "head"}) == 3


def test_nothing_is_common_where_a_lower_layer_trains():
    top = {"adapter__targets": ["q_proj"], "adapter__layers": "last:2"}
    nothing = [
        {"adapter__targets": ["q_proj"]},
        {"adapter__method": "full"},
        top | {"adapter__bias": "all"},
        top | {"adapter__bias": "lora_only"},
        top | {"adapter__modules_to_save": ["attn_norm"]},
        top | {"adapter__modules_to_save": ["embed_norm"]},
    ]
    assert [_depth(tiny.classifier(4), member) for member in nothing] == [0] * len(nothing)
    # A tied embedding trains from both ends.
    assert _depth(tiny.language_model(4), {"adapter__targets": r".*(embed|layers\.3\..*q_proj)"}) == 0


@pytest.mark.slow
def test_a_step_from_the_trunk():
    """Same losses and gradients; no layer below is in the step, nor does their cost grow with the pack."""
    model, batch = tiny.classifier(6), tiny.batch(micro=2)
    members = [tiny.config(adapter__targets=["q_proj"], adapter__layers="last:1", training__seed=k) for k in range(4)]
    mesh = make_mesh(MeshConfig())
    place_model(model, mesh)

    packs = {count: Pack.build(model, members[:count], 10, mesh) for count in (1, 4)}
    pack = packs[4]
    trunk = Trunk(pack.part, trunk_depth(pack.part, _micro()), 0, mesh)
    assert trunk.depth == 5
    placed = place_batch(mesh, batch, row_axis=1)
    common = trunk.of_step(0, placed)
    assert common.shape == (2, 4, 12, tiny.WIDTH)

    def arguments(pack, batch):
        return pack.state, pack.fixed, pack.part.frozen, batch, np.int32(0)

    def flops(pack, batch):
        return jax.jit(pack.programs.train.traces.function).lower(*arguments(pack, batch)).cost_analysis()["flops"]

    # XLA counts a scanned body once: one layer below, forward alone, and the same for one member and four.
    below = [flops(p, placed) - flops(p, placed | {"trunk": common}) for p in packs.values()]
    tokens, layer = 4 * 12, 8 * tiny.WIDTH**2  # four projections, and an MLP of twice the width
    assert 2 * tokens * layer < below[0] < 4 * tokens * layer and below[1] == pytest.approx(below[0], rel=0.01)
    # Of what is below nothing is read: only the top layer is there.
    step = pack.programs.train.traces.function
    assert "length=5" in str(jax.make_jaxpr(step)(*arguments(pack, placed)))
    assert "length=5" not in str(jax.make_jaxpr(step)(*arguments(pack, placed | {"trunk": common})))

    held = {name: array[0] for name, array in placed.items()}

    def evaluated(programs, batch):
        return np.asarray(programs.evaluate(pack.state.trainable, pack.fixed.settings, pack.part.frozen, batch)[0])

    other = Pack.build(model, members, 10, mesh)
    whole, apart = evaluated(pack.programs, held), evaluated(other.programs, held | {"trunk": trunk.of_held_out(held)})
    np.testing.assert_allclose(apart, whole, rtol=1e-6)
    _, metrics = pack.programs.train(*arguments(pack, placed))
    _, from_trunk = other.programs.train(*arguments(other, placed | {"trunk": common}))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), from_trunk, metrics)


@pytest.mark.long
def test_dropout_of_the_base_is_that_of_the_step():
    """The trunk drops what the step would drop; in an evaluation nothing is dropped."""
    model = tiny.classifier(3)
    model.base.dropout = 0.3
    batch = tiny.batch(micro=2)
    config = tiny.config(adapter__targets=["q_proj"], adapter__layers="last:1")
    pack, other = (Pack.build(model, [config], 10) for _ in range(2))
    trunk = Trunk(pack.part, 2, 0, make_mesh(MeshConfig()))
    common = trunk.of_step(3, batch)

    def loss(pack, **more):
        return float(pack.programs.train(pack.state, pack.fixed, pack.part.frozen, batch | more, np.int32(3))[1].loss[0])

    assert loss(pack, trunk=common) == pytest.approx(loss(other), rel=1e-5)
    assert np.abs(np.asarray(trunk.of_step(4, batch)) - np.asarray(common)).max() > 0.1
    held = trunk.of_held_out({name: array[0] for name, array in batch.items()})
    assert np.abs(np.asarray(held) - np.asarray(common)[0]).max() > 0.1
    model.base.dropout = 0.0
    undropped = Trunk(Pack.build(model, [config], 10).part, 2, 0, make_mesh(MeshConfig())).of_step(0, batch)
    np.testing.assert_allclose(held, np.asarray(undropped)[0], rtol=1e-4, atol=1e-5)
