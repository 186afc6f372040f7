"""Heads: which positions they read, and how they make class logits of them."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models.heads import LabelWordClassifier
from tests import tiny

TOL = {"rtol": 2e-5, "atol": 2e-5}
pytestmark = pytest.mark.usefixtures("compile_cache")


def _micro(**options):
    return {name: jnp.asarray(a[0]) for name, a in tiny.batch(**options).items()}


def _hidden(model, batch):
    return tiny.outputs(model.base, batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"])


def test_cls_reads_the_first_token_through_the_pooler():
    model, batch = tiny.classifier(), _micro()
    first = _hidden(model, batch).reshape(-1, tiny.WIDTH)[np.asarray(batch["target_index"])]
    np.testing.assert_allclose(tiny.outputs(model, batch, method="features"), model.base.pool(jnp.asarray(first)), **TOL)


def test_mean_reads_all_tokens_of_an_example_and_no_padding():
    model, batch = tiny.classifier(pooling="mean"), _micro()
    features = tiny.outputs(model, batch, method="features")
    hidden, examples = _hidden(model, batch), np.asarray(batch["example_ids"])
    for k in range(8):
        np.testing.assert_allclose(features[k], hidden[examples == k].mean(0), **TOL)
    assert features.shape[0] == 9 and not np.asarray(features[8]).any()  # no example there, and no division by 0


def test_class_logits_are_linear_and_float32():
    model = tiny.classifier(dtype=jnp.bfloat16)
    x = jnp.ones((2, tiny.WIDTH), jnp.bfloat16)
    logits = model.readout()(x)
    assert logits.dtype == jnp.float32 and logits.shape == (2, tiny.CLASSES)
    kernel = np.asarray(model.classifier.kernel[...])
    assert 0.01 < kernel.std() < 0.03


def test_language_model_predicts_at_the_targets():
    model, batch = tiny.language_model(), _micro(causal=True)
    expected = _hidden(model, batch).reshape(-1, tiny.VOCAB)[np.asarray(batch["target_index"])]
    np.testing.assert_allclose(model.readout()(tiny.outputs(model, batch, method="features")), expected, **TOL)


@pytest.mark.parametrize("tied", [True, False])
def test_label_words_pick_their_logits(tied):
    model, batch = tiny.language_model(tied=tied), _micro(causal=True)
    words = LabelWordClassifier(model.base, (7, 3))
    logits = model.readout()(tiny.outputs(model, batch, method="features"))
    np.testing.assert_allclose(words.readout()(tiny.outputs(words, batch, method="features")), np.asarray(logits)[:, [7, 3]], **TOL)
