"""Shared layers against their formulas in NumPy."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax.models import layers
from tests import tiny

X = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("gelu", lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2)))),
        ("gelu_tanh", lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
        ("silu", lambda x: x / (1 + math.exp(-x))),
        ("relu", lambda x: max(x, 0.0)),
    ],
)
def test_activations(name, formula):
    np.testing.assert_allclose(layers.activation(name, jnp.asarray(X)), np.vectorize(formula)(X.astype(np.float64)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "offset"), [("layer", 0.0), ("rms", 0.0), ("rms", 1.0)])
def test_norms_in_float32_with_a_large_mean(kind, offset):
    """A one-pass variance would lose all its digits here."""
    x = X + 1000.0
    model = tiny.random_model(lambda: layers.norm(kind, 8, 1e-6, offset=offset, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    y = x.astype(np.float64)
    y = y - y.mean(-1, keepdims=True) if kind == "layer" else y
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * (offset + np.asarray(model.scale[...]))
    y = y + np.asarray(model.bias[...]) if kind == "layer" else y
    np.testing.assert_allclose(model(jnp.asarray(x)), y, rtol=1e-3, atol=1e-3)


def test_row_layout_defaults():
    tokens = jnp.zeros((2, 3), jnp.int32)
    segments, positions = layers.row_layout(tokens, None, None, None)
    assert segments.tolist() == [[1, 1, 1]] * 2 and positions.tolist() == [[0, 1, 2]] * 2
    mask = jnp.array([[1, 1, 0]] * 2)
    assert layers.row_layout(tokens, mask, None, None)[0].tolist() == mask.tolist()
    assert layers.row_layout(tokens, mask, None, 2 * mask)[0].tolist() == (2 * mask).tolist()


def test_dropout_keeps_the_mean_and_its_rate():
    x = jnp.ones((400, 50))
    out = np.asarray(layers.dropout(x, 0.25, jax.random.key(0)))
    assert set(np.unique(out)) == {0.0, np.float32(1 / 0.75)}
    assert abs((out == 0).mean() - 0.25) < 0.01 and abs(out.mean() - 1) < 0.015
