"""Attention against its formula in NumPy, and what each kind of layer sees."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax.models.block import Context, segment_mask
from tests import tiny


def test_segment_mask_shows_own_segment_and_nothing_later():
    segments = jnp.array([[1, 1, 2, 2, 0]])
    both = np.asarray(segment_mask(segments, causal=False))[0, 0].astype(int)
    np.testing.assert_array_equal(both, [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]])
    np.testing.assert_array_equal(np.asarray(segment_mask(segments, causal=True))[0, 0], np.tril(both))


def test_attention_is_softmax_of_scaled_scores():
    model = tiny.encoder(1)
    graphdef, state = nnx.split(model.layers.segments[0].block.attn)
    attention = nnx.merge(graphdef, jax.tree.map(lambda a: a[0], state))
    x = np.random.default_rng(0).standard_normal((1, 6, tiny.WIDTH)).astype(np.float32)
    segments = jnp.array([[1, 1, 1, 1, 2, 2]])
    out = attention(jnp.asarray(x), Context(segment_mask(segments, causal=False)[None], None), 0, None)
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


@pytest.mark.slow
def test_a_models_own_dropout_needs_a_key_and_differs_between_layers_and_places():
    model = tiny.encoder(2)
    tokens = jnp.arange(24).reshape(2, 12) % tiny.VOCAB
    plain = tiny.outputs(model, tokens)
    np.testing.assert_array_equal(plain, tiny.outputs(model, tokens, dropout_rng=jax.random.key(1), method="hidden"))  # the rate is 0
    model.dropout = 0.1
    np.testing.assert_array_equal(plain, tiny.outputs(model, tokens))
    graphdef, state = nnx.split(model, graph=True)
    noisy = jax.jit(lambda state, key: nnx.merge(graphdef, state).hidden(tokens, dropout_rng=key))
    first, again, other = (np.asarray(noisy(state, jax.random.key(k))) for k in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - plain).max() > 0.05 and np.abs(first - other).max() > 0.05
    context = Context(jnp.ones((1, 1, 1, 1, 1), bool), None, jax.random.key(0), dropout=0.5)
    ones = jnp.ones((8, 8))
    drawn = [np.asarray(context.drop(ones, layer, place)) for layer, place in ((0, 0), (0, 1), (1, 0))]
    assert all((a != b).any() for a, b in ((drawn[0], drawn[1]), (drawn[0], drawn[2]), (drawn[1], drawn[2])))
