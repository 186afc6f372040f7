"""A pack on eight simulated devices: the same losses as on one, and a compiled step that moves what it must and no more."""

from __future__ import annotations

import functools
import types

import jax
import numpy as np
import pytest

from lora_jax.config.schema import MeshConfig
from lora_jax.models import load as loading
from lora_jax.models.heads import LanguageModel
from lora_jax.packing.pack import Pack
from lora_jax.parallel.constraints import place_batch
from lora_jax.parallel.mesh import make_mesh, to_host
from lora_jax.training.loop import train_pack
from lora_jax.training.setup import place_model, set_up
from tests import tiny
from tests.hlo import collectives, reduced_bytes

pytestmark = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs the eight CPU devices that tests/conftest.py makes")

STEPS = 20
FSDP = {"fsdp": 8}
MESHES = [{"data": 8}, FSDP, {"data": 2, "fsdp": 2, "tensor": 2}, {"sweep": 4, "data": 2}]

# Unlike in all that may differ inside a pack; three, which no sweep axis divides.
MEMBERS = [
    {"adapter__rank": 2, "adapter__targets": ["q_proj", "down_proj"], "adapter__layers": "last:3"},
    {"adapter__rank": 4, "adapter__targets": "attention", "optimizer__learning_rate": 3e-3, "training__seed": 1},
    {"adapter__rank": 3, "adapter__targets": ["up_proj", "o_proj"], "adapter__dropout": 0.1, "training__seed": 2},
]


def train(model, batches, *, mesh=None, members=MEMBERS, **values):
    """(losses of the steps, held-out losses at the end, final state on the host, the pack) of members trained on a mesh."""
    mesh = None if mesh is None else make_mesh(MeshConfig(**mesh))
    if mesh is not None:
        place_model(model, mesh)
    pack = Pack.build(model, [tiny.config(**(m | values)) for m in members], STEPS, mesh)
    state, losses = pack.state, []
    for step, batch in enumerate(batches):
        placed = batch if mesh is None else place_batch(mesh, batch, row_axis=1)
        state, metrics = pack.programs.train(state, pack.fixed, pack.part.frozen, placed, np.int32(step))
        losses.append(np.asarray(metrics.loss))
    micro = {n: a[0] for n, a in batches[0].items()}
    placed = micro if mesh is None else place_batch(mesh, micro, row_axis=0)
    held_out = pack.programs.evaluate(state.trainable, pack.fixed.settings, pack.part.frozen, placed)
    pack.programs.check()
    return np.stack(losses), np.stack(held_out[:2]), jax.tree.map(to_host, state), pack


class Tiny:
    """A model, its batches and what one device makes of them; made once a case."""

    def __init__(self, make, causal, **values):
        self.make, self.values = make, values
        self.batches = [tiny.batch(seed, rows=8, micro=2, causal=causal) for seed in range(STEPS)]
        self.alone = train(make(), self.batches, **values)


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick_compile():
        yield


@pytest.fixture(scope="module")
def encoder():
    return Tiny(lambda: tiny.classifier(4), causal=False)


@pytest.fixture(scope="module")
def decoder():
    return Tiny(lambda: tiny.language_model(4), causal=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "mesh"),
    # One mesh of each kind of model in CI, all of them in the long run.
    [
        pytest.param(kind, mesh, marks=[] if mesh == (FSDP if kind == "encoder" else MESHES[-1]) else pytest.mark.long)
        for kind in ("encoder", "decoder")
        for mesh in MESHES
    ],
    ids=str,
)
def test_the_mesh_is_invisible(request, kind, mesh):
    case = request.getfixturevalue(kind)
    losses, held_out, state, pack = train(case.make(), case.batches, mesh=mesh)
    alone = case.alone
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
    np.testing.assert_allclose(held_out, alone[1], rtol=1e-5)
    for name, array in alone[2].trainable.items():  # Adam's first steps blow up what rounding leaves of a gradient near 0
        assert tiny.relative(state.trainable[name], array) < 1e-3, name
    assert np.ptp(losses[-1]) > 1e-4 and np.ptp(losses) > 0.03  # members and steps differ, so that equal losses say something
    # The state came back in the layout in which it went in, and optimizer state lies with its array.
    for name, array in pack.state.trainable.items():
        like = [a for p, a in jax.tree_util.tree_leaves_with_path(pack.state.optimizer) if f"'{name}'" in jax.tree_util.keystr(p)]
        assert len(like) == 2 and all(a.sharding == array.sharding for a in like), name


