"""The ways to run a pack: one program each, equal results; and how one of them is chosen."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.config.schema import MeshConfig
from lora_jax.errors import OutOfMemory
from lora_jax.packing import choice as pack_choice
from lora_jax.packing.choice import Choice, choose
from lora_jax.packing.execution import SCAN, VMAP, PackMode
from lora_jax.packing.pack import Pack
from lora_jax.parallel.constraints import place_batch
from lora_jax.parallel.mesh import make_mesh, to_host
from lora_jax.training.setup import place_model, set_up
from tests import tiny

pytestmark = pytest.mark.usefixtures("compile_cache")

STEPS = 6
MEMBERS = [
    {"adapter__rank": 2, "adapter__targets": ["q_proj"]},
    {"adapter__rank": 4, "adapter__targets": ["down_proj"], "adapter__layers": "last:1", "adapter__dropout": 0.2},
    {"adapter__rank": 3, "adapter__targets": ["q_proj", "down_proj"], "training__seed": 1, "optimizer__clip_norm": 0.5},
    {"adapter__rank": 1, "adapter__targets": ["q_proj"], "training__seed": 2, "optimizer__weight_decay": 0.1},
    {"adapter__rank": 4, "adapter__targets": ["q_proj"], "optimizer__schedule": "cosine"},
]


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick_compile():
        yield


def train(mode, mesh=None, count=5):
    """(state, losses, held-out sums, pack) of members run in a mode."""
    model = tiny.classifier(2)
    if mesh is not None:
        mesh = make_mesh(MeshConfig(**mesh))
        place_model(model, mesh)
    pack = Pack.build(model, [tiny.config(**{"optimizer__learning_rate": 2e-3} | m) for m in MEMBERS[:count]], STEPS, mesh, mode)
    state, losses = pack.state, []
    for step in range(STEPS):
        batch = tiny.batch(step % 2, micro=2)
        placed = batch if mesh is None else place_batch(mesh, batch, row_axis=1)
        state, metrics = pack.programs.train(state, pack.fixed, pack.part.frozen, placed, np.int32(step))
        losses.append(np.asarray(metrics.loss))
    held = {n: a[0] for n, a in tiny.batch(0, micro=2).items()}
    held = held if mesh is None else place_batch(mesh, held, row_axis=0)
    loss, right, *_ = pack.programs.evaluate(state.trainable, pack.fixed.settings, pack.part.frozen, held)
    pack.programs.check()
    assert pack.programs.train.traces.count == pack.programs.evaluate.traces.count == 1
    return jax.tree.map(to_host, state), np.stack(losses), np.stack([loss, right]), pack


@pytest.fixture(scope="module")
def side_by_side(quick, compile_cache):
    return train(VMAP)


def check_equal(ours, theirs):
    assert ours[1].shape == theirs[1].shape == (STEPS, 5)
    np.testing.assert_allclose(ours[1][0], theirs[1][0], rtol=1e-6)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-5)
    np.testing.assert_allclose(ours[2], theirs[2], rtol=1e-5)
    assert jax.tree.structure(ours[0]) == jax.tree.structure(theirs[0])
    for name, array in ours[0].trainable.items():
        assert tiny.relative(array, theirs[0].trainable[name]) < 1e-5, name
    assert np.ptp(ours[1][-1]) > 1e-3  # members differ


@pytest.mark.parametrize("mode", [SCAN, PackMode(2)], ids=lambda mode: mode.name)
def test_all_modes_give_equal_results(side_by_side, mode):
    """Five members in chunks of two: the last is filled up with one that does not count."""
    check_equal(train(mode), side_by_side)


@pytest.mark.slow
@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs the devices that tests/conftest.py makes")
@pytest.mark.parametrize(
    ("mode", "mesh"), [(SCAN, {"sweep": 2, "data": 2}), pytest.param(PackMode(2), {"sweep": 2, "tensor": 2}, marks=pytest.mark.long)]
)
def test_members_on_several_devices(side_by_side, mode, mesh):
    """Each device goes over its own share, and the state comes back as it lay."""
    ours = train(mode, mesh)
    check_equal(ours, side_by_side)
    assert all("sweep" not in str(a.sharding).split("spec=")[1] for a in ours[3].state.trainable.values())  # 5 members lie on all devices


def test_one_after_the_other_takes_the_activations_of_one(side_by_side):
    """Beyond the members' own state, which each mode must hold, scanning five takes about a fifth."""
    temps = []
    for pack in (side_by_side[3], train(SCAN)[3]):
        temps.append(pack.programs.train._compiled.memory_analysis().temp_size_in_bytes)
    state = sum(a.nbytes for a in jax.tree.leaves(side_by_side[0]))
    assert temps[1] - 2 * state < 0.35 * temps[0], (temps, state)


