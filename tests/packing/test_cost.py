"""What a pack is said to compute and take before it is there, against packs that are there."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from lora_jax.config.load import with_values
from lora_jax.packing.cost import MemoryLine, PackMemory, PackShapes
from lora_jax.packing.pack import Pack
from lora_jax.parallel.constraints import place_batch
from lora_jax.training.setup import set_up
from tests import tiny

pytestmark = pytest.mark.usefixtures("compile_cache")


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick_compile():
        yield


def size(tree):
    return sum(a.nbytes for a in jax.tree.leaves(tree))


def measured(setup, pack):
    """Bytes of a real pack's training program, and of the copy of its best arrays."""
    batch = place_batch(setup.mesh, setup.plan.batch(0), row_axis=1)
    trunk = setup.trunk(pack.part, 0)
    if trunk is not None:
        batch["trunk"] = trunk.of_step(0, batch)
    memory = pack.programs.train.lower(pack.state, pack.fixed, pack.part.frozen, batch, np.int32(0)).compile().memory_analysis()
    program = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    return program + size(pack.state.trainable)


@pytest.mark.long
@pytest.mark.parametrize("layers", [None, "last:1"])
def test_memory_of_packs_of_1_4_and_16_is_as_forecast(hub, tmp_path, layers):
    """The base once, and all else with the members: within a tenth."""
    config = hub.config(tmp_path, {"adapter.layers": layers, "adapter.targets": "all-linear", "adapter.rank": 8})
    setup = set_up(config)
    shapes = PackShapes(setup, [config])
    assert shapes.depth == (0 if layers is None else 2)
    line = shapes.memory_line(16)
    for members in (1, 4, 16):
        pack = Pack.build(setup.model, [config] * members, setup.steps, setup.mesh)
        real, told = measured(setup, pack), line.at(members)
        print({"layers": layers, "members": members, "forecast": told, "real": real, "forecast / real": told.total / real})
        assert told.total == pytest.approx(real, rel=0.1)
        assert told.base == size(pack.part.frozen)
        assert told.state >= members * 4 * size(pack.part.trainable)
    assert line.at(16).base == line.at(1).base
    limit = line.at(9).total
    assert line.fitting(limit, 16) == 9 and line.fitting(limit - 1, 16) == 8 and line.fitting(limit, 5) == 5
    assert line.fitting(line.at(1).total - 1, 16) == 0


def test_small_packs_are_no_measure_of_large_ones():
    small, four = PackMemory(100, 10, 8, 50), PackMemory(100, 10, 32, 400)
    line = MemoryLine((1, small), (4, four))
    assert line.at(1) == small and line.at(4) == four and line.at(2).activations == 167
    assert line.at(16) == PackMemory(100, 10, 128, 1600)  # not 400 + 12 * 350 / 3
    assert MemoryLine((1, small), (1, small)).at(1) == small
    even = MemoryLine((2, small), (8, four), unit=2)
    assert even.at(3) == even.at(4) and even.at(1) == small


@pytest.mark.slow
@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs the devices that tests/conftest.py makes")
def test_members_are_spread_over_the_mesh(hub, tmp_path):
    """On two devices of the `sweep` axis each holds half the members' state and the whole base."""
    config = hub.config(tmp_path, {"mesh": {"sweep": 2}})
    alone = PackShapes(set_up(hub.config(tmp_path)), [config]).memory(2)
    spread = PackShapes(set_up(config), [config]).memory(2)
    assert spread.base == alone.base and spread.state == pytest.approx(alone.state / 2, rel=0.01)
    assert spread.activations == pytest.approx(alone.activations / 2, rel=0.2)


@pytest.mark.slow
def test_flops_follow_ranks_and_layers(hub, tmp_path):
    config = hub.config(tmp_path, {"adapter.targets": "all-linear"})
    setup = set_up(config)

    def of(**changes):
        return PackShapes(setup, [with_values(config, {f"adapter.{k}": v for k, v in changes.items()})])

    two, four, eight = (of(rank=r).member_flops for r in (2, 4, 8))
    assert eight - four == 2 * (four - two) > 0
    low, high = of(layers=[0]), of(layers="last:1")
    assert low.shared_flops == 0 < high.shared_flops
    assert high.member_flops < 0.6 * low.member_flops
    own, shared = high.evaluation_flops
    assert 0 < own < low.evaluation_flops[0] and shared > 0
