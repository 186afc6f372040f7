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


def test_unknown_activation():
    with pytest.raises(KeyError):
        layers.activation("swish2", jnp.ones(1))


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norms_in_float32_with_a_large_mean(kind):
    """A one-pass variance would lose all its digits here."""
    x = X + 1000.0
    model = tiny.random_model(lambda: layers.norm(kind, 8, 1e-6, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    y = x.astype(np.float64)
    y = y - y.mean(-1, keepdims=True) if kind == "layer" else y
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(model.scale[...])
    y = y + np.asarray(model.bias[...]) if kind == "layer" else y
    np.testing.assert_allclose(model(jnp.asarray(x)), y, rtol=1e-3, atol=1e-3)


def test_rotation_is_by_position_times_frequency():
    positions = jnp.array([[0, 1, 5]])
    cos, sin = layers.rotary_angles(positions, 4, 100.0)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 3, 1, 4)), jnp.float32)
    out = np.asarray(layers.rotate(x, (cos, sin)))[0, :, 0]
    for t, p in enumerate((0, 1, 5)):
        for k in range(2):  # the k-th pair lies half a head apart
            angle = p * 100.0 ** (-2 * k / 4)
            u, v = float(x[0, t, 0, k]), float(x[0, t, 0, k + 2])
            assert out[t, k] == pytest.approx(u * math.cos(angle) - v * math.sin(angle), abs=1e-5)
            assert out[t, k + 2] == pytest.approx(u * math.sin(angle) + v * math.cos(angle), abs=1e-5)


def test_segment_mask_shows_own_segment_and_nothing_later():
    segments = jnp.array([[1, 1, 2, 2, 0]])
    both = np.asarray(layers.segment_mask(segments, causal=False))[0, 0].astype(int)
    np.testing.assert_array_equal(both, [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]])
    np.testing.assert_array_equal(np.asarray(layers.segment_mask(segments, causal=True))[0, 0], np.tril(both))


def test_attention_is_softmax_of_scaled_scores():
    model = tiny.encoder(1)
    graphdef, state = nnx.split(model.layers.segments[0].block.attn)
    attention = nnx.merge(graphdef, jax.tree.map(lambda a: a[0], state))
    x = np.random.default_rng(0).standard_normal((1, 6, tiny.WIDTH)).astype(np.float32)
    segments = jnp.array([[1, 1, 1, 1, 2, 2]])
    out = attention(jnp.asarray(x), layers.Context(layers.segment_mask(segments, causal=False), None), 0, None)
    q, k, v = (
        (x[0] @ np.asarray(p.kernel[...]) + np.asarray(p.bias[...])).reshape(6, 4, 8)
        for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    scores = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(8)
    scores = np.where(np.asarray(segments)[0][:, None] == np.asarray(segments)[0], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("hqk,khd->qhd", weights, v).reshape(6, 32)
    expected = mixed @ np.asarray(attention.o_proj.kernel[...]) + np.asarray(attention.o_proj.bias[...])
    np.testing.assert_allclose(out[0], expected, rtol=1e-4, atol=1e-5)


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


def test_a_models_own_dropout_needs_a_key_and_differs_between_layers_and_places():
    model = tiny.encoder(2)
    tokens = jnp.arange(24).reshape(2, 12) % tiny.VOCAB
    plain = tiny.outputs(model, tokens)
    keyed = tiny.outputs(model, tokens, noise=jax.random.key(1))
    np.testing.assert_array_equal(plain, keyed)  # the rate is 0
    model.dropout = 0.1
    np.testing.assert_array_equal(plain, tiny.outputs(model, tokens))
    first, again, other = (tiny.outputs(model, tokens, noise=jax.random.key(k)) for k in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - plain).max() > 0.05 and np.abs(first - other).max() > 0.05
    context = layers.Context(jnp.ones((1, 1, 1, 1), bool), None, jax.random.key(0), 0.5)
    ones = jnp.ones((8, 8))
    drawn = [np.asarray(context.drop(ones, layer, place)) for layer, place in ((0, 0), (0, 1), (1, 0))]
    assert all((a != b).any() for a, b in ((drawn[0], drawn[1]), (drawn[0], drawn[2]), (drawn[1], drawn[2])))
