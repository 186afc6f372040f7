"""A decoder that goes on from its cache gives what it gives for the whole rows at once, and writes into the arrays that are there."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax.models.cache import Cache, slots_for
from lora_jax.models.layers import LayerType
from lora_jax.models.positions import Rotary
from tests import tiny

pytestmark = pytest.mark.usefixtures("compile_cache")
ROWS, PROMPT, LENGTH = 3, 12, 20
LOCAL, FAR = LayerType(5, Rotary(8)), LayerType(None, Rotary(8, 500.0))


def _decoder(kinds, depth=3, cut=None):
    model = tiny.decoder(depth)
    model.config = nnx.static(dataclasses.replace(model.config, layer_types=kinds))
    if cut is not None:
        model.layers.split_at(cut)
    return model


def _rows():
    """Tokens, mask and positions of rows of unlike length, padded on the left."""
    tokens = np.random.default_rng(0).integers(1, tiny.VOCAB, (ROWS, LENGTH)).astype(np.int32)
    mask = np.ones_like(tokens)
    mask[1, :5], mask[2, :9] = 0, 0
    return tokens, mask, np.maximum(np.cumsum(mask, 1) - 1, 0)


def _piecewise(model, tokens, mask, cuts):
    """The logits of the whole rows, computed piece by piece."""
    graphdef, state = nnx.split(model, graph=True)

    def run(state, tokens, mask):
        model = nnx.merge(graphdef, state)
        cache, out = model.empty_cache(ROWS, LENGTH), []
        for start, stop in zip((0, *cuts), (*cuts, LENGTH), strict=True):
            hidden, cache = model.extend(cache, tokens[:, start:stop], mask[:, start:stop], first=start == 0)
            out.append(model.head(hidden))
        return jnp.concatenate(out, 1), cache

    return jax.jit(run)(state, tokens, mask)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kinds, cut",
    [
        pytest.param((FAR,), None, marks=pytest.mark.slow),
        pytest.param((FAR,), 1, marks=pytest.mark.long),
        ((LOCAL, FAR, LOCAL), 2),
        pytest.param((LOCAL,), None, marks=pytest.mark.long),
    ],
    ids=["plain", "cut", "mixed", "rolling"],
)
def test_piece_by_piece_equals_whole_rows(kinds, cut):
    model = _decoder(kinds, cut=cut)
    tokens, mask, positions = _rows()
    whole = tiny.outputs(model, tokens, mask, positions)
    rolling = kinds == (LOCAL,)
    got, cache = _piecewise(model, tokens, mask, range(PROMPT, LENGTH) if rolling else (PROMPT, PROMPT + 1, PROMPT + 2, LENGTH - 3))
    np.testing.assert_allclose(np.asarray(got)[mask == 1], whole[mask == 1], atol=1e-4 * np.abs(whole).max())
    assert int(cache.length) == LENGTH and cache.counts.tolist() == mask.sum(1).tolist()
    assert cache.slots == (5 if rolling else LENGTH)
    if rolling:
        with pytest.raises(ValueError, match="one token at a time"):
            model.extend(cache, tokens[:, :2])


def test_slots():
    assert slots_for((LOCAL,), 20) == (5, True)
    assert slots_for((LOCAL,), 4) == (4, False)
    assert slots_for((LOCAL, LayerType(7)), 20) == (7, True)
    assert slots_for((LOCAL, FAR), 20) == (20, False)


def test_a_step_writes_into_the_cache_it_was_given():
    """With the cache donated, no array of it is allocated anew: not for the new tokens, not for reading a layer of it."""
    model = _decoder((FAR,), depth=4)
    graphdef, state = nnx.split(model, graph=True)
    cache = model.empty_cache(2, 4096)

    def step(state, cache: Cache, tokens):
        hidden, cache = nnx.merge(graphdef, state).extend(cache, tokens)
        return hidden, cache

    tokens = jnp.ones((2, 1), jnp.int32)
    memory = jax.jit(step, donate_argnums=1).lower(state, cache, tokens).compile().memory_analysis()
    size = sum(a.nbytes for a in (*cache.keys, *cache.values))
    assert memory.alias_size_in_bytes >= size
    layer = size / model.layers.depth
    assert memory.temp_size_in_bytes < 1.5 * layer, (memory.temp_size_in_bytes, layer)
