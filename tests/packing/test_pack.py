"""A pack equals its solo runs; padding is invisible; a member that fails falls alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.errors import RunError
from lora_jax.packing.pack import Pack, static_key
from tests import tiny

STEPS = 20


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick_compile():
        yield


# Six members that differ in everything that a pack allows. (None trains a key's bias: its gradient is rounding and nothing else,
# which Adam would blow up to steps of full size. And the rates are moderate: at large ones the training itself multiplies a
# difference in the last bit tenfold every few steps.)
MEMBERS = [
    {"adapter__rank": 2, "adapter__targets": ["q_proj"], "training__seed": 1},
    {
        "adapter__rank": 8,
        "adapter__targets": "all-linear",
        "adapter__exclude": ["k_proj"],
        "adapter__alpha": 8.0,
        "optimizer__learning_rate": 3e-3,
        "optimizer__weight_decay": 0.1,
    },
    {"adapter__rank": 3, "adapter__targets": "mlp", "adapter__layers": "last:1", "adapter__dropout": 0.3, "optimizer__schedule": "cosine"},
    {"adapter__targets": ["v_proj", "pooler"], "adapter__dropout": 0.1, "training__seed": 5, "optimizer__clip_norm": 0.5},
    {
        "adapter__targets": ["q_proj", "v_proj", "o_proj"],
        "adapter__layers": [1, 2],
        "optimizer__learning_rate": 1e-3,
        "optimizer__b_lr_ratio": 8.0,
        "optimizer__warmup_steps": 6,
    },
    {
        "adapter__rank": 5,
        "adapter__targets": "embedding",
        "adapter__rslora": True,
        "optimizer__schedule": "constant",
        "optimizer__b2": 0.95,
    },
]
# A moderate rate: where a gradient is nearly 0, Adam makes a whole step of its rounding.
MEMBERS = [{"optimizer__learning_rate": 1e-3, **m} for m in MEMBERS]
BIASED = [{**m, "adapter__bias": "lora_only"} for m in MEMBERS]
DECODER = [
    {"adapter__rank": 2, "adapter__targets": "attention", "adapter__layers": "last:1", "adapter__dropout": 0.2},
    {
        "adapter__rank": 6,
        "adapter__targets": ["down_proj", "embed"],
        "adapter__exclude": r"base\.layers\.0\..*",
        "optimizer__learning_rate": 3e-2,
    },
]


def _run(model, members, batches, steps=STEPS, change=None):
    """Trains a pack; returns it, its final state on the host, and the metrics, (steps, members) each."""
    pack = Pack.build(model, [tiny.config(**m) for m in members], steps)
    state = pack.state if change is None else change(pack.state)
    metrics = []
    for step in range(steps):
        state, out = pack.programs.train(state, pack.fixed, pack.part.frozen, batches[step % len(batches)], np.int32(step))
        metrics.append(jax.tree.map(np.asarray, out))
    pack.programs.check()
    return pack, jax.tree.map(np.asarray, state), jax.tree.map(lambda *a: np.stack(a), *metrics)


def _compare(model, members, batches):
    pack, state, packed = _run(model, members, batches)
    for k, member in enumerate(members):
        alone, alone_state, solo = _run(model, [member], batches)
        for name in ("loss", "grad_norm", "learning_rate"):
            assert tiny.relative(getattr(packed, name)[:, k], getattr(solo, name)[:, 0]) < 1e-5, (name, k)
        assert packed.loss[0, k] == pytest.approx(solo.loss[0, 0], rel=1e-6)
        ours = pack.member_arrays(model, k, state.trainable)
        theirs = alone.member_arrays(model, 0, alone_state.trainable)
        start = alone.member_arrays(model, 0, Pack.build(model, alone.configs, STEPS).state.trainable)
        trained = {n for n in theirs if not np.array_equal(theirs[n], start[n])}
        assert {n for n in theirs if "lora" in n or "classifier" in n} <= trained
        assert trained <= set(ours)
        for name in trained:
            assert ours[name].shape == theirs[name].shape
            error = np.linalg.norm(ours[name] - theirs[name]) / np.linalg.norm(theirs[name])
            assert error < 1e-5, (name, k, error)
    return pack, state, packed


@pytest.fixture(scope="module")
def batches():
    return [tiny.batch(i) for i in range(4)]


@pytest.mark.parametrize("members", [pytest.param((2, 4), marks=pytest.mark.long), pytest.param(range(6), marks=pytest.mark.slow)])
def test_a_pack_equals_its_solo_runs(members, batches, compile_cache):
    """And what a member does not use, padding, sites, layers and biases, is untouched."""
    model = tiny.classifier(3)
    pack, state, packed = _compare(model, [BIASED[k] for k in members], batches)
    assert (packed.loss[-4:].mean(0) < packed.loss[:4].mean(0)).all() and packed.accuracy.shape == (STEPS, len(members))
    start = Pack.build(model, pack.configs, STEPS).state.trainable
    for k, spec in enumerate(pack.specs):
        for name, array in state.trainable.items():
            site, _, factor = name.rpartition(".")
            if factor in ("lora_a", "lora_b"):
                member = spec.sites.get(site)
                shape = next(s for s in pack.structure.sites if s.site.name == site)
                ranks = np.zeros(shape.layers or 1, int) if member is None else member.ranks[shape.first :]
                layers = array[k] if array.ndim == 4 else array[k][None]
                for layer, rank in zip(layers, ranks, strict=True):
                    assert not (layer[:, rank:] if factor == "lora_a" else layer[rank:]).any(), (name, k)
                    used = layer.any(0) if factor == "lora_a" else layer.any(1)
                    assert used[:rank].all(), (name, k)
            elif factor == "bias" and "classifier" not in name:
                before = np.asarray(start[name][k])
                on = spec.sites[site].ranks > 0 if site in spec.sites else np.zeros(1 if before.ndim == 1 else len(before), bool)
                changed = np.atleast_2d(array[k] != before).any(-1)
                assert not changed[~on].any() and changed[on].all(), (name, k)


@pytest.mark.long
def test_a_pack_without_trained_biases_equals_its_solo_runs(batches, compile_cache):
    _compare(tiny.classifier(4), MEMBERS, batches)


@pytest.mark.long
def test_a_pack_of_language_models_equals_its_solo_runs(compile_cache):
    """With dropout in the base, whose noise the members share."""
    model = tiny.language_model(3)
    model.base.dropout = 0.2
    batches = [tiny.batch(i, micro=2, causal=True) for i in range(3)]
    _, _, packed = _compare(model, DECODER, batches)
    assert len(set(packed.loss[0])) == 1  # all begin as the base does
    model.base.dropout = 0.0
    _, _, plain = _run(model, DECODER[:1], batches, steps=1)
    assert abs(plain.loss[0, 0] - packed.loss[0, 0]) > 1e-3


class TestOneStructure:
    """One pack of three, used in several ways: all members' numbers are data."""

    members = ({"training__seed": 0}, {"training__seed": 1, "adapter__rank": 2}, {"training__seed": 2, "adapter__alpha": 4.0})

    @pytest.fixture(scope="class")
    def pack(self, compile_cache):
        return Pack.build(tiny.classifier(2), [tiny.config(adapter__targets=["q_proj"], **m) for m in self.members], STEPS)

    def _train(self, pack, batches, *, state=None, fixed=None, steps=6):
        state = jax.tree.map(jnp.copy, pack.state if state is None else state)  # the step donates it
        losses = []
        for step in range(steps):
            state, metrics = pack.programs.train(state, fixed or pack.fixed, pack.part.frozen, batches[step % 4], np.int32(step))
            losses.append(np.asarray(metrics.loss))
        return jax.tree.map(np.asarray, state), np.stack(losses)

    @pytest.mark.parametrize("poison", ["learning rate", "weights"])
    def test_a_member_that_is_not_finite_stops_alone(self, pack, batches, poison):
        healthy, losses = self._train(pack, batches)
        assert healthy.alive.all()
        fixed, state = pack.fixed, pack.state
        if poison == "learning rate":
            fixed = fixed._replace(hyper=fixed.hyper._replace(learning_rate=jnp.array([1e-2, 3e38, 1e-2])))
        else:
            state = state._replace(trainable={n: a.at[1].set(jnp.nan) if n.endswith("lora_b") else a for n, a in state.trainable.items()})
        sick, sick_losses = self._train(pack, batches, state=state, fixed=fixed)
        assert sick.alive.tolist() == [True, False, True]
        for k in (0, 2):
            np.testing.assert_array_equal(sick_losses[:, k], losses[:, k])
            assert tiny.arrays_equal(*(jax.tree.map(lambda a, k=k: a[k], s) for s in (sick, healthy)))
        assert not np.isfinite(sick_losses[-1, 1])
        # It keeps the state it had: nothing moves any more.
        later, _ = self._train(pack, batches, state=jax.tree.map(jnp.asarray, sick), fixed=fixed, steps=1)
        assert all(np.array_equal(a[1], b[1], equal_nan=True) for a, b in zip(jax.tree.leaves(later), jax.tree.leaves(sick)))

    def test_a_member_once_stopped_never_starts_again(self, pack, batches):
        state = pack.state._replace(alive=jnp.array([True, False, True]))
        after, losses = self._train(pack, batches, state=state)
        assert np.isfinite(losses).all() and after.alive.tolist() == [True, False, True]
        assert all(np.array_equal(a[1], np.asarray(pack.state.trainable[n][1])) for n, a in after.trainable.items())
        assert not any(np.array_equal(a[0], np.asarray(pack.state.trainable[n][0])) for n, a in after.trainable.items())

    def test_one_compilation_whatever_the_numbers(self, pack, batches):
        hyper = jax.tree.map(lambda a: a * 2 if a.dtype == jnp.float32 else (a + 1) % 3, pack.fixed.hyper)
        settings = {n: 3 * a for n, a in pack.fixed.settings.items()}
        before, first = self._train(pack, batches, steps=2)
        after, second = self._train(pack, batches, fixed=pack.fixed._replace(hyper=hyper, settings=settings), steps=2)
        assert pack.programs.train.traces.count == 1
        assert not tiny.arrays_equal(before.trainable, after.trainable)
        np.testing.assert_allclose(first[0], second[0], rtol=1e-6)  # B is 0, whatever the scale

    def test_evaluation_takes_part_in_nothing(self, pack, batches):
        micro = {n: a[0] for n, a in batches[0].items()}
        loss, correct, *_ = pack.programs.evaluate(pack.state.trainable, pack.fixed.settings, pack.part.frozen, micro)
        _, losses = self._train(pack, batches, steps=1)
        np.testing.assert_allclose(np.asarray(loss) / micro["target_weights"].sum(), losses[0], rtol=1e-5)
        assert (np.asarray(correct) <= micro["target_weights"].sum()).all()

    def test_a_second_compilation_is_an_error(self, batches):
        pack = Pack.build(tiny.classifier(2), [tiny.config()], STEPS)
        pack.programs.check()
        jax.eval_shape(pack.programs.train.traces, pack.state, pack.fixed, pack.part.frozen, batches[0], np.int32(0))
        pack.programs.check()
        jax.eval_shape(pack.programs.train.traces, pack.state, pack.fixed, pack.part.frozen, tiny.batch(rows=5), np.int32(0))
        with pytest.raises(RunError, match="training program was compiled 2 times"):
            pack.programs.check()


