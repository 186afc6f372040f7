"""What holds for every method (DESIGN.md, section 4): each test runs over all that are registered.

A method that needs other values than these (ranks that divide the width, even ranks) says so in `VALUES`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax.adapters.inject import inject, site_modules
from lora_jax.adapters.layout import resolve
from lora_jax.adapters.merge import merge, unmerge
from lora_jax.config.doors import METHODS
from lora_jax.errors import InputWarning
from lora_jax.models.heads import SequenceClassifier
from lora_jax.models.load import load_model
from lora_jax.packing.pack import Pack, repack
from lora_jax.training.checkpoint import Saved
from tests import tiny

pytestmark = pytest.mark.usefixtures("compile_cache")

STEPS = 20
# The library's own, those with arrays at sites.
ADAPTING = [name for name, method in METHODS.all().items() if method.kinds and type(method).__module__.startswith("lora_jax.")]
# Method -> the sections of four members, in place of the ones below.
RANKS = (2, 4, 3, 1)
VALUES: dict[str, Any] = {
    # Rows of embeddings, all of which the tests' tokens and positions look up.
    "trainable_tokens": {
        "section": {"targets": "embedding", "token_indices": [1]},
        "members": [
            {"targets": ["embed"], "token_indices": [3, 1, 7]},
            {"targets": ["embed", "position_embed"], "token_indices": [4, 2, 5]},
            {"targets": ["position_embed"], "token_indices": [0, 3, 5]},
            {"targets": "embedding", "token_indices": [9, 8, 3]},
        ],
    },
    "gralora": {"ranks": (2, 4, 6, 8), "section": {"hybrid_r": 1}},
    "lokr": {"section": {"decompose_both": True}},  # at these widths a rank of 4 is above half, where w2 is whole, and 2 where w1 is
    "c3a": {"ranks": (8, 16, 4, 32)},
    # Each with a schedule of its own; where it ends early, no site loses all that it has.
    "adalora": {
        "section": {"target_r": 1},
        "members": [
            {"targets": ["q_proj"], "layers": "last:1", "tinit": 3, "tfinal": 5, "deltaT": 2},
            {"targets": ["q_proj", "up_proj"], "target_r": 2, "deltaT": 4, "beta1": 0.5},
            {"targets": "attention", "tinit": 4, "deltaT": 3, "beta2": 0.6, "orth_reg_weight": 0.1},
            {},
        ],
    },
    "hra": {"ranks": (2, 4, 6, 8)},
    "oft": {"ranks": (4, 8, 2, 16)},
    "road": {"section": {"group_size": 8}},
}


# Beside what is in the ordinary tests of all methods, these corners run with the slow ones: a state that changes with the steps, the base's
# norms, what multiplies, two products, a rotation, a gradient of its own, an embedding. The rest is for the long tests.
SLOW = ("adalora", "dora", "ia3", "loha", "lora_fa", "oft", "trainable_tokens")


def corners(names: list[str], *, ordinary: tuple[str, ...], slow: tuple[str, ...]) -> list[Any]:
    """The names as parameters: some as they are, some marked slow, the others long."""
    marks = {name: pytest.mark.slow for name in slow} | dict.fromkeys(ordinary)
    return [
        name if marks.get(name, pytest.mark.long) is None else pytest.param(name, marks=marks.get(name, pytest.mark.long)) for name in names
    ]


def sections(name: str) -> list[dict[str, Any]]:
    """Four members of unequal ranks, targets and layers."""
    own = VALUES.get(name, {})
    ranks = own.get("ranks", RANKS)
    shapes = own.get(
        "members", [{"targets": ["q_proj"], "layers": "last:1"}, {"targets": ["q_proj", "up_proj"]}, {"targets": "attention"}, {}]
    )
    common = {"method": name, "targets": ["v_proj", "down_proj"]} | own.get("section", {})
    return [common | {"rank": rank} | shape for rank, shape in zip(ranks, shapes, strict=True)]


# Over a real encoder the rounding of float32 grows in these: a solo run whose start is moved by one part in 10^7 ends as far from itself as
# from its pack (losses: delora 1e-5, randlora 2e-5 to 8e-5). At a tenth of the rates it does not.
GENTLE = {"delora": 0.1, "randlora": 0.1}


def configs(name: str, pace: float = 1.0) -> list[Any]:
    options = {"optimizer__eps": 1e-3, "optimizer__weight_decay": 0.1}  # as in tests/packing/test_packed_equals_solo.py
    return [
        tiny.config(
            **{f"adapter__{k}": v for k, v in values.items()}, training__seed=7 + i, optimizer__learning_rate=pace * rate, **options
        )
        for i, (values, rate) in enumerate(zip(sections(name), (3e-3, 1e-2, 5e-3, 2e-3), strict=True))
    ]


def train(pack: Pack, state: Any, steps: range) -> tuple[Any, np.ndarray]:
    losses = []
    for step in steps:
        state, metrics = pack.programs.train(state, pack.fixed, pack.part.frozen, tiny.batch(step % 3), np.int32(step))
        losses.append(np.asarray(metrics.loss))
    return state, np.stack(losses)


@pytest.mark.parametrize("name", corners(ADAPTING, ordinary=("dora", "vera"), slow=SLOW))
def test_it_starts_as_the_base(name: str) -> None:
    model, tokens = tiny.encoder(2), np.arange(1, 13, dtype=np.int32).reshape(2, 6)
    for values in sections(name):
        adapted = inject(model, tiny.adapter(**values), rngs=nnx.Rngs(0))
        base, found = (tiny.outputs(m, tokens) for m in (model, adapted))
        assert tiny.relative(found, base) < 1e-6, values


@pytest.mark.parametrize("name", corners(ADAPTING, ordinary=(), slow=(*SLOW, "vera")))
def test_a_pack_equals_its_solo_runs_its_padding_stays_and_it_compiles_once(name: str) -> None:
    check_pack(tiny.classifier(2), configs(name))


@pytest.mark.long
@pytest.mark.parametrize("name", ADAPTING)
def test_a_pack_equals_its_solo_runs_with_a_real_encoder(name: str, minilm_source: str) -> None:
    base: Any = load_model(minilm_source)
    check_pack(SequenceClassifier(base, tiny.CLASSES, "cls", rngs=nnx.Rngs(0)), configs(name, GENTLE.get(name, 1.0)))


def check_pack(model: nnx.Module, chosen: list[Any]) -> None:
    pack = Pack.build(model, chosen, STEPS)
    start = jax.tree.map(np.asarray, pack.state.trainable)
    fixed = jax.tree.map(jnp.copy, pack.state)
    state, losses = train(pack, fixed, range(STEPS))
    pack.programs.check()
    assert pack.programs.train.traces.count == 1
    assert np.isfinite(losses).all() and np.asarray(state.alive).all()
    for k, config in enumerate(chosen[:2]):
        alone = Pack.build(model, [config], STEPS)
        own_start = alone.member_arrays(model, 0, alone.state.trainable)
        solo, curve = train(alone, alone.state, range(STEPS))
        assert tiny.relative(losses[:, k], curve[:, 0]) < 1e-5
        mine, wanted = pack.member_arrays(model, k, state.trainable), alone.member_arrays(model, 0, solo.trainable)
        assert mine.keys() == wanted.keys()
        for array in mine:
            moved = np.linalg.norm(wanted[array] - own_start[array])
            assert np.linalg.norm(mine[array] - wanted[array]) <= 1e-5 * np.linalg.norm(wanted[array]) + 1e-3 * moved, array
            assert moved > 0 or not wanted[array].size or not pack.part.labels[array].startswith("adapter"), array
        windows = pack.windows(model, k)
        for array, values in state.trainable.items():  # what is no member's own stays as it was
            rest = np.ones(values.shape[1:], bool)
            if windows[array] is not None:
                rest[windows[array]] = False
            np.testing.assert_array_equal(np.asarray(values[k])[rest], start[array][k][rest])


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n == "lokr" else pytest.mark.long) for n in ADAPTING])
def test_a_member_that_moves_to_another_pack_goes_on_as_it_was(name: str) -> None:
    model, chosen = tiny.classifier(2), configs(name)
    pack = Pack.build(model, chosen, STEPS)
    state, _ = train(pack, pack.state, range(2))
    rest = Pack.build(model, [chosen[3], chosen[1]], STEPS)
    every = [0] * 4
    loop = {"best": {"score": every, "step": every, "metrics": {}}, "window": [], "final": {}, "tokens": 0, "seconds": 0.0}
    state = jax.tree.map(np.asarray, state)
    moved = repack(model, [(pack, k, Saved(2, state, None, loop)) for k in (3, 1)], rest)
    kept, losses = train(pack, jax.tree.map(jnp.asarray, state), range(2, 5))
    after, curve = train(rest, moved.state, range(2, 5))
    assert tiny.relative(curve, losses[:, [3, 1]]) < 1e-5
    for place, k in enumerate((3, 1)):
        wanted, mine = pack.member_arrays(model, k, kept.trainable), rest.member_arrays(model, place, after.trainable)
        for array in wanted:
            assert tiny.relative(mine[array], wanted[array]) < 1e-4, array


@pytest.mark.parametrize("name", corners(ADAPTING, ordinary=("dora", "ia3"), slow=SLOW))
def test_merging_is_faithful_and_undone_bit_for_bit(name: str) -> None:
    model, tokens = tiny.encoder(2), np.arange(1, 13, dtype=np.int32).reshape(2, 6)
    base = tiny.base_arrays(model)
    for seed, values in enumerate(sections(name)[:2]):
        adapted = moved(inject(model, tiny.adapter(**values), rngs=nnx.Rngs(seed)), seed)
        outputs = tiny.outputs(adapted, tokens)
        assert tiny.relative(outputs, tiny.outputs(model, tokens)) > 1e-3
        assert tiny.relative(tiny.outputs(merge(adapted), tokens), outputs) < 1e-5
        assert tiny.arrays_equal(tiny.outputs(unmerge(merge(adapted)), tokens, bits=True), tiny.outputs(adapted, tokens, bits=True))
    assert tiny.arrays_equal(tiny.base_arrays(model), base)


def moved(adapted: nnx.Module, seed: int) -> nnx.Module:
    """The model with its trained arrays away from their start, their padding as it is."""
    rng = np.random.default_rng(seed)
    for site in site_modules(adapted).values():
        for name, parameter in site.method.padded(site.site, site.extent).items():
            if parameter.trained:
                variable = getattr(site, name)
                noise = 0.1 * rng.standard_normal(variable.shape)
                variable.set_value(jnp.asarray(variable[...] + noise, jnp.float32))
    return adapted


@pytest.mark.parametrize("name", [name for name in ADAPTING if METHODS.all()[name].ignores])
def test_a_key_that_it_has_no_use_for_is_said(name: str) -> None:
    values = {"method": name, "rank": 2, "targets": ["q_proj"], "alpha": 4.0} | VALUES.get(name, {}).get("section", {})
    with pytest.warns(InputWarning) as said:
        resolve(tiny.encoder(1), tiny.adapter(**values))
    keys = {str(w.message).split(":")[0].removeprefix("adapter.") for w in said}
    assert keys == {"alpha", "rank"} & set(METHODS.all()[name].ignores)
