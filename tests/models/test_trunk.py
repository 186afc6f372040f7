"""A model's layers below the cut, taken out and put back."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from lora_jax.models.stack import cut_of
from tests import tiny

pytestmark = pytest.mark.usefixtures("compile_cache")


def _cut(model, *layers):
    for layer in layers:
        model.base.layers.split_at(layer)
    return model


@pytest.mark.parametrize(("model", "cut"), [(tiny.classifier(3), 1), (tiny.language_model(4), 2)])
def test_features_from_the_trunk_are_the_features(model, cut):
    model = _cut(model, cut)
    causal = model.base.is_decoder
    micro = {name: array[0] for name, array in tiny.batch(causal=causal).items()}
    graphdef, state = nnx.split(model, graph=True)

    @jax.jit
    def three(state, micro):
        model = nnx.merge(graphdef, state)
        trunk = model.trunk(micro)
        features = model.features(micro | {"trunk": jax.lax.optimization_barrier(trunk)})
        other = model.features(micro | {"trunk": 1.5 * trunk})
        return trunk, features, other, model.features(micro)

    trunk, features, other, whole = three(state, micro)
    assert trunk.shape == (4, 12, tiny.WIDTH)
    np.testing.assert_allclose(features, whole, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(other - whole)).max() > 1e-3  # it is the trunk that features start from


def test_a_stack_that_is_whole_has_none():
    model = tiny.language_model(3)
    micro = {name: array[0] for name, array in tiny.batch(causal=True).items()}
    assert cut_of(model) == 0
    with pytest.raises(ValueError, match="no cut"):
        model.trunk(micro)
    assert cut_of(_cut(model, 2, 1)) == 1