LONG = functools.partial(pytest.param, marks=pytest.mark.long)
CASES = [
    ("encoder", FSDP, {"pooling": "mean"}, {"adapter__targets": "all-linear", "adapter__bias": "all"}),
    LONG("encoder", MESHES[2], {}, {"adapter__method": "full", "optimizer__learning_rate": 1e-3}),
    LONG("decoder", FSDP, {"tied": False}, {"adapter__targets": ["embed", "lm_head", "q_proj"]}),
    LONG("decoder", MESHES[3], {"bias": True}, {"adapter__targets": ["v_proj"], "adapter__bias": "lora_only", "adapter__layers": [1, 3]}),
    LONG("decoder", {"fsdp": 4, "tensor": 2}, {"vocab": 65}, {"adapter__targets": "all-linear"}),  # no axis divides these rows
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "mesh", "options", "values"), CASES)
def test_it_is_invisible_to_every_kind_of_training(kind, mesh, options, values):
    make = (lambda: tiny.classifier(4, **options)) if kind == "encoder" else (lambda: tiny.language_model(4, **options))
    members = [{"adapter__rank": r, "training__seed": r} for r in (2, 3)]
    case = Tiny(make, kind == "decoder", members=members, **values)
    losses, held_out, _, _ = train(make(), case.batches, mesh=mesh, members=members, **values)
    np.testing.assert_allclose(losses, case.alone[0], rtol=1e-5)
    np.testing.assert_allclose(held_out, case.alone[1], rtol=1e-5)


def device_bytes(arrays):
    """Bytes on the fullest device."""
    used: dict[jax.Device, int] = {}
    for array in jax.tree.leaves(arrays):
        for shard in array.addressable_shards:
            used[shard.device] = used.get(shard.device, 0) + shard.data.nbytes
    return max(used.values())


def check_fully_sharded(pack, text):
    """The acceptance of a step with the base cut over eight devices, read from its compiled program."""
    base = sum(a.nbytes for a in pack.part.frozen.values())
    trainable = sum(a.nbytes for a in pack.state.trainable.values())
    assert device_bytes(pack.part.frozen) <= 1.05 * base / 8
    found = collectives(text)
    # What is added up is gradients, and a few scalars for the losses and norms.
    assert 0.5 * trainable < reduced_bytes(found) <= 1.1 * trainable + 4096
    # Gathers of layers' weights are inside a loop, one layer at a time, and no gather has the stack's leading axis.
    depth = pack.part.frozen["base.layers.mlp.up_proj.kernel"].shape[0]
    stacked = {a.shape for n, a in pack.part.frozen.items() if ".layers." in n and a.ndim == 3}
    single = {(1, *s[1:]) for s in stacked} | {s[1:] for s in stacked}
    gathers = [c for c in found if c.kind == "all-gather"]
    assert depth > 2 and not any(shape in stacked for c in gathers for shape in c.shapes)
    layered = [c for c in gathers if any(shape in single for shape in c.shapes)]
    assert {shape[-2:] for c in layered if c.looped for shape in c.shapes} >= {s[1:] for s in stacked}
    unstacked = {a.shape for n, a in pack.part.frozen.items() if ".layers." not in n}
    assert all(c.looped for c in layered if not set(c.shapes) & unstacked)
    return found


@pytest.mark.slow
def test_an_encoders_step_moves_one_layer_at_a_time_and_adds_up_gradients():
    """No unstacked weight is larger than the pooler: the vocabulary's table is never gathered."""
    members = [{"adapter__rank": r, "adapter__targets": ["q_proj", "v_proj"]} for r in (2, 4)]
    *_, pack = train(tiny.classifier(4, vocab=512, width=64), [tiny.batch(rows=8)], mesh=FSDP, members=members)
    found = check_fully_sharded(pack, pack.programs.train.compiled_text())
    table = pack.part.frozen["base.embed.embedding"].shape
    assert not any(table in c.shapes for c in found)


def test_a_decoders_step_gathers_its_vocabulary_once():
    members = [{"adapter__rank": r, "adapter__targets": ["q_proj", "down_proj"]} for r in (4, 8)]
    batch = tiny.batch(rows=8, causal=True)
    *_, pack = train(tiny.language_model(4, vocab=512, width=64), [batch], mesh=FSDP, members=members)
    found = check_fully_sharded(pack, pack.programs.train.compiled_text())
    table = pack.part.frozen["base.embed.embedding"].shape
    assert sum(c.kind == "all-gather" and table in c.shapes for c in found) == 1


