"""The method door: a method that is not the library's own, under 60 lines, does all that LoRA does."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax.adapters.bank import AdapterBank
from lora_jax.adapters.describe import describe, rank_for
from lora_jax.adapters.inject import inject, site_modules
from lora_jax.adapters.layout import resolve, unite
from lora_jax.adapters.merge import merge, merged_base, unmerge
from lora_jax.adapters.methods.base import Method, register_method
from lora_jax.adapters.parameters import Parameter
from lora_jax.adapters.partition import partition
from lora_jax.config.doors import METHODS
from lora_jax.config.load import load_config
from lora_jax.config.schema import AdapterConfig, Config
from lora_jax.errors import InputError
from lora_jax.packing.pack import Pack, repack
from lora_jax.sweeps.space import members_of
from lora_jax.training.checkpoint import Saved
from tests import tiny

pytestmark = pytest.mark.usefixtures("compile_cache")


# The method: outputs scaled by a trained gain (IA3, arXiv:2205.05638, eq. 1) and a product of two trained matrices with a gain
# between them. Its padding is 1 in two of the arrays, and would train if nothing kept it.


class GainSection(AdapterConfig):
    method: Literal["gain"] = "gain"
    spread: float = 1.0


class Gain(Method):
    name, section = "gain", GainSection
    kinds = ("linear",)
    setting_names = ("scale",)

    def parameters(self, site, rank):
        return {
            "gain": Parameter((site.outputs,), axes=("out",), fill=1.0),
            "down": Parameter((site.inputs, rank), axes=("in", None)),
            "middle": Parameter((rank,), axes=(None,), fill=1.0),
            "up": Parameter((rank, site.outputs), axes=(None, "out")),
        }

    def settings(self, config, rank, alpha):
        return {"scale": alpha}

    def init(self, site, rank, config, random, data):
        assert data.weight().shape == (site.inputs, site.outputs)
        return {"down": config.spread * random.standard_normal((rank, site.inputs), np.float32).T}

    def apply(self, module, *inputs, rows):
        y = module.base(*inputs)
        low = (inputs[0] @ module.down[...]) * (module.scale[...] * module.middle[...])
        return (y * module.gain[...] + low @ module.up[...]).astype(y.dtype)

    def merged(self, module, weight, bias):
        low = module.down[...] * (module.scale[...][..., None] * module.middle[...])[..., None, :]
        gain = module.gain[...]
        return weight * gain[..., None, :] + low @ module.up[...], None if bias is None else bias * gain


# Until here.

VALUES = {"method": "gain", "alpha": 0.5, "rank": 2, "targets": ["q_proj", "up_proj"]}
MEMBERS = [
    {"targets": ["q_proj"], "layers": "last:1", "rank": 1},
    {"targets": ["q_proj", "up_proj"], "rank": 3, "spread": 0.5},
    {"targets": ["up_proj", "pooler"], "layers": None, "rank_pattern": {r"1\.mlp\.up_proj": 1}},
]
STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def registered():
    register_method("gain", Gain())
    yield
    METHODS._found.pop("gain")
    Config.model_rebuild(force=True)


def configs(members=MEMBERS):
    rates = {"optimizer__learning_rate": 1e-2, "optimizer__weight_decay": 0.1}
    named = [{f"adapter__{key}": value for key, value in (VALUES | m).items()} for m in members]
    return [tiny.config(**m, training__seed=k, **rates) for k, m in enumerate(named)]


def run(model, chosen):
    pack = Pack.build(model, chosen, STEPS)
    state, losses = jax.tree.map(jnp.copy, pack.state), []
    for step in range(STEPS):
        state, metrics = pack.programs.train(state, pack.fixed, pack.part.frozen, tiny.batch(step % 2), np.int32(step))
        losses.append(np.asarray(metrics.loss))
    pack.programs.check()
    return pack, jax.tree.map(np.asarray, state), np.stack(losses)


def test_a_member_starts_as_the_base_bit_for_bit():
    model, tokens = tiny.encoder(3), np.arange(1, 13, dtype=np.int32).reshape(2, 6)
    adapted = inject(model, tiny.adapter(**VALUES), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(tiny.outputs(adapted, tokens, bits=True), tiny.outputs(model, tokens, bits=True))


@pytest.mark.slow
def test_a_pack_of_unequal_members_equals_its_solo_runs_and_padding_stays():
    model = tiny.classifier(3)
    pack, state, losses = run(model, configs())
    assert (losses[-2] < losses[0]).all()  # of the same batch
    for k, config in enumerate(configs()):
        alone, alone_state, solo = run(model, [config])
        assert tiny.relative(losses[:, k], solo[:, 0]) < 1e-5
        ours, theirs = pack.member_arrays(model, k, state.trainable), alone.member_arrays(model, 0, alone_state.trainable)
        start = alone.member_arrays(model, 0, alone.state.trainable)
        assert set(theirs) <= set(ours)
        for name, array in theirs.items():
            assert ours[name].shape == array.shape and tiny.relative(ours[name], array) < 1e-5, name
            assert not np.array_equal(array, start[name]), name
        own = pack.windows(model, k)
        for name, array in pack.part.parameters.items():
            padding = np.ones(state.trainable[name][k].shape, bool)
            if own[name] is not None:
                padding[own[name]] = False
            assert (state.trainable[name][k][padding] == array.parameter.fill).all(), name


def test_counts():
    model = tiny.classifier(3)
    pack = Pack.build(model, configs(), STEPS)
    heads = 32 * 3 + 3
    sizes = {"q_proj": lambda r: 32 + r * (32 + 1 + 32), "up_proj": lambda r: 64 + r * (32 + 1 + 64)}
    q, up = sizes["q_proj"], sizes["up_proj"]
    wanted = [q(1), 3 * (q(3) + up(3)), 2 * up(2) + up(1) + q(2)]  # the pooler is as large as a query's projection
    assert [pack.parameter_count(k) - heads for k in range(3)] == wanted
    table = describe(inject(model, configs()[1].adapter, rngs=nnx.Rngs(0)))
    assert sum(row.count for row in table.rows if row.label == "gain") == wanted[1]
    assert rank_for(model, tiny.adapter(**VALUES), 10**4) > 1


def test_merging_and_back():
    model, tokens = tiny.encoder(3), np.arange(1, 13, dtype=np.int32).reshape(2, 6)
    adapted = inject(model, tiny.adapter(**VALUES, layers="last:2"), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for site in site_modules(adapted).values():
        for array in (site.gain, site.middle, site.up):
            array[...] = array[...] + jnp.asarray(0.2 * rng.standard_normal(array.shape), jnp.float32)
    wanted = tiny.outputs(adapted, tokens)
    assert tiny.relative(wanted, tiny.outputs(model, tokens)) > 1e-2
    for plain in (merge(adapted), merged_base(adapted)):
        assert tiny.relative(tiny.outputs(plain, tokens), wanted) < 1e-5
    again, before = partition(unmerge(merge(adapted))), partition(adapted)
    assert tiny.arrays_equal(again.trainable, before.trainable) and tiny.arrays_equal(again.frozen, before.frozen)


@pytest.mark.slow
def test_a_member_moves_to_another_pack_with_its_padding():
    model = tiny.classifier(3)
    chosen = configs()
    pack, state, _ = run(model, chosen)
    loop = {"best": {"score": [0.0] * 3, "step": [0] * 3, "metrics": {}}, "window": [], "final": {}, "tokens": 0, "seconds": 0.0}
    saved = Saved(STEPS, state, None, loop)
    target = Pack.build(model, [chosen[2], chosen[0]], STEPS)
    moved = repack(model, [(pack, 2, saved), (pack, 0, saved)], target).state
    for k, old in enumerate((2, 0)):
        ours = target.member_arrays(model, k, moved.trainable)
        theirs = pack.member_arrays(model, old, state.trainable)
        assert all(np.array_equal(ours[n], a) for n, a in theirs.items() if n in ours)
        assert {n for n in theirs if n in pack.part.parameters} <= set(ours)
        own = target.windows(model, k)
        for name, array in target.part.parameters.items():
            padding = np.ones(moved.trainable[name][k].shape, bool)
            if own[name] is not None:
                padding[own[name]] = False
            assert (np.asarray(moved.trainable[name][k])[padding] == array.parameter.fill).all(), name


def test_a_sweep_in_yaml(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "name: gains\nmodel: {source: nowhere}\ntask: {kind: classification, source: nowhere.csv, text: text, label: label}\n"
        "adapter: {method: gain, targets: [q_proj], spread: 0.5}\ntraining: {steps: 3}\nsweep: {grid: {adapter.rank: [1, 2]}}\n"
    )
    members = members_of(load_config(path))
    assert [m.config.adapter.rank for m in members] == [1, 2]
    assert all(type(m.config.adapter) is GainSection and m.config.adapter.spread == 0.5 for m in members)
    model = tiny.classifier(2)
    layout = unite(model, [resolve(model, m.config.adapter) for m in members])
    assert layout.method is METHODS.get("gain", "adapter.method") and layout.sites[0].rank == 2
    path.write_text(path.read_text().replace("spread", "spred"))
    with pytest.raises(InputError, match=r"adapter\.spred.*spread"):
        load_config(path)


def test_what_it_cannot_do_is_said():
    model = tiny.encoder(2)
    with pytest.raises(InputError, match=r"adapter\.targets.*embed"):
        resolve(model, tiny.adapter(**VALUES | {"targets": "embedding"}))
    with pytest.raises(InputError, match=r"adapter\.dropout.*_proj"):
        resolve(model, tiny.adapter(**VALUES, dropout=0.1))
    bank = AdapterBank(model)
    bank.add("own", inject(model, tiny.adapter(**VALUES), rngs=nnx.Rngs(0)))
    bank.add("lora", tiny.trained(model))
    assert bank.row_ids(["lora", None]).tolist() == [0, -1]
    with pytest.raises(InputError, match="own.*low-rank"):
        bank.mixed(["own", "lora"])
    with pytest.raises(InputError, match="own.*low-rank"):
        bank.combine("sum", {"own": 1.0, "lora": 1.0})
