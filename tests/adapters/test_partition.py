"""Cutting a model into what trains, a member's settings, and the base."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax.adapters.inject import inject, inject_layout
from lora_jax.adapters.layout import resolve, unite
from lora_jax.adapters.partition import partition, update_mask, with_dropout_keys
from lora_jax.config.schema import AdapterConfig
from tests import tiny

TOKENS = np.random.default_rng(0).integers(1, tiny.VOCAB, (2, 9)).astype(np.int32)


def _adapt(model, **values):
    return inject(model, AdapterConfig(**({"rank": 4, "targets": ["q_proj"]} | values)), rngs=nnx.Rngs(0))


def test_parts_make_the_model_again():
    adapted = _adapt(tiny.encoder(3), dropout=0.5, layers="last:2", bias="all")
    part = partition(adapted)
    again = part.merge(part.trainable, part.settings, part.frozen, training=False)
    np.testing.assert_array_equal(tiny.outputs(again, TOKENS), tiny.outputs(nnx.view(adapted, deterministic=True), TOKENS))
    assert set(part.trainable) == set(part.labels)
    assert not set(part.trainable) & set(part.frozen) and not set(part.settings) & set(part.frozen)


@pytest.mark.slow
def test_dropout_while_training_alone():
    adapted = _adapt(tiny.encoder(2), dropout=0.5)
    part = partition(adapted)
    trained = {n: a + 0.3 for n, a in part.trainable.items()}

    def run(key, training):
        settings = with_dropout_keys(part, part.settings, jax.random.key(key))
        return np.asarray(part.merge(trained, settings, part.frozen, training=training)(TOKENS))

    assert not np.array_equal(run(0, True), run(1, True)) and np.array_equal(run(0, True), run(0, True))
    assert np.array_equal(run(0, False), run(1, False))


def test_dropout_keys_depend_on_site_and_layer_from_the_top():
    wide = partition(_adapt(tiny.encoder(4), targets=["q_proj", "k_proj"], dropout=0.5))
    narrow = partition(_adapt(tiny.encoder(4), dropout=0.5, layers="last:2"))
    key = jax.random.key(3)
    a, b = (with_dropout_keys(p, p.settings, key) for p in (wide, narrow))
    bits = lambda keys: np.asarray(jax.random.key_data(keys))
    name = "layers.attn.q_proj.dropout_key"
    np.testing.assert_array_equal(bits(a[name])[2:], bits(b[name]))
    every = np.concatenate([bits(a[name]), bits(a["layers.attn.k_proj.dropout_key"])])
    assert len({k.tobytes() for k in every}) == 8
    assert not np.array_equal(bits(with_dropout_keys(wide, wide.settings, jax.random.key(4))[name]), bits(a[name]))


def test_what_trains_is_float32_whatever_the_base():
    part = partition(_adapt(tiny.encoder(2, dtype=jnp.bfloat16), method="full"))
    assert {a.dtype for a in part.trainable.values()} == {jnp.dtype("float32")}
    model = part.merge(part.trainable, part.settings, part.frozen, training=True)
    assert model(TOKENS).dtype == jnp.bfloat16
    lora = partition(_adapt(tiny.encoder(2, dtype=jnp.bfloat16)))
    assert {a.dtype for a in lora.trainable.values()} == {jnp.dtype("float32")}
    assert {a.dtype for a in lora.frozen.values()} == {jnp.dtype("bfloat16")}


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="nothing is trainable"):
        partition(tiny.encoder(1))


def test_update_mask_of_lora_only_biases():
    model = tiny.encoder(4)
    specs = [
        resolve(model, AdapterConfig(targets=["q_proj"], layers=[1, 3], bias="lora_only")),
        resolve(model, AdapterConfig(targets=["k_proj", "pooler"], bias="lora_only")),
    ]
    layout = unite(model, specs)
    part = partition(inject_layout(model, layout))
    one, two = (update_mask(part, s, layout) for s in specs)
    assert one["layers.attn.q_proj.bias"].ravel().tolist() == [0, 1, 0, 1]
    assert one["layers.attn.k_proj.bias"].ravel().tolist() == [0] * 4 and float(one["pooler.bias"]) == 0
    assert two["layers.attn.k_proj.bias"].ravel().tolist() == [1] * 4 and float(two["pooler.bias"]) == 1
    assert update_mask(part, resolve(model, AdapterConfig(bias="all")), unite(model, [resolve(model, AdapterConfig(bias="all"))])) is None