def test_parameter_counts_leave_the_padding_out():
    pack = Pack.build(tiny.classifier(3), [tiny.config(**m) for m in BIASED], STEPS)
    head = 32 * 3 + 3
    q = 3 * 2 * (32 + 32) + 3 * 32
    assert pack.parameter_count(0) == q + head
    assert pack.parameter_count(2) == 3 * 2 * (32 + 64) + (64 + 32) + head
    assert pack.parameter_count(4) == 3 * 2 * (4 * (32 + 32) + 32) + head
    assert pack.parameter_count(5) == 5 * (64 + 32) + head


def test_member_arrays_have_the_shapes_they_have_alone():
    model = tiny.classifier(3)
    pack = Pack.build(model, [tiny.config(**m) for m in MEMBERS], STEPS)
    for k, member in enumerate(MEMBERS):
        alone = Pack.build(model, [tiny.config(**member)], STEPS)
        ours = pack.member_arrays(model, k, pack.state.trainable)
        theirs = alone.member_arrays(model, 0, alone.state.trainable)
        assert tiny.arrays_equal(ours, theirs)  # bit for bit: a member starts the same in any company


def test_what_is_static_must_be_equal():
    base = tiny.config()
    same = [
        {"adapter__rank": 2},
        {"adapter__targets": "mlp"},
        {"adapter__dropout": 0.5},
        {"optimizer__learning_rate": 1.0},
        {"training__seed": 9},
    ]
    other = [{"adapter__bias": "all"}, {"adapter__modules_to_save": ["pooler"]}, {"adapter__method": "head"}, {"training__batch_size": 8}]
    assert all(static_key(tiny.config(**v)) == static_key(base) for v in same)
    assert all(static_key(tiny.config(**v)) != static_key(base) for v in other)
