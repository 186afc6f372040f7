"""RoAd against its equation in float64."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax.adapters.inject import inject, site_modules
from lora_jax.adapters.layout import resolve
from lora_jax.adapters.merge import merge, merged_arrays
from lora_jax.config.doors import METHODS
from lora_jax.errors import InputError
from lora_jax.packing.pack import Pack, static_key
from tests import tiny

INPUTS, OUTPUTS, GROUP = 10, 24, 8


def matrix(variant: str, theta: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """R (outputs, outputs), pair by pair."""
    r, half = np.zeros((OUTPUTS, OUTPUTS)), GROUP // 2
    for start in range(0, OUTPUTS, GROUP):
        for place in range(half):
            i, j = start + place, start + half + place
            if variant == "road_1":
                at = {k: (start // 2 + place,) * 2 for k in (i, j)}
            elif variant == "road_2":
                at = {k: (k, k) for k in (i, j)}
            else:
                at = {k: (2 * start + k - start, 2 * start + GROUP + k - start) for k in (i, j)}
            for row, partner, sign in ((i, j, -1), (j, i, 1)):
                own, other = at[row]
                r[row, row] = alpha[own] * np.cos(theta[own])
                r[row, partner] = sign * alpha[other] * np.sin(theta[other])
    return r


@pytest.mark.parametrize(("variant", "count"), [("road_1", OUTPUTS), ("road_2", 2 * OUTPUTS), ("road_4", 4 * OUTPUTS)])
def test_it_computes_what_the_equation_says(variant: str, count: int) -> None:
    net = nnx.Sequential(nnx.Linear(INPUTS, OUTPUTS, rngs=nnx.Rngs(0)))
    net.layers[0].bias.set_value(jnp.arange(OUTPUTS) / 10)
    config = tiny.adapter(method="road", variant=variant, group_size=GROUP, targets="all-linear")
    (site,) = site_modules(inject(net, config, rngs=nnx.Rngs(1))).values()
    assert site.method.count(site.site, 8) == count
    rng = np.random.default_rng(0)
    theta, alpha = rng.standard_normal(site.theta.shape), 1 + 0.5 * rng.standard_normal(site.alpha.shape)
    site.theta.set_value(jnp.asarray(theta, jnp.float32))
    site.alpha.set_value(jnp.asarray(alpha, jnp.float32))
    x = rng.standard_normal((5, INPUTS))
    kernel, bias = (np.asarray(v[...], np.float64) for v in (site.base.kernel, site.base.bias))
    expected = (x @ kernel + bias) @ matrix(variant, theta, alpha).T
    assert tiny.relative(site(jnp.asarray(x, jnp.float32)), expected) < 1e-5
    weight, turned = merged_arrays(site)
    assert turned is not None and tiny.relative(x @ np.asarray(weight) + np.asarray(turned), expected) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["road_2", "road_4"])
def test_stacked_layers_have_numbers_of_their_own(variant: str) -> None:
    model, tokens = tiny.encoder(3), np.arange(1, 13, dtype=np.int32).reshape(2, 6)
    config = tiny.adapter(method="road", variant=variant, group_size=16, targets=["q_proj", "up_proj"], layers="last:2")
    adapted = inject(model, config, rngs=nnx.Rngs(0))
    for seed, site in enumerate(site_modules(adapted).values()):
        for array in (site.theta, site.alpha):
            array.set_value(array[...] + jnp.asarray(0.3 * np.random.default_rng(seed).standard_normal(array.shape), jnp.float32))
    outputs = tiny.outputs(adapted, tokens)
    assert tiny.relative(outputs, tiny.outputs(model, tokens)) > 1e-2
    assert tiny.relative(tiny.outputs(merge(adapted), tokens), outputs) < 1e-5


def test_scales_do_not_decay_and_variants_are_packs_of_their_own() -> None:
    model = tiny.classifier(2)
    first, second = (tiny.config(adapter__method="road", adapter__group_size=8, adapter__variant=v) for v in ("road_1", "road_2"))
    part = Pack.build(model, [first], 2).part
    decays = {own.name: own.parameter.decays for own in part.parameters.values()}
    assert decays == {"theta": True, "alpha": False}
    assert static_key(first) != static_key(second)


def test_what_it_cannot_do_is_said() -> None:
    model = tiny.encoder(2)
    with pytest.raises(InputError, match=r"adapter\.group_size: 64 .* 32 outputs of layers\.attn\.k_proj\. Nearest: 32\."):
        resolve(model, tiny.adapter(method="road"))
    with pytest.raises(InputError, match=r"adapter\.group_size: 10 .*Nearest: 8 and 16"):
        resolve(model, tiny.adapter(method="road", group_size=10))
    assert METHODS.get("road", "adapter.method").low_rank(None) is None
