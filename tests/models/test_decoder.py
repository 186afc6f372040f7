"""The decoder: causality, packed rows, gathered positions, grouped-query attention, the tied head."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import tiny

TOL = {"rtol": 2e-5, "atol": 2e-5}

pytestmark = pytest.mark.usefixtures("compile_cache")


def _tokens(rows, length, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(1, tiny.VOCAB, (rows, length)), jnp.int32)


def test_no_token_sees_a_later_one():
    model, tokens = tiny.decoder(), _tokens(2, 8)
    changed = tiny.outputs(model, tokens.at[:, 5].set(1 + tokens[:, 5] % 60))
    difference = np.abs(np.asarray(changed - tiny.outputs(model, tokens))).max(-1)
    assert (difference[:, :5] == 0).all() and (difference[:, 5:] > 0).all()


def test_padding_on_the_right_does_not_reach_real_tokens():
    model, tokens = tiny.decoder(), _tokens(2, 9)
    mask = jnp.array([[1] * 6 + [0] * 3] * 2)
    np.testing.assert_allclose(tiny.outputs(model, tokens, mask)[:, :6], tiny.outputs(model, tokens[:, :6]), **TOL)


def test_padding_on_the_left_with_positions_changes_nothing():
    model, tokens = tiny.decoder(), _tokens(1, 6)
    padded = jnp.concatenate([jnp.zeros((1, 3), jnp.int32), tokens], axis=1)
    mask, positions = jnp.array([[0] * 3 + [1] * 6]), jnp.array([[0, 0, 0, *range(6)]])
    np.testing.assert_allclose(tiny.outputs(model, padded, mask, positions)[:, 3:], tiny.outputs(model, tokens), **TOL)


def test_packed_rows_equal_separate_rows():
    model = tiny.decoder()
    a, b = _tokens(2, 5, 1), _tokens(2, 7, 2)
    packed = jnp.concatenate([a, b, jnp.zeros((2, 2), jnp.int32)], axis=1)
    positions = jnp.array([[*range(5), *range(7), 0, 0]] * 2)
    segments = jnp.array([[1] * 5 + [2] * 7 + [0] * 2] * 2)
    out = tiny.outputs(model, packed, positions=positions, segment_ids=segments)
    np.testing.assert_allclose(out[:, :5], tiny.outputs(model, a), **TOL)
    np.testing.assert_allclose(out[:, 5:12], tiny.outputs(model, b), **TOL)
    assert np.isfinite(np.asarray(out)).all()


def test_only_relative_positions_matter():
    model, tokens = tiny.decoder(), _tokens(1, 6)
    np.testing.assert_allclose(
        tiny.outputs(model, tokens, positions=jnp.arange(6)[None] + 17), tiny.outputs(model, tokens), rtol=1e-4, atol=1e-4
    )
    assert tiny.relative(tiny.outputs(model, tokens, positions=2 * jnp.arange(6)[None]), tiny.outputs(model, tokens)) > 1e-3


@pytest.mark.parametrize("count", [3, 20])  # the first leaves most of the top layer out, the second does not
def test_gather_equals_the_full_pass(count):
    model, tokens = tiny.decoder(), _tokens(3, 8)
    index = jnp.asarray(np.random.default_rng(0).integers(0, 24, count))
    np.testing.assert_allclose(
        tiny.outputs(model, tokens, gather=index, method="hidden"),
        tiny.outputs(model, tokens, method="hidden").reshape(-1, tiny.WIDTH)[index],
        **TOL,
    )


def test_key_value_heads_serve_groups_of_query_heads():
    """Grouped-query attention is full attention with each key/value head repeated for its group."""
    grouped, tokens = tiny.decoder(2), _tokens(2, 7)
    attention = grouped.layers.segments[0].block.attn
    full = nnx.clone(grouped)
    wide = full.layers.segments[0].block.attn
    for name in ("k_proj", "v_proj"):
        kernel = getattr(attention, name).kernel[...]
        heads = kernel.reshape(*kernel.shape[:-1], 2, 8)
        getattr(wide, name).kernel = nnx.Param(jnp.repeat(heads, 2, axis=-2).reshape(*kernel.shape[:-1], 32))
    np.testing.assert_allclose(tiny.outputs(full, tokens), tiny.outputs(grouped, tokens), **TOL)


def test_tied_head_is_the_embedding():
    model, tokens = tiny.decoder(tied=True), _tokens(1, 4)
    logits = tiny.outputs(model, tokens, method="hidden") @ np.asarray(model.embed.embedding[...]).T
    np.testing.assert_allclose(tiny.outputs(model, tokens), logits, **TOL)
    untied = tiny.decoder(tied=False)
    np.testing.assert_allclose(
        tiny.outputs(untied, tokens), tiny.outputs(untied, tokens, method="hidden") @ np.asarray(untied.lm_head.kernel[...]), **TOL
    )