@pytest.fixture(scope="module")
def setup(hub, tmp_path_factory):
    return set_up(hub.config(tmp_path_factory.mktemp("choice"), {"training.steps": 300}))


class TestChoice:
    def _pack(self, setup, count=4, **values):
        changes = {"optimizer__learning_rate": 1e-3, "adapter__targets": ["q_proj"]} | values
        return Pack.build(setup.model, [tiny.config(training__seed=k, **changes) for k in range(count)], setup.steps, setup.mesh)

    @pytest.mark.parametrize(
        ("seconds", "chosen"),
        [((1.0, 0.95, 0.97), VMAP), ((1.0, 0.5, 0.8), PackMode(2)), ((1.0, 0.8, 0.5), SCAN), ((None, 0.5, 0.6), PackMode(2))],
    )
    def test_the_fastest_if_it_is_clearly_faster(self, setup, monkeypatch, seconds, chosen):
        """And what does not fit is passed over."""
        measured = dict(zip((VMAP, PackMode(2), SCAN), seconds, strict=True))

        def measure(pack, batch):
            took = measured[pack.programs.mode]
            if took is None:
                raise OutOfMemory("too large")
            return took

        monkeypatch.setattr(pack_choice, "_measure", measure)
        pack = self._pack(setup, training__chunk=2)
        choice = choose(pack, setup, None)
        assert choice.mode == pack.programs.mode == chosen
        assert choice.seconds == {m.name: s for m, s in measured.items() if s is not None}
        assert Choice.load(choice.dump()) == choice

    @pytest.mark.slow
    def test_measuring_leaves_the_state_alone_and_compiles_the_pack_once(self, setup):
        pack = self._pack(setup, count=2)
        before = jax.tree.map(np.asarray, pack.state)
        choice = choose(pack, setup, None)
        assert set(choice.seconds) == {"vmap", "scan"} and all(s > 0 for s in choice.seconds.values()) and choice.why == "measured"
        assert tiny.arrays_equal(before, pack.state)
        batch = pack_choice.first_batch(pack, setup, None)
        pack.programs.train(jax.tree.map(jnp.copy, pack.state), pack.fixed, pack.part.frozen, batch, np.int32(0))
        assert pack.programs.train.traces.count == 1

    def test_what_is_not_measured(self, hub, tmp_path, setup, monkeypatch):
        monkeypatch.setattr(pack_choice, "_measure", None)
        assert choose(self._pack(setup, count=1), setup, None).mode == VMAP
        short = set_up(hub.config(tmp_path))
        chosen = choose(self._pack(short), short, None)
        assert chosen.mode == VMAP and "too short" in chosen.why
        monkeypatch.setattr(pack_choice, "_BUSY_CPU", 1)
        chosen = choose(self._pack(short), short, None)
        assert chosen.mode == SCAN and "keeps the CPU busy" in chosen.why


@pytest.mark.parametrize("mode", [VMAP, SCAN, PackMode(2)])
def test_a_member_may_have_empty_arrays(mode):
    """LoKr has none of the factors it does without: arrays of no numbers, which are cut into rounds as others are."""
    tree = {"b": jnp.arange(15.0).reshape(5, 3), "none": jnp.zeros((5, 0, 4))}
    done = mode.over_members(lambda member: {"b": member["b"] * 2, "none": member["none"] + 1}, None, None)(tree)
    np.testing.assert_array_equal(done["b"], tree["b"] * 2)
    assert done["none"].shape == (5, 0, 4)
