"""C3A against its equation in float64."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax.adapters.inject import inject, site_modules
from lora_jax.adapters.layout import resolve
from lora_jax.adapters.merge import merge, merged_arrays
from lora_jax.errors import InputError
from tests import tiny

INPUTS, OUTPUTS = 24, 36


def site_of(rank: int, dtype: Any = jnp.float32, **options: Any) -> Any:
    net = nnx.Sequential(nnx.Linear(INPUTS, OUTPUTS, rngs=nnx.Rngs(0), dtype=dtype))
    (site,) = site_modules(inject(net, tiny.adapter(method="c3a", rank=rank, targets="all-linear", **options), rngs=nnx.Rngs(1))).values()
    return site


@pytest.mark.parametrize("size", [1, 2, 3, 4, 12])
def test_it_computes_what_the_equation_says(size: int) -> None:
    site = site_of(size, init_weights="gaussian")
    assert site.method.count(site.site, size) == INPUTS * OUTPUTS // size == site.circulant.size
    kernel, weight, bias = (np.asarray(v[...], np.float64) for v in (site.circulant, site.base.kernel, site.base.bias))
    c = np.zeros((OUTPUTS, INPUTS))
    for k in range(OUTPUTS):
        for j in range(INPUTS):
            c[k, j] = kernel[k // size * size + (j - k) % size, j // size]
    x = np.random.default_rng(2).standard_normal((5, INPUTS))
    expected = x @ (weight + c.T / INPUTS) + bias
    assert tiny.relative(site(jnp.asarray(x, jnp.float32)), expected) < 1e-5
    merged, _ = merged_arrays(site)
    assert tiny.relative(x @ np.asarray(merged) + bias, expected) < 1e-5


def test_layers_of_unequal_blocks_merge() -> None:
    model, tokens = tiny.encoder(3), np.arange(1, 13, dtype=np.int32).reshape(2, 6)
    options = {"targets": ["q_proj", "up_proj"], "layers": "last:2", "rank_pattern": {r"1\.attn\.q_proj": 16, r"2\.mlp\.up_proj": 4}}
    adapted = inject(model, tiny.adapter(method="c3a", rank=8, init_weights="gaussian", **options), rngs=nnx.Rngs(0))
    outputs = tiny.outputs(adapted, tokens)
    assert tiny.relative(outputs, tiny.outputs(model, tokens)) > 1e-2
    assert tiny.relative(tiny.outputs(merge(adapted), tokens), outputs) < 1e-5


@pytest.mark.parametrize(("init", "bound"), [("xavier_uniform", np.sqrt(6 / 60)), ("kaiming_uniform", np.sqrt(1 / 24))])
def test_its_other_starts_are_peft_s(init: str, bound: float) -> None:
    kernel = np.asarray(site_of(4, init_weights=init).circulant[...])
    assert 0.95 * bound < np.abs(kernel).max() <= bound and abs(kernel.mean()) < 0.1 * bound


def test_in_bfloat16_the_transform_is_in_float32() -> None:
    site, x = site_of(12, jnp.bfloat16, init_weights="gaussian"), jnp.ones((2, INPUTS), jnp.bfloat16)
    y = site(x)
    assert y.dtype == jnp.bfloat16
    added = np.asarray(y, np.float64) - np.asarray(site.base(x), np.float64)
    sums = np.asarray(site.circulant[...], np.float64).reshape(3, 12, 2).sum((1, 2)).repeat(12) / INPUTS
    np.testing.assert_allclose(added, np.broadcast_to(sums, added.shape), atol=0.02)


def test_what_it_cannot_do_is_said() -> None:
    model = tiny.encoder(2)
    with pytest.raises(InputError, match=r"adapter\.rank: blocks of 6 .* 32 inputs and 32 outputs of layers\.attn\.q_proj.*4 and 8"):
        resolve(model, tiny.adapter(method="c3a", rank=6, targets=["q_proj"]))
    with pytest.raises(InputError, match=r"adapter\.dropout"):
        resolve(model, tiny.adapter(method="c3a", rank=8, dropout=0.1))
