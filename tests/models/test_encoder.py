"""The encoder: masks, packed rows, gathered positions, the pooler, dtypes."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax.models.encoder import Encoder
from tests import tiny

# Beside BERT's form the others: a window in all layers but the first, rotary positions, a norm at the end; scores by distance.
RELATIVE = {"relative_attention": True, "position_biased_input": False, "pos_att_type": "c2p|p2c", "norm_rel_ebd": "layer_norm"}
ENCODERS = {
    "bert": tiny.encoder,
    "modernbert": lambda: tiny.encoder_of("modernbert", local_attention=4),
    "deberta-v2": lambda: tiny.encoder_of("deberta-v2", **RELATIVE, position_buckets=4, max_relative_positions=8, conv_kernel_size=3),
}

pytestmark = pytest.mark.usefixtures("compile_cache")


def _tokens(rows, length, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(1, tiny.VOCAB, (rows, length)), jnp.int32)


def test_padding_does_not_reach_real_tokens():
    model, tokens = tiny.encoder(), _tokens(2, 9)
    alone = tiny.outputs(model, tokens[:, :6])
    mask = jnp.array([[1] * 6 + [0] * 3] * 2)
    np.testing.assert_allclose(tiny.outputs(model, tokens, mask)[:, :6], alone, rtol=2e-5, atol=2e-5)
    assert np.abs(np.asarray(tiny.outputs(model, tokens)[:, :6] - alone)).max() > 1e-3  # the mask is what did it


def test_every_token_sees_every_other():
    model, tokens = tiny.encoder(), _tokens(1, 6)
    changed = tiny.outputs(model, tokens.at[0, 5].set(1 + tokens[0, 5] % 60))
    assert (np.abs(np.asarray(changed - tiny.outputs(model, tokens))).max(-1) > 0).all()


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.long), 2])
def test_packed_rows_equal_separate_rows(rows, family):
    model = ENCODERS[family]()
    a, b = _tokens(rows, 5, 1), _tokens(rows, 7, 2)
    packed = jnp.concatenate([a, b, jnp.zeros((rows, 2), jnp.int32)], axis=1)
    positions = jnp.array([[*range(5), *range(7), 0, 0]] * rows)
    segments = jnp.array([[1] * 5 + [2] * 7 + [0] * 2] * rows)
    out = tiny.outputs(model, packed, positions=positions, segment_ids=segments)
    np.testing.assert_allclose(out[:, :5], tiny.outputs(model, a), rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(out[:, 5:12], tiny.outputs(model, b), rtol=2e-5, atol=2e-5)
    assert np.isfinite(np.asarray(out)).all()


@pytest.mark.parametrize("family", ENCODERS)
def test_gather_equals_the_full_pass(family):
    model, tokens = ENCODERS[family](), _tokens(3, 8)
    index = jnp.array([0, 8, 16, 23])
    np.testing.assert_allclose(
        tiny.outputs(model, tokens, gather=index, method="hidden"),
        tiny.outputs(model, tokens).reshape(-1, tiny.WIDTH)[index],
        rtol=2e-5,
        atol=2e-5,
    )


def test_pooler_is_tanh_of_a_linear_layer_or_nothing():
    x = jnp.ones((2, tiny.WIDTH))
    model = tiny.encoder(1)
    np.testing.assert_allclose(
        model.pool(x),
        np.tanh(np.asarray(x) @ np.asarray(model.pooler.kernel[...]) + np.asarray(model.pooler.bias[...])),
        rtol=1e-5,
        atol=1e-6,
    )
    assert tiny.encoder(1, pooler=False).pool(x) is x


def test_bfloat16_weights_give_bfloat16_states_near_float32():
    full, half = tiny.encoder(2), tiny.encoder(2, dtype=jnp.bfloat16)
    values = tiny.base_arrays(full)
    for path, variable in nnx.iter_graph(half):
        if isinstance(variable, nnx.Param):
            variable[...] = jnp.asarray(values[".".join(map(str, path))], jnp.bfloat16)
    tokens = _tokens(2, 8)
    assert tiny.outputs(half, tokens).dtype == jnp.bfloat16
    assert tiny.relative(tiny.outputs(half, tokens).astype(jnp.float32), tiny.outputs(full, tokens)) < 0.1


def test_a_window_is_as_far_as_a_layer_sees():
    """Half of `local_attention` to each side: 2 a layer, in 2 layers of 3; the first sees all, unless it has a window too."""
    tokens = _tokens(1, 12)
    changed = tokens.at[0, 0].set(1 + tokens[0, 0] % 60)
    for types, reach in (("sliding_attention",) * 3, 6), (("sliding_attention", "full_attention", "sliding_attention"), 11):
        model = tiny.encoder_of("modernbert", local_attention=4, layer_types=types)
        moved = np.abs(tiny.outputs(model, tokens) - tiny.outputs(model, changed)).max(-1)[0] > 0
        assert moved.tolist() == [True] * (reach + 1) + [False] * (11 - reach)


def test_the_first_layers_norm_is_left_out():
    model, tokens = tiny.encoder_of("modernbert"), _tokens(1, 6)
    before = tiny.outputs(model, tokens)
    scale = model.layers.segments[0].block.attn_norm.scale
    scale[...] = scale[...].at[0].set(7.0)
    assert np.array_equal(tiny.outputs(model, tokens), before)
    scale[...] = scale[...].at[1].set(7.0)
    assert not np.array_equal(tiny.outputs(model, tokens), before)


def test_is_an_encoder():
    assert isinstance(tiny.encoder(1), Encoder) and not tiny.encoder(1).is_decoder