@pytest.mark.slow
def test_one_device_is_told_nothing():
    """The program of a mesh of one device says nothing of where arrays lie inside it; that of eight does."""
    model, batch = tiny.classifier(3), tiny.batch(rows=8)

    def told(config):
        mesh = make_mesh(config)
        place_model(model, mesh)
        pack = Pack.build(model, [tiny.config(**m) for m in MEMBERS], STEPS, mesh)
        placed = place_batch(mesh, batch, row_axis=1)
        return (
            pack.programs.train.lower(pack.state, pack.fixed, pack.part.frozen, placed, np.int32(0)).as_text().count("sharding_constraint")
        )

    assert told(MeshConfig()) == 0 and told(MeshConfig(**FSDP)) > 0


@pytest.mark.slow
def test_a_run_on_a_mesh(hub, tmp_path, compile_cache):
    """From a config: loaded onto the mesh, trained, evaluated, and members' arrays taken back in one piece."""

    def run(folder, mesh):
        changes = {"mesh": mesh, "training.steps": 8, "training.batch_size": 16, "task.eval_size": 16}
        folder.mkdir()
        config = hub.config(folder, changes)
        other = config.model_copy(update={"adapter": config.adapter.model_copy(update={"rank": 3})})
        setup = set_up(config)
        pack = Pack.build(setup.model, [config, other, config], setup.steps, setup.mesh)
        losses = []
        listener = types.SimpleNamespace(
            on_start=lambda step: None,
            on_save=lambda step: None,
            on_train=lambda step, metrics, speed: losses.append(metrics["loss"]),
            on_eval=lambda step, metrics: None,
        )
        outcome = train_pack(pack, setup, eval_every=4, log_every=1, listener=listener)
        return np.stack(losses), outcome.final["loss"], pack.member_arrays(setup.model, 1, outcome.final_arrays)

    alone, placed = run(tmp_path / "one", {}), run(tmp_path / "eight", {"sweep": 2, "fsdp": 4})
    np.testing.assert_allclose(placed[0], alone[0], rtol=1e-5)
    np.testing.assert_allclose(placed[1], alone[1], rtol=1e-5)
    assert alone[0].shape == (8, 3) and set(placed[2]) == set(alone[2])
    assert all(placed[2][n].shape == alone[2][n].shape for n in alone[2])


@pytest.fixture(scope="module")
def minilm(minilm_source):
    return lambda mesh: tiny_head(loading.load_model(minilm_source, mesh=mesh))


def tiny_head(base):
    from flax import nnx

    from lora_jax.models.heads import SequenceClassifier

    return SequenceClassifier(base, tiny.CLASSES, "cls", rngs=nnx.Rngs(1))


@pytest.fixture(scope="module")
def smollm2_cut(smollm2_source):
    """The first four layers of SmolLM2, with its embedding and final norm."""

    def make(mesh):
        with pytest.MonkeyPatch.context() as patch:
            real = loading.open_checkpoint

            def cut(*args, **kwargs):
                checkpoint = real(*args, **kwargs)
                checkpoint.config["num_hidden_layers"] = 4
                return checkpoint

            patch.setattr(loading, "open_checkpoint", cut)
            return LanguageModel(loading.load_model(smollm2_source, mesh=mesh))

    return make


@pytest.fixture(scope="module")
def real_alone():
    return {}


@pytest.mark.long
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("kind", ["minilm", "smollm2_cut"])
def test_the_mesh_is_invisible_to_real_models(request, kind, mesh, real_alone):
    make, causal = request.getfixturevalue(kind), kind == "smollm2_cut"
    batches = [tiny.batch(seed, rows=8, length=24, causal=causal, vocab=30000) for seed in range(STEPS)]
    usual = {"optimizer__learning_rate": 1e-3}  # at ten times that a member's loss jumps about, and rounding with it
    if kind not in real_alone:
        real_alone[kind] = train(make(None), batches, **usual)[:2]
    losses, held_out, _, pack = train(make(make_mesh(MeshConfig(**mesh))), batches, mesh=mesh, **usual)
    np.testing.assert_allclose(losses, real_alone[kind][0], rtol=1e-5)
    np.testing.assert_allclose(held_out, real_alone[kind][1], rtol=1e-5)
    if mesh == FSDP:
        check_fully_sharded(pack, pack.programs.train.compiled_text())
