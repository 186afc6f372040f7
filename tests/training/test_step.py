"""One step: what it changes, what it leaves alone, how micro-batches add up."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.packing.pack import Pack
from tests import tiny

pytestmark = pytest.mark.usefixtures("compile_cache")


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick_compile():
        yield


def _train(model, batches, steps=2, **values):
    pack = Pack.build(model, [tiny.config(**values)], 10)
    before = jax.tree.map(np.asarray, pack.state.trainable)
    frozen = jax.tree.map(np.array, pack.part.frozen)
    state = pack.state
    for step in range(steps):
        state, metrics = pack.programs.train(state, pack.fixed, pack.part.frozen, batches[step % len(batches)], np.int32(step))
    assert bool(state.alive.all())
    assert tiny.arrays_equal(pack.part.frozen, frozen)
    changed = {n for n, a in state.trainable.items() if not np.array_equal(a, before[n])}
    return pack, state, metrics, changed


def _joined(batch):
    """The micro-batches of a batch as one."""
    micro, rows, length = batch["tokens"].shape
    out = {}
    for name, a in batch.items():
        if name == "target_index":
            a = a + (np.arange(micro) * rows * length)[:, None].astype(np.int32)
        out[name] = a.reshape(1, -1, *a.shape[2:])
    return out


@pytest.mark.parametrize("causal", [False, pytest.param(True, marks=pytest.mark.long)])
def test_micro_batches_add_up_to_the_whole_batch(causal):
    """The loss is the mean over all labels of the step, however unequally they lie in its micro-batches."""
    model = tiny.language_model(2) if causal else tiny.classifier(2)
    parts = [tiny.batch(1, micro=4, rows=2, causal=causal), tiny.batch(2, micro=4, rows=2, causal=causal)]
    for batch in parts:
        batch["target_weights"] *= np.array([1, 0, 1, 1], np.float32)[:, None]
        batch["target_weights"][2, 1:] = 0
    options = {"optimizer__eps": 1.0, "adapter__targets": "attention"}
    _, cut, metrics, _ = _train(model, parts, **options)
    _, whole, wanted, _ = _train(model, [_joined(b) for b in parts], **options)
    for name in ("loss", "accuracy", "grad_norm"):
        assert tiny.relative(getattr(metrics, name), getattr(wanted, name)) < 1e-6, name
    for name, array in cut.trainable.items():
        assert tiny.relative(array, whole.trainable[name]) < 1e-5, name


def test_mean_loss_is_over_labels():
    model, batch = tiny.classifier(2), tiny.batch(0)
    _, _, metrics, _ = _train(model, [batch], steps=1)
    pack = Pack.build(model, [tiny.config()], 10)
    micro = {n: jnp.asarray(a[0]) for n, a in batch.items()}
    adapted = pack.part.merge(
        *(jax.tree.map(lambda a: a[0], t) for t in (pack.state.trainable, pack.fixed.settings)), pack.part.frozen, training=True
    )
    logits = np.asarray(jax.jit(lambda m: adapted.readout()(adapted.features(m)))(micro), np.float64)[:8]
    p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ids = batch["target_ids"][0][:8]
    assert float(metrics.loss[0]) == pytest.approx(-p[np.arange(8), ids].mean(), rel=1e-5)
    assert float(metrics.accuracy[0]) == pytest.approx((p.argmax(-1) == ids).mean())


def test_a_batch_without_labels_moves_nothing_and_is_no_failure():
    batch = tiny.batch(0)
    batch["target_weights"][...] = 0
    _, _, metrics, changed = _train(tiny.classifier(2), [batch])
    assert not changed and float(metrics.loss[0]) == 0


def test_bias_all_and_modules_to_save_train_those_alone():
    _, _, _, changed = _train(
        tiny.classifier(2), [tiny.batch(0)], adapter__targets=["q_proj"], adapter__bias="all", adapter__modules_to_save=["attn_norm"]
    )
    assert "base.layers.attn_norm.scale" in changed and "base.layers.mlp.up_proj.bias" in changed and "base.pooler.bias" in changed
    assert all(n.endswith((".bias", "lora_a", "lora_b")) or "attn_norm" in n or "classifier" in n for n in changed)


def test_lora_only_biases_of_adapted_layers_alone_even_with_decay():
    pack, state, _, changed = _train(
        tiny.classifier(4),
        [tiny.batch(0)],
        adapter__targets=["v_proj"],
        adapter__layers=[1, 3],
        adapter__bias="lora_only",
        optimizer__weight_decay=0.5,
    )
    name = "base.layers.attn.v_proj.bias"
    assert {n for n in changed if "lora" not in n and "classifier" not in n} == {name}
    start = Pack.build(tiny.classifier(4), pack.configs, 10).state.trainable[name]
    assert (np.asarray(state.trainable[name]) != np.asarray(start)).any(-1)[0].tolist() == [False, True, False, True]


def test_full_trains_every_weight_and_head_only_the_head():
    pack, _, _, changed = _train(tiny.classifier(2), [tiny.batch(0, rows=6)], adapter__method="full", optimizer__weight_decay=0.1)
    assert not pack.part.frozen
    assert changed == set(pack.part.trainable) - {"base.type_embed.embedding"} or changed == set(pack.part.trainable)
    _, _, _, changed = _train(tiny.classifier(2), [tiny.batch(0)], adapter__method="head")
    assert changed == {"classifier.kernel", "classifier.bias"}


def test_a_bfloat16_base_trains_float32_factors():
    pack, state, metrics, changed = _train(tiny.classifier(2, dtype=jnp.bfloat16), [tiny.batch(0)], adapter__targets="attention")
    assert {a.dtype for a in jax.tree.leaves(state.trainable)} == {jnp.dtype("float32")}
    assert {a.dtype for a in jax.tree.leaves(state.optimizer)} <= {jnp.dtype("float32"), jnp.dtype("int32")}
    assert changed == set(pack.part.trainable) and np.isfinite(np.asarray(metrics.loss)).all()


@pytest.mark.slow
def test_dropout_is_by_seed_and_step():
    pack = Pack.build(tiny.classifier(2), [tiny.config(adapter__dropout=0.5)] * 2, 10)
    hyper = pack.fixed.hyper
    trainable = {n: a + 0.1 for n, a in pack.state.trainable.items()}

    def losses(step, seeds):
        fixed = pack.fixed._replace(hyper=hyper._replace(seed=jnp.array(seeds, jnp.uint32)))
        state = jax.tree.map(jnp.copy, pack.state._replace(trainable=trainable))
        return np.asarray(pack.programs.train(state, fixed, pack.part.frozen, tiny.batch(0), np.int32(step))[1].loss)

    one = losses(0, [1, 1])
    assert one[0] == one[1] and np.array_equal(one, losses(0, [1, 1]))
    assert losses(0, [1, 2])[1] != one[1] and losses(1, [1, 1])[0] != one[0]
    micro = {n: a[0] for n, a in tiny.batch(0).items()}
    seen = [np.asarray(pack.programs.evaluate(trainable, pack.fixed.settings, pack.part.frozen, micro)[0]) for _ in range(2)]
    assert np.array_equal(*seen)
